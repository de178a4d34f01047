"""Autocast, as code sees it that keeps a product of its own in full precision."""
import torch

__all__ = ['autocast_is_on']


def autocast_is_on(device_type: str) -> bool:
    """Tell whether autocast is on for a type of devices, some of which have none."""
    # Dynamo cannot trace the second question. Where it is at work, the third has an answer.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)
    return available and torch.is_autocast_enabled(device_type)
