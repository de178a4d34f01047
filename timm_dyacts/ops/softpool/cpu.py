"""SoftPool on CPUs: block by block, so that what is computed in between stays in the cache."""
import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..cpu_blocks import BLOCK, arithmetic, cut, dense, empty_planes, is_channels_last
from ..pooling.window import Sizes, Window, five_dims, reach, size_of
from .scaling import scale_of, sharpness_of

__all__ = ['global_softpool', 'global_softpool_backward', 'softpool', 'softpool_backward']


# Elements of a plane up to which a copy with the channels last is worth it
_SMALL_PLANE = 32


class _Blocks:
    """The planes of an input, cut into blocks, and the weights of the elements of a block."""

    def __init__(self, x: Tensor, window: Window, out_size: Sizes, beta: float) -> None:
        self.x = dense(x)
        self.channels_last = is_channels_last(self.x)
        self.dtype = arithmetic(x)
        self.planes = self.as_planes(self.x)
        self.out_size = out_size
        self.rising = beta >= 0
        self.scale, self.sharpness = scale_of(window.elements), sharpness_of(window.elements, beta)
        per_dim = [
            [(slice(first, last), slice(start, stop, dim[3])) for first, last, start, stop in reach(*dim)]
            for dim in zip(size_of(x.shape), out_size, *window, strict=True)
        ]
        # For each element of a window: the windows for which it lies in the input, and the positions that it has there.
        self.elements = [tuple(zip(*element, strict=True)) for element in itertools.product(*per_dim)]
        padding = torch.ones(len(self.elements), 1, *out_size, 1, dtype=torch.bool)
        for e, (windows, _) in enumerate(self.elements):
            padding[(e, 0, *windows)] = False
        self.padding = padding if padding.any() else None

    def as_planes(self, t: Tensor) -> Tensor:
        """View (N, C, *spatial) as (N * C, D, H, W, 1), or as (N, D, H, W, C) where channels are last in memory."""
        t = five_dims(t)
        return t.movedim(1, -1) if self.channels_last else t.reshape(-1, *t.shape[2:], 1)

    def cut(self) -> Iterator[tuple]:
        """Give the indices of each block in the planes."""
        rows, *size, columns = self.planes.shape
        for at in cut((rows, columns), max(BLOCK // math.prod(size), 16)):
            yield at[0], ..., at[1]

    def weigh(self, at: tuple) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weigh the elements of the windows of a block.

        Returns:
            The element of each window that has the largest weight and the distances of all elements from it, both times
            ``scale``; the weights, up to a factor, and their sum.
        """
        x = self.planes[at]
        distances = torch.empty((len(self.elements), x.shape[0], *self.out_size, x.shape[-1]), dtype=self.dtype)
        if self.padding is not None:
            distances.fill_(-math.inf if self.rising else math.inf)
        for element, (windows, positions) in zip(distances, self.elements, strict=True):
            element[(slice(None), *windows)] = x[(slice(None), *positions)]
        distances.mul_(self.scale)
        top = distances.amax(0) if self.rising else distances.amin(0)
        distances.sub_(top)
        # PyTorch computes powers of 2 with vector instructions on every CPU, those of e with a library made for one.
        weights = torch.mul(distances, self.sharpness / math.log(2)).exp2_()
        if self.padding is not None:
            distances.masked_fill_(self.padding, 0)
            weights.masked_fill_(self.padding, 0)
        total = weights[0].clone()
        for weight in weights[1:]:
            total += weight
        return top, distances, weights, total


def _mean(distances: Tensor, weights: Tensor, total: Tensor) -> Tensor:
    """Compute the weighted mean of the distances."""
    mean = distances[0] * weights[0]
    for distance, weight in zip(distances[1:], weights[1:], strict=True):
        mean.addcmul_(distance, weight)
    return mean.div_(total)


def softpool(x: Tensor, window: Window, ceil_mode: bool, beta: float, detach_weights: bool) -> Tensor:
    """Compute SoftPool of (N, C, *spatial)."""
    out_size = window.out_size(size_of(x.shape), ceil_mode)
    blocks = _Blocks(x, window, out_size, beta)
    y = empty_planes(blocks.x, out_size)
    planes = blocks.as_planes(y)
    for at in blocks.cut():
        top, *weighed = blocks.weigh(at)
        planes[at] = top.add_(_mean(*weighed)).div_(blocks.scale)
    return y.reshape(*x.shape[:2], *out_size[5 - x.dim():])


def softpool_backward(
        dy: Tensor,
        x: Tensor,
        window: Window,
        ceil_mode: bool,
        beta: float,
        detach_weights: bool,
) -> tuple[Tensor, None, None, None, None]:
    """Compute the gradient of the input."""
    size, out_size = size_of(x.shape), size_of(dy.shape)
    blocks = _Blocks(x, window, out_size, beta)
    overlap = max(window.overlap) > 1
    dx = torch.empty_like(blocks.x) if window.covers(size, out_size) else torch.zeros_like(blocks.x)
    dy_planes, dx_planes = blocks.as_planes(dy), blocks.as_planes(dx)
    for at in blocks.cut():
        _, distances, slopes, total = blocks.weigh(at)
        if not detach_weights:
            # w * (1 + beta * (x - y))
            distances.sub_(_mean(distances, slopes, total))
            slopes.addcmul_(slopes, distances, value=blocks.sharpness)
        slopes.mul_(total.reciprocal_().mul_(dy_planes[at]))
        grads = dx_planes[at]
        block = torch.zeros(grads.shape, dtype=blocks.dtype) if overlap and grads.dtype != blocks.dtype else grads
        for slope, (windows, positions) in zip(slopes, blocks.elements, strict=True):
            target, slope = block[(slice(None), *positions)], slope[(slice(None), *windows)]
            target.add_(slope) if overlap else target.copy_(slope)
        if block is not grads:
            grads.copy_(block)
    return dx, None, None, None, None


def _as_rows(x: Tensor) -> tuple[Tensor, int]:
    """View (N, C, *spatial), which is dense, as (N, C, P) or (N, P, C), and tell where P is.

    P is last where the memory has it so, unless a plane is small: softmax is slow over rows of few elements.
    """
    if is_channels_last(x):
        return x.movedim(1, -1).flatten(1, -2), 1
    rows = x.flatten(2)
    return (rows.transpose(1, 2), 1) if rows.shape[2] < _SMALL_PLANE else (rows, 2)


def _weigh_plane(x: Tensor, beta: float, top: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, int]:
    """Weigh the elements of planes.

    Returns:
        The element of each plane that has the largest weight, and the distances of all elements from it, both times
        ``scale``; the weights; and the dimension of the positions.
    """
    rows, dim = _as_rows(x)
    rows = rows.contiguous()
    dtype = arithmetic(x)
    distances = rows * scale_of(1) if rows.dtype == dtype else rows.to(dtype).mul_(scale_of(1))
    if top is None:
        top = distances.amax(dim, keepdim=True) if beta >= 0 else distances.amin(dim, keepdim=True)
    distances.sub_(top)
    return top, distances, torch.softmax(distances * sharpness_of(1, beta), dim), dim


def global_softpool(x: Tensor, beta: float, detach_weights: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Compute SoftPool of (N, C, *spatial) over the whole plane: (N, C, 1), and two numbers of each plane."""
    top, distances, weights, dim = _weigh_plane(dense(x), beta)
    mean = weights.mul_(distances).sum(dim, keepdim=True)
    return ((top + mean) / scale_of(1)).to(x.dtype).reshape(*x.shape[:2], 1), top, mean


def global_softpool_backward(
        dy: Tensor,
        x: Tensor,
        beta: float,
        detach_weights: bool,
        saved: tuple[Tensor, Tensor],
) -> tuple[Tensor, None, None]:
    """Compute the gradient of the input."""
    top, mean = saved
    x = dense(x)
    _, distances, slopes, _ = _weigh_plane(x, beta, top)
    if not detach_weights:
        # w * (1 + beta * (x - y)), from the product of w on: the distance may be large where w is 0
        slopes.addcmul_(slopes, distances.sub_(mean), value=sharpness_of(1, beta))
    dx = torch.empty_like(x)
    rows, _ = _as_rows(dx)
    torch.mul(slopes, dy.reshape(mean.shape), out=rows)
    return dx, None, None
