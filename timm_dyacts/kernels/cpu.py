"""The passes on CPUs: PyTorch operations on blocks that stay in the cache, in place.

A chain of operations on a large tensor reads and writes main memory with each of them, and new memory for what is in
between costs more still. Here a block goes through the whole chain before the next is touched.
"""
import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .window import Sizes, Window, five_dims, reach, scales, size_of

__all__ = [
    'apply',
    'apply_backward',
    'brelu',
    'brelu_backward',
    'softpool',
    'softpool_backward',
    'statistics',
    'statistics_backward',
]

# Elements of a block: some of them have room in a second-level cache, and calls take little of the time.
_BLOCK = 128 * 1024


def _cut(sizes: Sequence[int], limit: int = _BLOCK) -> Iterator[tuple[slice, ...]]:
    """Cuts a shape, dimensions in the order of memory, into blocks of up to `limit` elements."""
    ranges = []
    for size in reversed(sizes):
        step = max(1, min(size, limit))
        limit //= max(size, 1)
        ranges.insert(0, [slice(start, start + step) for start in range(0, size, step)])
    return itertools.product(*ranges)


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() > 2 and x.stride(1) == 1 and x.shape[1] > 1 and x.movedim(1, -1).is_contiguous()


def _dense(x: Tensor) -> Tensor:
    """The tensor itself if it is contiguous or channels_last, else a contiguous copy."""
    return x if _is_channels_last(x) else x.contiguous()


def _as_rows(x: Tensor, channels_last: bool) -> Tensor:
    """(N, C, *spatial) as (N, C, P, 1), or (N, 1, P, C) where channels are last, in both cases contiguous."""
    x = x.reshape(*x.shape[:2], math.prod(x.shape[2:]), 1)
    return x.transpose(1, 3) if channels_last else x


def _arithmetic(x: Tensor, *others: Tensor) -> torch.dtype:
    """The dtype to compute in: at least fp32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    for t in others:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype


class _DyReLUBlocks:
    """The operands of Dynamic ReLU as rows, and what is computed from a block of them."""

    def __init__(self, x: Tensor, theta: Tensor, pi: Tensor | None, max_value: float | None) -> None:
        self.x = _dense(x)
        self.channels_last = _is_channels_last(self.x)
        self.dtype = _arithmetic(x, theta)
        self.rows = self.as_rows(self.x)
        coefs = theta.to(self.dtype).expand(-1, x.shape[1], -1).unbind(2)
        self.coefs = [self.as_rows(coef).contiguous() for coef in coefs]
        self.pi = None if pi is None else _as_rows(pi, False).to(self.dtype)
        self.max_value = max_value
        self.k = len(coefs) // 2

    def as_rows(self, t: Tensor) -> Tensor:
        return _as_rows(t, self.channels_last)

    def pieces(self, at: tuple[slice, ...], out: Tensor | None = None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """A block of x; the largest of the linear functions; and, unless that goes to `out`, how far those before each
        but the first were above it."""
        n, c, _, b = at
        x = self.rows[at].to(self.dtype)
        coefs = [coef[n, c, :, b] for coef in self.coefs]
        y = _linear(x, coefs[0], coefs[self.k], out)
        leads = []
        for slope, intercept in zip(coefs[1:self.k], coefs[self.k + 1:], strict=True):
            piece = _linear(x, slope, intercept)
            if out is None:
                leads.append(y - piece)
            torch.maximum(y, piece, out=y)
        return x, y, leads


def _linear(x: Tensor, slope: Tensor, intercept: Tensor, out: Tensor | None = None) -> Tensor:
    # Two operations: a single one with two broadcast factors is not vectorised.
    return torch.mul(x, slope, out=out).add_(intercept)


def _where_positive(g: Tensor, condition: Tensor) -> Tensor:
    """``g * (condition > 0)``, as the gradient of ReLU: several times as fast as with a tensor of bools."""
    return torch.ops.aten.threshold_backward(g, condition, 0)


def apply(x: Tensor, theta: Tensor, pi: Tensor | None, max_value: float | None) -> Tensor:
    """``pi * min(max_k(a_k * x + b_k), max_value)``; shapes as in `layers.dyrelu`."""
    blocks = _DyReLUBlocks(x, theta, pi, max_value)
    y = torch.empty_like(blocks.x)
    rows = blocks.as_rows(y)
    for at in _cut(rows.shape):
        exact = y.dtype == blocks.dtype
        _, block, _ = blocks.pieces(at, rows[at] if exact else torch.empty(rows[at].shape, dtype=blocks.dtype))
        if max_value is not None:
            block.clamp_(max=max_value)
        if pi is not None:
            block.mul_(blocks.pi[at[0], :, at[2]])
        if not exact:
            rows[at] = block
    return y


def apply_backward(
        dy: Tensor,
        x: Tensor,
        theta: Tensor,
        pi: Tensor | None,
        max_value: float | None,
) -> tuple[Tensor, Tensor, Tensor | None, None]:
    """Gradients of `x`, `theta` and `pi`."""
    blocks = _DyReLUBlocks(x, theta, pi, max_value)
    dx = torch.empty_like(blocks.x)
    dy_rows, dx_rows = (blocks.as_rows(t) for t in (dy, dx))
    dcoefs = [torch.zeros_like(coef) for coef in blocks.coefs]
    dpi = None if pi is None else torch.zeros_like(blocks.pi)
    for at in _cut(dx_rows.shape):
        n, c, p, b = at
        x, y, leads = blocks.pieces(at)
        g = dy_rows[at].to(blocks.dtype)
        if pi is not None:
            dpi[n, :, p] += (g * (y if max_value is None else y.clamp(max=max_value))).sum((1, 3), keepdim=True)
            g = g * blocks.pi[n, :, p]
        if max_value is not None:
            g = _where_positive(g, max_value - y)
        block = torch.zeros_like(g)
        # From the last piece to the first: what one has won is no longer there for those before it.
        for k in range(blocks.k - 1, -1, -1):
            rest = _where_positive(g, leads[k - 1]) if k else None
            won, g = (g - rest, rest) if k else (g, None)
            block += won * blocks.coefs[k][n, c, :, b]
            dcoefs[k][n, c, :, b] += (won * x).sum(2, keepdim=True)
            dcoefs[blocks.k + k][n, c, :, b] += won.sum(2, keepdim=True)
        dx_rows[at] = block
    dtheta = torch.stack([dcoef.flatten(1) for dcoef in dcoefs], 2).sum_to_size(theta.shape).to(theta.dtype)
    return dx, dtheta, None if pi is None else dpi.reshape(pi.shape).to(pi.dtype), None


def statistics(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """x; the mean of each plane, (N, C); with a `weight` of shape (1, C) its product with x, (N, 1, *spatial)."""
    dense, dtype = _dense(x), _arithmetic(x)
    channels_last = _is_channels_last(dense)
    rows = _as_rows(dense, channels_last)
    sums = _as_rows(torch.zeros(x.shape[:2], dtype=dtype), channels_last)
    logits = None if weight is None else torch.zeros((x.shape[0], 1, *x.shape[2:]), dtype=dtype)
    for at in _cut(rows.shape):
        n, c, p, b = at
        block = rows[at].to(dtype)
        sums[n, c, :, b] += block.sum(2, keepdim=True)
        if weight is not None:
            product = block * _as_rows(weight.to(dtype), channels_last)[:, c, :, b]
            _as_rows(logits, False)[n, :, p] += product.sum((1, 3), keepdim=True)
    return x, sums.flatten(1) / math.prod(x.shape[2:]), logits


def statistics_backward(
        dy: Tensor,
        dmean: Tensor,
        dlogits: Tensor | None,
        x: Tensor,
        weight: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `x` and `weight`, added to the gradient `dy` that x has from elsewhere, in its memory."""
    channels_last = _is_channels_last(dy)
    dx = dy if channels_last or dy.is_contiguous() else dy.contiguous()
    dtype = _arithmetic(x)
    x_rows, dx_rows = _as_rows(x, channels_last), _as_rows(dx, channels_last)
    dmean = _as_rows(dmean / math.prod(x.shape[2:]), channels_last)
    if weight is None:
        for at in _cut(dx_rows.shape):
            n, c, _, b = at
            dx_rows[at] += dmean[n, c, :, b]
        return dx, None
    weights = _as_rows(weight.to(dtype), channels_last)
    dlogits = _as_rows(dlogits, False)
    dweights = torch.zeros_like(weights)
    for at in _cut(dx_rows.shape):
        n, c, p, b = at
        dx_rows[at] += dmean[n, c, :, b] + weights[:, c, :, b] * dlogits[n, :, p]
        dweights[:, c, :, b] += (x_rows[at] * dlogits[n, :, p]).sum((0, 2), keepdim=True)
    return dx, dweights.reshape(weight.shape).to(weight.dtype)


def brelu(x: Tensor, weight: None, kind: str, bound: float, layout: str, inplace: bool) -> Tensor:
    """Bipolar ReLU: one pass over memory in any layout."""
    y = x if inplace else torch.empty_like(x)
    channels = x.shape[1]
    if layout == 'halves':
        positive, negative = slice(0, (channels + 1) // 2), slice((channels + 1) // 2, None)
    else:
        positive, negative = slice(0, None, 2), slice(1, None, 2)
    if x.stride(1) == 1:
        # Slices of the channels would take memory in single steps.
        lower, upper = x.new_zeros(2, channels, *[1] * (x.dim() - 2))
        lower[negative], upper[positive] = -bound, bound
        return torch.clamp(x, lower, upper, out=y)
    torch.clamp(x[:, positive], 0, bound, out=y[:, positive])
    torch.clamp(x[:, negative], -bound, 0, out=y[:, negative])
    return y


def brelu_backward(
        dy: Tensor,
        y: Tensor,
        weight: None,
        kind: str,
        bound: float,
        layout: str,
        inplace: bool,
) -> tuple[Tensor | None, ...]:
    """Gradient of the input, from the output: the mask ``y != 0`` does not depend on the sign of the channel."""
    dx = torch.ops.aten.hardshrink_backward(dy, y, 0)
    if bound < math.inf:
        torch.ops.aten.hardtanh_backward(dx, y, -bound, bound, grad_input=dx)
    return dx, None, None, None, None, None


class _SoftPoolBlocks:
    """The planes of SoftPool, and what is computed from a block of them."""

    def __init__(self, x: Tensor, window: Window, out_size: Sizes, beta: float) -> None:
        self.x = _dense(x)
        self.channels_last = _is_channels_last(self.x)
        self.dtype = _arithmetic(x)
        self.planes = self.as_planes(self.x)
        self.out_size = out_size
        self.rising = beta >= 0
        self.scale, self.sharpness = scales(window, beta)
        per_dim = [
            [(slice(first, last), slice(start, stop, dim[3])) for first, last, start, stop in reach(*dim)]
            for dim in zip(size_of(x.shape), out_size, *window, strict=True)
        ]
        # For each element of a window: the windows that have it, and where it lies.
        self.elements = [tuple(zip(*element, strict=True)) for element in itertools.product(*per_dim)]
        holes = torch.ones(len(self.elements), 1, *out_size, 1, dtype=torch.bool)
        for e, (windows, _) in enumerate(self.elements):
            holes[(e, 0, *windows)] = False
        self.holes = holes if holes.any() else None

    def as_planes(self, t: Tensor) -> Tensor:
        """(N, C, *spatial) as (N * C, D, H, W, 1), or (N, D, H, W, C) where channels are last."""
        t = five_dims(t)
        return t.movedim(1, -1) if self.channels_last else t.reshape(-1, *t.shape[2:], 1)

    def cut(self) -> Iterator[tuple]:
        rows, *size, columns = self.planes.shape
        for at in _cut((rows, columns), max(_BLOCK // math.prod(size), 16)):
            yield at[0], ..., at[1]

    def weigh(self, at: tuple) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For the windows of a block, of an x times `scale`: the element with the largest weight, the distances of all
        elements from it, their weights up to a factor, and the sum of these."""
        x = self.planes[at]
        distances = torch.empty((len(self.elements), x.shape[0], *self.out_size, x.shape[-1]), dtype=self.dtype)
        if self.holes is not None:
            distances.fill_(-math.inf if self.rising else math.inf)
        for element, (windows, positions) in zip(distances, self.elements, strict=True):
            element[(slice(None), *windows)] = x[(slice(None), *positions)]
        distances.mul_(self.scale)
        top = distances.amax(0) if self.rising else distances.amin(0)
        distances.sub_(top)
        # PyTorch computes powers of 2 with vector instructions on every CPU, those of e with a library made for one.
        weights = torch.mul(distances, self.sharpness).exp2_()
        if self.holes is not None:
            distances.masked_fill_(self.holes, 0)
            weights.masked_fill_(self.holes, 0)
        total = weights[0].clone()
        for weight in weights[1:]:
            total += weight
        return top, distances, weights, total


def _mean(distances: Tensor, weights: Tensor, total: Tensor) -> Tensor:
    mean = distances[0] * weights[0]
    for distance, weight in zip(distances[1:], weights[1:], strict=True):
        mean.addcmul_(distance, weight)
    return mean.div_(total)


def softpool(x: Tensor, window: Window, ceil_mode: bool, beta: float, detach_weights: bool) -> Tensor:
    """SoftPool of (N, C, *spatial)."""
    out_size = window.out_size(size_of(x.shape), ceil_mode)
    blocks = _SoftPoolBlocks(x, window, out_size, beta)
    memory_format = torch.channels_last_3d if blocks.channels_last else torch.contiguous_format
    y = torch.empty(*x.shape[:2], *out_size, dtype=x.dtype, memory_format=memory_format)
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
    """Gradient of the input."""
    size, out_size = size_of(x.shape), size_of(dy.shape)
    blocks = _SoftPoolBlocks(x, window, out_size, beta)
    overlap = max(window.overlap) > 1
    dx = torch.empty_like(blocks.x) if window.covers(size, out_size) else torch.zeros_like(blocks.x)
    dy_planes, dx_planes = blocks.as_planes(dy), blocks.as_planes(dx)
    for at in blocks.cut():
        _, distances, slopes, total = blocks.weigh(at)
        if not detach_weights:
            # w * (1 + beta * (x - y))
            distances.sub_(_mean(distances, slopes, total))
            slopes.addcmul_(slopes, distances, value=blocks.sharpness * math.log(2))
        slopes.mul_(total.reciprocal_().mul_(dy_planes[at]))
        grads = dx_planes[at]
        block = torch.zeros(grads.shape, dtype=blocks.dtype) if overlap and grads.dtype != blocks.dtype else grads
        for slope, (windows, positions) in zip(slopes, blocks.elements, strict=True):
            target, slope = block[(slice(None), *positions)], slope[(slice(None), *windows)]
            target.add_(slope) if overlap else target.copy_(slope)
        if block is not grads:
            grads.copy_(block)
    return dx, None, None, None, None
