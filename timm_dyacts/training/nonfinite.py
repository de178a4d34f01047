"""Find where a NaN or an infinity came from."""
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ['NonFiniteLossError', 'check_finite', 'find_nonfinite', 'first_nonfinite_tensor']


class NonFiniteLossError(RuntimeError):
    """The training loss, or what is trained, became NaN or infinite."""


def first_nonfinite_tensor(model: nn.Module) -> str | None:
    """Give the name of the first parameter or buffer of a model that is not finite, ``None`` if all are."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            return name
    return None


def check_finite(model: nn.Module, epoch: int, samples: int) -> None:
    """Raise ``NonFiniteLossError`` if a value of a model is not finite: such a state must not replace a good one.

    Args:
        model: The model.
        epoch: The epoch, for the message.
        samples: Number of images of it that have been trained on, for the message.
    """
    name = first_nonfinite_tensor(model)
    if name is not None:
        raise NonFiniteLossError(
            f'{name} is not finite any more at epoch {epoch} after {samples} images. Lower --lr, set --clip-grad, or '
            f'train without --amp; the checkpoints before are kept.')


@torch.no_grad()
def find_nonfinite(
        model: nn.Module,
        images: Tensor,
        autocast: Callable[[], AbstractContextManager[Any]],
) -> str:
    """Say where the first value that is not finite appears when a model computes a batch.

    Args:
        model: The model, whose gradients are still those of the update before.
        images: Its input, shape (N, C, H, W).
        autocast: Context of the forward pass.

    Returns:
        A sentence that names the images, a gradient, a parameter, or the module.
    """
    if not images.isfinite().all():
        return 'The images of the batch hold it already.'
    # The backward pass runs from the last module to the first, so that a bad gradient has spread to those before.
    bad_gradients = [n for n, p in model.named_parameters() if p.grad is not None and not _is_finite(p.grad)]
    if bad_gradients:
        return f'It first appeared in the gradient of {bad_gradients[-1]}, in the backward pass of the step before.'
    # The buffers tell nothing: the pass that gave the bad loss has spoilt the statistics of BatchNorm.
    for name, parameter in model.named_parameters():
        if not _is_finite(parameter):
            return f'{name} is not finite any more.'
    if any(hasattr(parameter, 'to_local') for parameter in model.parameters()):
        # A pass of a model that processes share takes all of them, and some may have found it by now.
        return 'It is not in the parameters and gradients that this process has a share of.'
    module = _first_module(model, images, autocast)
    return f'It first appeared in the output of {module}.' if module else 'All modules are finite: it is in the loss.'


def _is_finite(tensor: Tensor) -> bool:
    """Say whether a tensor is finite; of one that processes share, the share of this one."""
    local = tensor.to_local() if hasattr(tensor, 'to_local') else tensor
    return bool(local.isfinite().all())


def _first_module(
        model: nn.Module,
        images: Tensor,
        autocast: Callable[[], AbstractContextManager[Any]],
) -> str | None:
    """Find the first module, innermost first, whose output is not finite."""
    found: list[str] = []

    def register(name: str, module: nn.Module) -> RemovableHandle:
        def check(module: nn.Module, args: tuple, output: object) -> None:
            if not found and isinstance(output, Tensor) and not output.isfinite().all():
                found.append(f'{name or "the model"} ({type(module).__name__})')
        return module.register_forward_hook(check)

    handles = [register(name, module) for name, module in model.named_modules()]
    # The pass must not count in the statistics of the model. In eval mode it could miss what happened.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with autocast():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return found[0] if found else None
