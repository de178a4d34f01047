"""A stand-in for a trained checkpoint, since none can be downloaded where the tests run.

A fresh network hides errors: its BatchNorm statistics are 0 and 1, its biases 0, and in ResNets the last scale of each
residual branch too. Here all of these are drawn at random, and the statistics are then settled on data, so that
activations keep a sensible size.
"""
import timm
import torch
from torch import nn


@torch.no_grad()
def trained_like_(model: nn.Module, size: int = 64, in_chans: int = 3, seed: int = 0) -> nn.Module:
    """Give a model, in place, parameters and statistics such as training leaves. Returns it in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            continue
        if name.endswith('weight'):
            signs = 1 - 2 * (torch.rand(p.shape, generator=generator) < 0.1).float()
            p.copy_(signs * (0.4 + torch.rand(p.shape, generator=generator)))
        else:
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    model.train()
    for _ in range(3):
        model(torch.randn(4, in_chans, size, size, generator=generator))
    for name, buffer in model.named_buffers():
        if name.endswith('running_mean'):
            buffer.add_(0.2 * torch.randn(buffer.shape, generator=generator))
        elif name.endswith('running_var'):
            buffer.mul_(0.7 + 0.6 * torch.rand(buffer.shape, generator=generator))
    return model.eval()


def trained_like(name: str, **kwargs) -> nn.Module:
    """A timm model by name, as if trained."""
    torch.manual_seed(0)
    return trained_like_(timm.create_model(name, **kwargs), in_chans=kwargs.get('in_chans', 3))


def probe(size: int = 64, in_chans: int = 3, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, in_chans, size, size, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model.eval()(x)


def max_diff(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference, relative to the largest absolute element of ``b``."""
    return ((a - b).abs().max() / b.abs().max()).item()
