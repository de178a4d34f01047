"""SoftPool: the weights live in registers only.

Forward: one read of the input, one write of the output. Backward: where windows do not overlap, each program has all
that its gradients need: it reads the input and the gradient of the output and writes that of the input. Where they
do, a first pass leaves two numbers for each window, from which the second gathers the gradient of each element: no
atomics, the result is reproducible.

Two passes move more bytes than one that forms anew, for each element, all windows that hold it: of 3x3/2 in 16 bits,
10.5 for each element instead of 4.5, in 32 bits 17 instead of 9. But that one pass would take, for every four elements,
the exponentials of nine elements of four windows: 9 for each instead of 5, and more than 100 instructions instead of
85. An H200 issues about 7 in the time of a byte: nothing would be gained in 16 bits, and little in 32.

Windows of up to 9 elements are held in registers, larger ones read once more from the cache. As in
`layers/softpool.py`, what is summed up are differences from the element with the largest weight, of an x that has been
divided by a power of 2 large enough for no sum to overflow, whatever the finite input.
"""
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pooling.triton_elements import (
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
    shared_window,
    site_offsets,
    site_position,
    split_word,
    steps_held,
    store_positions,
    window_element,
    zeros,
)
from ..pooling.window import Window, five_dims, scale_of, sharpness_of, size_of
from ..triton_tiles import launch

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
                elements = elements + ((first, inside), (second, inside))
            else:
                elements = elements + ((loaded.to(tl.float32), inside),)
    return elements


@triton.jit
def _heavier(top, value, mask, PADDED: tl.constexpr, RISING: tl.constexpr):
    """Of two elements the one with the larger weight."""
    if RISING:
        return tl.maximum(top, tl.where(mask, value, float('-inf')) if PADDED else value)
    else:
        return tl.minimum(top, tl.where(mask, value, float('inf')) if PADDED else value)


@triton.jit
def _reciprocal(total):
    """One over a sum of weights, which lies between 1 and their number: division would see to other ranges too."""
    root = tl.rsqrt(total)
    return root * root


@triton.jit
def _add(total, moment, value, mask, top, sharpness, SCALE: tl.constexpr, PADDED: tl.constexpr):
    distance = value * SCALE - top
    weight = tl.exp2(sharpness * distance)
    if PADDED:
        weight = tl.where(mask, weight, 0.0)
    return total + weight, moment + weight * distance


@triton.jit
def _window_sums(
        x_ptr, elements, row, w, mask, size, out_size, x_strides, sharpness,
        WINDOW: tl.constexpr, UNITS: tl.constexpr, WORDS: tl.constexpr, PADDED: tl.constexpr, HELD: tl.constexpr,
        SCALE: tl.constexpr, RISING: tl.constexpr, BLOCK: tl.constexpr,
):
    """The scaled element with the largest weight, one over the sum of the weights, and the mean distance from it."""
    COUNT: tl.constexpr = WINDOW[0][0] * WINDOW[0][1] * WINDOW[0][2] * (2 if WORDS else 1)
    top = tl.full(BLOCK, float('-inf') if RISING else float('inf'), tl.float32)
    total = tl.zeros(BLOCK, tl.float32)
    moment = tl.zeros(BLOCK, tl.float32)
    if HELD:
        for e in tl.static_range(COUNT):
            top = _heavier(top, elements[e][0], elements[e][1], PADDED, RISING)
        top *= SCALE
        for e in tl.static_range(COUNT):
            total, moment = _add(total, moment, elements[e][0], elements[e][1], top, sharpness, SCALE, PADDED)
    else:
        for e in range(COUNT):
            value, inside = _load(x_ptr, e, row, w, mask, size, out_size, x_strides, WINDOW, UNITS)
            top = _heavier(top, value.to(tl.float32), inside, PADDED, RISING)
        top *= SCALE
        for e in range(COUNT):
            value, inside = _load(x_ptr, e, row, w, mask, size, out_size, x_strides, WINDOW, UNITS)
            total, moment = _add(total, moment, value.to(tl.float32), inside, top, sharpness, SCALE, PADDED)
    share = _reciprocal(total)
    return top, share, moment * share


@triton.jit
def _slope(value, top, mean, sharpness, SCALE: tl.constexpr, DETACH: tl.constexpr):
    """The derivative of the output by an element, ``w * (1 + beta * (x - y))``, times the sum of the weights."""
    distance = value * SCALE - top
    weight = tl.exp2(sharpness * distance)
    if DETACH:
        return weight
    else:
        return weight + sharpness * LN_2 * (weight * (distance - mean))


@triton.jit
def _forward_kernel(
        x_ptr, dy_ptr, y_ptr, channels, size, out_size, blocks, x_strides, y_strides, dy_strides, part, sharpness,
        WINDOW: tl.constexpr, UNITS: tl.constexpr, WORDS: tl.constexpr, PADDED: tl.constexpr, HELD: tl.constexpr,
        SCALE: tl.constexpr, RISING: tl.constexpr, BLOCK: tl.constexpr,
):
    """Writes the output; given its gradient, the two numbers of each window that `_gradient` takes."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    n, row, c, w = locate_sites(blocks, BLOCK)
    mask = existing_sites(row, c, w, channels, out_size, UNITS)
    x_ptr = (as_words(x_ptr) if WORDS else x_ptr) + plane_offsets(n, c, x_strides, UNITS)
    elements = _hold(x_ptr, row, w, mask, size, out_size, x_strides, DTYPE, WINDOW, UNITS, WORDS, HELD)
    top, share, mean = _window_sums(
        x_ptr, elements, row, w, mask, size, out_size, x_strides, sharpness,
        WINDOW, UNITS, WORDS, PADDED, HELD, SCALE, RISING, BLOCK)
    center = top + mean
    y_ptr += plane_offsets(n, c, y_strides, UNITS) + site_offsets(row, w, out_size, y_strides, UNITS)
    if dy_ptr is None:
        tl.store(y_ptr, (center * (1 / SCALE)).to(y_ptr.dtype.element_ty), mask)
    else:
        dy_ptr += plane_offsets(n, c, dy_strides, UNITS) + site_offsets(row, w, out_size, dy_strides, UNITS)
        dy = tl.load(dy_ptr, mask, 0.0).to(tl.float32)
        tl.store(y_ptr, center, mask)
        tl.store(y_ptr + part, dy * share * tl.exp2(sharpness * (center - top)), mask)


@triton.jit
def _disjoint_backward_kernel(
        dy_ptr, x_ptr, dx_ptr, channels, size, out_size, blocks, dy_strides, x_strides, dx_strides, sharpness,
        DETACH: tl.constexpr,
        WINDOW: tl.constexpr, UNITS: tl.constexpr, WORDS: tl.constexpr, PADDED: tl.constexpr, HELD: tl.constexpr,
        SCALE: tl.constexpr, RISING: tl.constexpr, BLOCK: tl.constexpr,
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
        x_ptr, elements, row, w, mask, size, out_size, x_strides, sharpness,
        WINDOW, UNITS, WORDS, PADDED, HELD, SCALE, RISING, BLOCK)
    dy *= share
    COUNT: tl.constexpr = WINDOW[0][0] * WINDOW[0][1] * WINDOW[0][2]
    if HELD:
        for e in tl.static_range(COUNT):
            at, inside = window_element(e, row, w, size, out_size, dx_strides, WINDOW, UNITS)
            if WORDS:
                first = dy * _slope(elements[2 * e][0], top, mean, sharpness, SCALE, DETACH)
                second = dy * _slope(elements[2 * e + 1][0], top, mean, sharpness, SCALE, DETACH)
                tl.store(dx_ptr + at, join_word(first.to(DTYPE), second.to(DTYPE)), mask & inside)
            else:
                dx = dy * _slope(elements[e][0], top, mean, sharpness, SCALE, DETACH)
                tl.store(dx_ptr + at, dx.to(DTYPE), mask & inside)
    else:
        for e in range(COUNT):
            value, inside = _load(x_ptr, e, row, w, mask, size, out_size, x_strides, WINDOW, UNITS)
            dx = dy * _slope(value.to(tl.float32), top, mean, sharpness, SCALE, DETACH)
            at, _ = window_element(e, row, w, size, out_size, dx_strides, WINDOW, UNITS)
            tl.store(dx_ptr + at, dx.to(DTYPE), inside)


@triton.jit
def _gradient(value, center, factor, holds, sharpness, SCALE: tl.constexpr, DETACH: tl.constexpr):
    """What an element gets from a window: ``dy * w * (1 + beta * (x - y))`` where `center` is the scaled y.

    Weights are relative to y here: it is close to the element with the largest weight, so that none overflows.
    """
    distance = tl.where(holds, value * SCALE - center, 0.0)
    weight = tl.exp2(sharpness * distance)
    if DETACH:
        return factor * weight
    else:
        return factor * (weight + sharpness * LN_2 * (weight * distance))


@triton.jit
def _overlapping_backward_kernel(
        x_ptr, sums_ptr, dx_ptr, channels, sites, size, out_size, blocks, x_strides, dx_strides, sums_strides,
        part, sharpness,
        DETACH: tl.constexpr, SHARES: tl.constexpr, WINDOW: tl.constexpr, UNITS: tl.constexpr, WORDS: tl.constexpr,
        SCALE: tl.constexpr, BLOCK: tl.constexpr,
):
    """Gradients of the elements. A site has as many positions as windows step over, which share the sums they need."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    n, row, c, w = locate_sites(blocks, BLOCK)
    mask = existing_sites(row, c, w, channels, sites, UNITS)
    x_ptr = (as_words(x_ptr) if WORDS else x_ptr) + plane_offsets(n, c, x_strides, UNITS)
    dx_ptr = (as_words(dx_ptr) if WORDS else dx_ptr) + plane_offsets(n, c, dx_strides, UNITS)
    sums_ptr += plane_offsets(n, c, sums_strides, UNITS)
    values = ()
    for phase in tl.static_range(WINDOW[1][0] * WINDOW[1][1] * (1 if WORDS else WINDOW[1][2])):
        at, inside = site_position(phase, row, w, sites, size, x_strides, WINDOW, UNITS, WORDS)
        loaded = tl.load(x_ptr + at, mask & inside, 0)
        values = values + (split_word(loaded, DTYPE) if WORDS else (loaded.to(tl.float32),))
    grads = zeros(WINDOW, BLOCK)
    for i in tl.static_range(len(SHARES)):
        at, holds = shared_window(row, w, sites, out_size, sums_strides, SHARES, i, UNITS)
        holds = mask & holds
        center = tl.load(sums_ptr + at, holds, 0.0)
        factor = tl.load(sums_ptr + at + part, holds, 0.0)
        summed = ()
        for phase in tl.static_range(len(values)):
            if SHARES[i][6 + phase] < 0:
                summed = summed + (grads[phase],)
            else:
                grad = _gradient(values[phase], center, factor, holds, sharpness, SCALE, DETACH)
                summed = summed + (grads[phase] + grad,)
        grads = summed
    store_positions(dx_ptr, grads, row, w, mask, sites, size, dx_strides, DTYPE, WINDOW, UNITS, WORDS)


@triton.jit
def _large_backward_kernel(
        x_ptr, sums_ptr, dx_ptr, channels, sites, size, out_size, blocks, x_strides, dx_strides, sums_strides,
        part, sharpness,
        DETACH: tl.constexpr, OVERLAP: tl.constexpr, WINDOW: tl.constexpr, UNITS: tl.constexpr,
        SCALE: tl.constexpr, BLOCK: tl.constexpr,
):
    """The same for windows that are too large for constants: a site is a position."""
    n, row, c, w = locate_sites(blocks, BLOCK)
    mask = existing_sites(row, c, w, channels, size, UNITS)
    sums_ptr += plane_offsets(n, c, sums_strides, UNITS)
    x_ptr += plane_offsets(n, c, x_strides, UNITS) + site_offsets(row, w, size, x_strides, UNITS)
    value = tl.load(x_ptr, mask, 0.0).to(tl.float32)
    dx = tl.zeros(BLOCK, tl.float32)
    for i in range(OVERLAP[0] * OVERLAP[1] * OVERLAP[2]):
        _, out_row, out_w, holds = candidate(i, row, w, size, out_size, WINDOW, OVERLAP)
        holds = mask & holds
        at = sums_ptr + site_offsets(out_row, out_w, out_size, sums_strides, UNITS)
        center, factor = tl.load(at, holds, 0.0), tl.load(at + part, holds, 0.0)
        dx += _gradient(value, center, factor, holds, sharpness, SCALE, DETACH)
    dx_ptr += plane_offsets(n, c, dx_strides, UNITS) + site_offsets(row, w, size, dx_strides, UNITS)
    tl.store(dx_ptr, dx.to(dx_ptr.dtype.element_ty), mask)


def softpool(x: Tensor, window: Window, ceil_mode: bool, beta: float, detach_weights: bool) -> Tensor:
    """SoftPool of (N, C, *spatial)."""
    out_size = window.out_size(size_of(x.shape), ceil_mode)
    y = empty_planes(x, out_size)
    planes = five_dims(x)
    layout = layout_of(window, (planes,), (y,))
    launch(
        _forward_kernel, layout.programs,
        planes, None, y, *_sizes(layout), *layout.strides, *layout.out_strides, None, 0,
        _sharpness(window, beta), *_constants(layout, window, beta),
    )
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
    differentiate = _disjoint_backward if max(window.overlap) == 1 else _overlapping_backward
    dx = differentiate(five_dims(dy), five_dims(x), window, beta, detach_weights)
    return dx.reshape(x.shape), None, None, None, None


def _disjoint_backward(dy: Tensor, x: Tensor, window: Window, beta: float, detach_weights: bool) -> Tensor:
    dx = empty_planes(x, size_of(x.shape))
    if not window.covers(size_of(x.shape), size_of(dy.shape)):
        dx.zero_()
    layout = layout_of(window, (x, dx), (dy,))
    launch(
        _disjoint_backward_kernel, layout.programs,
        dy, x, dx, *_sizes(layout), *layout.out_strides, *layout.strides,
        _sharpness(window, beta), detach_weights, *_constants(layout, window, beta),
    )
    return dx


def _overlapping_backward(dy: Tensor, x: Tensor, window: Window, beta: float, detach_weights: bool) -> Tensor:
    sums = empty_planes(x, size_of(dy.shape), torch.float32, count=2).unflatten(0, (2, x.shape[0]))
    layout = layout_of(window, (x,), (sums[0], dy))
    launch(
        _forward_kernel, layout.programs,
        x, dy, sums, *_sizes(layout), *layout.strides, *layout.out_strides, sums.stride(0),
        _sharpness(window, beta), *_constants(layout, window, beta),
    )
    dx = empty_planes(x, size_of(x.shape))
    held = steps_held(window)
    layout = layout_of(window, (x, dx), (sums[0],), 'steps' if held else 'positions')
    kernel, shared = (
        (_overlapping_backward_kernel, layout.shares) if held else (_large_backward_kernel, layout.overlap))
    launch(
        kernel, layout.programs,
        x, sums, dx, layout.channels, layout.sites, layout.size, layout.out_size, layout.blocks,
        *layout.strides, *layout.out_strides, sums.stride(0), _sharpness(window, beta), detach_weights,
        shared, layout.window, layout.units, *((layout.words,) if held else ()), scale_of(window.elements),
        layout.block,
    )
    return dx


def _sizes(layout: Layout) -> tuple:
    return layout.channels, layout.size, layout.out_size, layout.blocks


def _sharpness(window: Window, beta: float) -> float:
    """The factor of a scaled x in exponents of 2."""
    return sharpness_of(window.elements, beta) / math.log(2)


def _constants(layout: Layout, window: Window, beta: float) -> tuple:
    """Of a kernel: besides the layout, whether registers hold a window, and whether large elements weigh most."""
    count = window.elements
    return (
        layout.window, layout.units, layout.words, layout.padded, count <= MOST_HELD, scale_of(count), beta >= 0,
        layout.block,
    )
