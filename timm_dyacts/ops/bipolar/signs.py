"""The signs of channels under bipolar operators."""
import torch
from torch import Tensor

from ..checks import check_choice, check_int

__all__ = ['LAYOUTS', 'channel_signs', 'multiply_signs', 'overwrites']

# Where the negative channels are
LAYOUTS = ('interleaved', 'halves')


def channel_signs(
        channels: int,
        layout: str = 'interleaved',
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
) -> Tensor:
    """Give the sign of each channel under a bipolar activation.

    Args:
        channels: Number of channels C.
        layout: ``'interleaved'``, as in the paper: +1 for even and -1 for odd channels; or ``'halves'``, as in the
            authors' code: +1 for the first half of the channels, -1 for the second. If C is odd, the first is larger.
        device: Device of the result.
        dtype: Dtype of the result.

    Returns:
        A tensor of shape (C,) of +1 and -1.

    Raises:
        ValueError: If ``layout`` is another, or ``channels`` is less than 1.
        TypeError: If ``channels`` is not an int.
    """
    if not torch.jit.is_scripting():
        check_choice('layout', layout, LAYOUTS)
        check_int('channels', channels, 1)
    signs = torch.ones(channels, device=device, dtype=dtype)
    if layout == 'halves':
        signs[(channels + 1) // 2:] = -1
    else:
        signs[1::2] = -1
    return signs


def multiply_signs(x: Tensor, layout: str, inplace: bool, channel_dim: int) -> Tensor:
    """Multiply each channel by its sign."""
    signs = channel_signs(x.shape[channel_dim], layout, x.device, x.dtype)
    if channel_dim == 1:
        signs = signs.reshape([x.shape[1]] + [1] * (x.dim() - 2))
    return x.mul_(signs) if inplace else x * signs


def overwrites(inplace: bool) -> bool:
    """Tell whether to overwrite what a backward pass might need, if the input may be overwritten.

    A trace has to be the same with gradients and without, since PyTorch compares the two: there, never.
    """
    tracing = False
    if not torch.jit.is_scripting():
        tracing = torch.jit.is_tracing()
    return inplace and not torch.is_grad_enabled() and not tracing
