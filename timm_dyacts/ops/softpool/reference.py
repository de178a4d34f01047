"""SoftPool in plain differentiable operations.

The arithmetic stays finite for every finite input, for two reasons:

- ``y = top + sum(w * (x - top))``, where ``top`` is the element of the window with the largest weight. Its exponent is
  0 and all others are negative: nothing overflows, and the sum of the weights is never 0. ``top`` cancels out, so it
  needs no gradient.
- It computes with fractions of x: the difference of two elements may overflow, that of their halves cannot.

So does its gradient: ``w * d`` of a weight and a distance is formed as ``r * (r * d)`` from the root of the weight. The
gradient of ``w`` would be ``d`` times another, which overflows where both are large, and times ``w = 0`` is NaN then.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..exporting import is_exporting
from ..pooling.window import Window, count_windows, reach
from .scaling import scale_of, sharpness_of

__all__ = ['batch_reference', 'global_softpool2d_reference', 'softpool_reference']


def softpool_reference(
        x: Tensor,
        kernel_size: list[int],
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        ceil_mode: bool,
        beta: float,
        detach_weights: bool,
) -> Tensor:
    """Compute SoftPool over as many of the last dimensions as ``kernel_size`` has."""
    # One code for 1 to 3 spatial dimensions: those that are missing have size 1.
    missing = 3 - len(kernel_size)
    for _ in range(missing):
        x = x.unsqueeze(missing - 4)
    k = [1] * missing + list(kernel_size)
    s = [1] * missing + list(stride)
    p = [0] * missing + list(padding)
    d = [1] * missing + list(dilation)
    out_size = [count_windows(x.shape[i - 3], k[i], s[i], p[i], d[i], ceil_mode) for i in range(3)]
    count = k[0] * k[1] * k[2]

    scale, sharpness = scale_of(count), sharpness_of(count, beta)
    scaled = scale * x.to(torch.promote_types(x.dtype, torch.float32))
    # The elements of all windows, one tensor for each place in the window; the range of windows whose element there is
    # no padding; and, if there may be others, how many of them lie on each side of the range.
    elements: list[Tensor] = []
    ranges: list[list[int]] = []
    margins: list[list[int]] = []
    for z0, z1, z_from, z_to in reach(x.shape[-3], out_size[0], k[0], s[0], p[0], d[0]):
        for y0, y1, y_from, y_to in reach(x.shape[-2], out_size[1], k[1], s[1], p[1], d[1]):
            for x0, x1, x_from, x_to in reach(x.shape[-1], out_size[2], k[2], s[2], p[2], d[2]):
                elements.append(scaled[..., z_from:z_to:s[0], y_from:y_to:s[1], x_from:x_to:s[2]])
                ranges.append([z0, z1, y0, y1, x0, x1])
                around = [x0, out_size[2] - x1, y0, out_size[1] - y1, z0, out_size[0] - z1]
                margins.append(around if ceil_mode or max(p) > 0 else around[:0])

    exporting = False
    if not torch.jit.is_scripting():
        exporting = is_exporting()
    # torch.compile makes faster code of this than of max pooling. It need not pass NaN on: the sums below do.
    lowest = math.inf if beta < 0 else -math.inf
    top = _fill_up(elements[0].detach(), margins[0], lowest)
    for i in range(1, len(elements)):
        element = _fill_up(elements[i].detach(), margins[i], lowest)
        if exporting:  # runtimes are fast at this
            top = torch.minimum(element, top) if beta < 0 else torch.maximum(element, top)
        else:
            top = torch.where(element < top if beta < 0 else element > top, element, top)

    stable = _may_be_differentiated()
    total = torch.zeros_like(top)
    moment = torch.zeros_like(top)
    for i in range(len(elements)):
        at = ranges[i]
        shifted = elements[i] - top[..., at[0]:at[1], at[2]:at[3], at[4]:at[5]]
        # Not powers of 2, as in the kernels: torch.compile makes slower code of them.
        if detach_weights or not stable:
            weights = torch.exp(shifted * sharpness)
            if detach_weights:
                weights = weights.detach()
            weighted = weights * shifted
        else:
            root = torch.exp(shifted * (sharpness / 2))
            weights = root * root
            weighted = root * (root * shifted)
        total += _fill_up(weights, margins[i], 0.0)
        moment += _fill_up(weighted, margins[i], 0.0)
    out = (top + moment / total) / scale
    for _ in range(missing):
        out = out.squeeze(missing - 4)
    return out.to(x.dtype)


def _may_be_differentiated() -> bool:
    """Tell whether to spend on a stable gradient. A trace has to be the same with gradients and without."""
    recording = False
    if not torch.jit.is_scripting():
        recording = is_exporting() or torch.jit.is_tracing()
    return torch.is_grad_enabled() and not recording


def _fill_up(x: Tensor, margins: list[int], value: float) -> Tensor:
    return F.pad(x, margins, value=value) if len(margins) > 0 else x


def batch_reference(x: Tensor, window: Window, ceil_mode: bool, beta: float, detach_weights: bool) -> Tensor:
    """Compute SoftPool of (N, C, *spatial), with the arguments of the kernels."""
    missing = 5 - x.dim()
    kernel_size, stride, padding, dilation = (list(sizes[missing:]) for sizes in window)
    return softpool_reference(x, kernel_size, stride, padding, dilation, ceil_mode, beta, detach_weights)


def global_softpool2d_reference(x: Tensor, beta: float, detach_weights: bool) -> Tensor:
    """Compute SoftPool of (..., H, W) over the whole plane, as (..., 1)."""
    scale, sharpness = scale_of(1), sharpness_of(1, beta)  # the weights sum up to 1: nothing grows with their number
    scaled = scale * x.flatten(-2).to(torch.promote_types(x.dtype, torch.float32))
    top = scaled.detach().amin(-1, keepdim=True) if beta < 0 else scaled.detach().amax(-1, keepdim=True)
    shifted = scaled - top
    if detach_weights or not _may_be_differentiated():
        weights = torch.softmax(shifted * sharpness, -1)
        if detach_weights:
            weights = weights.detach()
        weighted = weights * shifted
    else:
        root = torch.exp(shifted * (sharpness / 2))
        root = root * torch.rsqrt((root * root).sum(-1, keepdim=True))
        weighted = root * (root * shifted)
    return ((top + weighted.sum(-1, keepdim=True)) / scale).to(x.dtype)
