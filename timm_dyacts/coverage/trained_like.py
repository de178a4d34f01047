"""A stand-in for a trained checkpoint, for where none can be had.

A fresh network hides errors: its BatchNorm statistics are 0 and 1, its biases 0, and in ResNets the last scale of each
residual branch too.
"""
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..convert.inputs import Inputs

__all__ = ['trained_like_']


@torch.no_grad()
def trained_like_(
        model: nn.Module,
        batches: Iterable[Tensor | Inputs],
        generator: torch.Generator,
        *,
        scales: tuple[float, float],
        exact_statistics: bool,
) -> nn.Module:
    """Give a model parameters and statistics such as training leaves, in place, and put it into eval mode.

    Scales and biases are drawn at random, statistics are then settled on data: activations keep a sensible size.

    Args:
        model: The model.
        batches: Inputs, or arguments, that settle the statistics. They are asked for after the parameters have been
            drawn, so they may come from the same generator.
        generator: The source of the random numbers.
        scales: The smallest scale, and how much larger the largest one is. A tenth of the scales becomes negative.
        exact_statistics: Leave the statistics at the plain average over the batches. Otherwise they are the running
            average, moved at random from there.

    Returns:
        The model.
    """
    smallest, spread = scales
    for name, p in model.named_parameters():
        if p.ndim > 1:
            continue
        if name.endswith('weight'):
            signs = 1 - 2 * (torch.rand(p.shape, generator=generator) < 0.1).float()
            p.copy_(signs * (smallest + spread * torch.rand(p.shape, generator=generator)))
        else:
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    if exact_statistics:
        _average_statistics(model, batches)
    else:
        model.train()
        for batch in batches:
            model(batch)
        _move_statistics(model, generator)
    return model.eval()


def _average_statistics(model: nn.Module, batches: Iterable[Tensor | Inputs]) -> None:
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average
    model.eval()  # in training detectors ask for boxes
    for norm in norms:
        norm.train()
    for batch in batches:
        batch.call(model) if isinstance(batch, Inputs) else model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _move_statistics(model: nn.Module, generator: torch.Generator) -> None:
    for name, buffer in model.named_buffers():
        if name.endswith('running_mean'):
            buffer.add_(0.2 * torch.randn(buffer.shape, generator=generator))
        elif name.endswith('running_var'):
            buffer.mul_(0.7 + 0.6 * torch.rand(buffer.shape, generator=generator))
