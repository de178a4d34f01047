"""SoftPool written down as its definition reads, the way research code has it: what benchmarks compare with."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ['literal_global_softpool', 'literal_softpool']


def literal_softpool(module: nn.Module, x: Tensor) -> Tensor:
    """Divide two average poolings: of the weighted elements and of the weights. Short, and it overflows.

    Args:
        module: A `layers.SoftPool2d`, for its window and `beta`.
        x: Input of shape (N, C, H, W).
    """
    weights = torch.exp(module.beta * x)
    window = module.kernel_size, module.stride, module.padding
    return F.avg_pool2d(weights * x, *window) / F.avg_pool2d(weights, *window)


def literal_global_softpool(module: nn.Module, x: Tensor) -> Tensor:
    """Do the same for the whole plane, with a `layers.GlobalSoftPool2d`."""
    weights = torch.exp(module.beta * x)
    return (weights * x).mean((2, 3), keepdim=True) / weights.mean((2, 3), keepdim=True)
