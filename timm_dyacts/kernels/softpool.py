"""SoftPool: the weights live in registers only.

Forward: one read of the input, one write of the output. Backward: where windows do not overlap, each program has all
that its gradients need: it reads the input and the gradient of the output and writes that of the input. Where they
do, a first pass leaves three numbers for each window, from which the second gathers the gradient of each element: no
atomics, the result is reproducible.

A window is gone through once, as in online softmax, with one exponential per element. As in `layers/softpool.py`, it is
halves of x that are computed with, and differences from the element with the largest weight, so that no finite input
overflows.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import channels_inner, launch
from .windows import (
    SiteTiling,
    Sizes,
    Window,
    candidate,
    empty_planes,
    existing,
    five_dims,
    locate_sites,
    plane_offsets,
    site_offsets,
    size_of,
    window_element,
)

__all__ = ['softpool', 'softpool_backward']


@triton.jit
def _window_sums(
        x_ptr, row, w, mask, size, out_size, x_strides, sharpness,
        WINDOW: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):
    """The element with the largest weight, the sum of the weights, and the mean distance of the elements from it."""
    ELEMENTS: tl.constexpr = WINDOW[0][0] * WINDOW[0][1] * WINDOW[0][2]
    top = tl.zeros(BLOCK, tl.float32)
    total = tl.zeros(BLOCK, tl.float32)
    moment = tl.zeros(BLOCK, tl.float32)
    for e in tl.range(0, ELEMENTS, loop_unroll_factor=UNROLL):
        at, inside = window_element(e, row, w, size, out_size, x_strides, WINDOW)
        value = tl.load(x_ptr + at, mask & inside, 0.0).to(tl.float32) * 0.5
        distance = value - top
        rises = inside & ((total == 0) | (sharpness * distance > 0))
        weight = tl.exp(-tl.abs(sharpness * distance))
        share = weight * distance
        # A new top: what there is so far is seen from further off. The sum of ELEMENTS distances could overflow.
        raised = moment * weight - total / ELEMENTS * share
        moment = tl.where(rises, raised, tl.where(inside, moment + share / ELEMENTS, moment))
        total = tl.where(rises, total * weight + 1, tl.where(inside, total + weight, total))
        top = tl.where(rises, value, top)
    return top, total, moment / (total / ELEMENTS)


@triton.jit
def _slope(value, top, total, mean, sharpness, DETACH: tl.constexpr):
    """The derivative of the output by an element, ``w * (1 + beta * (x - y))``."""
    distance = value - top
    weight = tl.exp(sharpness * distance) / total
    if DETACH:
        return weight
    else:
        return weight + sharpness * (weight * (distance - mean))


@triton.jit
def _forward_kernel(
        x_ptr, y_ptr, sums_ptr, channels, size, out_size, blocks, x_strides, y_strides, sums_strides, part, sharpness,
        WINDOW: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):
    """Writes the output, or what the gradient needs to know of each window."""
    n, row, c, w = locate_sites(blocks, BLOCK)
    mask = existing(row, c, w, channels, out_size)
    x_ptr += plane_offsets(n, c, x_strides)
    top, total, mean = _window_sums(
        x_ptr, row, w, mask, size, out_size, x_strides, sharpness, WINDOW, UNROLL, BLOCK)
    if sums_ptr is None:
        y_ptr += plane_offsets(n, c, y_strides) + site_offsets(row, w, out_size, y_strides)
        tl.store(y_ptr, (2 * (top + mean)).to(y_ptr.dtype.element_ty), mask)
    else:
        sums_ptr += plane_offsets(n, c, sums_strides) + site_offsets(row, w, out_size, sums_strides)
        tl.store(sums_ptr, top, mask)
        tl.store(sums_ptr + part, total, mask)
        tl.store(sums_ptr + 2 * part, mean, mask)


@triton.jit
def _disjoint_backward_kernel(
        dy_ptr, x_ptr, dx_ptr, channels, size, out_size, blocks, dy_strides, x_strides, dx_strides, sharpness,
        DETACH: tl.constexpr, WINDOW: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):
    """Gradients of the elements of windows that share none."""
    n, row, c, w = locate_sites(blocks, BLOCK)
    mask = existing(row, c, w, channels, out_size)
    x_ptr += plane_offsets(n, c, x_strides)
    dx_ptr += plane_offsets(n, c, dx_strides)
    dy_ptr += plane_offsets(n, c, dy_strides) + site_offsets(row, w, out_size, dy_strides)
    dy = tl.load(dy_ptr, mask, 0.0).to(tl.float32)
    top, total, mean = _window_sums(
        x_ptr, row, w, mask, size, out_size, x_strides, sharpness, WINDOW, UNROLL, BLOCK)
    for e in tl.range(0, WINDOW[0][0] * WINDOW[0][1] * WINDOW[0][2], loop_unroll_factor=UNROLL):
        at, inside = window_element(e, row, w, size, out_size, x_strides, WINDOW)
        value = tl.load(x_ptr + at, mask & inside, 0.0).to(tl.float32) * 0.5
        dx = dy * _slope(value, top, total, mean, sharpness, DETACH)
        to, inside = window_element(e, row, w, size, out_size, dx_strides, WINDOW)
        tl.store(dx_ptr + to, dx.to(dx_ptr.dtype.element_ty), mask & inside)


@triton.jit
def _overlapping_backward_kernel(
        dy_ptr, x_ptr, sums_ptr, dx_ptr, channels, size, out_size, blocks, dy_strides, x_strides, sums_strides,
        part, dx_strides, sharpness,
        DETACH: tl.constexpr, WINDOW: tl.constexpr, OVERLAP: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):
    """Gradients of the elements, each gathered from all windows that it is in."""
    n, row, c, w = locate_sites(blocks, BLOCK)
    mask = existing(row, c, w, channels, size)
    dy_ptr += plane_offsets(n, c, dy_strides)
    sums_ptr += plane_offsets(n, c, sums_strides)
    x_ptr += plane_offsets(n, c, x_strides) + site_offsets(row, w, size, x_strides)
    value = tl.load(x_ptr, mask, 0.0).to(tl.float32) * 0.5
    dx = tl.zeros(BLOCK, tl.float32)
    for i in tl.range(0, OVERLAP[0] * OVERLAP[1] * OVERLAP[2], loop_unroll_factor=UNROLL):
        _, out_row, out_w, holds = candidate(i, row, w, size, out_size, WINDOW, OVERLAP)
        at = sums_ptr + site_offsets(out_row, out_w, out_size, sums_strides)
        top = tl.load(at, mask & holds, 0.0)
        total = tl.load(at + part, mask & holds, 1.0)
        mean = tl.load(at + 2 * part, mask & holds, 0.0)
        dy = tl.load(dy_ptr + site_offsets(out_row, out_w, out_size, dy_strides), mask & holds, 0.0).to(tl.float32)
        dx += tl.where(holds, dy * _slope(value, top, total, mean, sharpness, DETACH), 0.0)
    dx_ptr += plane_offsets(n, c, dx_strides) + site_offsets(row, w, size, dx_strides)
    tl.store(dx_ptr, dx.to(dx_ptr.dtype.element_ty), mask)


def softpool(x: Tensor, window: Window, ceil_mode: bool, sharpness: float) -> Tensor:
    """SoftPool of (N, C, *spatial); `sharpness` is 2 beta, finite in fp32."""
    out_size = window.out_size(size_of(x.shape), ceil_mode)
    y = empty_planes(x, out_size)
    _launch_forward(x, window, sharpness, out_size, y=y)
    return y.reshape(*x.shape[:2], *out_size[5 - x.dim():])


def softpool_backward(dy: Tensor, x: Tensor, window: Window, sharpness: float, detach_weights: bool) -> Tensor:
    """Gradient of the input."""
    grads, planes = five_dims(dy), five_dims(x)
    size, out_size = size_of(x.shape), size_of(dy.shape)
    dx = empty_planes(x, size)
    common = (x.shape[1], size, out_size)
    if max(window.overlap) == 1:
        if not window.covers(size, out_size):
            dx.zero_()
        tiling = SiteTiling.of(*x.shape[:2], out_size, channels_inner(x))
        launch(
            _disjoint_backward_kernel, tiling.programs,
            grads, planes, dx, *common, tiling.blocks, grads.stride(), planes.stride(), dx.stride(), sharpness,
            detach_weights, tuple(window), window.unroll, tiling.block,
        )
    else:
        sums = empty_planes(x, out_size, torch.float32, count=3).unflatten(0, (3, x.shape[0]))
        _launch_forward(x, window, sharpness, out_size, sums=sums)
        tiling = SiteTiling.of(*x.shape[:2], size, channels_inner(x))
        launch(
            _overlapping_backward_kernel, tiling.programs,
            grads, planes, sums, dx, *common, tiling.blocks,
            grads.stride(), planes.stride(), sums[0].stride(), sums.stride(0), dx.stride(), sharpness,
            detach_weights, tuple(window), window.overlap, window.unroll, tiling.block,
        )
    return dx.reshape(x.shape)


def _launch_forward(
        x: Tensor,
        window: Window,
        sharpness: float,
        out_size: Sizes,
        y: Tensor | None = None,
        sums: Tensor | None = None,
) -> None:
    planes = five_dims(x)
    tiling = SiteTiling.of(*x.shape[:2], out_size, channels_inner(x))
    launch(
        _forward_kernel, tiling.programs,
        planes, y, sums, x.shape[1], size_of(x.shape), out_size, tiling.blocks, planes.stride(),
        None if y is None else y.stride(), None if sums is None else sums[0].stride(),
        None if sums is None else sums.stride(0), sharpness, tuple(window), window.unroll, tiling.block,
    )
