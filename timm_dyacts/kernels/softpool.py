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
    SiteTiling,
    candidate,
    empty_planes,
    existing_sites,
    locate_sites,
    plane_offsets,
    site_offsets,
    unroll,
    window_element,
)
from .tiles import channels_inner, launch
from .window import Sizes, Window, five_dims, size_of

__all__ = ['softpool', 'softpool_backward']

LN_2 = tl.constexpr(math.log(2))


@triton.jit
def _load(x_ptr, e, row, w, mask, size, out_size, x_strides, scale, WINDOW: tl.constexpr, PADDED: tl.constexpr):
    """Element number `e` of each window, and where it is one and not padding."""
    at, inside = window_element(e, row, w, size, out_size, x_strides, WINDOW)
    if PADDED:
        mask = mask & inside
    return tl.load(x_ptr + at, mask, 0.0).to(tl.float32) * scale, mask


@triton.jit
def _hold(
        x_ptr, row, w, mask, size, out_size, x_strides, scale,
        WINDOW: tl.constexpr, PADDED: tl.constexpr, HELD: tl.constexpr,
):
    """All elements of each window, where they are so few that registers can hold them."""
    elements = ()
    if HELD:
        for e in tl.static_range(WINDOW[0][0] * WINDOW[0][1] * WINDOW[0][2]):
            elements = elements + (_load(x_ptr, e, row, w, mask, size, out_size, x_strides, scale, WINDOW, PADDED),)
    return elements


@triton.jit
def _find_top(top, value, mask, PADDED: tl.constexpr, RISING: tl.constexpr):
    if RISING:
        return tl.maximum(top, tl.where(mask, value, float('-inf')) if PADDED else value)
    else:
        return tl.minimum(top, tl.where(mask, value, float('inf')) if PADDED else value)


@triton.jit
def _add(total, moment, value, mask, top, sharpness, PADDED: tl.constexpr):
    distance = value - top
    weight = tl.exp2(sharpness * distance)
    if PADDED:
        weight = tl.where(mask, weight, 0.0)
    return total + weight, moment + weight * distance


@triton.jit
def _window_sums(
        x_ptr, elements, row, w, mask, size, out_size, x_strides, scale, sharpness,
        WINDOW: tl.constexpr, PADDED: tl.constexpr, HELD: tl.constexpr, RISING: tl.constexpr, BLOCK: tl.constexpr,
):
    """The element with the largest weight, the sum of the weights, and the mean distance of the elements from it."""
    COUNT: tl.constexpr = WINDOW[0][0] * WINDOW[0][1] * WINDOW[0][2]
    top = tl.full(BLOCK, float('-inf') if RISING else float('inf'), tl.float32)
    total = tl.zeros(BLOCK, tl.float32)
    moment = tl.zeros(BLOCK, tl.float32)
    if HELD:
        for e in tl.static_range(COUNT):
            top = _find_top(top, elements[e][0], elements[e][1], PADDED, RISING)
        for e in tl.static_range(COUNT):
            total, moment = _add(total, moment, elements[e][0], elements[e][1], top, sharpness, PADDED)
    else:
        for e in range(COUNT):
            value, inside = _load(x_ptr, e, row, w, mask, size, out_size, x_strides, scale, WINDOW, PADDED)
            top = _find_top(top, value, inside, PADDED, RISING)
        for e in range(COUNT):
            value, inside = _load(x_ptr, e, row, w, mask, size, out_size, x_strides, scale, WINDOW, PADDED)
            total, moment = _add(total, moment, value, inside, top, sharpness, PADDED)
    return top, total, moment / total


@triton.jit
def _slope(value, top, mean, sharpness, DETACH: tl.constexpr):
    """The derivative of the output by an element, ``w * (1 + beta * (x - y))``, times the sum of the weights."""
    distance = value - top
    weight = tl.exp2(sharpness * distance)
    if DETACH:
        return weight
    else:
        return weight + sharpness * LN_2 * (weight * (distance - mean))


@triton.jit
def _forward_kernel(
        x_ptr, y_ptr, sums_ptr, channels, size, out_size, blocks, x_strides, y_strides, sums_strides, part,
        scale, sharpness,
        WINDOW: tl.constexpr, PADDED: tl.constexpr, HELD: tl.constexpr, RISING: tl.constexpr, BLOCK: tl.constexpr,
):
    """Writes the output, or what the gradient needs to know of each window."""
    n, row, c, w = locate_sites(blocks, BLOCK)
    mask = existing_sites(row, c, w, channels, out_size)
    x_ptr += plane_offsets(n, c, x_strides)
    elements = _hold(x_ptr, row, w, mask, size, out_size, x_strides, scale, WINDOW, PADDED, HELD)
    top, total, mean = _window_sums(
        x_ptr, elements, row, w, mask, size, out_size, x_strides, scale, sharpness,
        WINDOW, PADDED, HELD, RISING, BLOCK)
    if sums_ptr is None:
        y_ptr += plane_offsets(n, c, y_strides) + site_offsets(row, w, out_size, y_strides)
        tl.store(y_ptr, ((top + mean) / scale).to(y_ptr.dtype.element_ty), mask)
    else:
        sums_ptr += plane_offsets(n, c, sums_strides) + site_offsets(row, w, out_size, sums_strides)
        tl.store(sums_ptr, top, mask)
        tl.store(sums_ptr + part, total, mask)
        tl.store(sums_ptr + 2 * part, mean, mask)


@triton.jit
def _disjoint_backward_kernel(
        dy_ptr, x_ptr, dx_ptr, channels, size, out_size, blocks, dy_strides, x_strides, dx_strides, scale, sharpness,
        DETACH: tl.constexpr,
        WINDOW: tl.constexpr, PADDED: tl.constexpr, HELD: tl.constexpr, RISING: tl.constexpr, BLOCK: tl.constexpr,
):
    """Gradients of the elements of windows that share none."""
    n, row, c, w = locate_sites(blocks, BLOCK)
    mask = existing_sites(row, c, w, channels, out_size)
    x_ptr += plane_offsets(n, c, x_strides)
    dx_ptr += plane_offsets(n, c, dx_strides)
    dy_ptr += plane_offsets(n, c, dy_strides) + site_offsets(row, w, out_size, dy_strides)
    dy = tl.load(dy_ptr, mask, 0.0).to(tl.float32)
    elements = _hold(x_ptr, row, w, mask, size, out_size, x_strides, scale, WINDOW, PADDED, HELD)
    top, total, mean = _window_sums(
        x_ptr, elements, row, w, mask, size, out_size, x_strides, scale, sharpness,
        WINDOW, PADDED, HELD, RISING, BLOCK)
    dy /= total
    COUNT: tl.constexpr = WINDOW[0][0] * WINDOW[0][1] * WINDOW[0][2]
    if HELD:
        for e in tl.static_range(COUNT):
            dx = dy * _slope(elements[e][0], top, mean, sharpness, DETACH)
            at, _ = window_element(e, row, w, size, out_size, dx_strides, WINDOW)
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), elements[e][1])
    else:
        for e in range(COUNT):
            value, inside = _load(x_ptr, e, row, w, mask, size, out_size, x_strides, scale, WINDOW, PADDED)
            dx = dy * _slope(value, top, mean, sharpness, DETACH)
            at, _ = window_element(e, row, w, size, out_size, dx_strides, WINDOW)
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), inside)


@triton.jit
def _overlapping_backward_kernel(
        dy_ptr, x_ptr, sums_ptr, dx_ptr, channels, size, out_size, blocks, dy_strides, x_strides, sums_strides,
        part, dx_strides, scale, sharpness,
        DETACH: tl.constexpr, WINDOW: tl.constexpr, OVERLAP: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):
    """Gradients of the elements, each gathered from all windows that it is in."""
    n, row, c, w = locate_sites(blocks, BLOCK)
    mask = existing_sites(row, c, w, channels, size)
    dy_ptr += plane_offsets(n, c, dy_strides)
    sums_ptr += plane_offsets(n, c, sums_strides)
    x_ptr += plane_offsets(n, c, x_strides) + site_offsets(row, w, size, x_strides)
    value = tl.load(x_ptr, mask, 0.0).to(tl.float32) * scale
    dx = tl.zeros(BLOCK, tl.float32)
    for i in tl.range(0, OVERLAP[0] * OVERLAP[1] * OVERLAP[2], loop_unroll_factor=UNROLL):
        _, out_row, out_w, holds = candidate(i, row, w, size, out_size, WINDOW, OVERLAP)
        at = sums_ptr + site_offsets(out_row, out_w, out_size, sums_strides)
        top = tl.load(at, mask & holds, 0.0)
        total = tl.load(at + part, mask & holds, 1.0)
        mean = tl.load(at + 2 * part, mask & holds, 0.0)
        dy = tl.load(dy_ptr + site_offsets(out_row, out_w, out_size, dy_strides), mask & holds, 0.0).to(tl.float32)
        dx += tl.where(holds, dy / total * _slope(value, top, mean, sharpness, DETACH), 0.0)
    dx_ptr += plane_offsets(n, c, dx_strides) + site_offsets(row, w, size, dx_strides)
    tl.store(dx_ptr, dx.to(dx_ptr.dtype.element_ty), mask)


def softpool(x: Tensor, window: Window, ceil_mode: bool, beta: float, detach_weights: bool) -> Tensor:
    """SoftPool of (N, C, *spatial)."""
    out_size = window.out_size(size_of(x.shape), ceil_mode)
    y = empty_planes(x, out_size)
    _launch_forward(x, window, beta, out_size, y=y)
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
    sizes = (x.shape[1], size, out_size)
    if max(window.overlap) == 1:
        if not window.covers(size, out_size):
            dx.zero_()
        tiling = SiteTiling.of(*x.shape[:2], out_size, channels_inner(x))
        launch(
            _disjoint_backward_kernel, tiling.programs,
            grads, planes, dx, *sizes, tiling.blocks, grads.stride(), planes.stride(), dx.stride(),
            *_scales(window, beta), detach_weights, *_constants(window, beta, size, out_size), tiling.block,
        )
    else:
        sums = empty_planes(x, out_size, torch.float32, count=3).unflatten(0, (3, x.shape[0]))
        _launch_forward(x, window, beta, out_size, sums=sums)
        tiling = SiteTiling.of(*x.shape[:2], size, channels_inner(x))
        launch(
            _overlapping_backward_kernel, tiling.programs,
            grads, planes, sums, dx, *sizes, tiling.blocks,
            grads.stride(), planes.stride(), sums[0].stride(), sums.stride(0), dx.stride(), *_scales(window, beta),
            detach_weights, tuple(window), window.overlap, unroll(math.prod(window.overlap)), tiling.block,
        )
    return dx.reshape(x.shape), None, None, None, None


def _launch_forward(
        x: Tensor,
        window: Window,
        beta: float,
        out_size: Sizes,
        y: Tensor | None = None,
        sums: Tensor | None = None,
) -> None:
    planes, size = five_dims(x), size_of(x.shape)
    tiling = SiteTiling.of(*x.shape[:2], out_size, channels_inner(x))
    launch(
        _forward_kernel, tiling.programs,
        planes, y, sums, x.shape[1], size, out_size, tiling.blocks, planes.stride(),
        None if y is None else y.stride(), None if sums is None else sums[0].stride(),
        None if sums is None else sums.stride(0), *_scales(window, beta),
        *_constants(window, beta, size, out_size), tiling.block,
    )


def _scales(window: Window, beta: float) -> tuple[float, float]:
    """The factor of x, and that of its products in the exponents of 2. Bounded: infinity times 0 is NaN."""
    scale = 0.5 / triton.next_power_of_2(window.elements)
    return scale, max(-1e38, min(beta / scale / math.log(2), 1e38))


def _constants(window: Window, beta: float, size: Sizes, out_size: Sizes) -> tuple[Window, bool, bool, bool]:
    """The window, whether any has padding in it, whether registers hold it, and whether large elements weigh most."""
    return tuple(window), window.hangs_over(size, out_size), window.elements <= 9, beta >= 0
