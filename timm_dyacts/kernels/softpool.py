"""SoftPool: the weights live in registers only.

Forward: one read of the input, one write of the output. Backward: where windows do not overlap, each program has all
that its gradients need: it reads the input and the gradient of the output and writes that of the input. Where they
do, a first pass leaves three numbers for each window, from which the second gathers the gradient of each element: no
atomics, the result is reproducible.

Windows of up to 9 elements are held in registers, larger ones read once more from the cache. As in
`layers/softpool.py`, what is summed up are differences from the element with the largest weight, of an x that has been
divided by a power of 2 large enough for no sum to overflow, whatever the finite input.
"""
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sites import (
    MOST_HELD,
    Layout,
    as_words,
    candidate,
    empty_planes,
    existing_sites,
    join_word,
    layout_of,
    locate_sites,
    plane_offsets,
    site_offsets,
    split_word,
    unroll,
    window_element,
)
from .tiles import launch
from .window import Window, five_dims, size_of

__all__ = ['softpool', 'softpool_backward']

LN_2 = tl.constexpr(math.log(2))


@triton.jit
def _load(x_ptr, e, row, w, mask, size, out_size, x_strides, WINDOW: tl.constexpr, UNITS: tl.constexpr):
    """Element number `e` of each window, and where it is one and not padding."""
    at, inside = window_element(e, row, w, size, out_size, x_strides, WINDOW, UNITS)
    mask = mask & inside
    return tl.load(x_ptr + at, mask, 0), mask


@triton.jit
def _hold(
        x_ptr, row, w, mask, size, out_size, x_strides,
        DTYPE: tl.constexpr, WINDOW: tl.constexpr, UNITS: tl.constexpr, WORDS: tl.constexpr, HELD: tl.constexpr,
):
    """All elements of each window, where they are so few that registers can hold them."""
    elements = ()
    if HELD:
        for e in tl.static_range(WINDOW[0][0] * WINDOW[0][1] * WINDOW[0][2]):
            loaded, inside = _load(x_ptr, e, row, w, mask, size, out_size, x_strides, WINDOW, UNITS)
            if WORDS:
                first, second = split_word(loaded, DTYPE)
                elements = elements + ((first.to(tl.float32), inside), (second.to(tl.float32), inside))
            else:
                elements = elements + ((loaded.to(tl.float32), inside),)
    return elements


@triton.jit
def _find_top(top, value, mask, PADDED: tl.constexpr, RISING: tl.constexpr):
    if RISING:
        return tl.maximum(top, tl.where(mask, value, float('-inf')) if PADDED else value)
    else:
        return tl.minimum(top, tl.where(mask, value, float('inf')) if PADDED else value)


@triton.jit
def _add(total, moment, value, mask, top, scale, sharpness, PADDED: tl.constexpr):
    distance = value * scale - top
    weight = tl.exp2(sharpness * distance)
    if PADDED:
        weight = tl.where(mask, weight, 0.0)
    return total + weight, moment + weight * distance


@triton.jit
def _window_sums(
        x_ptr, elements, row, w, mask, size, out_size, x_strides, scale, sharpness,
        WINDOW: tl.constexpr, UNITS: tl.constexpr, WORDS: tl.constexpr, PADDED: tl.constexpr, HELD: tl.constexpr,
        RISING: tl.constexpr, BLOCK: tl.constexpr,
):
    """The scaled element with the largest weight, one over the sum of the weights, and the mean distance from it."""
    COUNT: tl.constexpr = WINDOW[0][0] * WINDOW[0][1] * WINDOW[0][2] * (2 if WORDS else 1)
    top = tl.full(BLOCK, float('-inf') if RISING else float('inf'), tl.float32)
    total = tl.zeros(BLOCK, tl.float32)
    moment = tl.zeros(BLOCK, tl.float32)
    if HELD:
        for e in tl.static_range(COUNT):
            top = _find_top(top, elements[e][0], elements[e][1], PADDED, RISING)
        top *= scale
        for e in tl.static_range(COUNT):
            total, moment = _add(total, moment, elements[e][0], elements[e][1], top, scale, sharpness, PADDED)
    else:
        for e in range(COUNT):
            value, inside = _load(x_ptr, e, row, w, mask, size, out_size, x_strides, WINDOW, UNITS)
            top = _find_top(top, value.to(tl.float32), inside, PADDED, RISING)
        top *= scale
        for e in range(COUNT):
            value, inside = _load(x_ptr, e, row, w, mask, size, out_size, x_strides, WINDOW, UNITS)
            total, moment = _add(total, moment, value.to(tl.float32), inside, top, scale, sharpness, PADDED)
    share = 1 / total
    return top, share, moment * share


@triton.jit
def _slope(value, top, mean, scale, sharpness, DETACH: tl.constexpr):
    """The derivative of the output by an element, ``w * (1 + beta * (x - y))``, times the sum of the weights."""
    distance = value * scale - top
    weight = tl.exp2(sharpness * distance)
    if DETACH:
        return weight
    else:
        return weight + sharpness * LN_2 * (weight * (distance - mean))


@triton.jit
def _forward_kernel(
        x_ptr, y_ptr, sums_ptr, channels, size, out_size, blocks, x_strides, y_strides, part, scale, sharpness,
        WINDOW: tl.constexpr, UNITS: tl.constexpr, WORDS: tl.constexpr, PADDED: tl.constexpr, HELD: tl.constexpr,
        RISING: tl.constexpr, BLOCK: tl.constexpr,
):
    """Writes the output, or what the gradient needs to know of each window."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    n, row, c, w = locate_sites(blocks, BLOCK)
    mask = existing_sites(row, c, w, channels, out_size, UNITS)
    x_ptr = (as_words(x_ptr) if WORDS else x_ptr) + plane_offsets(n, c, x_strides, UNITS)
    elements = _hold(x_ptr, row, w, mask, size, out_size, x_strides, DTYPE, WINDOW, UNITS, WORDS, HELD)
    top, share, mean = _window_sums(
        x_ptr, elements, row, w, mask, size, out_size, x_strides, scale, sharpness,
        WINDOW, UNITS, WORDS, PADDED, HELD, RISING, BLOCK)
    site = plane_offsets(n, c, y_strides, UNITS) + site_offsets(row, w, out_size, y_strides, UNITS)
    if sums_ptr is None:
        tl.store(y_ptr + site, ((top + mean) * (1 / scale)).to(y_ptr.dtype.element_ty), mask)
    else:
        tl.store(sums_ptr + site, top, mask)
        tl.store(sums_ptr + site + part, share, mask)
        tl.store(sums_ptr + site + 2 * part, mean, mask)


@triton.jit
def _disjoint_backward_kernel(
        dy_ptr, x_ptr, dx_ptr, channels, size, out_size, blocks, dy_strides, x_strides, dx_strides, scale, sharpness,
        DETACH: tl.constexpr,
        WINDOW: tl.constexpr, UNITS: tl.constexpr, WORDS: tl.constexpr, PADDED: tl.constexpr, HELD: tl.constexpr,
        RISING: tl.constexpr, BLOCK: tl.constexpr,
):
    """Gradients of the elements of windows that share none."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    n, row, c, w = locate_sites(blocks, BLOCK)
    mask = existing_sites(row, c, w, channels, out_size, UNITS)
    x_ptr = (as_words(x_ptr) if WORDS else x_ptr) + plane_offsets(n, c, x_strides, UNITS)
    dx_ptr = (as_words(dx_ptr) if WORDS else dx_ptr) + plane_offsets(n, c, dx_strides, UNITS)
    dy_ptr += plane_offsets(n, c, dy_strides, UNITS) + site_offsets(row, w, out_size, dy_strides, UNITS)
    dy = tl.load(dy_ptr, mask, 0.0).to(tl.float32)
    elements = _hold(x_ptr, row, w, mask, size, out_size, x_strides, DTYPE, WINDOW, UNITS, WORDS, HELD)
    top, share, mean = _window_sums(
        x_ptr, elements, row, w, mask, size, out_size, x_strides, scale, sharpness,
        WINDOW, UNITS, WORDS, PADDED, HELD, RISING, BLOCK)
    dy *= share
    COUNT: tl.constexpr = WINDOW[0][0] * WINDOW[0][1] * WINDOW[0][2]
    if HELD:
        for e in tl.static_range(COUNT):
            at, inside = window_element(e, row, w, size, out_size, dx_strides, WINDOW, UNITS)
            if WORDS:
                first = dy * _slope(elements[2 * e][0], top, mean, scale, sharpness, DETACH)
                second = dy * _slope(elements[2 * e + 1][0], top, mean, scale, sharpness, DETACH)
                tl.store(dx_ptr + at, join_word(first.to(DTYPE), second.to(DTYPE)), mask & inside)
            else:
                dx = dy * _slope(elements[e][0], top, mean, scale, sharpness, DETACH)
                tl.store(dx_ptr + at, dx.to(DTYPE), mask & inside)
    else:
        for e in range(COUNT):
            value, inside = _load(x_ptr, e, row, w, mask, size, out_size, x_strides, WINDOW, UNITS)
            dx = dy * _slope(value.to(tl.float32), top, mean, scale, sharpness, DETACH)
            at, _ = window_element(e, row, w, size, out_size, dx_strides, WINDOW, UNITS)
            tl.store(dx_ptr + at, dx.to(DTYPE), inside)


@triton.jit
def _overlapping_backward_kernel(
        dy_ptr, x_ptr, sums_ptr, dx_ptr, channels, size, out_size, blocks, dy_strides, x_strides, sums_strides, dx_strides,
        part, scale, sharpness,
        DETACH: tl.constexpr, WINDOW: tl.constexpr, UNITS: tl.constexpr, OVERLAP: tl.constexpr, UNROLL: tl.constexpr,
        BLOCK: tl.constexpr,
):
    """Gradients of the elements, each gathered from all windows that it is in."""
    n, row, c, w = locate_sites(blocks, BLOCK)
    mask = existing_sites(row, c, w, channels, size, UNITS)
    dy_ptr += plane_offsets(n, c, dy_strides, UNITS)
    sums_ptr += plane_offsets(n, c, sums_strides, UNITS)
    x_ptr += plane_offsets(n, c, x_strides, UNITS) + site_offsets(row, w, size, x_strides, UNITS)
    value = tl.load(x_ptr, mask, 0.0).to(tl.float32)
    dx = tl.zeros(BLOCK, tl.float32)
    for i in tl.range(0, OVERLAP[0] * OVERLAP[1] * OVERLAP[2], loop_unroll_factor=UNROLL):
        _, out_row, out_w, holds = candidate(i, row, w, size, out_size, WINDOW, OVERLAP)
        at = sums_ptr + site_offsets(out_row, out_w, out_size, sums_strides, UNITS)
        top = tl.load(at, mask & holds, 0.0)
        share = tl.load(at + part, mask & holds, 0.0)
        mean = tl.load(at + 2 * part, mask & holds, 0.0)
        dy = tl.load(dy_ptr + site_offsets(out_row, out_w, out_size, dy_strides, UNITS), mask & holds, 0.0)
        slope = dy.to(tl.float32) * share * _slope(value, top, mean, scale, sharpness, DETACH)
        dx += tl.where(holds, slope, 0.0)
    dx_ptr += plane_offsets(n, c, dx_strides, UNITS) + site_offsets(row, w, size, dx_strides, UNITS)
    tl.store(dx_ptr, dx.to(dx_ptr.dtype.element_ty), mask)


def softpool(x: Tensor, window: Window, ceil_mode: bool, beta: float, detach_weights: bool) -> Tensor:
    """SoftPool of (N, C, *spatial)."""
    out_size = window.out_size(size_of(x.shape), ceil_mode)
    y = empty_planes(x, out_size)
    _launch_forward(five_dims(x), y, None, window, beta)
    return y.reshape(*x.shape[:2], *out_size[5 - x.dim():])


def softpool_backward(
        dy: Tensor,
        x: Tensor,
        window: Window,
        ceil_mode: bool,
        beta: float,
        detach_weights: bool,
) -> tuple[Tensor, None, None, None, None]:
    """Gradient of the input."""
    grads, planes = five_dims(dy), five_dims(x)
    size, out_size = size_of(x.shape), size_of(dy.shape)
    dx = empty_planes(x, size)
    if max(window.overlap) == 1:
        if not window.covers(size, out_size):
            dx.zero_()
        layout = layout_of(window, (planes, dx), (grads,))
        launch(
            _disjoint_backward_kernel, layout.programs,
            grads, planes, dx, *_sizes(layout), layout.out_strides[0], *layout.strides,
            *_scales(window, beta), detach_weights, *_constants(layout, window, beta),
        )
    else:
        sums = empty_planes(x, out_size, torch.float32, count=3).unflatten(0, (3, x.shape[0]))
        _launch_forward(planes, None, sums, window, beta)
        layout = layout_of(window, (planes, dx), (grads, sums[0]), by_window=False)
        launch(
            _overlapping_backward_kernel, layout.programs,
            grads, planes, sums, dx, *_sizes(layout),
            layout.out_strides[0], layout.strides[0], layout.out_strides[1], layout.strides[1], sums.stride(0),
            *_scales(window, beta), detach_weights, layout.window, layout.units, layout.overlap,
            unroll(math.prod(window.overlap)), layout.block,
        )
    return dx.reshape(x.shape), None, None, None, None


def _launch_forward(planes: Tensor, y: Tensor | None, sums: Tensor | None, window: Window, beta: float) -> None:
    """Writes `y`, or the numbers of each window to `sums`."""
    layout = layout_of(window, (planes,), (y if sums is None else sums[0],))
    launch(
        _forward_kernel, layout.programs,
        planes, y, sums, *_sizes(layout), *layout.strides, *layout.out_strides, 0 if sums is None else sums.stride(0),
        *_scales(window, beta), *_constants(layout, window, beta),
    )


def _sizes(layout: Layout) -> tuple:
    return layout.channels, layout.size, layout.out_size, layout.blocks


def _scales(window: Window, beta: float) -> tuple[float, float]:
    """The factor of x, and that of its products in the exponents of 2. Bounded: infinity times 0 is NaN."""
    scale = 0.5 / triton.next_power_of_2(window.elements)
    return scale, max(-1e38, min(beta / scale / math.log(2), 1e38))


def _constants(layout: Layout, window: Window, beta: float) -> tuple:
    """Of a kernel: besides the layout, whether registers hold a window, and whether large elements weigh most."""
    held = window.elements <= MOST_HELD
    return layout.window, layout.units, layout.words, layout.padded, held, beta >= 0, layout.block
