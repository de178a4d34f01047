"""The two layers of Dynamic ReLU's hyper function as matrix products, for those who have no kernel for them.

Products that are told where to go are left alone by autocast.
"""
import torch
from torch import Tensor

__all__ = ['perceptron', 'perceptron_backward']


def perceptron(
        x: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """The hidden units and the outputs, in the dtype of `x`, of shape (N, channels)."""
    hidden = _layer(x, fc1_weight, fc1_bias).relu_()
    return hidden, _layer(hidden, fc2_weight, fc2_bias)


def perceptron_backward(
        dz: Tensor,
        x: Tensor,
        hidden: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of `x` and of the parameters."""
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
