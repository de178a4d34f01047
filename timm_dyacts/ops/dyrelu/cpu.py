"""Dynamic ReLU on CPUs."""
import math

import torch
from torch import Tensor

from ..cpu_blocks import arithmetic, as_rows, cut, dense, is_channels_last
from .mlp import perceptron, perceptron_backward
from .settings import DyReLUSettings

__all__ = ['apply', 'apply_backward', 'dynamic_relu', 'dynamic_relu_backward']


class _DyReLUBlocks:
    """The operands of Dynamic ReLU as rows, and what is computed from a block of them."""

    def __init__(self, x: Tensor, theta: Tensor, pi: Tensor | None, max_value: float | None) -> None:
        self.x = dense(x)
        self.channels_last = is_channels_last(self.x)
        self.dtype = arithmetic(x, theta)
        self.rows = self.as_rows(self.x)
        coefs = theta.to(self.dtype).expand(-1, x.shape[1], -1).movedim(2, 0).contiguous()
        self.coefs = [self.as_rows(coef) for coef in coefs]
        self.pi = None if pi is None else as_rows(pi, False).to(self.dtype)
        self.max_value = max_value
        self.k = len(coefs) // 2

    def as_rows(self, t: Tensor) -> Tensor:
        return as_rows(t, self.channels_last)

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
    for at in cut(rows.shape):
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
    for at in cut(dx_rows.shape):
        n, c, p, b = at
        x, y, leads = blocks.pieces(at)
        g = dy_rows[at].to(blocks.dtype)
        if pi is not None:
            dpi[n, :, p] += (g * (y if max_value is None else y.clamp(max=max_value))).sum((1, 3), keepdim=True)
            g = g * blocks.pi[n, :, p]
        if max_value is not None:
            g = _where_positive(g, max_value - y)
        # From the last piece to the first: what one has won is no longer there for those before it.
        shares = []
        for lead in reversed(leads):
            rest = _where_positive(g, lead)
            shares.append(g - rest)
            g = rest
        block = torch.zeros_like(g)
        for k, won in enumerate([g, *reversed(shares)]):
            block += won * blocks.coefs[k][n, c, :, b]
            dcoefs[k][n, c, :, b] += (won * x).sum(2, keepdim=True)
            dcoefs[blocks.k + k][n, c, :, b] += won.sum(2, keepdim=True)
        dx_rows[at] = block
    dtheta = torch.stack([dcoef.flatten(1) for dcoef in dcoefs], 2).sum_to_size(theta.shape).to(theta.dtype)
    return dx, dtheta, None if pi is None else dpi.reshape(pi.shape).to(pi.dtype), None


def _statistics(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The mean of each plane, (N, C); with a `weight` of C elements its product with x, (N, 1, *spatial)."""
    dtype = arithmetic(x)
    mean = x.flatten(2).mean(2, dtype=dtype) if x.dim() > 2 else x.to(dtype)
    if weight is None:
        return mean, None
    x = dense(x)
    channels_last = is_channels_last(x)
    rows, weights = (as_rows(t, channels_last) for t in (x, weight.to(dtype).reshape(1, -1)))
    logits = torch.zeros((x.shape[0], 1, *x.shape[2:]), dtype=dtype)
    for at in cut(rows.shape):
        n, c, p, b = at
        as_rows(logits, False)[n, :, p] += (rows[at] * weights[:, c, :, b]).sum((1, 3), keepdim=True)
    return mean, logits


def _add_statistics_backward(
        dx: Tensor,
        dmean: Tensor,
        dlogits: Tensor | None,
        x: Tensor,
        weight: Tensor | None,
) -> Tensor | None:
    """Adds to `dx` what comes back through the statistics. Returns the gradient of `weight`."""
    channels_last = is_channels_last(dx)
    dx_rows, dmeans = (as_rows(t, channels_last) for t in (dx, dmean / math.prod(x.shape[2:])))
    if weight is None:
        for at in cut(dx_rows.shape):
            n, c, _, b = at
            dx_rows[at] += dmeans[n, c, :, b]
        return None
    x_rows, weights = (as_rows(t, channels_last) for t in (x, weight.to(dmean.dtype).reshape(1, -1)))
    dlogits = as_rows(dlogits, False)
    dweights = torch.zeros_like(weights)
    for at in cut(dx_rows.shape):
        n, c, p, b = at
        dx_rows[at] += torch.addcmul(dmeans[n, c, :, b], weights[:, c, :, b], dlogits[n, :, p])
        dweights[:, c, :, b] += (x_rows[at] * dlogits[n, :, p]).sum((0, 2), keepdim=True)
    return dweights.reshape(weight.shape).to(weight.dtype)


def _attention(logits: Tensor, bias: Tensor, settings: DyReLUSettings) -> tuple[Tensor, Tensor]:
    """The weight of each position, and what that is the minimum of and 3."""
    z = (logits + bias.to(logits.dtype)).flatten(1).div_(settings.tau)
    share = z.sub_(z.amax(1, keepdim=True)).exp_()
    share = share.div_(share.mean(1, keepdim=True)).reshape(logits.shape)
    return share.clamp(max=3).div_(settings.divisor), share


def _attention_backward(dpi: Tensor, share: Tensor, settings: DyReLUSettings) -> Tensor:
    """Gradient of the logits. That of the bias is zero: softmax does not see it."""
    dshare = dpi.masked_fill(share > 3, 0).div_(settings.divisor)
    mean = (dshare * share).flatten(1).mean(1).reshape(-1, *[1] * (share.dim() - 1))
    return dshare.sub_(mean).mul_(share).div_(settings.tau)


def dynamic_relu(
        x: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor,
        spatial_weight: Tensor | None,
        spatial_bias: Tensor | None,
        settings: DyReLUSettings,
) -> tuple[Tensor | None, ...]:
    """The whole of a module. Returns the output, then what `dynamic_relu_backward` takes as `found`."""
    mean, logits = _statistics(x, spatial_weight)
    hidden, z = perceptron(mean, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    residual = z.div_(2).tanh_()
    starts, ranges = mean.new_tensor(settings.starts), mean.new_tensor(settings.ranges)
    theta = residual.unflatten(1, (-1, len(starts))) * ranges + starts
    pi = share = None
    if logits is not None:
        pi, share = _attention(logits, spatial_bias, settings)
    return apply(x, theta, pi, settings.max_value), theta, mean, hidden, residual, pi, share


def dynamic_relu_backward(
        dy: Tensor,
        x: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor,
        spatial_weight: Tensor | None,
        spatial_bias: Tensor | None,
        settings: DyReLUSettings,
        found: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """A gradient or None for each argument but the last."""
    theta, mean, hidden, residual, pi, share = found
    dx, dtheta, dpi, _ = apply_backward(dy, x, theta, pi, settings.max_value)
    dlogits = dspatial_bias = None
    if dpi is not None:
        dlogits = _attention_backward(dpi, share, settings)
        dspatial_bias = torch.zeros_like(spatial_bias)
    dresidual = (dtheta * mean.new_tensor(settings.ranges)).reshape(residual.shape)
    dz = dresidual * (1 - residual * residual) * 0.5
    dmean, *dparams = perceptron_backward(dz, mean, hidden, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    dspatial_weight = _add_statistics_backward(dx, dmean, dlogits, x, spatial_weight)
    return dx, *dparams, dspatial_weight, dspatial_bias, None
