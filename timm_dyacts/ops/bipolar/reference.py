"""Bipolar operators in plain differentiable operations, and the kinds of activations that kernels know.

A new kind is a branch of ``_plain`` here and a branch each of ``_plain`` and ``_plain_gradient`` in ``triton.py``.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autocast import without_autocast
from ..pooling.window import Window
from .signs import multiply_signs, overwrites

__all__ = [
    'activation_reference',
    'max_pool_backward_reference',
    'max_pool_reference',
    'max_pool_with_indices_reference',
]


def _plain(u: Tensor, weight: Tensor | None, kind: str, parameter: float) -> Tensor:
    """Compute the plain activation. It may overwrite ``u``."""
    if kind == 'relu':
        y = F.relu(u, inplace=True) if parameter == math.inf else F.hardtanh(u, 0.0, parameter, inplace=True)
    elif kind == 'elu':
        y = F.elu(u, parameter)
    elif kind == 'selu':
        y = F.selu(u)
    elif kind == 'leaky_relu':
        y = F.leaky_relu(u, parameter)
    else:
        assert kind == 'prelu' and weight is not None
        # In the dtype of the input, whatever that of the slopes: autocast would have both in another.
        weight = weight.to(u.dtype)
        y = F.prelu(u, weight) if torch.jit.is_scripting() else without_autocast(F.prelu, u, weight)
    return y


def activation_reference(
        x: Tensor,
        weight: Tensor | None,
        kind: str,
        parameter: float,
        layout: str,
        inplace: bool,
) -> Tensor:
    """Compute the bipolar form of an activation of (N, C, *spatial).

    Args:
        x: Input.
        weight: Slopes of ``'prelu'``, of shape (1,) or (C,).
        kind: The plain activation: ``'relu'``, ``'elu'``, ``'selu'``, ``'leaky_relu'`` or ``'prelu'``.
        parameter: The bound of ``'relu'``, alpha of ``'elu'``, the negative slope of ``'leaky_relu'``.
        layout: Which channels are negative.
        inplace: Whether the memory of ``x`` may be overwritten.
    """
    y = _plain(multiply_signs(x, layout, inplace, 1), weight, kind, parameter)
    # The backward pass may need the result of the plain activation.
    return multiply_signs(y, layout, overwrites(inplace), 1)


def max_pool_reference(
        x: Tensor,
        kernel_size: list[int],
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        ceil_mode: bool,
        layout: str,
) -> Tensor:
    """Compute bipolar max pooling of (N, C, H, W)."""
    y = F.max_pool2d(multiply_signs(x, layout, False, 1), kernel_size, stride, padding, dilation, ceil_mode)
    return multiply_signs(y, layout, False, 1)


def max_pool_with_indices_reference(
        x: Tensor,
        window: Window,
        ceil_mode: bool,
        layout: str,
) -> tuple[Tensor, Tensor]:
    """Compute bipolar max pooling with the arguments of the kernel.

    Returns:
        The output, and where its elements lie in the plane: PyTorch's indices, where the kernel gives numbers within
        the window.
    """
    kernel_size, stride, padding, dilation = (sizes[1:] for sizes in window)
    y, indices = F.max_pool2d(
        multiply_signs(x, layout, False, 1), kernel_size, stride, padding, dilation, ceil_mode, return_indices=True)
    return multiply_signs(y, layout, False, 1), indices


def max_pool_backward_reference(dy: Tensor, winner: Tensor, size: tuple[int, int], window: Window) -> Tensor:
    """Compute the gradient of the input of bipolar max pooling in operations that can be differentiated again.

    Args:
        dy: Gradient of the output.
        winner: The second output of the kernel or of its reference.
        size: H and W of the input.
        window: The window.
    """
    indices = winner
    if winner.dtype != torch.int64:
        (_, _, width), (_, *stride), (_, *padding), (_, *dilation) = window
        winner = winner.reshape(dy.shape).long()
        rows, columns = (
            torch.arange(count, device=dy.device) * s - p
            for count, s, p in zip(dy.shape[2:], stride, padding, strict=True)
        )
        rows = rows[:, None] + winner // width * dilation[0]
        indices = rows * size[1] + columns + winner % width * dilation[1]
    planes = (*dy.shape[:2], dy.shape[2] * dy.shape[3])
    dx = dy.new_zeros(*dy.shape[:2], size[0] * size[1])
    return dx.scatter_add(2, indices.reshape(planes), dy.reshape(planes)).reshape(*dy.shape[:2], *size)
