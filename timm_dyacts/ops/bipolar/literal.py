"""Bipolar forms written down as their definition reads, the way research code has it: what benchmarks compare with."""
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ['literal_bipolar']


def literal_bipolar(plain: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    """Give ``s * f(s * x)`` for a function f, as a function of a module (not used) and of x, shape (N, C, H, W)."""
    def f_bipolar(module: nn.Module, x: Tensor) -> Tensor:
        signs = torch.ones(x.shape[1], device=x.device, dtype=x.dtype)
        signs[1::2] = -1
        signs = signs.reshape(-1, 1, 1)
        return signs * plain(signs * x)
    return f_bipolar
