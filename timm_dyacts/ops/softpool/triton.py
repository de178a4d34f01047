"""SoftPool on GPUs: the weights live in registers only.

Forward: one read of the input, one write of the output. Backward, where windows do not overlap: each lane has all
that the gradients of its window need. It reads the input and the gradient of the output, and writes the gradient of
the input. Backward, where windows overlap: a first pass writes two numbers for each window, from which a second pass
collects the gradient of each element. There are no atomic additions, so results are reproducible.

A single pass could form all windows that hold an element anew, and would move fewer bytes: for 3x3/2, 4.5 for each
16-bit element instead of 10.5, and 9 for each 32-bit element instead of 17. But for every four elements it would have
to weigh the nine elements of four windows: 9 exponentials for each element instead of 5, and more than 100 instructions
instead of 85. An H200 issues about 7 instructions in the time that it takes to move a byte, so a single pass would be
no faster in 16 bits, and hardly faster in 32.

Registers hold windows of up to 9 elements; larger windows are read a second time, from the cache. The arithmetic stays
finite as in ``reference.py``: what is summed up are distances from the element with the largest weight, of a scaled
input.
"""
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pooling.layout import MOST_HELD, Layout, empty_planes, layout_of, patches_held, without_dims
from ..pooling.triton_elements import (
    as_pairs,
    candidate_window,
    join_pair,
    lane_offsets,
    lanes_exist,
    locate_lanes,
    patch_element,
    patch_zeros,
    plane_offsets,
    sharing_window,
    split_pair,
    store_patches,
    window_element,
)
from ..pooling.window import Window, five_dims, size_of
from ..tiling import Space, planned
from ..triton_tiles import Launch, launch
from .scaling import scale_of, sharpness_of
from .triton_global import global_softpool, global_softpool_backward

__all__ = ['global_softpool', 'global_softpool_backward', 'softpool', 'softpool_backward']

LN_2 = tl.constexpr(math.log(2))


@triton.jit
def _load(
        x_ptr, e, row, w, mask, size, out_size, x_strides,
        WINDOW: tl.constexpr, UNITS: tl.constexpr, KNOWN: tl.constexpr = False,
):
    """Load element number ``e`` of each window; also tell where it lies within the input."""
    at, inside = window_element(e, row, w, size, out_size, x_strides, WINDOW, UNITS, KNOWN)
    mask = mask & inside
    return tl.load(x_ptr + at, mask, 0), mask


@triton.jit
def _hold(
        x_ptr, row, w, mask, size, out_size, x_strides,
        DTYPE: tl.constexpr, WINDOW: tl.constexpr, UNITS: tl.constexpr, PACKED: tl.constexpr, COLUMNS: tl.constexpr,
        OUTSIDE: tl.constexpr, HELD: tl.constexpr,
):
    """Load all elements of each window, if they are so few that registers can hold them.

    With each goes where it lies within the input, and whether that needs to be asked.
    """
    elements = ()
    # In a row of a window. Rows of one pair may have been merged with other dimensions.
    PAIRS: tl.constexpr = (COLUMNS[1] + 1) // 2
    if HELD:
        for e in tl.static_range(WINDOW[0][0] * WINDOW[0][1] * WINDOW[0][2]):
            loaded, inside = _load(x_ptr, e, row, w, mask, size, out_size, x_strides, WINDOW, UNITS, True)
            if PACKED:
                first, second = split_pair(loaded, DTYPE)
                if 2 * (e % PAIRS) >= COLUMNS[0]:
                    elements = elements + ((first, inside, OUTSIDE[e]),)
                if 2 * (e % PAIRS) + 1 < COLUMNS[1]:
                    elements = elements + ((second, inside, OUTSIDE[e]),)
            else:
                elements = elements + ((loaded.to(tl.float32), inside, OUTSIDE[e]),)
    return elements


@triton.jit
def _heavier(top, value, inside, ASK: tl.constexpr, RISING: tl.constexpr):
    """Give the one of two elements that has the larger weight."""
    if RISING:
        return tl.maximum(top, tl.where(inside, value, float('-inf')) if ASK else value)
    else:
        return tl.minimum(top, tl.where(inside, value, float('inf')) if ASK else value)


@triton.jit
def _reciprocal(total):
    """Compute 1 / total. That lies between 1 and the number of weights; division would also care for extreme values."""
    root = tl.rsqrt(total)
    return root * root


@triton.jit
def _add(total, moment, value, inside, top, sharpness, SCALE: tl.constexpr, ASK: tl.constexpr):
    """Add an element to the sum of the weights and to the sum of the weighted distances."""
    distance = value * SCALE - top
    weight = tl.exp2(sharpness * distance)
    if ASK:
        weight = tl.where(inside, weight, 0.0)
    return total + weight, moment + weight * distance


@triton.jit
def _window_sums(
        x_ptr, elements, row, w, mask, size, out_size, x_strides, sharpness,
        WINDOW: tl.constexpr, UNITS: tl.constexpr, PACKED: tl.constexpr, HELD: tl.constexpr,
        SCALE: tl.constexpr, RISING: tl.constexpr, BLOCK: tl.constexpr,
):
    """Give the scaled element with the largest weight, 1 over the sum of the weights, and the mean distance from it."""
    COUNT: tl.constexpr = WINDOW[0][0] * WINDOW[0][1] * WINDOW[0][2]
    top = tl.full(BLOCK, float('-inf') if RISING else float('inf'), tl.float32)
    total = tl.zeros(BLOCK, tl.float32)
    moment = tl.zeros(BLOCK, tl.float32)
    if HELD:
        for e in tl.static_range(len(elements)):
            top = _heavier(top, elements[e][0], elements[e][1], elements[e][2], RISING)
        top *= SCALE
        for e in tl.static_range(len(elements)):
            value, inside, ask = elements[e]
            total, moment = _add(total, moment, value, inside, top, sharpness, SCALE, ask)
    else:
        for e in range(COUNT):
            value, inside = _load(x_ptr, e, row, w, mask, size, out_size, x_strides, WINDOW, UNITS)
            top = _heavier(top, value.to(tl.float32), inside, True, RISING)
        top *= SCALE
        for e in range(COUNT):
            value, inside = _load(x_ptr, e, row, w, mask, size, out_size, x_strides, WINDOW, UNITS)
            total, moment = _add(total, moment, value.to(tl.float32), inside, top, sharpness, SCALE, True)
    share = _reciprocal(total)
    return top, share, moment * share


@triton.jit
def _slope(value, top, mean, sharpness, SCALE: tl.constexpr, DETACH: tl.constexpr):
    """Differentiate the output by an element: ``w * (1 + beta * (x - y))``, times the sum of the weights."""
    distance = value * SCALE - top
    weight = tl.exp2(sharpness * distance)
    if DETACH:
        return weight
    else:
        return weight + sharpness * LN_2 * (weight * (distance - mean))


@triton.jit
def _forward_kernel(
        x_ptr, dy_ptr, y_ptr, channels, size, out_size, blocks, x_strides, y_strides, dy_strides, part, sharpness,
        WINDOW: tl.constexpr, UNITS: tl.constexpr, PACKED: tl.constexpr, COLUMNS: tl.constexpr, OUTSIDE: tl.constexpr,
        HELD: tl.constexpr, SCALE: tl.constexpr, RISING: tl.constexpr, BLOCK: tl.constexpr,
):
    """Write the output; or, given its gradient, the two numbers of each window that ``_gradient`` takes.

    The output or the first of the two numbers goes to ``y_ptr``, the second one ``part`` elements further.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    n, row, c, w = locate_lanes(blocks, BLOCK)
    mask = lanes_exist(row, c, w, channels, out_size, UNITS)
    x_ptr = (as_pairs(x_ptr) if PACKED else x_ptr) + plane_offsets(n, c, x_strides, UNITS)
    elements = _hold(
        x_ptr, row, w, mask, size, out_size, x_strides, DTYPE, WINDOW, UNITS, PACKED, COLUMNS, OUTSIDE, HELD)
    top, share, mean = _window_sums(
        x_ptr, elements, row, w, mask, size, out_size, x_strides, sharpness,
        WINDOW, UNITS, PACKED, HELD, SCALE, RISING, BLOCK)
    center = top + mean
    y_ptr += plane_offsets(n, c, y_strides, UNITS) + lane_offsets(row, w, out_size, y_strides, UNITS)
    if dy_ptr is None:
        tl.store(y_ptr, (center * (1 / SCALE)).to(y_ptr.dtype.element_ty), mask)
    else:
        dy_ptr += plane_offsets(n, c, dy_strides, UNITS) + lane_offsets(row, w, out_size, dy_strides, UNITS)
        dy = tl.load(dy_ptr, mask, 0.0).to(tl.float32)
        tl.store(y_ptr, center, mask)
        tl.store(y_ptr + part, dy * share * tl.exp2(sharpness * (center - top)), mask)


@triton.jit
def _disjoint_backward_kernel(
        dy_ptr, x_ptr, dx_ptr, channels, size, out_size, blocks, dy_strides, x_strides, dx_strides, sharpness,
        DETACH: tl.constexpr,
        WINDOW: tl.constexpr, UNITS: tl.constexpr, PACKED: tl.constexpr, COLUMNS: tl.constexpr, OUTSIDE: tl.constexpr,
        HELD: tl.constexpr, SCALE: tl.constexpr, RISING: tl.constexpr, BLOCK: tl.constexpr,
):
    """Write the gradient of the input where no element is in two windows. A lane is a window."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    n, row, c, w = locate_lanes(blocks, BLOCK)
    mask = lanes_exist(row, c, w, channels, out_size, UNITS)
    x_ptr = (as_pairs(x_ptr) if PACKED else x_ptr) + plane_offsets(n, c, x_strides, UNITS)
    dx_ptr = (as_pairs(dx_ptr) if PACKED else dx_ptr) + plane_offsets(n, c, dx_strides, UNITS)
    dy_ptr += plane_offsets(n, c, dy_strides, UNITS) + lane_offsets(row, w, out_size, dy_strides, UNITS)
    dy = tl.load(dy_ptr, mask, 0.0).to(tl.float32)
    elements = _hold(
        x_ptr, row, w, mask, size, out_size, x_strides, DTYPE, WINDOW, UNITS, PACKED, COLUMNS, OUTSIDE, HELD)
    top, share, mean = _window_sums(
        x_ptr, elements, row, w, mask, size, out_size, x_strides, sharpness,
        WINDOW, UNITS, PACKED, HELD, SCALE, RISING, BLOCK)
    dy *= share
    COUNT: tl.constexpr = WINDOW[0][0] * WINDOW[0][1] * WINDOW[0][2]
    if HELD:
        for e in tl.static_range(COUNT):
            at, inside = window_element(e, row, w, size, out_size, dx_strides, WINDOW, UNITS, True)
            if PACKED:
                first = dy * _slope(elements[2 * e][0], top, mean, sharpness, SCALE, DETACH)
                second = dy * _slope(elements[2 * e + 1][0], top, mean, sharpness, SCALE, DETACH)
                tl.store(dx_ptr + at, join_pair(first.to(DTYPE), second.to(DTYPE)), mask & inside)
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
    """Give what a window adds to the gradient of an element: ``dy * w * (1 + beta * (x - y))``.

    The numbers of the window are ``center``, the scaled y, and ``factor``, dy over the sum of weights that are relative
    to y instead of to the largest element. The two are close, so that no weight overflows.
    """
    distance = tl.where(holds, value * SCALE - center, 0.0)
    weight = tl.exp2(sharpness * distance)
    if DETACH:
        return factor * weight
    else:
        return factor * (weight + sharpness * LN_2 * (weight * distance))


@triton.jit
def _overlapping_backward_kernel(
        x_ptr, sums_ptr, dx_ptr, channels, lanes, size, out_size, blocks, x_strides, dx_strides, sums_strides,
        part, sharpness,
        DETACH: tl.constexpr, SHARES: tl.constexpr, WINDOW: tl.constexpr, UNITS: tl.constexpr, PACKED: tl.constexpr,
        SCALE: tl.constexpr, BLOCK: tl.constexpr,
):
    """Write the gradient of the input where windows overlap. A lane is a patch."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    n, row, c, w = locate_lanes(blocks, BLOCK)
    mask = lanes_exist(row, c, w, channels, lanes, UNITS)
    x_ptr = (as_pairs(x_ptr) if PACKED else x_ptr) + plane_offsets(n, c, x_strides, UNITS)
    dx_ptr = (as_pairs(dx_ptr) if PACKED else dx_ptr) + plane_offsets(n, c, dx_strides, UNITS)
    sums_ptr += plane_offsets(n, c, sums_strides, UNITS)
    values = ()
    for i in tl.static_range(WINDOW[1][0] * WINDOW[1][1] * (1 if PACKED else WINDOW[1][2])):
        at, inside = patch_element(i, row, w, lanes, size, x_strides, WINDOW, UNITS, PACKED)
        loaded = tl.load(x_ptr + at, mask & inside, 0)
        values = values + (split_pair(loaded, DTYPE) if PACKED else (loaded.to(tl.float32),))
    grads = patch_zeros(WINDOW, BLOCK)
    for number in tl.static_range(len(SHARES)):
        at, holds = sharing_window(row, w, lanes, out_size, sums_strides, SHARES, number, UNITS)
        holds = mask & holds
        center = tl.load(sums_ptr + at, holds, 0.0)
        factor = tl.load(sums_ptr + at + part, holds, 0.0)
        summed = ()
        for i in tl.static_range(len(values)):
            if SHARES[number][6 + i] < 0:
                summed = summed + (grads[i],)
            else:
                grad = _gradient(values[i], center, factor, holds, sharpness, SCALE, DETACH)
                summed = summed + (grads[i] + grad,)
        grads = summed
    store_patches(dx_ptr, grads, row, w, mask, lanes, size, dx_strides, DTYPE, WINDOW, UNITS, PACKED)


@triton.jit
def _large_backward_kernel(
        x_ptr, sums_ptr, dx_ptr, channels, lanes, size, out_size, blocks, x_strides, dx_strides, sums_strides,
        part, sharpness,
        DETACH: tl.constexpr, OVERLAP: tl.constexpr, WINDOW: tl.constexpr, UNITS: tl.constexpr, PACKED: tl.constexpr,
        SCALE: tl.constexpr, BLOCK: tl.constexpr,
):
    """Write the same for windows with too many elements to compile code for each. A lane is an element."""
    n, row, c, w = locate_lanes(blocks, BLOCK)
    mask = lanes_exist(row, c, w, channels, size, UNITS)
    sums_ptr += plane_offsets(n, c, sums_strides, UNITS)
    x_ptr += plane_offsets(n, c, x_strides, UNITS) + lane_offsets(row, w, size, x_strides, UNITS)
    value = tl.load(x_ptr, mask, 0.0).to(tl.float32)
    dx = tl.zeros(BLOCK, tl.float32)
    for i in range(OVERLAP[0] * OVERLAP[1] * OVERLAP[2]):
        _, out_row, out_w, holds = candidate_window(i, row, w, size, out_size, WINDOW, OVERLAP)
        holds = mask & holds
        at = sums_ptr + lane_offsets(out_row, out_w, out_size, sums_strides, UNITS)
        center, factor = tl.load(at, holds, 0.0), tl.load(at + part, holds, 0.0)
        dx += _gradient(value, center, factor, holds, sharpness, SCALE, DETACH)
    dx_ptr += plane_offsets(n, c, dx_strides, UNITS) + lane_offsets(row, w, size, dx_strides, UNITS)
    tl.store(dx_ptr, dx.to(dx_ptr.dtype.element_ty), mask)


@planned
def _plan_forward(x: Tensor, window: Window, ceil_mode: bool, beta: float) -> tuple[Space, Launch]:
    planes = five_dims(x)
    y = empty_planes(planes, window.out_size(size_of(x.shape), ceil_mode))
    layout = layout_of(window, (planes,), (y,), partial_pairs=True)
    run = Launch(
        _forward_kernel, layout.programs,
        x_strides=layout.strides[0],
        y_strides=layout.out_strides[0],
        dy_strides=None,
        part=0,
        **_arguments(layout, window, beta),
    )
    return Space.of(without_dims(y, x.dim())), run


def softpool(x: Tensor, window: Window, ceil_mode: bool, beta: float, detach_weights: bool) -> Tensor:
    """Compute SoftPool of (N, C, *spatial)."""
    space, run = _plan_forward(x, window, ceil_mode, beta)
    y = space.allocate(x)
    launch(run, x, None, y)
    return y


class _Backward(NamedTuple):
    """What is planned of the backward pass.

    Attributes:
        dx: The gradient of the input.
        has_gaps: Whether there are elements that no window holds.
        sums: Two numbers of each window, where windows overlap.
        reduce: The pass that computes them.
        run: The pass that writes the gradient.
    """
    dx: Space
    has_gaps: bool
    sums: Space | None
    reduce: Launch | None
    run: Launch


@planned
def _plan_backward(dy: Tensor, x: Tensor, window: Window, beta: float, detach_weights: bool) -> _Backward:
    planes = five_dims(x)
    dx = empty_planes(planes, size_of(x.shape))
    plan = _plan_disjoint if max(window.overlap) == 1 else _plan_overlapping
    return plan(Space.of(without_dims(dx, x.dim())), five_dims(dy), planes, dx, window, beta, detach_weights)


def _plan_disjoint(
        space: Space, dy: Tensor, x: Tensor, dx: Tensor, window: Window, beta: float, detach_weights: bool,
) -> _Backward:
    layout = layout_of(window, (x, dx), (dy,))
    run = Launch(
        _disjoint_backward_kernel, layout.programs,
        dy_strides=layout.out_strides[0],
        x_strides=layout.strides[0],
        dx_strides=layout.strides[1],
        DETACH=detach_weights,
        **_arguments(layout, window, beta),
    )
    return _Backward(space, not window.covers(size_of(x.shape), size_of(dy.shape)), None, None, run)


def _plan_overlapping(
        space: Space, dy: Tensor, x: Tensor, dx: Tensor, window: Window, beta: float, detach_weights: bool,
) -> _Backward:
    sums = empty_planes(x, size_of(dy.shape), torch.float32, count=2).unflatten(0, (2, x.shape[0]))
    layout = layout_of(window, (x,), (sums[0], dy), partial_pairs=True)
    reduce = Launch(
        _forward_kernel, layout.programs,
        x_strides=layout.strides[0],
        y_strides=layout.out_strides[0],
        dy_strides=layout.out_strides[1],
        part=sums.stride(0),
        **_arguments(layout, window, beta),
    )
    held = patches_held(window)
    layout = layout_of(window, (x, dx), (sums[0],), 'patches' if held else 'elements')
    windows = dict(SHARES=layout.shares) if held else dict(OVERLAP=layout.overlap)
    run = Launch(
        _overlapping_backward_kernel if held else _large_backward_kernel, layout.programs,
        lanes=layout.lanes,
        x_strides=layout.strides[0],
        dx_strides=layout.strides[1],
        sums_strides=layout.out_strides[0],
        part=sums.stride(0),
        DETACH=detach_weights,
        **windows,
        **_scaling(window, beta),
        **layout.arguments,
    )
    return _Backward(space, False, Space.of(sums), reduce, run)


def softpool_backward(
        dy: Tensor,
        x: Tensor,
        window: Window,
        ceil_mode: bool,
        beta: float,
        detach_weights: bool,
) -> tuple[Tensor, None, None, None, None]:
    """Compute the gradient of the input."""
    plan = _plan_backward(dy, x, window, beta, detach_weights)
    dx = plan.dx.allocate(x)
    if plan.has_gaps:
        dx.zero_()
    if plan.sums is None:
        launch(plan.run, dy, x, dx)
    else:
        sums = plan.sums.allocate(x)
        launch(plan.reduce, x, dy, sums)
        launch(plan.run, x, sums, dx)
    return dx, None, None, None, None


def _arguments(layout: Layout, window: Window, beta: float) -> dict[str, Any]:
    """Give the arguments of kernels that weigh the elements of windows."""
    held = window.elements <= MOST_HELD
    return dict(
        COLUMNS=layout.columns, OUTSIDE=layout.outside if held else None, HELD=held, RISING=beta >= 0,
        **_scaling(window, beta), **layout.arguments)


def _scaling(window: Window, beta: float) -> dict[str, float]:
    """Give the scale of windows, and what scaled distances are multiplied by in powers of 2."""
    count = window.elements
    return dict(sharpness=sharpness_of(count, beta) / math.log(2), SCALE=scale_of(count))
