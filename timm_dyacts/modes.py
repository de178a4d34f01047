"""Eval mode for a while."""
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ['evaluating']


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put a model into eval mode, and at the end each of its modules into the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training
