"""Products that autocast leaves in the precision of their operands."""
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ['without_autocast']


def without_autocast(function: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
    """Compute ``function(x, *args)`` with autocast turned off, if it is on."""
    kind = x.device.type
    # Some types of devices have none. Dynamo cannot trace the second question; where it is at work, the third has an
    # answer. Where autocast is off, a graph need not hold that it is.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
    if available and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return function(x, *args)
    return function(x, *args)
