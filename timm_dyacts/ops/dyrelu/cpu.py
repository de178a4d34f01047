"""The kernels of Dynamic ReLU for CPUs: PyTorch operations on blocks that stay in the cache."""
import math

import torch
from torch import Tensor

from ..checks import reachable_bound
from ..cpu_blocks import arithmetic, as_rows, cut, dense, is_channels_last
from .mlp import mlp, mlp_backward
from .settings import DyReLUParams, DyReLUSaved, DyReLUSettings

__all__ = ['dynamic_relu', 'dynamic_relu_backward', 'dyrelu', 'dyrelu_backward']


class _Blocks:
    """The operands of ``dyrelu`` as rows, which are computed with block by block."""

    def __init__(self, x: Tensor, theta: Tensor, pi: Tensor | None, max_value: float | None) -> None:
        self.x = dense(x)
        self.channels_last = is_channels_last(self.x)
        self.dtype = arithmetic(x, theta)
        self.rows = self.as_rows(self.x)
        coefs = theta.to(self.dtype).expand(-1, x.shape[1], -1).movedim(2, 0).contiguous()
        self.coefs = [self.as_rows(coef) for coef in coefs]
        self.pi = None if pi is None else as_rows(pi, False).to(self.dtype)
        self.max_value = reachable_bound(max_value, self.dtype)
        self.k = len(coefs) // 2

    def as_rows(self, t: Tensor) -> Tensor:
        return as_rows(t, self.channels_last)

    def pieces(self, at: tuple[slice, ...], out: Tensor | None = None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Compute the linear functions of a block.

        Returns:
            The block of ``x``; the largest of the linear functions; and, unless that goes to ``out``, for each function
            but the first by how much the largest of those before it exceeds it.
        """
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
    # Two operations: a single one with two broadcast operands is not vectorised.
    return torch.mul(x, slope, out=out).add_(intercept)


def _where_positive(g: Tensor, condition: Tensor) -> Tensor:
    """Compute ``g * (condition > 0)`` as the gradient of ReLU: several times as fast as with a tensor of bools."""
    return torch.ops.aten.threshold_backward(g, condition, 0)


def dyrelu(x: Tensor, theta: Tensor, pi: Tensor | None, max_value: float | None) -> Tensor:
    """Compute ``functional.dyrelu``."""
    blocks = _Blocks(x, theta, pi, max_value)
    max_value = blocks.max_value
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


def dyrelu_backward(
        dy: Tensor,
        x: Tensor,
        theta: Tensor,
        pi: Tensor | None,
        max_value: float | None,
) -> tuple[Tensor, Tensor, Tensor | None, None]:
    """Compute the gradients of ``x``, ``theta`` and ``pi``."""
    blocks = _Blocks(x, theta, pi, max_value)
    max_value = blocks.max_value
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
        # From the last piece to the first: each takes the gradients of the elements where it is the largest, and leaves
        # the rest to those before it.
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
    """Compute the mean of each plane, (N, C), and, given a ``weight``, its product with ``x``, (N, 1, *spatial)."""
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
    """Add to ``dx`` the gradients that pass through the statistics, and compute the gradient of ``weight``."""
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


def attention(logits: Tensor, bias: Tensor, settings: DyReLUSettings) -> tuple[Tensor, Tensor]:
    """Compute the attention, and the attention before it is bounded and divided."""
    z = (logits + bias.to(logits.dtype)).flatten(1).div_(settings.tau)
    share = z.sub_(z.amax(1, keepdim=True)).exp_()
    share = share.div_(share.mean(1, keepdim=True)).reshape(logits.shape)
    return share.clamp(max=3).div_(settings.divisor), share


def attention_backward(dpi: Tensor, share: Tensor, settings: DyReLUSettings) -> Tensor:
    """Compute the gradient of the logits. That of the bias is zero: softmax does not see it."""
    dshare = dpi.masked_fill(share > 3, 0).div_(settings.divisor)
    mean = (dshare * share).flatten(1).mean(1).reshape(-1, *[1] * (share.dim() - 1))
    return dshare.sub_(mean).mul_(share).div_(settings.tau)


def dynamic_relu(x: Tensor, settings: DyReLUSettings, *params: Tensor | None) -> tuple[Tensor | None, ...]:
    """Compute ``functional.dynamic_relu``. Returns the output, then the fields of ``DyReLUSaved``."""
    params = DyReLUParams(*params)
    mean, logits = _statistics(x, params.spatial_weight)
    hidden, z = mlp(mean, params)
    residual = z.div_(2).tanh_()
    starts, ranges = mean.new_tensor(settings.starts), mean.new_tensor(settings.ranges)
    theta = residual.unflatten(1, (-1, len(starts))) * ranges + starts
    pi = share = None
    if logits is not None:
        pi, share = attention(logits, params.spatial_bias, settings)
    y = dyrelu(x, theta, pi, settings.max_value)
    return y, *DyReLUSaved(theta, mean, hidden, residual, pi, share)


def dynamic_relu_backward(
        dy: Tensor,
        x: Tensor,
        settings: DyReLUSettings,
        *params: Tensor | None,
        saved: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of ``x`` and the parameters."""
    params, saved = DyReLUParams(*params), DyReLUSaved(*saved)
    residual = saved.residual
    dx, dtheta, dpi, _ = dyrelu_backward(dy, x, saved.theta, saved.pi, settings.max_value)
    dlogits = dspatial_bias = None
    if dpi is not None:
        dlogits = attention_backward(dpi, saved.share, settings)
        dspatial_bias = torch.zeros_like(params.spatial_bias)
    dresidual = (dtheta * residual.new_tensor(settings.ranges)).reshape(residual.shape)
    dz = dresidual * (1 - residual * residual) * 0.5
    dmean, *dparams = mlp_backward(dz, saved.mean, saved.hidden, params)
    dspatial_weight = _add_statistics_backward(dx, dmean, dlogits, x, params.spatial_weight)
    return dx, None, *dparams, dspatial_weight, dspatial_bias
