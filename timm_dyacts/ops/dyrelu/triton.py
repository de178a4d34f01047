"""Dynamic ReLU: two reads and one write forward, four of them and one backward, for all of its modes.

Forward, one pass takes all that the coefficients need from the input (the mean of each plane and, in mode "c", the
logit of each position), the other applies the functions. Backward, one pass forms the gradients of the coefficients
and the part of the gradient of the input that passes through the functions, the other adds what comes back through
the mean and the logits. What lies between the passes is in `hyper`.

Sums over positions are left as one partial sum for each run of tiles and added up afterwards: no atomics, the results
are reproducible. A sum over channels stays within one program, which then goes through all channels of its positions.
"""
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_tiles import (
    Tiling,
    alignment,
    cdiv,
    channels_inner,
    existing,
    launch,
    locate,
    offsets,
    readable,
    strides,
    tiling_of,
)
from . import triton_hyper as hyper
from .settings import DyReLUSettings

__all__ = ['apply', 'apply_backward', 'dynamic_relu', 'dynamic_relu_backward']

# The most tiles that one program goes through before it sums over their positions.
_RUN = 8
# Programs that keep a GPU busy; with fewer, runs are shorter.
_ENOUGH = 1024


@triton.jit
def _load_theta(theta_ptr, theta_strides, n, c, channels, K: tl.constexpr):
    """The K slopes and K intercepts of channels."""
    theta_ptr += n.to(tl.int64) * theta_strides[0] + c * theta_strides[1]
    theta = ()
    for i in tl.static_range(2 * K):
        theta = theta + (tl.load(theta_ptr + i * theta_strides[2], c < channels, 0.0).to(tl.float32)[:, None],)
    return theta


@triton.jit
def _pieces(x, theta, K: tl.constexpr):
    """The largest of the K linear functions, and for each but the first where it is larger than those before it.

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
def _fold(tile, FOLD: tl.constexpr, CHANNELS_INNER: tl.constexpr):
    """Adds up the positions of a tile by groups of `FOLD`, the positions that one thread holds."""
    if CHANNELS_INNER:
        return tl.sum(tl.reshape(tile, [tile.shape[0], FOLD, tile.shape[1] // FOLD]), 1)
    else:
        return tl.sum(tl.reshape(tile, [tile.shape[0], tile.shape[1] // FOLD, FOLD]), 2)


@triton.jit
def _zeros(COUNT: tl.constexpr, BLOCK_C: tl.constexpr, WIDTH: tl.constexpr):
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros([BLOCK_C, WIDTH], tl.float32),)
    return sums


@triton.jit
def _add_theta(sums, g, x, wins, K: tl.constexpr, FOLD: tl.constexpr, CHANNELS_INNER: tl.constexpr):
    """Adds the gradients of the slopes and intercepts of a tile."""
    slopes = ()
    intercepts = ()
    # From the last piece to the first: what one has won is no longer there for those before it.
    for i in tl.static_range(1, K + 1):
        won = g
        if i < K:
            won = tl.where(wins[K - 1 - i], g, 0.0)
            g = tl.where(wins[K - 1 - i], 0.0, g)
        slopes = (sums[K - i] + _fold(won * x, FOLD, CHANNELS_INNER),) + slopes
        intercepts = (sums[2 * K - i] + _fold(won, FOLD, CHANNELS_INNER),) + intercepts
    return slopes + intercepts


@triton.jit
def _slope(theta, wins, K: tl.constexpr):
    """The slope of the largest piece."""
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
        # Where a partial sum lies does not matter, as long as each run has its own place.
        row = n.to(tl.int64) * blocks[1] + tl.program_id(0) % blocks[1]
        tl.store(dweight_ptr + row * size[0] + c, tl.sum(dweight, 1), c < size[0])


def _tiling(x: Tensor) -> Tiling:
    """Tiles of few enough channels for each thread to load the coefficients of its own: no way over shared memory."""
    return tiling_of(x, channels=64)


class _Runs(NamedTuple):
    """How many tiles one program goes through, along the channels and along the positions."""

    tiling: Tiling
    steps: tuple[int, int]

    @classmethod
    def of(cls, x: Tensor, over_channels: bool) -> '_Runs':
        if over_channels:
            # Rather many positions than many channels: each run leaves a sum for each channel.
            tiling = tiling_of(x, positions=2048 if channels_inner(x) else 256, channels=32)
            return cls(tiling, (tiling.blocks[0], 1))
        tiling = _tiling(x)
        return cls(tiling, (1, max(1, min(_RUN, tiling.blocks[1], tiling.programs // _ENOUGH))))

    @property
    def blocks(self) -> tuple[int, int]:
        return tuple(cdiv(blocks, steps) for blocks, steps in zip(self.tiling.blocks, self.steps, strict=True))

    @property
    def programs(self) -> int:
        return self.tiling.batch * math.prod(self.blocks)

    @property
    def constants(self) -> tuple[bool, int, int, int, int]:
        tiling = self.tiling
        return tiling.channels_inner, tiling.block_c, tiling.block_p, *self.steps

    def fold(self, align: int, element_size: int, warps: int = 4) -> int:
        """How many positions of a tile each of its threads holds, in vectors of up to 16 bytes.

        Where those are added up at once, what is kept from tile to tile takes that many times less registers.
        """
        tiling = self.tiling
        vector = min(align, 16 // element_size)
        if tiling.channels_inner:
            return min(max(1, tiling.block_c * tiling.block_p // (32 * warps * vector)), tiling.block_p)
        return min(vector, tiling.block_p)

    def partial_sums(self, x: Tensor, *shape: int) -> Tensor:
        """Room for one partial sum per run: (N, runs, C, *shape)."""
        shape = (self.tiling.batch, self.blocks[1], self.tiling.channels, *shape)
        return torch.empty(shape, dtype=torch.float32, device=x.device)


def apply(x: Tensor, theta: Tensor, pi: Tensor | None, max_value: float | None) -> Tensor:
    """``pi * min(max_k(a_k * x + b_k), max_value)``; shapes as in `layers.dyrelu`."""
    x = readable(x)
    pi = None if pi is None else readable(pi)
    y = torch.empty_like(x)
    tiling = _tiling(x)
    launch(
        _apply_kernel, tiling.programs,
        x, theta, pi, y, tiling.size, tiling.blocks,
        strides(x), _theta_strides(theta), None if pi is None else strides(pi), strides(y), max_value,
        theta.shape[2] // 2, alignment(tiling, x, y), tiling.channels_inner, tiling.block_c, tiling.block_p,
    )
    return y


def apply_backward(
        dy: Tensor,
        x: Tensor,
        theta: Tensor,
        pi: Tensor | None,
        max_value: float | None,
) -> tuple[Tensor, Tensor, Tensor | None, None]:
    """Gradients of `x`, `theta` and `pi`."""
    dx, dtheta, dpi = _apply_backward(dy, x, theta, pi, max_value)
    dtheta = dtheta.sum(1).sum_to_size(theta.shape).to(theta.dtype)
    return dx, dtheta, None if pi is None else dpi.to(pi.dtype), None


def _apply_backward(
        dy: Tensor,
        x: Tensor,
        theta: Tensor,
        pi: Tensor | None,
        max_value: float | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `apply_backward`, but of `theta` partial sums, (N, runs, C, 2K), and the smaller gradients in fp32."""
    dy, x = readable(dy), readable(x)
    pi = None if pi is None else readable(pi)
    dx = torch.empty_like(x)
    runs = _Runs.of(x, over_channels=pi is not None)
    dtheta = runs.partial_sums(x, theta.shape[2])
    dpi = None if pi is None else torch.empty(pi.shape, dtype=torch.float32, device=x.device)
    align = alignment(runs.tiling, dy, x, dx)
    launch(
        _apply_backward_kernel, runs.programs,
        dy, x, theta, pi, dx, dtheta, dpi, runs.tiling.size, runs.blocks,
        strides(dy), strides(x), _theta_strides(theta), None if pi is None else strides(pi), strides(dx),
        max_value, theta.shape[2] // 2, align, *runs.constants, runs.fold(align, x.element_size()),
    )
    return dx, dtheta, dpi


def _statistics(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Summands of the mean of each plane, (N, runs, C); with a `weight` of C elements its product with x, (N, 1, *)."""
    runs = _Runs.of(x, over_channels=weight is not None)
    means = runs.partial_sums(x)
    logits = None
    if weight is not None:
        logits = torch.empty((x.shape[0], 1, *x.shape[2:]), dtype=torch.float32, device=x.device)
    launch(
        _statistics_kernel, runs.programs,
        x, None if weight is None else weight.contiguous(), means, logits, runs.tiling.size, runs.blocks, strides(x),
        alignment(runs.tiling, x), *runs.constants,
    )
    return means, logits


def _add_statistics_backward(
        dx: Tensor,
        dmean: Tensor,
        dlogits: Tensor | None,
        x: Tensor,
        weight: Tensor | None,
) -> Tensor | None:
    """Adds to `dx` what comes back through the statistics. Returns the gradient of `weight`."""
    x = readable(x)
    # Partial sums only for the weight.
    runs = _Runs.of(x, over_channels=False) if weight is not None else _Runs(_tiling(x), (1, 1))
    dweight = None if weight is None else runs.partial_sums(x)
    launch(
        _statistics_backward_kernel, runs.programs,
        dx, dmean, dlogits, x, None if weight is None else weight.contiguous(), dweight, runs.tiling.size, runs.blocks,
        strides(dx), strides(x), alignment(runs.tiling, dx, x), *runs.constants,
    )
    return None if weight is None else dweight.sum((0, 1)).reshape(weight.shape).to(weight.dtype)


class _Found(NamedTuple):
    """What the forward pass keeps for the backward pass beside its arguments."""

    theta: Tensor
    mean: Tensor
    hidden: Tensor
    residual: Tensor
    pi: Tensor | None
    share: Tensor | None


def dynamic_relu(
        x: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor,
        spatial_weight: Tensor | None,
        spatial_bias: Tensor | None,
        settings: DyReLUSettings,
) -> tuple[Tensor, ...]:
    """The whole of a module. Returns the output, then the fields of `_Found`."""
    x = readable(x)
    parts, logits = _statistics(x, spatial_weight)
    theta, *inner = hyper.coefficients(parts, fc1_weight, fc1_bias, fc2_weight, fc2_bias, settings)
    pi = share = None
    if logits is not None:
        pi, share = hyper.attention(logits, spatial_bias, settings)
    return apply(x, theta, pi, settings.max_value), *_Found(theta, *inner, pi, share)


def dynamic_relu_backward(
        dy: Tensor,
        x: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor,
        spatial_weight: Tensor | None,
        spatial_bias: Tensor | None,
        settings: DyReLUSettings,
        found: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """A gradient or None for each argument but the last."""
    found = _Found(*found)
    dx, dtheta, dpi = _apply_backward(dy, x, found.theta, found.pi, settings.max_value)
    dlogits = dspatial_bias = None
    if dpi is not None:
        dlogits = hyper.attention_backward(dpi, found.share, settings)
        dspatial_bias = torch.zeros_like(spatial_bias)  # softmax does not see it
    dmean, *dparams = hyper.coefficients_backward(
        dtheta, found.mean, found.hidden, found.residual, fc1_weight, fc1_bias, fc2_weight, fc2_bias, settings)
    dspatial_weight = _add_statistics_backward(dx, dmean, dlogits, x, spatial_weight)
    return dx, *dparams, dspatial_weight, dspatial_bias, None


def _theta_strides(theta: Tensor) -> tuple[int, int, int]:
    """Strides that give all channels the same coefficients where they share them."""
    return theta.stride(0), theta.stride(1) if theta.shape[1] > 1 else 0, theta.stride(2)
