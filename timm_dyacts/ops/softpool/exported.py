"""SoftPool as ONNX graphs have it: few nodes, and the kinds that runtimes compute fast.

What costs most in a runtime without a kernel for it is to take the windows apart: slices with steps are slow. Depthwise
convolutions by kernels with a single 1 do the same, to the last bit, and runtimes are at their best with them. What
they spread, NaN and the NaN that infinity times 0 gives, stays in its window, whose average is NaN then anyway.
"""
import functools
import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autocast import without_autocast

__all__ = ['can_export', 'softpool_exported']

# Runtimes slice volumes faster than they convolve them.
_CONVOLUTIONS = {1: torch.conv1d, 2: torch.conv2d}
# The work grows with the square of it: more elements are sliced faster.
_MOST_ELEMENTS = 9


def can_export(x: Tensor, kernel_size: list[int], beta: float) -> bool:
    """Tell whether ``softpool_exported`` is made for these arguments. Runtimes convolve no double precision."""
    few = len(kernel_size) in _CONVOLUTIONS and math.prod(kernel_size) <= _MOST_ELEMENTS
    return few and x.dtype != torch.float64 and beta != 0


def softpool_exported(
        x: Tensor,
        kernel_size: list[int],
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        ceil_mode: bool,
        beta: float,
) -> Tensor:
    """Compute what ``functional.softpool`` does. Sizes and padding may be symbols: one graph serves inputs of all."""
    rank = len(kernel_size)
    batch = x if x.dim() == rank + 2 else x.unsqueeze(0)
    dims = [_Dim(*dim, ceil_mode) for dim in zip(
        batch.shape[2:], kernel_size, stride, padding, dilation, strict=True)]
    values = _take_apart(batch.to(torch.float32), dims)
    keys = values
    partial = [any(missing) for missing in itertools.product(*(dim.may_miss() for dim in dims))]
    if any(partial):
        # The convolutions give 0 for an element in the padding. As a key, it must be the last that is chosen.
        inside = _take_apart(torch.ones_like(batch[:1, :1], dtype=torch.float32), dims, stacked=True)[0]
        lowest = torch.where(inside > 0, 0.0, -math.inf if beta > 0 else math.inf)
        keys = [v + lowest[:, i:i + 1] if partial[i] else v for i, v in enumerate(values)]
    top = functools.reduce(torch.maximum if beta > 0 else torch.minimum, keys)
    shifted = [key - top for key in keys]
    weights = [torch.exp(s if beta == 1 else s * beta) for s in shifted]
    total = functools.reduce(torch.add, weights)
    # The quotient of two sums would be less to compute, but the first of them may overflow.
    y = functools.reduce(torch.add, [v * (w / total) for v, w in zip(values, weights, strict=True)])
    return (y if batch is x else y.squeeze(0)).to(x.dtype)


class _Dim(NamedTuple):
    """Along one dimension: the input and the window. ``size`` and ``padding`` are symbols in a graph for any size."""
    size: int
    kernel_size: int
    stride: int
    padding: int
    dilation: int
    ceil_mode: bool

    @property
    def span(self) -> int:
        """The length of the window."""
        return self.dilation * (self.kernel_size - 1) + 1

    def windows(self) -> int:
        """Count the windows as ``count_windows`` does, without a question that a symbol has no answer to."""
        slack = self.size + 2 * self.padding - self.span + (self.stride - 1 if self.ceil_mode else 0)
        count = slack // self.stride + 1
        if not self.ceil_mode or isinstance(self.padding, int) and self.padding + self.stride <= self.span:
            return count
        return torch.sym_min(count, (self.size + self.padding + self.stride - 1) // self.stride)

    def excess(self) -> int:
        """Give how far the last window reaches beyond the padded input. It may be negative."""
        return (self.windows() - 1) * self.stride + self.span - self.size - 2 * self.padding if self.ceil_mode else 0

    def may_miss(self) -> list[bool]:
        """Tell for each element of the window whether it may lie outside of the input for some window."""
        offsets = range(0, self.span, self.dilation)
        if isinstance(self.size, int) and isinstance(self.padding, int):
            last = (self.windows() - 1) * self.stride - self.padding
            return [offset < self.padding or last + offset >= self.size for offset in offsets]
        if not isinstance(self.padding, int):
            return [True] * self.kernel_size
        reach = self.padding + (self.stride - 1 if self.ceil_mode else 0)
        return [offset < self.padding or offset + reach >= self.span for offset in offsets]


def _take_apart(x: Tensor, dims: list[_Dim], stacked: bool = False) -> list[Tensor]:
    """Take the elements of all windows of (N, C, *spatial), a tensor for each place in the window; padding is 0.

    Args:
        x: Input.
        dims: What is known of each of its spatial dimensions.
        stacked: Give them as the channels of a single tensor. The input must have one channel.
    """
    channels = x.shape[1]
    kernel_size = [dim.kernel_size for dim in dims]
    count = math.prod(kernel_size)
    padding = [dim.padding for dim in dims]
    excess = [dim.excess() for dim in dims]
    if any(not isinstance(n, int) or n > 0 for n in excess) or any(not isinstance(n, int) for n in padding):
        # As a convolution has no ``ceil_mode``
        margins = [n for p, e in zip(reversed(padding), reversed(excess), strict=True) for n in (p, p + e)]
        x, padding = F.pad(x, margins), [0] * len(dims)
    picks = torch.eye(count, device=x.device).reshape([count, 1, *kernel_size])
    kernels = [picks] if stacked else [picks[i].expand([channels, 1, *kernel_size]) for i in range(count)]
    stride, dilation = [dim.stride for dim in dims], [dim.dilation for dim in dims]
    convolve = _CONVOLUTIONS[len(dims)]
    return [without_autocast(convolve, x, kernel, None, stride, padding, dilation, channels) for kernel in kernels]
