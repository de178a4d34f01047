"""The window of a pooling, in plain Python. Kernels of pooling see every tensor as (N, C, D, H, W)."""
import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..exporting import is_recording

__all__ = [
    'Sizes',
    'Window',
    'count_windows',
    'five_dims',
    'reach',
    'size_of',
    'trim',
    'trim_large',
]

Sizes = tuple[int, int, int]


class Window(NamedTuple):
    """A pooling window in depth, height and width."""

    kernel_size: Sizes
    stride: Sizes
    padding: Sizes
    dilation: Sizes

    @classmethod
    def of(
            cls,
            kernel_size: Sequence[int],
            stride: Sequence[int],
            padding: Sequence[int],
            dilation: Sequence[int],
    ) -> 'Window':
        """Make a window of 1 to 3 dimensions. Those that are missing in front have size 1."""
        missing = 3 - len(kernel_size)
        return cls(
            (1,) * missing + tuple(kernel_size),
            (1,) * missing + tuple(stride),
            (0,) * missing + tuple(padding),
            (1,) * missing + tuple(dilation),
        )

    @property
    def elements(self) -> int:
        """The number of its elements."""
        return math.prod(self.kernel_size)

    @property
    def overlap(self) -> Sizes:
        """The number of windows, along each dimension, that an element may belong to."""
        spans = [d * (k - 1) + 1 for k, d in zip(self.kernel_size, self.dilation, strict=True)]
        return tuple(-(-span // s) for span, s in zip(spans, self.stride, strict=True))

    def covers(self, size: Sizes, out_size: Sizes) -> bool:
        """Whether windows do not overlap and leave out no element of the input."""
        return all(
            k == s and (d == 1 or k == 1) and out * s - p >= n
            for n, out, k, s, p, d in zip(size, out_size, *self, strict=True)
        )

    def out_size(self, size: Sizes, ceil_mode: bool) -> Sizes:
        """Count the windows along each dimension."""
        return tuple(count_windows(*dim, ceil_mode) for dim in zip(size, *self, strict=True))


def size_of(shape: Sequence[int]) -> Sizes:
    """Give depth, height and width of a shape (N, C, *spatial)."""
    return (1,) * (5 - len(shape)) + tuple(shape[2:])


def five_dims(x: Tensor) -> Tensor:
    """View (N, C, *spatial) as (N, C, D, H, W)."""
    for _ in range(5 - x.dim()):
        x = x.unsqueeze(2)
    return x


def count_windows(size: int, kernel_size: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """Count the windows along one dimension, as max pooling does."""
    slack = size + 2 * padding - dilation * (kernel_size - 1) - 1
    if not ceil_mode:
        return slack // stride + 1
    count = (slack + stride - 1) // stride + 1
    # No window starts in the padding on the right.
    return count - 1 if (count - 1) * stride >= size + padding else count


def trim(
        size: Sequence[int],
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        ceil_mode: bool,
) -> tuple[list[int], list[int], list[int]]:
    """Take off a window what no input of a size fills: the pooling stays the same, and costs what the input does.

    Returns:
        The kernel size, stride and padding.
    """
    kernels, strides, paddings = [], [], []
    for n, k, s, p, d in zip(size, kernel_size, stride, padding, dilation, strict=True):
        windows = count_windows(n, k, s, p, d, ceil_mode)
        last_start = (windows - 1) * s - p
        # Elements that lie before the input for all windows; behind it, for all.
        before, behind = max(0, -(last_start // d)), max(0, k - 1 - (n - 1 + p) // d)
        spare = min(before, behind, p // d)  # as many at both ends, and there are as many windows
        k, p = k - 2 * spare, p - spare * d
        shorter = k - (behind - spare)
        if p <= shorter // 2 and count_windows(n, shorter, s, p, d, ceil_mode) == windows:
            k = shorter
        kernels.append(k)
        paddings.append(p)
        strides.append(min(s, n + p + d * (k - 1)))  # behind all that a first window reaches, there is no second
    return kernels, strides, paddings


def trim_large(
        x: Tensor,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        ceil_mode: bool,
) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """Trim a window that is larger than the input, as ``trim`` does, but where a program is recorded for others too."""
    size = x.shape[-len(kernel_size):]
    if is_recording() or max(*kernel_size, *stride) <= min(size):
        return kernel_size, stride, padding
    return trim(size, kernel_size, stride, padding, dilation, ceil_mode)


def reach(
        size: int,
        out_size: int,
        kernel_size: int,
        stride: int,
        padding: int,
        dilation: int,
) -> list[tuple[int, int, int, int]]:
    """Find, along one dimension, where the elements of windows lie in the input, beside those in the padding.

    Returns:
        For each element of a window that lies in the input for any window: the first and the end of the range of
        windows for which it does, and the first and the end of the range of its positions, in steps of ``stride``.
    """
    reach: list[tuple[int, int, int, int]] = []
    for element in range(kernel_size):
        shift = element * dilation - padding
        first = max(0, -(shift // stride))
        last = min(out_size - 1, (size - 1 - shift) // stride)
        if first <= last:
            reach.append((first, last + 1, first * stride + shift, last * stride + shift + 1))
    return reach
