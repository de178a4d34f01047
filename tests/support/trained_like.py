"""A stand-in for a trained checkpoint, since none can be downloaded where the tests run."""
import timm
import torch
from torch import nn

from timm_dyacts.coverage import trained_like as coverage


def trained_like_(model: nn.Module, size: int = 64, in_chans: int = 3, seed: int = 0) -> nn.Module:
    """Give a model, in place, parameters and statistics such as training leaves. Returns it in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    batches = (torch.randn(4, in_chans, size, size, generator=generator) for _ in range(3))
    return coverage.trained_like_(model, batches, generator, scales=(0.4, 1.0), exact_statistics=False)


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
