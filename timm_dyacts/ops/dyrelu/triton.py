"""The Triton kernels of Dynamic ReLU: two reads and one write forward, four reads and one write backward, in all modes.

Forward, one pass takes all that the coefficients need from the input (the mean of each plane and, in mode "c", the
logit of each position), the other applies the functions. Backward, one pass computes the gradients of the coefficients
and the part of the gradient of the input that passes through the functions, the other adds the part that passes through
the mean and the logits. What lies between the passes is in ``triton_hyper``.

A sum over positions is left as partial sums, one for each run of tiles, which are added up afterwards: without atomics,
results are reproducible. A sum over channels stays within one program, which then goes through all channels of its
positions.
"""
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiling import Space, Tiling, alignment, cdiv, channels_inner, fold_of, planned, readable, strides, tiling_of
from ..triton_tiles import Launch, existing, grouped, launch, locate, offsets
from . import triton_hyper as hyper
from .settings import DyReLUParams, DyReLUSaved, DyReLUSettings

__all__ = ['dynamic_relu', 'dynamic_relu_backward', 'dyrelu', 'dyrelu_backward']

# The most tiles that one program goes through before it sums over their positions.
_RUN = 8
# Programs that keep a GPU busy. With fewer, runs are shorter.
_ENOUGH = 1024


@triton.jit
def _load_theta(theta_ptr, theta_strides, n, c, channels, K: tl.constexpr):
    """Load the K slopes and K intercepts of channels."""
    theta_ptr += n.to(tl.int64) * theta_strides[0] + c * theta_strides[1]
    theta = ()
    for i in tl.static_range(2 * K):
        theta = theta + (tl.load(theta_ptr + i * theta_strides[2], c < channels, 0.0).to(tl.float32)[:, None],)
    return theta


@triton.jit
def _pieces(x, theta, K: tl.constexpr):
    """Compute the largest of the K linear functions, and for each but the first where it exceeds those before it.

    Of those that tie, the last counts as the largest. NaN stays.
    """
    y = theta[0] * x + theta[K]
    wins = ()
    for k in tl.static_range(1, K):
        value = theta[k] * x + theta[K + k]
        wins = wins + (value >= y,)
        y = tl.maximum(y, value, tl.PropagateNan.ALL)
    return y, wins


@triton.jit
def _bounded(y, max_value):
    if max_value is None:
        return y
    else:
        return tl.minimum(y, max_value, tl.PropagateNan.ALL)


@triton.jit
def _apply_kernel(
        x_ptr, theta_ptr, pi_ptr, y_ptr, size, blocks, x_strides, theta_strides, pi_strides, y_strides, max_value,
        K: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_INNER: tl.constexpr,
        BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):
    n, c, p = locate(blocks, BLOCK_C, BLOCK_P, BACKWARDS=True)
    mask = existing(c, p, size, ALIGN, CHANNELS_INNER)
    x = tl.load(x_ptr + offsets(n, c, p, x_strides, ALIGN, CHANNELS_INNER), mask, 0.0).to(tl.float32)
    y, _ = _pieces(x, _load_theta(theta_ptr, theta_strides, n, c, size[0], K), K)
    y = _bounded(y, max_value)
    if pi_ptr is not None:
        pi_ptr += n.to(tl.int64) * pi_strides[0] + p.to(tl.int64) * pi_strides[2]
        y *= tl.load(pi_ptr, p < size[1], 0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offsets(n, c, p, y_strides, ALIGN, CHANNELS_INNER), y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _zeros(COUNT: tl.constexpr, BLOCK_C: tl.constexpr, WIDTH: tl.constexpr):
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros([BLOCK_C, WIDTH], tl.float32),)
    return sums


@triton.jit
def _add_theta(sums, g, x, wins, K: tl.constexpr, FOLD: tl.constexpr, CHANNELS_INNER: tl.constexpr):
    """Add the gradients of the slopes and intercepts of a tile."""
    GROUP: tl.constexpr = 1 if CHANNELS_INNER else 2
    slopes = ()
    intercepts = ()
    # From the last piece to the first: each takes the gradients of the elements where it is the largest, and leaves the
    # rest to those before it.
    for i in tl.static_range(1, K + 1):
        won = g
        if i < K:
            won = tl.where(wins[K - 1 - i], g, 0.0)
            g = tl.where(wins[K - 1 - i], 0.0, g)
        slopes = (sums[K - i] + tl.sum(grouped(won * x, FOLD, CHANNELS_INNER), GROUP),) + slopes
        intercepts = (sums[2 * K - i] + tl.sum(grouped(won, FOLD, CHANNELS_INNER), GROUP),) + intercepts
    return slopes + intercepts


@triton.jit
def _slope(theta, wins, K: tl.constexpr):
    """Pick the slope of the largest piece."""
    slope = theta[0]
    for k in tl.static_range(1, K):
        slope = tl.where(wins[k - 1], theta[k], slope)
    return slope


@triton.jit
def _apply_backward_kernel(
        dy_ptr, x_ptr, theta_ptr, pi_ptr, dx_ptr, dtheta_ptr, dpi_ptr, size, blocks,
        dy_strides, x_strides, theta_strides, pi_strides, dx_strides, max_value,
        K: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_INNER: tl.constexpr, BLOCK_C: tl.constexpr,
        BLOCK_P: tl.constexpr, STEPS_C: tl.constexpr, STEPS_P: tl.constexpr, FOLD: tl.constexpr,
):
    n, first_c, first_p = locate(blocks, BLOCK_C, BLOCK_P, STEPS_C, STEPS_P)
    row = n.to(tl.int64) * blocks[1] + tl.program_id(0) % blocks[1]
    dpi = tl.zeros([BLOCK_P], tl.float32)
    for step_c in range(STEPS_C):
        c = first_c + step_c * BLOCK_C
        theta = _load_theta(theta_ptr, theta_strides, n, c, size[0], K)
        sums = _zeros(2 * K, BLOCK_C, BLOCK_P // FOLD)
        for step_p in range(STEPS_P):
            p = first_p + step_p * BLOCK_P
            mask = existing(c, p, size, ALIGN, CHANNELS_INNER)
            x = tl.load(x_ptr + offsets(n, c, p, x_strides, ALIGN, CHANNELS_INNER), mask, 0.0).to(tl.float32)
            g = tl.load(dy_ptr + offsets(n, c, p, dy_strides, ALIGN, CHANNELS_INNER), mask, 0.0).to(tl.float32)
            y, wins = _pieces(x, theta, K)
            if pi_ptr is not None:
                dpi += tl.sum(tl.where(mask, g * _bounded(y, max_value), 0.0), 0)
                pi_at = n.to(tl.int64) * pi_strides[0] + p.to(tl.int64) * pi_strides[2]
                g *= tl.load(pi_ptr + pi_at, p < size[1], 0.0).to(tl.float32)[None, :]
            if max_value is not None:
                g = tl.where(y >= max_value, 0.0, g)
            sums = _add_theta(sums, g, x, wins, K, FOLD, CHANNELS_INNER)
            dx = (g * _slope(theta, wins, K)).to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + offsets(n, c, p, dx_strides, ALIGN, CHANNELS_INNER), dx, mask)
        for i in tl.static_range(2 * K):
            tl.store(dtheta_ptr + (row * size[0] + c) * (2 * K) + i, tl.sum(sums[i], 1), c < size[0])
    if pi_ptr is not None:
        tl.store(dpi_ptr + n.to(tl.int64) * size[1] + first_p, dpi, first_p < size[1])


@triton.jit
def _statistics_kernel(
        x_ptr, weight_ptr, means_ptr, logits_ptr, size, blocks, x_strides,
        ALIGN: tl.constexpr, CHANNELS_INNER: tl.constexpr,
        BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STEPS_C: tl.constexpr, STEPS_P: tl.constexpr,
):
    n, first_c, first_p = locate(blocks, BLOCK_C, BLOCK_P, STEPS_C, STEPS_P)
    row = n.to(tl.int64) * blocks[1] + tl.program_id(0) % blocks[1]
    logits = tl.zeros([BLOCK_P], tl.float32)
    for step_c in range(STEPS_C):
        c = first_c + step_c * BLOCK_C
        sums = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
        for step_p in range(STEPS_P):
            p = first_p + step_p * BLOCK_P
            mask = existing(c, p, size, ALIGN, CHANNELS_INNER)
            x = tl.load(x_ptr + offsets(n, c, p, x_strides, ALIGN, CHANNELS_INNER), mask, 0.0).to(tl.float32)
            sums += x
            if weight_ptr is not None:
                weight = tl.load(weight_ptr + c, c < size[0], 0.0).to(tl.float32)
                logits += tl.sum(x * weight[:, None], 0)
        tl.store(means_ptr + row * size[0] + c, tl.sum(sums, 1) / size[1], c < size[0])
    if weight_ptr is not None:
        tl.store(logits_ptr + n.to(tl.int64) * size[1] + first_p, logits, first_p < size[1])


@triton.jit
def _statistics_backward_kernel(
        dx_ptr, dmean_ptr, dlogits_ptr, x_ptr, weight_ptr, dweight_ptr, size, blocks, dx_strides, x_strides,
        ALIGN: tl.constexpr, CHANNELS_INNER: tl.constexpr,
        BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STEPS_C: tl.constexpr, STEPS_P: tl.constexpr,
):
    n, c, first_p = locate(blocks, BLOCK_C, BLOCK_P, STEPS_C, STEPS_P, BACKWARDS=True)
    dmean = tl.load(dmean_ptr + n.to(tl.int64) * size[0] + c, c < size[0], 0.0)[:, None] / size[1]
    dweight = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for step_p in range(STEPS_P):
        p = first_p + step_p * BLOCK_P
        mask = existing(c, p, size, ALIGN, CHANNELS_INNER)
        dx_at = dx_ptr + offsets(n, c, p, dx_strides, ALIGN, CHANNELS_INNER)
        dx = tl.load(dx_at, mask, 0.0).to(tl.float32) + dmean
        if weight_ptr is not None:
            dlogits = tl.load(dlogits_ptr + n.to(tl.int64) * size[1] + p, p < size[1], 0.0)[None, :]
            dx += dlogits * tl.load(weight_ptr + c, c < size[0], 0.0).to(tl.float32)[:, None]
            x = tl.load(x_ptr + offsets(n, c, p, x_strides, ALIGN, CHANNELS_INNER), mask, 0.0).to(tl.float32)
            dweight += dlogits * x
        tl.store(dx_at, dx.to(dx_ptr.dtype.element_ty), mask)
    if weight_ptr is not None:
        # Where a partial sum goes does not matter, as long as each run has a place of its own.
        row = n.to(tl.int64) * blocks[1] + tl.program_id(0) % blocks[1]
        tl.store(dweight_ptr + row * size[0] + c, tl.sum(dweight, 1), c < size[0])


def _tiling(x: Tensor, attended: bool = False) -> Tiling:
    """Cut a tensor into tiles of so few channels that threads load their own coefficients, past shared memory.

    Where something is loaded for each position, ``attended``, a tile has several channels that share it.
    """
    return tiling_of(x, positions=256 if attended else 2048, channels=64)


class _Runs(NamedTuple):
    """How many tiles one program goes through, along the channels and along the positions."""
    tiling: Tiling
    steps: tuple[int, int]
    warps: int = 4

    @classmethod
    def of(cls, x: Tensor, over_channels: bool, attended: bool = False) -> '_Runs':
        """Plan the runs of a pass that sums over positions, and over channels too or not."""
        if over_channels:
            # Rather many positions than many channels: each run leaves a sum for each channel.
            for elements, channels, warps in ((4096, 16, 8), (2048, 32, 4)):
                tiling = tiling_of(x, elements, 2048 if channels_inner(x) else 256, channels)
                runs = cls(tiling, (tiling.blocks[0], 1), warps)
                if channels_inner(x) and runs.programs >= _ENOUGH:
                    break
            return runs
        tiling = _tiling(x, attended)
        return cls(tiling, (1, max(1, min(_RUN, tiling.blocks[1], tiling.programs // _ENOUGH))))

    @property
    def blocks(self) -> tuple[int, int]:
        """The numbers of runs along the channels and along the positions of a sample."""
        return tuple(cdiv(blocks, steps) for blocks, steps in zip(self.tiling.blocks, self.steps, strict=True))

    @property
    def programs(self) -> int:
        return self.tiling.batch * math.prod(self.blocks)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that tell a kernel how its runs lie."""
        return dict(
            size=self.tiling.size, blocks=self.blocks, **self.tiling.constants,
            STEPS_C=self.steps[0], STEPS_P=self.steps[1], num_warps=self.warps)

    def partial_sums(self, *shape: int) -> Space:
        """Plan one partial sum per run: (N, runs, C, *shape)."""
        return Space.fp32(self.tiling.batch, self.blocks[1], self.tiling.channels, *shape)


@planned
def _plan_apply(x: Tensor, theta: Tensor, pi: Tensor | None, max_value: float | None) -> tuple[Space, Launch]:
    y = torch.empty_like(x, device='meta')
    tiling = _tiling(x, attended=pi is not None)
    run = Launch(
        _apply_kernel, tiling.programs,
        size=tiling.size, blocks=tiling.blocks, x_strides=strides(x), theta_strides=_theta_strides(theta),
        pi_strides=None if pi is None else strides(pi), y_strides=strides(y), max_value=max_value,
        K=theta.shape[2] // 2, ALIGN=alignment(tiling, x, y), **tiling.constants,
    )
    return Space.of(y), run


def dyrelu(x: Tensor, theta: Tensor, pi: Tensor | None, max_value: float | None) -> Tensor:
    """Compute ``functional.dyrelu``."""
    x = readable(x)
    pi = None if pi is None else readable(pi)
    space, run = _plan_apply(x, theta, pi, max_value)
    y = space.allocate(x)
    launch(run, x, theta, pi, y)
    return y


class _ApplyBackward(NamedTuple):
    """What is planned of the pass that differentiates the functions."""
    dx: Space
    dtheta: Space
    dpi: Space | None
    run: Launch


@planned
def _plan_apply_backward(
        dy: Tensor, x: Tensor, theta: Tensor, pi: Tensor | None, max_value: float | None,
) -> _ApplyBackward:
    dx = torch.empty_like(x, device='meta')
    runs = _Runs.of(x, over_channels=pi is not None)
    align = alignment(runs.tiling, dy, x, dx)
    run = Launch(
        _apply_backward_kernel, runs.programs,
        dy_strides=strides(dy), x_strides=strides(x), theta_strides=_theta_strides(theta),
        pi_strides=None if pi is None else strides(pi), dx_strides=strides(dx), max_value=max_value,
        K=theta.shape[2] // 2, ALIGN=align, FOLD=fold_of(runs.tiling, align, x.element_size(), runs.warps),
        **runs.arguments,
    )
    dpi = None if pi is None else Space.fp32(*pi.shape)
    return _ApplyBackward(Space.of(dx), runs.partial_sums(theta.shape[2]), dpi, run)


def dyrelu_backward(
        dy: Tensor,
        x: Tensor,
        theta: Tensor,
        pi: Tensor | None,
        max_value: float | None,
) -> tuple[Tensor, Tensor, Tensor | None, None]:
    """Compute the gradients of ``x``, ``theta`` and ``pi``."""
    dx, dtheta, dpi = _apply_backward(dy, readable(x), theta, pi, max_value)
    dtheta = dtheta.sum(1).sum_to_size(theta.shape).to(theta.dtype)
    return dx, dtheta, None if pi is None else dpi.to(pi.dtype), None


def _apply_backward(
        dy: Tensor,
        x: Tensor,
        theta: Tensor,
        pi: Tensor | None,
        max_value: float | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Do as ``dyrelu_backward``, but leave the smaller gradients in fp32, that of ``theta`` as (N, runs, C, 2K)."""
    dy = readable(dy)
    pi = None if pi is None else readable(pi)
    plan = _plan_apply_backward(dy, x, theta, pi, max_value)
    dx, dtheta = plan.dx.allocate(x), plan.dtheta.allocate(x)
    dpi = None if pi is None else plan.dpi.allocate(x)
    launch(plan.run, dy, x, theta, pi, dx, dtheta, dpi)
    return dx, dtheta, dpi


class _Statistics(NamedTuple):
    """What is planned of the pass that the coefficients, and the attention, are computed from."""
    means: Space
    logits: Space | None
    run: Launch


@planned
def _plan_statistics(x: Tensor, weight: Tensor | None) -> _Statistics:
    runs = _Runs.of(x, over_channels=weight is not None)
    run = Launch(
        _statistics_kernel, runs.programs, x_strides=strides(x), ALIGN=alignment(runs.tiling, x), **runs.arguments)
    logits = None if weight is None else Space.fp32(x.shape[0], 1, *x.shape[2:])
    return _Statistics(runs.partial_sums(), logits, run)


@planned
def _plan_statistics_backward(dx: Tensor, x: Tensor, weight: Tensor | None) -> tuple[Space | None, Launch]:
    # Only the gradient of the weight is made of partial sums.
    runs = _Runs.of(x, over_channels=False, attended=True) if weight is not None else _Runs(_tiling(x), (1, 1))
    run = Launch(
        _statistics_backward_kernel, runs.programs,
        dx_strides=strides(dx), x_strides=strides(x), ALIGN=alignment(runs.tiling, dx, x), **runs.arguments,
    )
    return None if weight is None else runs.partial_sums(), run


def _statistics(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Compute summands of the means, (N, runs, C), and, given a ``weight``, its product with ``x``, (N, 1, *)."""
    weight = None if weight is None else weight.contiguous()
    plan = _plan_statistics(x, weight)
    means = plan.means.allocate(x)
    logits = None if weight is None else plan.logits.allocate(x)
    launch(plan.run, x, weight, means, logits)
    return means, logits


def _add_statistics_backward(
        dx: Tensor,
        dmean: Tensor,
        dlogits: Tensor | None,
        x: Tensor,
        weight: Tensor | None,
) -> Tensor | None:
    """Add to ``dx`` the gradients that pass through the statistics, and compute the gradient of ``weight``."""
    weight = None if weight is None else weight.contiguous()
    sums, run = _plan_statistics_backward(dx, x, weight)
    dweight = None if weight is None else sums.allocate(x)
    launch(run, dx, dmean, dlogits, x, weight, dweight)
    return None if weight is None else dweight.sum((0, 1)).reshape(weight.shape).to(weight.dtype)


def dynamic_relu(x: Tensor, settings: DyReLUSettings, *params: Tensor | None) -> tuple[Tensor | None, ...]:
    """Compute ``functional.dynamic_relu``. Returns the output, then the fields of ``DyReLUSaved``."""
    params = DyReLUParams(*params)
    x = readable(x)
    parts, logits = _statistics(x, params.spatial_weight)
    theta, *inner = hyper.coefficients(parts, params, settings)
    pi = share = None
    if logits is not None:
        pi, share = hyper.attention(logits, params.spatial_bias, settings)
    return dyrelu(x, theta, pi, settings.max_value), *DyReLUSaved(theta, *inner, pi, share)


def dynamic_relu_backward(
        dy: Tensor,
        x: Tensor,
        settings: DyReLUSettings,
        *params: Tensor | None,
        saved: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of ``x`` and the parameters."""
    params, saved = DyReLUParams(*params), DyReLUSaved(*saved)
    x = readable(x)
    dx, dtheta, dpi = _apply_backward(dy, x, saved.theta, saved.pi, settings.max_value)
    dlogits = dspatial_bias = None
    if dpi is not None:
        dlogits = hyper.attention_backward(dpi, saved.share, settings)
        dspatial_bias = torch.zeros_like(params.spatial_bias)  # softmax does not see it
    dmean, *dparams = hyper.coefficients_backward(
        dtheta, saved.mean, saved.hidden, saved.residual, params, settings)
    dspatial_weight = _add_statistics_backward(dx, dmean, dlogits, x, params.spatial_weight)
    return dx, None, *dparams, dspatial_weight, dspatial_bias


def _theta_strides(theta: Tensor) -> tuple[int, int, int]:
    """Give strides with which all channels read the same coefficients where they share them."""
    return theta.stride(0), theta.stride(1) if theta.shape[1] > 1 else 0, theta.stride(2)
