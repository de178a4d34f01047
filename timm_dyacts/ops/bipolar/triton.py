"""Bipolar activations and max pooling: one read, one write.

ReLU keeps its output for the backward pass, whose mask ``y != 0`` does not depend on the sign of the channel. Max
pooling keeps one byte per window, which element won: its backward pass reads neither the input nor 64-bit indices.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pooling.triton_elements import (
    as_words,
    candidate,
    empty_planes,
    existing_sites,
    layout_of,
    locate_sites,
    plane_offsets,
    shared_window,
    site_offsets,
    split_word,
    steps_held,
    store_positions,
    unroll,
    window_element,
    zeros,
)
from ..pooling.window import Window, five_dims, size_of
from ..triton_tiles import alignment, existing, expm1, launch, locate, offsets, readable, strides, tiling_of

__all__ = ['activation', 'activation_backward', 'brelu', 'brelu_backward', 'max_pool', 'max_pool_backward']

# The scale and alpha of SELU
_SELU = (1.0507009873554804934193349852946, 1.6732632423543772848170429916717)


@triton.jit
def _mirrored(c, channels, HALVES: tl.constexpr):
    """Which channels have the sign -1."""
    if HALVES:
        return c >= (channels + 1) // 2
    else:
        return c % 2 == 1


@triton.jit
def _slope(weight_ptr, weight_stride, parameter, c, channels):
    """The slope of the negative part: that of the channel if there are weights."""
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
    n, c, p = locate(blocks, BLOCK_C, BLOCK_P)
    mask = existing(c, p, size, ALIGN, CHANNELS_INNER)
    mirrored = _mirrored(c, size[0], HALVES)[:, None]
    x = tl.load(x_ptr + offsets(n, c, p, x_strides, ALIGN, CHANNELS_INNER), mask, 0.0)
    u = x.to(tl.float32)
    u = tl.where(mirrored, -u, u)
    # Comparisons are written so that NaN falls through.
    if KIND == 'relu':
        y = tl.where(u <= 0, 0.0, u)
        y = tl.where(y > parameter, parameter, y)
    elif KIND == 'elu' or KIND == 'selu':
        y = scale * tl.where(u <= 0, parameter * expm1(u), u)
    else:
        y = tl.where(u > 0, u, u * _slope(weight_ptr, weight_stride, parameter, c, size[0]))
    y = tl.where(mirrored, -y, y).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offsets(n, c, p, y_strides, ALIGN, CHANNELS_INNER), y, mask)


@triton.jit
def _activation_backward_kernel(
        dy_ptr, saved_ptr, dx_ptr, weight_ptr, dweight_ptr, size, blocks, dy_strides, saved_strides, dx_strides,
        weight_stride, scale, parameter,
        KIND: tl.constexpr, HALVES: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_INNER: tl.constexpr,
        BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):
    n, c, p = locate(blocks, BLOCK_C, BLOCK_P)
    mask = existing(c, p, size, ALIGN, CHANNELS_INNER)
    dy = tl.load(dy_ptr + offsets(n, c, p, dy_strides, ALIGN, CHANNELS_INNER), mask, 0.0).to(tl.float32)
    saved = tl.load(saved_ptr + offsets(n, c, p, saved_strides, ALIGN, CHANNELS_INNER), mask, 0.0).to(tl.float32)
    if KIND == 'relu':
        dx = tl.where((saved == 0) | ((tl.abs(saved) >= parameter) & (parameter < float('inf'))), 0.0, dy)
    else:
        u = tl.where(_mirrored(c, size[0], HALVES)[:, None], -saved, saved)
        if KIND == 'elu' or KIND == 'selu':
            dx = dy * scale * tl.where(u <= 0, parameter * tl.exp(u), 1.0)
        else:
            dx = tl.where(u > 0, dy, dy * _slope(weight_ptr, weight_stride, parameter, c, size[0]))
            if weight_ptr is not None:
                # The two signs of the channel cancel: s * dy * (s * x).
                dweight = tl.sum(tl.where(u > 0, 0.0, dy * saved), 1)
                row = n.to(tl.int64) * blocks[1] + tl.program_id(0) % blocks[1]
                tl.store(dweight_ptr + row * size[0] + c, dweight, c < size[0])
    tl.store(dx_ptr + offsets(n, c, p, dx_strides, ALIGN, CHANNELS_INNER), dx.to(dx_ptr.dtype.element_ty), mask)


def activation(x: Tensor, weight: Tensor | None, kind: str, parameter: float, layout: str, inplace: bool) -> Tensor:
    """The bipolar form of an activation.

    Args:
        x: Shape (N, C, *spatial).
        weight: Slopes of "prelu", of shape (1,) or (C,).
        kind: "relu" up to `parameter`; "elu" and "leaky_relu" with it; "selu"; or "prelu".
        parameter: A number, see there.
        layout: "interleaved" or "halves".
        inplace: Write the result over `x`.
    """
    source = readable(x)
    y = x if inplace and source is x else torch.empty_like(source)
    tiling = tiling_of(source)
    launch(
        _activation_kernel, tiling.programs,
        source, y, weight, tiling.size, tiling.blocks, strides(source), strides(y), _step(weight),
        *_numbers(kind, parameter), kind, layout == 'halves', alignment(tiling, source, y), tiling.channels_inner,
        tiling.block_c, tiling.block_p,
    )
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
    """Gradients of the input and of `weight`; `saved` is the output of "relu" and the input of the others."""
    dy, saved = readable(dy), readable(saved)
    dx = torch.empty_like(saved)
    tiling = tiling_of(saved)
    # A row for each block of positions, summed up afterwards: no atomics, so that results are reproducible.
    rows = (tiling.batch, tiling.blocks[1], tiling.channels)
    dweight = None if weight is None else torch.empty(rows, dtype=torch.float32, device=saved.device)
    launch(
        _activation_backward_kernel, tiling.programs,
        dy, saved, dx, weight, dweight, tiling.size, tiling.blocks, strides(dy), strides(saved), strides(dx),
        _step(weight), *_numbers(kind, parameter), kind, layout == 'halves', alignment(tiling, dy, saved, dx),
        tiling.channels_inner, tiling.block_c, tiling.block_p,
    )
    if weight is not None:
        dweight = dweight.sum((0, 1)).sum_to_size(weight.shape).to(weight.dtype)
    return dx, dweight, None, None, None, None


# On CPUs, ReLU is the only member with passes of its own.
brelu = activation
brelu_backward = activation_backward


def _numbers(kind: str, parameter: float) -> tuple[float, float]:
    """The factor of the positive part, and the parameter."""
    return _SELU if kind == 'selu' else (1.0, parameter)


def _step(weight: Tensor | None) -> int:
    return 0 if weight is None or weight.numel() == 1 else weight.stride(0)


@triton.jit
def _compete(best, winner, value, e, valid, mirrored):
    """Has element number `e` of each window compete with the best so far."""
    value = value.to(tl.float32)
    value = tl.where(mirrored, -value, value)
    # As in PyTorch, the first of equal elements wins, and NaN wins over everything.
    wins = valid & ((value > best) | (value != value) | (winner < 0))
    return tl.where(wins, value, best), tl.where(wins, e, winner)


@triton.jit
def _max_pool_kernel(
        x_ptr, y_ptr, winner_ptr, channels, size, out_size, blocks, x_strides, y_strides, winner_strides,
        HALVES: tl.constexpr, WINDOW: tl.constexpr, UNITS: tl.constexpr, WORDS: tl.constexpr, UNROLL: tl.constexpr,
        BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    n, row, c, w = locate_sites(blocks, BLOCK)
    mask = existing_sites(row, c, w, channels, out_size, UNITS)
    mirrored = _mirrored(c, channels, HALVES)[None, :, None]
    x_ptr = (as_words(x_ptr) if WORDS else x_ptr) + plane_offsets(n, c, x_strides, UNITS)
    best = tl.full(BLOCK, float('-inf'), tl.float32)
    winner = tl.full(BLOCK, -1, tl.int32)
    for e in tl.range(0, WINDOW[0][0] * WINDOW[0][1] * WINDOW[0][2], loop_unroll_factor=UNROLL):
        at, inside = window_element(e, row, w, size, out_size, x_strides, WINDOW, UNITS)
        valid = mask & inside
        loaded = tl.load(x_ptr + at, valid, 0)
        if WORDS:
            first, second = split_word(loaded, DTYPE)
            best, winner = _compete(best, winner, first, 2 * e, valid, mirrored)
            best, winner = _compete(best, winner, second, 2 * e + 1, valid, mirrored)
        else:
            best, winner = _compete(best, winner, loaded, e, valid, mirrored)
    site = plane_offsets(n, c, y_strides, UNITS) + site_offsets(row, w, out_size, y_strides, UNITS)
    tl.store(y_ptr + site, tl.where(mirrored, -best, best).to(y_ptr.dtype.element_ty), mask)
    tl.store(winner_ptr + site, winner.to(winner_ptr.dtype.element_ty), mask)


@triton.jit
def _max_pool_backward_kernel(
        dy_ptr, winner_ptr, dx_ptr, channels, sites, size, out_size, blocks, dx_strides, dy_strides, winner_strides,
        SHARES: tl.constexpr, WINDOW: tl.constexpr, UNITS: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr,
):
    """A site has as many positions as windows step over, which share the windows that they are in."""
    DTYPE: tl.constexpr = dx_ptr.dtype.element_ty
    n, row, c, w = locate_sites(blocks, BLOCK)
    mask = existing_sites(row, c, w, channels, sites, UNITS)
    dy_ptr += plane_offsets(n, c, dy_strides, UNITS)
    winner_ptr += plane_offsets(n, c, winner_strides, UNITS)
    dx_ptr = (as_words(dx_ptr) if WORDS else dx_ptr) + plane_offsets(n, c, dx_strides, UNITS)
    grads = zeros(WINDOW, BLOCK)
    for i in tl.static_range(len(SHARES)):
        at, holds = shared_window(row, w, sites, out_size, dy_strides, SHARES, i, UNITS)
        dy = tl.load(dy_ptr + at, mask & holds, 0.0).to(tl.float32)
        at, holds = shared_window(row, w, sites, out_size, winner_strides, SHARES, i, UNITS)
        winner = tl.load(winner_ptr + at, mask & holds, -1)
        summed = ()
        for phase in tl.static_range(len(grads)):
            if SHARES[i][6 + phase] < 0:
                summed = summed + (grads[phase],)
            else:
                summed = summed + (grads[phase] + tl.where(winner == SHARES[i][6 + phase], dy, 0.0),)
        grads = summed
    store_positions(dx_ptr, grads, row, w, mask, sites, size, dx_strides, DTYPE, WINDOW, UNITS, WORDS)


@triton.jit
def _large_max_pool_backward_kernel(
        dy_ptr, winner_ptr, dx_ptr, channels, sites, size, out_size, blocks, dx_strides, dy_strides, winner_strides,
        OVERLAP: tl.constexpr, WINDOW: tl.constexpr, UNITS: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr,
):
    """The same for windows that are too large for constants: a site is a position."""
    n, row, c, w = locate_sites(blocks, BLOCK)
    mask = existing_sites(row, c, w, channels, sites, UNITS)
    dy_ptr += plane_offsets(n, c, dy_strides, UNITS)
    winner_ptr += plane_offsets(n, c, winner_strides, UNITS)
    dx = tl.zeros(BLOCK, tl.float32)
    for i in range(OVERLAP[0] * OVERLAP[1] * OVERLAP[2]):
        e, out_row, out_w, holds = candidate(i, row, w, size, out_size, WINDOW, OVERLAP)
        holds = mask & holds
        winner = tl.load(winner_ptr + site_offsets(out_row, out_w, out_size, winner_strides, UNITS), holds, -1)
        dy = tl.load(dy_ptr + site_offsets(out_row, out_w, out_size, dy_strides, UNITS), holds, 0.0).to(tl.float32)
        dx += tl.where(holds & (winner == e), dy, 0.0)
    site = plane_offsets(n, c, dx_strides, UNITS) + site_offsets(row, w, size, dx_strides, UNITS)
    tl.store(dx_ptr + site, dx.to(dx_ptr.dtype.element_ty), mask)


def max_pool(x: Tensor, window: Window, ceil_mode: bool, layout: str) -> tuple[Tensor, Tensor]:
    """Bipolar max pooling of (N, C, *spatial), and which element of each window has won, of shape (N, C, D, H, W)."""
    planes = five_dims(x)
    out_size = window.out_size(size_of(x.shape), ceil_mode)
    y = empty_planes(planes, out_size)
    winner = empty_planes(planes, out_size, torch.int8 if window.elements <= 127 else torch.int32)
    tiles = layout_of(window, (planes,), (y, winner), merge_channels=False)
    launch(
        _max_pool_kernel, tiles.programs,
        planes, y, winner, tiles.channels, tiles.size, tiles.out_size, tiles.blocks, *tiles.strides, *tiles.out_strides,
        layout == 'halves', tiles.window, tiles.units, tiles.words, unroll(window.elements), tiles.block,
    )
    return y.reshape(*x.shape[:2], *out_size[5 - x.dim():]), winner


def max_pool_backward(dy: Tensor, winner: Tensor, size: tuple[int, ...], window: Window) -> Tensor:
    """Gradient of the input, whose spatial dimensions are `size`."""
    grads = five_dims(dy)
    shape = (*dy.shape[:2], *size)
    dx = empty_planes(winner, size_of(shape), dy.dtype)
    held = steps_held(window)
    tiles = layout_of(window, (dx,), (grads, winner), 'steps' if held else 'positions')
    kernel, shared = (
        (_max_pool_backward_kernel, tiles.shares) if held else (_large_max_pool_backward_kernel, tiles.overlap))
    launch(
        kernel, tiles.programs,
        grads, winner, dx, tiles.channels, tiles.sites, tiles.size, tiles.out_size, tiles.blocks,
        *tiles.strides, *tiles.out_strides, shared, tiles.window, tiles.units, tiles.words, tiles.block,
    )
    return dx.reshape(shape)
