"""Dynamic ReLU as exported graphs have it: few nodes, and the kinds that runtimes compute fast.

The coefficients are shaped to be broadcast over the positions as they come out of the hyper function, and taken apart
by a single split; the rest is a product and a sum for each piece, and their maximum. The results are those of the
reference up to rounding. The gradient is not: pieces that tie share it.
"""
import torch
from torch import Tensor

from ..autocast import without_autocast
from .reference import hyper_reference
from .settings import DyReLUParams, DyReLUSettings

__all__ = ['dynamic_relu_exported', 'dyrelu_exported']


def dyrelu_exported(x: Tensor, theta: Tensor, pi: Tensor | None, max_value: float | None) -> Tensor:
    """Compute what ``functional.dyrelu`` does."""
    positions = x.unsqueeze(-1) if x.dim() == 2 else x
    theta = theta.reshape([theta.shape[0], theta.shape[1], theta.shape[2]] + [1] * (positions.dim() - 3))
    y = _largest_piece(positions, theta, max_value)
    y = y.squeeze(-1) if x.dim() == 2 else y
    return (y if pi is None else y * pi).to(x.dtype)


def dynamic_relu_exported(x: Tensor, params: DyReLUParams, settings: DyReLUSettings) -> Tensor:
    """Compute what ``functional.dynamic_relu`` does."""
    positions = x.unsqueeze(-1) if x.dim() == 2 else x
    mean = positions.mean(list(range(2, positions.dim())), dtype=torch.promote_types(x.dtype, torch.float32))
    z = hyper_reference(mean, params)
    k = len(settings.alpha)
    shape = [2 * k] + [1] * (positions.dim() - 3)
    # start + range * tanh(z / 2), with a sigmoid: it merges with the product of matrices before it
    ranges = z.new_tensor(settings.ranges).reshape(shape)
    starts = z.new_tensor(settings.starts).reshape(shape)
    theta = torch.sigmoid(z).reshape([-1, z.shape[1] // (2 * k), *shape]) * (2 * ranges) + (starts - ranges)
    y = _largest_piece(positions, theta, settings.max_value)
    y = y.squeeze(-1) if x.dim() == 2 else y
    if params.spatial_weight is not None and params.spatial_bias is not None:
        y = y * _attention(x, params.spatial_weight, params.spatial_bias, settings)
    return y.to(x.dtype)


def _largest_piece(x: Tensor, theta: Tensor, max_value: float | None) -> Tensor:
    """Compute ``min(max_k(a_k * x + b_k), max_value)`` from coefficients of shape (N, C or 1, 2K, 1, ...)."""
    coefs = torch.split(theta, 1, 2)
    k = len(coefs) // 2
    y = x * coefs[0] + coefs[k]
    for slope, intercept in zip(coefs[1:k], coefs[k + 1:], strict=True):
        y = torch.maximum(y, x * slope + intercept)
    return y if max_value is None else torch.clamp(y, max=max_value)


def _attention(x: Tensor, weight: Tensor, bias: Tensor, settings: DyReLUSettings) -> Tensor:
    """Compute the attention of mode "c", (N, 1, *spatial)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    # A product of matrices, which runtimes compute several times as fast as a product and its sum over the channels
    logits = without_autocast(torch.matmul, weight.to(dtype), x.unsqueeze(-1).flatten(2).to(dtype))
    z = (logits + bias.to(dtype)) / settings.tau
    e = torch.exp(z - z.amax(2, keepdim=True))
    pi = torch.clamp(e / e.mean(2, keepdim=True), max=3.0)
    if settings.paper_scale:
        pi = pi / 3
    return pi.reshape([x.shape[0], 1, *x.shape[2:]])
