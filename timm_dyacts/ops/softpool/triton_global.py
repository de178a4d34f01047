"""SoftPool over whole planes on GPUs: forward one read, backward one read and one write.

Forward, each thread keeps the largest element that it has seen of a channel, the sum of the weights relative to it, and
the sum of the weighted distances from it; with a larger element it moves both sums over. Planes are cut into runs of
tiles where there are few of them, and what the runs leave is then joined by a second, small kernel. The plane's own two
numbers are kept: with them, backward is elementwise.

Inputs are scaled so that no sum of distances overflows, and so that the largest has the largest weight: by a negative
number if ``beta`` is negative.
"""
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiling import Space, Tiling, alignment, cdiv, fold_of, planned, power_of_2, readable, strides, tiling_of
from ..triton_tiles import Launch, existing, grouped, launch, locate, offsets
from .scaling import scale_of, sharpness_of

__all__ = ['global_softpool', 'global_softpool_backward']

LN_2 = tl.constexpr(math.log(2))
# No scaled element is smaller, and the distance of no other from it overflows.
_LOWEST = tl.constexpr(-1.7e38)
# Programs that keep a GPU busy. With fewer, planes are cut into more runs.
_ENOUGH = 1024
# The most runs that a plane is cut into, and the fewest tiles of a run: to join runs costs a launch.
_MOST_RUNS = 64
_FEWEST_TILES = 4


@triton.jit
def _moved_over(total, moment, top, new_top, sharpness):
    """Give both sums relative to a larger element."""
    factor = tl.exp2(sharpness * (top - new_top))
    # Where nothing is left of the weights, the distance may be so large that the moment overflows on its way to 0.
    moment = tl.where(factor == 0, 0.0, factor * (moment + total * (top - new_top)))
    return factor * total, moment


@triton.jit
def _joined(total, moment, top, sharpness):
    """Join the sums of each row."""
    new_top = tl.max(top, 1)
    total, moment = _moved_over(total, moment, top, new_top[:, None], sharpness)
    return tl.sum(total, 1), tl.sum(moment, 1), new_top


@triton.jit
def _store_plane(y_ptr, kept_ptr, n, c, channels, planes, total, moment, top, sharpness, scale):
    """Store the output, and what backward takes: the scaled output, and 1 over the weights relative to it."""
    mean = moment / total
    at = n.to(tl.int64) * channels + c
    tl.store(y_ptr + at, ((top + mean) / scale).to(y_ptr.dtype.element_ty), c < channels)
    tl.store(kept_ptr + at, top + mean, c < channels)
    tl.store(kept_ptr + planes + at, tl.exp2(sharpness * mean) / total, c < channels)


@triton.jit
def _global_kernel(
        x_ptr, y_ptr, kept_ptr, parts_ptr, size, blocks, x_strides, planes, sharpness, scale,
        ALIGN: tl.constexpr, CHANNELS_INNER: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
        STEPS_P: tl.constexpr, FOLD: tl.constexpr,
):
    """Go through a run of tiles. It is the whole of its planes if there are no ``parts``, which its sums go to."""
    n, c, first_p = locate(blocks, BLOCK_C, BLOCK_P, 1, STEPS_P)
    GROUP: tl.constexpr = 1 if CHANNELS_INNER else 2
    top = tl.full([BLOCK_C, BLOCK_P // FOLD], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK_C, BLOCK_P // FOLD], tl.float32)
    moment = tl.zeros([BLOCK_C, BLOCK_P // FOLD], tl.float32)
    for step_p in range(STEPS_P):
        p = first_p + step_p * BLOCK_P
        mask = existing(c, p, size, ALIGN, CHANNELS_INNER)
        x = tl.load(x_ptr + offsets(n, c, p, x_strides, ALIGN, CHANNELS_INNER), mask, 0.0)
        value = grouped(tl.where(mask, x.to(tl.float32) * scale, _LOWEST), FOLD, CHANNELS_INNER)
        new_top = tl.maximum(top, tl.max(value, GROUP))
        total, moment = _moved_over(total, moment, top, new_top, sharpness)
        top = new_top
        distance = value - tl.expand_dims(top, GROUP)
        weight = tl.where(grouped(mask, FOLD, CHANNELS_INNER), tl.exp2(sharpness * distance), 0.0)
        total += tl.sum(weight, GROUP)
        moment += tl.sum(weight * distance, GROUP)
    total, moment, top = _joined(total, moment, top, sharpness)
    if parts_ptr is None:
        _store_plane(y_ptr, kept_ptr, n, c, size[0], planes, total, moment, top, sharpness, scale)
    else:
        at = (n.to(tl.int64) * blocks[1] + tl.program_id(0) % blocks[1]) * 3 * size[0] + c
        tl.store(parts_ptr + at, total, c < size[0])
        tl.store(parts_ptr + at + size[0], moment, c < size[0])
        tl.store(parts_ptr + at + 2 * size[0], top, c < size[0])


@triton.jit
def _global_join_kernel(
        parts_ptr, y_ptr, kept_ptr, runs, channels, blocks, planes, sharpness, scale,
        BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """Join the sums of the runs of each plane."""
    n = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    run = tl.arange(0, BLOCK_R)
    mask = (c < channels)[:, None] & (run < runs)[None, :]
    at = parts_ptr + (n.to(tl.int64) * runs + run[None, :]) * 3 * channels + c[:, None]
    total, moment = tl.load(at, mask, 0.0), tl.load(at + channels, mask, 0.0)
    top = tl.load(at + 2 * channels, mask, _LOWEST)
    total, moment, top = _joined(total, moment, top, sharpness)
    _store_plane(y_ptr, kept_ptr, n, c, channels, planes, total, moment, top, sharpness, scale)


@triton.jit
def _global_backward_kernel(
        dy_ptr, x_ptr, kept_ptr, dx_ptr, size, blocks, dy_strides, x_strides, dx_strides, planes, sharpness, scale,
        DETACH: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_INNER: tl.constexpr,
        BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):
    """Write ``dy * w * (1 + beta * (x - y))``."""
    n, c, p = locate(blocks, BLOCK_C, BLOCK_P)
    mask = existing(c, p, size, ALIGN, CHANNELS_INNER)
    at = n.to(tl.int64) * size[0] + c
    center = tl.load(kept_ptr + at, c < size[0], 0.0)[:, None]
    dy_at = n.to(tl.int64) * dy_strides[0] + c.to(tl.int64) * dy_strides[1]
    dy = tl.load(dy_ptr + dy_at, c < size[0], 0.0).to(tl.float32)
    factor = (dy * tl.load(kept_ptr + planes + at, c < size[0], 0.0))[:, None]
    x = tl.load(x_ptr + offsets(n, c, p, x_strides, ALIGN, CHANNELS_INNER), mask, 0.0)
    distance = x.to(tl.float32) * scale - center
    weight = tl.exp2(sharpness * distance)
    slope = weight if DETACH else weight + sharpness * LN_2 * (weight * distance)
    dx = tl.where(weight == 0, 0.0, factor * slope)
    tl.store(dx_ptr + offsets(n, c, p, dx_strides, ALIGN, CHANNELS_INNER), dx.to(dx_ptr.dtype.element_ty), mask)


class _Forward(NamedTuple):
    """What is planned of the forward pass.

    Attributes:
        y: The output.
        kept: Two numbers of each plane.
        parts: The sums of the runs of each plane, if there are several.
        run: The pass over the input.
        join: The kernel that joins the sums of the runs.
    """
    y: Space
    kept: Space
    parts: Space | None
    run: Launch
    join: Launch | None


@planned
def _plan_forward(x: Tensor, beta: float) -> _Forward:
    n, channels = x.shape[:2]
    tiling = tiling_of(x, channels=64)
    runs = min(_MOST_RUNS, cdiv(tiling.blocks[1], _FEWEST_TILES), cdiv(_ENOUGH, max(1, n * tiling.blocks[0])))
    steps = cdiv(tiling.blocks[1], runs)
    runs = cdiv(tiling.blocks[1], steps)
    scaling, align = _scaling(tiling, beta), alignment(tiling, x)
    run = Launch(
        _global_kernel, n * tiling.blocks[0] * runs,
        size=tiling.size, blocks=(tiling.blocks[0], runs), x_strides=strides(x), planes=n * channels,
        ALIGN=align, STEPS_P=steps, FOLD=fold_of(tiling, align, x.element_size()), **scaling, **tiling.constants,
    )
    parts = join = None
    if runs > 1:
        parts = Space.fp32(n, runs, 3, channels)
        block = min(power_of_2(channels), 64)
        blocks = cdiv(channels, block)
        join = Launch(
            _global_join_kernel, n * blocks,
            runs=runs, channels=channels, blocks=blocks, planes=n * channels,
            BLOCK_C=block, BLOCK_R=power_of_2(runs), **scaling,
        )
    y = torch.empty(n, channels, 1, dtype=x.dtype, device='meta')
    return _Forward(Space.of(y), Space.fp32(2, n, channels), parts, run, join)


@planned
def _plan_backward(dy: Tensor, x: Tensor, beta: float, detach_weights: bool) -> tuple[Space, Launch]:
    dx = torch.empty_like(x, device='meta')
    tiling = tiling_of(x, channels=64)
    run = Launch(
        _global_backward_kernel, tiling.programs,
        size=tiling.size, blocks=tiling.blocks, dy_strides=dy.stride()[:2], x_strides=strides(x),
        dx_strides=strides(dx), planes=dy.shape[0] * dy.shape[1], DETACH=detach_weights,
        ALIGN=alignment(tiling, x, dx), **_scaling(tiling, beta), **tiling.constants,
    )
    return Space.of(dx), run


def global_softpool(x: Tensor, beta: float, detach_weights: bool) -> tuple[Tensor, Tensor]:
    """Compute SoftPool of (N, C, *spatial) over the whole plane: (N, C, 1), and two numbers of each plane."""
    x = readable(x)
    plan = _plan_forward(x, beta)
    y, kept = plan.y.allocate(x), plan.kept.allocate(x)
    parts = None if plan.parts is None else plan.parts.allocate(x)
    launch(plan.run, x, y, kept, parts)
    if parts is not None:
        launch(plan.join, parts, y, kept)
    return y, kept


def global_softpool_backward(
        dy: Tensor,
        x: Tensor,
        beta: float,
        detach_weights: bool,
        saved: tuple[Tensor],
) -> tuple[Tensor, None, None]:
    """Compute the gradient of the input."""
    x = readable(x)
    space, run = _plan_backward(dy, x, beta, detach_weights)
    dx = space.allocate(x)
    launch(run, dy, x, saved[0], dx)
    return dx, None, None


def _scaling(tiling: Tiling, beta: float) -> dict[str, Any]:
    scale, sharpness = scale_of(tiling.positions), sharpness_of(tiling.positions, beta)
    return dict(scale=math.copysign(scale, beta), sharpness=abs(sharpness) / math.log(2))
