"""Bipolar activations: every second channel gets the activation function mirrored through the origin.

``f_B(x)_c = s_c * f(s_c * x_c)`` with ``s_c`` +1 or -1. Flipping signs is exact in floating point, hence so is
``f_B(s * x) = s * f(x)``: a network with bipolar activations is, up to the signs of its channels, the network with the
plain ones.

Paper: `Shifting Mean Activation Towards Zero with Bipolar Activation Functions` (Eidnes & Nøkland, 2018)
    - https://arxiv.org/abs/1709.04054
"""
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import backends
from ..checks import (
    check_beside,
    check_bool,
    check_channels,
    check_choice,
    check_factor,
    check_input,
    check_positive,
    check_window_fits,
    expand_window,
    reachable_bound,
    unless_tracing,
)
from ..pooling.window import Window, trim_large
from ..registered import is_registered_for
from .reference import (
    activation_reference,
    max_pool_backward_reference,
    max_pool_reference,
    max_pool_with_indices_reference,
)
from .registered import MOST_ELEMENTS, max_pool_registered
from .signs import LAYOUTS, channel_signs, multiply_signs, overwrites

__all__ = [
    'LAYOUTS',
    'belu',
    'bipolar',
    'bipolar_max_pool',
    'bipolar_max_pool2d',
    'bleaky_relu',
    'bprelu',
    'brelu',
    'bselu',
    'channel_signs',
    'flip',
    'flip_back',
]


# The numbers of dimensions that the input of an activation may have
DIMS = (2, 3, 4, 5)


# FX keeps the functions marked by `wrap` as single nodes: a symbolic input has no shape for their checks to read. It
# finds them by their names in this module, so other modules have to call them as `functional.<name>`.
@torch.fx.wrap
def flip(x: Tensor, layout: str, inplace: bool, channel_dim: int) -> Tensor:
    """Multiply each channel by its sign."""
    if not torch.jit.is_scripting():
        check_choice('channel_dim', channel_dim, (1, -1))
        check_input(x, DIMS)
    return multiply_signs(x, layout, inplace, channel_dim)


@torch.fx.wrap
def flip_back(y: Tensor, layout: str, inplace: bool, channel_dim: int) -> Tensor:
    """Do the same with the result of an activation, which its backward pass may need unchanged."""
    if not torch.jit.is_scripting():
        check_input(y, DIMS, name='the result of the function')
    return multiply_signs(y, layout, overwrites(inplace), channel_dim)


def bipolar(
        x: Tensor,
        fn: Callable[[Tensor], Tensor],
        layout: str = 'interleaved',
        inplace: bool = False,
        channel_dim: int = 1,
) -> Tensor:
    """Apply the bipolar form of an elementwise function: ``s_c * fn(s_c * x_c)``.

    All bipolar activations share the following.

    Args:
        x: Input of shape (N, C, *spatial), with 0 to 3 spatial dimensions.
        fn: The function, tensor to tensor. It may work in place.
        layout: Which channels get the mirrored function, see ``channel_signs``.
        inplace: Whether the memory of ``x`` may be overwritten.
        channel_dim: 1, or -1 for an input of shape (N, *spatial, C).

    Returns:
        A tensor like ``x``.

    Raises:
        ValueError: If the rank is another, a dimension other than the batch is empty, or another argument is out of
            range.
        TypeError: If ``x`` has no floating-point dtype, or another argument the wrong type.
    """
    if not callable(fn):
        raise TypeError(f'fn must be a function of a tensor, got {fn!r}')
    check_bool('inplace', inplace)
    return flip_back(fn(flip(x, layout, inplace, channel_dim)), layout, inplace, channel_dim)


class _Activation(torch.autograd.Function):
    """Keeps the output of a ReLU for the backward pass, as PyTorch does, and the input of the others."""

    @staticmethod
    def forward(
            ctx,
            kernel: backends.Kernel,
            x: Tensor,
            weight: Tensor | None,
            kind: str,
            parameter: float,
            layout: str,
            inplace: bool,
    ) -> Tensor:
        y = backends.run_kernel(kernel, activation_reference, x, weight, kind, parameter, layout, inplace)
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(y if kind == 'relu' else x, weight)
        ctx.args = kind, parameter, layout, False
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        # ReLU has the same gradient at its output as at its input.
        args = (*ctx.saved_tensors, *ctx.args)
        name = 'brelu_backward' if ctx.args[0] == 'relu' else 'activation_backward'
        kernel = backends.find_kernel('bipolar', name, dy, *args)
        return None, *backends.differentiate(kernel, activation_reference, args, (dy,), ctx.needs_input_grad[1:])


def _activate(
        x: Tensor,
        weight: Tensor | None,
        kind: str,
        parameter: float,
        layout: str,
        inplace: bool,
        channel_dim: int,
) -> Tensor:
    """Apply a member of the family; ``weight``, ``kind`` and ``parameter`` as of ``activation_reference``."""
    if not torch.jit.is_scripting():
        _check_operands(x, weight, kind, parameter, layout, inplace, channel_dim)
        if kind == 'relu' and parameter != math.inf and reachable_bound(parameter, x.dtype) is None:
            parameter = math.inf
    planes = x if channel_dim == 1 else x.movedim(channel_dim, 1)
    # Others than ReLU need their input for the backward pass.
    inplace = inplace if kind == 'relu' else overwrites(inplace)
    if not torch.jit.is_scripting():
        kernel = backends.find_kernel('bipolar', 'brelu' if kind == 'relu' else 'activation', x, weight)
        if kernel is not None:
            args = planes, weight, kind, parameter, layout, inplace
            # Autograd has to hear of what is overwritten, even if it asks for no gradient.
            if inplace or backends.needs_grad(x, weight):
                y = _Activation.apply(kernel, *args)
            else:
                y = backends.run_kernel(kernel, activation_reference, *args)
            return y if channel_dim == 1 else y.movedim(1, channel_dim)
    y = activation_reference(planes, weight, kind, parameter, layout, inplace)
    return y if channel_dim == 1 else y.movedim(1, channel_dim)


@unless_tracing
def _check_operands(
        x: Tensor,
        weight: Tensor | None,
        kind: str,
        parameter: float,
        layout: str,
        inplace: bool,
        channel_dim: int,
) -> None:
    check_input(x, DIMS)
    check_choice('layout', layout, LAYOUTS)
    check_bool('inplace', inplace)
    check_choice('channel_dim', channel_dim, (1, -1))
    if kind == 'relu':
        if parameter != math.inf:
            check_positive('max_value', parameter)
    elif kind == 'elu':
        check_factor('alpha', parameter, x.dtype)
    elif kind == 'leaky_relu':
        check_factor('negative_slope', parameter, x.dtype)
    elif kind == 'prelu':
        _check_slopes(x, weight, channel_dim)


def _check_slopes(x: Tensor, weight: Tensor, channel_dim: int) -> None:
    check_beside('weight', weight, x)
    if weight.dim() > 1 or weight.numel() == 0:
        raise ValueError(f'weight must have shape (1,) or (C,), got {tuple(weight.shape)}')
    if weight.numel() != 1:
        check_channels(x, weight.numel(), channel_dim)


# A function for each member, written out: TorchScript compiles them from their source, and FX knows them by name.


@torch.fx.wrap
def brelu(
        x: Tensor,
        max_value: float | None = None,
        layout: str = 'interleaved',
        inplace: bool = False,
        channel_dim: int = 1,
) -> Tensor:
    """Bipolar ReLU: ``max(x, 0)`` on half of the channels, ``min(x, 0)`` on the others. See ``bipolar``.

    Args:
        max_value: Bound of the magnitude; 6 gives the bipolar form of ReLU6.
    """
    return _activate(x, None, 'relu', math.inf if max_value is None else max_value, layout, inplace, channel_dim)


@torch.fx.wrap
def belu(
        x: Tensor,
        alpha: float = 1.0,
        layout: str = 'interleaved',
        inplace: bool = False,
        channel_dim: int = 1,
) -> Tensor:
    """Bipolar form of ``F.elu``. See ``bipolar``."""
    return _activate(x, None, 'elu', alpha, layout, inplace, channel_dim)


@torch.fx.wrap
def bselu(x: Tensor, layout: str = 'interleaved', inplace: bool = False, channel_dim: int = 1) -> Tensor:
    """Bipolar form of ``F.selu``. See ``bipolar``."""
    return _activate(x, None, 'selu', 0.0, layout, inplace, channel_dim)


@torch.fx.wrap
def bleaky_relu(
        x: Tensor,
        negative_slope: float = 0.01,
        layout: str = 'interleaved',
        inplace: bool = False,
        channel_dim: int = 1,
) -> Tensor:
    """Bipolar form of ``F.leaky_relu``. See ``bipolar``."""
    return _activate(x, None, 'leaky_relu', negative_slope, layout, inplace, channel_dim)


@torch.fx.wrap
def bprelu(
        x: Tensor,
        weight: Tensor,
        layout: str = 'interleaved',
        inplace: bool = False,
        channel_dim: int = 1,
) -> Tensor:
    """Bipolar form of ``F.prelu``. See ``bipolar``.

    Args:
        weight: Slopes of the negative part, of shape (1,) or (C,).
    """
    return _activate(x, weight, 'prelu', 0.0, layout, inplace, channel_dim)


class _MaxPool(torch.autograd.Function):
    """Keeps one byte per window for the backward pass: the number of the element that has won."""

    @staticmethod
    def forward(ctx, kernel: backends.Kernel, x: Tensor, window: Window, ceil_mode: bool, layout: str) -> Tensor:
        y, winner = backends.run_kernel(kernel, max_pool_with_indices_reference, x, window, ceil_mode, layout)
        ctx.save_for_backward(winner)
        ctx.window, ctx.size = window, tuple(x.shape[2:])
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        winner, = ctx.saved_tensors
        args = dy, winner, ctx.size, ctx.window
        kernel = backends.find_kernel('bipolar', 'max_pool_backward', dy)
        # 64-bit winners are those of the reference, where the kernel of the forward pass could not be built.
        if kernel is None or torch.is_grad_enabled() or winner.dtype == torch.int64:
            dx = max_pool_backward_reference(*args)
        else:
            dx = backends.run_kernel(kernel, max_pool_backward_reference, *args)
        return None, dx, None, None, None


@torch.fx.wrap
def bipolar_max_pool(
        x: Tensor,
        kernel_size: list[int],
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        ceil_mode: bool,
        layout: str,
) -> Tensor:
    """Compute ``bipolar_max_pool2d`` with all arguments of the window given for both dimensions."""
    if not torch.jit.is_scripting():
        check_window_fits(x, kernel_size, stride, padding, dilation, ceil_mode)
        check_choice('layout', layout, LAYOUTS)
        kernel_size, stride, padding = trim_large(x, kernel_size, stride, padding, dilation, ceil_mode)
    batch = x if x.dim() == 4 else x.unsqueeze(0)
    if not torch.jit.is_scripting():
        kernel = backends.find_kernel('bipolar', 'max_pool', x)
        if kernel is not None:
            window = Window.of(kernel_size, stride, padding, dilation)
            args = batch, window, ceil_mode, layout
            if backends.needs_grad(x):
                y = _MaxPool.apply(kernel, *args)
            else:
                y, _ = backends.run_kernel(kernel, max_pool_with_indices_reference, *args)
            return y if x.dim() == 4 else y.squeeze(0)
        if math.prod(kernel_size) <= MOST_ELEMENTS and is_registered_for(x):
            y = max_pool_registered(batch, kernel_size, stride, padding, dilation, ceil_mode, layout)
            return y if x.dim() == 4 else y.squeeze(0)
    y = max_pool_reference(batch, kernel_size, stride, padding, dilation, ceil_mode, layout)
    return y if x.dim() == 4 else y.squeeze(0)


def bipolar_max_pool2d(
        x: Tensor,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        ceil_mode: bool = False,
        layout: str = 'interleaved',
) -> Tensor:
    """Max pooling on half of the channels, min pooling on the others: ``s_c * maxpool(s_c * x_c)``.

    Args:
        x: Input of shape (N, C, H, W) or (C, H, W).
        kernel_size: Size of the window.
        stride: Step of the window. Default: ``kernel_size``.
        padding: Positions added on both sides, at most half of the kernel. They take no part in the pooling.
        dilation: Step between the elements of a window.
        ceil_mode: Whether windows may start inside the input and end outside.
        layout: Which channels are min-pooled, see ``channel_signs``.

    Returns:
        A tensor of the dtype and memory format of ``x``, with the shape that ``F.max_pool2d`` gives.

    Raises:
        ValueError: If an argument is out of range, the rank is another, a dimension other than the batch is empty,
            or the window does not fit into the padded input.
        TypeError: If an argument has the wrong type, or ``x`` no floating-point dtype.
    """
    window = expand_window(2, kernel_size, stride, padding, dilation)
    check_bool('ceil_mode', ceil_mode)
    return bipolar_max_pool(x, *window, ceil_mode, layout)
