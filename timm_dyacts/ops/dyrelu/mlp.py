"""The two layers that compute the coefficients, as matrix products, for kernels that have nothing faster.

Autocast leaves products alone that are given a tensor for their result.
"""
import torch
from torch import Tensor

from .settings import DyReLUParams

__all__ = ['mlp', 'mlp_backward']


def mlp(x: Tensor, params: DyReLUParams) -> tuple[Tensor, Tensor]:
    """Compute the hidden units and the outputs, in the dtype of ``x``, of shape (N, C)."""
    hidden = _layer(x, params.fc1_weight, params.fc1_bias).relu_()
    return hidden, _layer(hidden, params.fc2_weight, params.fc2_bias)


def mlp_backward(dz: Tensor, x: Tensor, hidden: Tensor, params: DyReLUParams) -> tuple[Tensor, ...]:
    """Compute the gradients of ``x`` and of the four parameters from ``dz``, that of the outputs."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias, *_ = params
    dhidden = torch.ops.aten.threshold_backward(_product(dz, fc2_weight), hidden, 0)
    return (
        _product(dhidden, fc1_weight),
        _product(dhidden.t(), x).to(fc1_weight.dtype),
        dhidden.sum(0).to(fc1_bias.dtype),
        _product(dz.t(), hidden).to(fc2_weight.dtype),
        dz.sum(0).to(fc2_bias.dtype),
    )


def _layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias.to(x.dtype), x, weight.to(x.dtype).t(), out=x.new_empty(x.shape[0], weight.shape[0]))


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b.to(a.dtype), out=a.new_empty(a.shape[0], b.shape[1]))
