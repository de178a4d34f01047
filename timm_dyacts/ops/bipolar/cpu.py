"""Bipolar ReLU on CPUs. The other members of the family run as their references here."""
import math

import torch
from torch import Tensor

__all__ = ['brelu', 'brelu_backward']


def brelu(x: Tensor, weight: None, kind: str, bound: float, layout: str, inplace: bool) -> Tensor:
    """Compute bipolar ReLU up to a bound in one pass over memory, whatever its format."""
    y = x if inplace else torch.empty_like(x)
    channels = x.shape[1]
    if layout == 'halves':
        positive, negative = slice(0, (channels + 1) // 2), slice((channels + 1) // 2, None)
    else:
        positive, negative = slice(0, None, 2), slice(1, None, 2)
    if x.stride(1) == 1:
        # Slices of the channels would be read and written one number at a time.
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
    """Compute the gradient of the input from the output: the mask ``y != 0`` does not depend on the channel's sign."""
    dx = torch.ops.aten.hardshrink_backward(dy, y, 0)
    if bound < math.inf:
        torch.ops.aten.hardtanh_backward(dx, y, -bound, bound, grad_input=dx)
    return dx, None, None, None, None, None
