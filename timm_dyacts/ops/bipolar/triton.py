"""Bipolar activations and max pooling on GPUs: one read, one write.

ReLU keeps its output for the backward pass, whose mask ``y != 0`` does not depend on the sign of the channel. Max
pooling keeps one byte per window, the number of the element that has won: its backward pass reads neither the input nor
64-bit indices.
"""
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pooling.layout import empty_planes, layout_of, patches_held, unroll, without_dims
from ..pooling.triton_elements import (
    as_pairs,
    candidate_window,
    lane_offsets,
    lanes_exist,
    locate_lanes,
    patch_zeros,
    plane_offsets,
    sharing_window,
    split_pair,
    store_patches,
    window_element,
)
from ..pooling.window import Window, five_dims, size_of
from ..tiling import Space, Tiling, alignment, planned, readable, strides, tiling_of
from ..triton_tiles import Launch, existing, expm1, launch, locate, offsets

__all__ = ['activation', 'activation_backward', 'brelu', 'brelu_backward', 'max_pool', 'max_pool_backward']

# The scale and alpha of SELU
_SELU = (1.0507009873554804934193349852946, 1.6732632423543772848170429916717)


@triton.jit
def _mirrored(c, channels, HALVES: tl.constexpr):
    """Whether channels have the sign -1."""
    if HALVES:
        return c >= (channels + 1) // 2
    else:
        return c % 2 == 1


@triton.jit
def _plain(u, slope, scale, parameter, KIND: tl.constexpr):
    """Compute the plain activation. Comparisons are written so that NaN falls through."""
    if KIND == 'relu':
        y = tl.where(u <= 0, 0.0, u)
        return tl.where(y > parameter, parameter, y)
    elif KIND == 'elu' or KIND == 'selu':
        return scale * tl.where(u <= 0, parameter * expm1(u), u)
    else:
        tl.static_assert(KIND == 'leaky_relu' or KIND == 'prelu')
        return tl.where(u > 0, u, u * slope)


@triton.jit
def _plain_gradient(dy, u, slope, scale, parameter, KIND: tl.constexpr):
    """Compute the gradient of ``u``, of which ReLU gets its output, with either sign."""
    if KIND == 'relu':
        return tl.where((u == 0) | ((tl.abs(u) >= parameter) & (parameter < float('inf'))), 0.0, dy)
    elif KIND == 'elu' or KIND == 'selu':
        return dy * scale * tl.where(u <= 0, parameter * tl.exp(u), 1.0)
    else:
        tl.static_assert(KIND == 'leaky_relu' or KIND == 'prelu')
        return tl.where(u > 0, dy, dy * slope)


@triton.jit
def _slope(weight_ptr, weight_stride, parameter, c, channels):
    """Give the slope of the negative part: that of the channel if there are weights, else the parameter."""
    if weight_ptr is None:
        return parameter
    else:
        return tl.load(weight_ptr + c * weight_stride, c < channels, 0.0).to(tl.float32)[:, None]


@triton.jit
def _activation_kernel(
        x_ptr, y_ptr, weight_ptr, size, blocks, x_strides, y_strides, weight_stride, scale, parameter,
        KIND: tl.constexpr, HALVES: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_INNER: tl.constexpr,
        BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):
    """Write the output."""
    n, c, p = locate(blocks, BLOCK_C, BLOCK_P)
    mask = existing(c, p, size, ALIGN, CHANNELS_INNER)
    mirrored = _mirrored(c, size[0], HALVES)[:, None]
    x = tl.load(x_ptr + offsets(n, c, p, x_strides, ALIGN, CHANNELS_INNER), mask, 0.0)
    u = x.to(tl.float32)
    slope = _slope(weight_ptr, weight_stride, parameter, c, size[0])
    y = _plain(tl.where(mirrored, -u, u), slope, scale, parameter, KIND)
    y = tl.where(mirrored, -y, y).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offsets(n, c, p, y_strides, ALIGN, CHANNELS_INNER), y, mask)


@triton.jit
def _activation_backward_kernel(
        dy_ptr, saved_ptr, dx_ptr, weight_ptr, dweight_ptr, size, blocks, dy_strides, saved_strides, dx_strides,
        weight_stride, scale, parameter,
        KIND: tl.constexpr, HALVES: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_INNER: tl.constexpr,
        BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):
    """Write the gradient of the input, and for weights the sums of this program's tile."""
    n, c, p = locate(blocks, BLOCK_C, BLOCK_P)
    mask = existing(c, p, size, ALIGN, CHANNELS_INNER)
    dy = tl.load(dy_ptr + offsets(n, c, p, dy_strides, ALIGN, CHANNELS_INNER), mask, 0.0).to(tl.float32)
    saved = tl.load(saved_ptr + offsets(n, c, p, saved_strides, ALIGN, CHANNELS_INNER), mask, 0.0).to(tl.float32)
    # The mask of ReLU is the same for both signs.
    u = saved if KIND == 'relu' else tl.where(_mirrored(c, size[0], HALVES)[:, None], -saved, saved)
    slope = _slope(weight_ptr, weight_stride, parameter, c, size[0])
    dx = _plain_gradient(dy, u, slope, scale, parameter, KIND)
    if weight_ptr is not None:
        # The two signs of the channel cancel: s * dy * (s * x).
        dweight = tl.sum(tl.where(u > 0, 0.0, dy * saved), 1)
        row = n.to(tl.int64) * blocks[1] + tl.program_id(0) % blocks[1]
        tl.store(dweight_ptr + row * size[0] + c, dweight, c < size[0])
    tl.store(dx_ptr + offsets(n, c, p, dx_strides, ALIGN, CHANNELS_INNER), dx.to(dx_ptr.dtype.element_ty), mask)


class _Elementwise(NamedTuple):
    """What is planned of a pass over an activation.

    Attributes:
        result: The output, or the gradient of the input.
        sums: Summands of the gradient of the weights, if there are any: a row for each block of positions. Without
            atomics, results are reproducible.
        run: The pass.
    """
    result: Space
    sums: Space | None
    run: Launch


@planned
def _plan_activation(
        x: Tensor, weight: Tensor | None, kind: str, parameter: float, layout: str, inplace: bool,
) -> _Elementwise:
    y = x if inplace else torch.empty_like(x, device='meta')
    tiling = tiling_of(x)
    run = Launch(
        _activation_kernel, tiling.programs,
        x_strides=strides(x),
        y_strides=strides(y),
        ALIGN=alignment(tiling, x, y),
        **_arguments(tiling, weight, kind, parameter, layout),
    )
    return _Elementwise(Space.of(y), None, run)


@planned
def _plan_activation_backward(
        dy: Tensor, saved: Tensor, weight: Tensor | None, kind: str, parameter: float, layout: str,
) -> _Elementwise:
    dx = torch.empty_like(saved, device='meta')
    tiling = tiling_of(saved)
    run = Launch(
        _activation_backward_kernel, tiling.programs,
        dy_strides=strides(dy),
        saved_strides=strides(saved),
        dx_strides=strides(dx),
        ALIGN=alignment(tiling, dy, saved, dx),
        **_arguments(tiling, weight, kind, parameter, layout),
    )
    sums = None if weight is None else Space.fp32(tiling.batch, tiling.blocks[1], tiling.channels)
    return _Elementwise(Space.of(dx), sums, run)


def _arguments(tiling: Tiling, weight: Tensor | None, kind: str, parameter: float, layout: str) -> dict[str, Any]:
    """Give the arguments that both kernels take."""
    scale, parameter = _SELU if kind == 'selu' else (1.0, parameter)
    return dict(
        size=tiling.size,
        blocks=tiling.blocks,
        weight_stride=0 if weight is None or weight.numel() == 1 else weight.stride(0),
        scale=scale,
        parameter=parameter,
        KIND=kind,
        HALVES=layout == 'halves',
        **tiling.constants,
    )


def activation(x: Tensor, weight: Tensor | None, kind: str, parameter: float, layout: str, inplace: bool) -> Tensor:
    """Compute the bipolar form of an activation; arguments as of ``activation_reference``."""
    source = readable(x)
    inplace_here = inplace and source is x
    plan = _plan_activation(source, weight, kind, parameter, layout, inplace_here)
    y = x if inplace_here else plan.result.allocate(x)
    launch(plan.run, source, y, weight)
    return x.copy_(y) if inplace and y is not x else y


def activation_backward(
        dy: Tensor,
        saved: Tensor,
        weight: Tensor | None,
        kind: str,
        parameter: float,
        layout: str,
        inplace: bool,
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of the input and of ``weight``.

    ``saved`` is the output of ``'relu'`` and the input of the other kinds; other arguments as of ``activation``.
    """
    dy, saved = readable(dy), readable(saved)
    plan = _plan_activation_backward(dy, saved, weight, kind, parameter, layout)
    dx = plan.result.allocate(saved)
    sums = None if weight is None else plan.sums.allocate(saved)
    launch(plan.run, dy, saved, dx, weight, sums)
    dweight = None if weight is None else sums.sum((0, 1)).sum_to_size(weight.shape).to(weight.dtype)
    return dx, dweight, None, None, None, None


# On CPUs, ReLU is the only member with kernels of its own.
brelu = activation
brelu_backward = activation_backward


@triton.jit
def _compete(best, winner, value, e, valid, mirrored):
    """Let element number ``e`` of each window compete with the best one so far."""
    value = value.to(tl.float32)
    value = tl.where(mirrored, -value, value)
    # As in PyTorch, the first of equal elements wins, and NaN wins over everything.
    wins = valid & ((value > best) | (value != value) | (winner < 0))
    return tl.where(wins, value, best), tl.where(wins, e, winner)


@triton.jit
def _max_pool_kernel(
        x_ptr, y_ptr, winner_ptr, channels, size, out_size, blocks, x_strides, y_strides,
        HALVES: tl.constexpr, WINDOW: tl.constexpr, UNITS: tl.constexpr, PACKED: tl.constexpr, UNROLL: tl.constexpr,
        BLOCK: tl.constexpr,
):
    """Write the output, and which element of each window has won. A lane is a window."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    n, row, c, w = locate_lanes(blocks, BLOCK)
    mask = lanes_exist(row, c, w, channels, out_size, UNITS)
    mirrored = _mirrored(c, channels, HALVES)[None, :, None]
    x_ptr = (as_pairs(x_ptr) if PACKED else x_ptr) + plane_offsets(n, c, x_strides, UNITS)
    best = tl.full(BLOCK, float('-inf'), tl.float32)
    winner = tl.full(BLOCK, -1, tl.int32)
    for e in tl.range(0, WINDOW[0][0] * WINDOW[0][1] * WINDOW[0][2], loop_unroll_factor=UNROLL):
        at, inside = window_element(e, row, w, size, out_size, x_strides, WINDOW, UNITS)
        valid = mask & inside
        loaded = tl.load(x_ptr + at, valid, 0)
        if PACKED:
            first, second = split_pair(loaded, DTYPE)
            best, winner = _compete(best, winner, first, 2 * e, valid, mirrored)
            best, winner = _compete(best, winner, second, 2 * e + 1, valid, mirrored)
        else:
            best, winner = _compete(best, winner, loaded, e, valid, mirrored)
    at = plane_offsets(n, c, y_strides, UNITS) + lane_offsets(row, w, out_size, y_strides, UNITS)
    tl.store(y_ptr + at, tl.where(mirrored, -best, best).to(y_ptr.dtype.element_ty), mask)
    # Both have been made by `empty_planes`, with the same strides.
    tl.store(winner_ptr + at, winner.to(winner_ptr.dtype.element_ty), mask)


@triton.jit
def _max_pool_backward_kernel(
        dy_ptr, winner_ptr, dx_ptr, channels, lanes, size, out_size, blocks, dx_strides, dy_strides, winner_strides,
        SHARES: tl.constexpr, WINDOW: tl.constexpr, UNITS: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):
    """Write the gradient of the input. A lane is a patch."""
    DTYPE: tl.constexpr = dx_ptr.dtype.element_ty
    n, row, c, w = locate_lanes(blocks, BLOCK)
    mask = lanes_exist(row, c, w, channels, lanes, UNITS)
    dy_ptr += plane_offsets(n, c, dy_strides, UNITS)
    winner_ptr += plane_offsets(n, c, winner_strides, UNITS)
    dx_ptr = (as_pairs(dx_ptr) if PACKED else dx_ptr) + plane_offsets(n, c, dx_strides, UNITS)
    grads = patch_zeros(WINDOW, BLOCK)
    for number in tl.static_range(len(SHARES)):
        at, holds = sharing_window(row, w, lanes, out_size, dy_strides, SHARES, number, UNITS)
        dy = tl.load(dy_ptr + at, mask & holds, 0.0).to(tl.float32)
        at, holds = sharing_window(row, w, lanes, out_size, winner_strides, SHARES, number, UNITS)
        winner = tl.load(winner_ptr + at, mask & holds, -1)
        summed = ()
        for i in tl.static_range(len(grads)):
            if SHARES[number][6 + i] < 0:
                summed = summed + (grads[i],)
            else:
                summed = summed + (grads[i] + tl.where(winner == SHARES[number][6 + i], dy, 0.0),)
        grads = summed
    store_patches(dx_ptr, grads, row, w, mask, lanes, size, dx_strides, DTYPE, WINDOW, UNITS, PACKED)


@triton.jit
def _large_max_pool_backward_kernel(
        dy_ptr, winner_ptr, dx_ptr, channels, lanes, size, out_size, blocks, dx_strides, dy_strides, winner_strides,
        OVERLAP: tl.constexpr, WINDOW: tl.constexpr, UNITS: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):
    """Write the same for windows with too many elements to compile code for each. A lane is an element."""
    n, row, c, w = locate_lanes(blocks, BLOCK)
    mask = lanes_exist(row, c, w, channels, lanes, UNITS)
    dy_ptr += plane_offsets(n, c, dy_strides, UNITS)
    winner_ptr += plane_offsets(n, c, winner_strides, UNITS)
    dx = tl.zeros(BLOCK, tl.float32)
    for i in range(OVERLAP[0] * OVERLAP[1] * OVERLAP[2]):
        e, out_row, out_w, holds = candidate_window(i, row, w, size, out_size, WINDOW, OVERLAP)
        holds = mask & holds
        winner = tl.load(winner_ptr + lane_offsets(out_row, out_w, out_size, winner_strides, UNITS), holds, -1)
        dy = tl.load(dy_ptr + lane_offsets(out_row, out_w, out_size, dy_strides, UNITS), holds, 0.0).to(tl.float32)
        dx += tl.where(holds & (winner == e), dy, 0.0)
    at = plane_offsets(n, c, dx_strides, UNITS) + lane_offsets(row, w, size, dx_strides, UNITS)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask)


class _MaxPool(NamedTuple):
    """What is planned of max pooling."""
    y: Space
    winner: Space
    run: Launch


@planned
def _plan_max_pool(x: Tensor, window: Window, ceil_mode: bool, layout: str) -> _MaxPool:
    planes = five_dims(x)
    out_size = window.out_size(size_of(x.shape), ceil_mode)
    y = empty_planes(planes, out_size)
    winner = empty_planes(planes, out_size, torch.int8 if window.elements <= 127 else torch.int32)
    tiles = layout_of(window, (planes,), (y, winner), merge_channels=False)
    run = Launch(
        _max_pool_kernel, tiles.programs,
        x_strides=tiles.strides[0],
        y_strides=tiles.out_strides[0],
        HALVES=layout == 'halves',
        UNROLL=unroll(window.elements),
        **tiles.arguments,
    )
    return _MaxPool(Space.of(without_dims(y, x.dim())), Space.of(winner), run)


@planned
def _plan_max_pool_backward(dy: Tensor, winner: Tensor, size: tuple[int, ...], window: Window) -> tuple[Space, Launch]:
    dy_planes = five_dims(dy)
    dx = empty_planes(winner, size_of((*dy.shape[:2], *size)), dy.dtype)
    held = patches_held(window)
    tiles = layout_of(window, (dx,), (dy_planes, winner), 'patches' if held else 'elements')
    windows = dict(SHARES=tiles.shares) if held else dict(OVERLAP=tiles.overlap)
    run = Launch(
        _max_pool_backward_kernel if held else _large_max_pool_backward_kernel, tiles.programs,
        lanes=tiles.lanes,
        dx_strides=tiles.strides[0],
        dy_strides=tiles.out_strides[0],
        winner_strides=tiles.out_strides[1],
        **windows,
        **tiles.arguments,
    )
    return Space.of(without_dims(dx, dy.dim())), run


def max_pool(x: Tensor, window: Window, ceil_mode: bool, layout: str) -> tuple[Tensor, Tensor]:
    """Compute bipolar max pooling of (N, C, *spatial), and which element of each window has won, (N, C, D, H, W)."""
    plan = _plan_max_pool(x, window, ceil_mode, layout)
    y, winner = plan.y.allocate(x), plan.winner.allocate(x)
    launch(plan.run, x, y, winner)
    return y, winner


def max_pool_backward(dy: Tensor, winner: Tensor, size: tuple[int, ...], window: Window) -> Tensor:
    """Compute the gradient of the input, whose spatial dimensions are ``size``."""
    space, run = _plan_max_pool_backward(dy, winner, size, window)
    dx = space.allocate(dy)
    launch(run, dy, winner, dx)
    return dx
