"""Dynamic ReLU as functions: of given coefficients, and of an input that they are computed from."""
import torch
from torch import Tensor

from .. import backends
from ..checks import check_beside, check_channels, check_finite, check_input, unless_tracing
from ..exporting import is_exporting
from ..registered import is_registered_for
from .exported import dynamic_relu_exported, dyrelu_exported
from .reference import (
    attention_reference,
    coefficients_reference,
    dynamic_relu_reference,
    dyrelu_reference,
    static_coefficients_reference,
    statistics_reference,
)
from .registered import MOST_PIECES, dynamic_relu_registered
from .settings import DyReLUParams, DyReLUSettings

__all__ = ['DIMS', 'attention', 'channels_first', 'coefficients', 'dynamic_relu', 'dyrelu', 'static_coefficients']

# The numbers of dimensions that an input may have.
DIMS = (2, 3, 4, 5)


# FX keeps the functions marked by ``wrap`` as single nodes: a symbolic input has no shape for their checks to read.
# It looks for them in this module, so other modules call them as attributes of it.
@torch.fx.wrap
def dyrelu(x: Tensor, theta: Tensor, pi: Tensor | None = None, max_value: float | None = None) -> Tensor:
    """Apply given piecewise linear functions: ``y = pi * min(max_k(a_k * x + b_k), max_value)``.

    Of pieces that tie, the last has the gradient: ``max(x, 0)`` has that of ReLU, zero at zero.

    Args:
        x: Input of shape (N, C, *spatial), with 0 to 3 spatial dimensions.
        theta: Coefficients of shape (N, C, 2K), or (N, 1, 2K) where all channels share them: the K slopes ``a``,
            then the K intercepts ``b``.
        pi: Weight of each position, of shape (N, 1, *spatial).
        max_value: Upper bound of the piecewise linear functions.

    Returns:
        A tensor like ``x``. The arithmetic is in at least fp32.

    Raises:
        ValueError: If a shape is not as above, a dimension of ``x`` other than the batch is empty, ``theta`` or ``pi``
            is on another device than ``x``, or ``max_value`` is not finite.
        TypeError: If a tensor has no floating-point dtype, or an argument the wrong type.
    """
    if not torch.jit.is_scripting():
        _check_operands(x, theta, pi, max_value)
        kernel = backends.find_kernel('dyrelu', 'dyrelu', x, theta, pi)
        if kernel is not None:
            if backends.needs_grad(x, theta, pi):
                return _DyReLUFunction.apply(kernel, x, theta, pi, max_value)
            return backends.run_kernel(kernel, dyrelu_reference, x, theta, pi, max_value)
        if is_exporting():
            return dyrelu_exported(x, theta, pi, max_value)
    return dyrelu_reference(x, theta, pi, max_value)


@torch.fx.wrap
def channels_first(x: Tensor, channels: int) -> Tensor:
    """View (N, *spatial, C) as (N, C, *spatial), and check that it is one with ``channels``."""
    if not torch.jit.is_scripting():
        check_input(x, DIMS)
        check_channels(x, channels, -1)
    return x.movedim(-1, 1)


@torch.fx.wrap
def dynamic_relu(x: Tensor, params: DyReLUParams, settings: DyReLUSettings) -> Tensor:
    """Compute the coefficients, and in mode "c" the attention, from the input, and apply them to it.

    Args:
        x: Input of shape (N, C, *spatial), with 0 to 3 spatial dimensions.
        params: The parameters of a ``layers.DyReLU``. Those of the attention are None except in mode "c".
        settings: Its settings. With ``inplace``, ``x`` may be overwritten where no gradient is needed.

    Returns:
        A tensor like ``x``.

    Raises:
        ValueError: If ``x`` has other dimensions or channels, or a dimension other than the batch is empty.
        TypeError: If ``x`` has no floating-point dtype.
    """
    if not torch.jit.is_scripting():
        _check_module_input(x, params)
        kernel = backends.find_kernel('dyrelu', 'dynamic_relu', x, *params)
        if kernel is not None:
            if backends.needs_grad(x, *params):
                # The backward pass needs the input.
                return _DynamicReLUFunction.apply(kernel, x, settings._replace(inplace=False), *params)
            y, *_ = backends.run_kernel(kernel, _forward_reference, x, settings, *params)
            return y
        if is_exporting():
            return dynamic_relu_exported(x, params, settings)
        if len(settings.alpha) <= MOST_PIECES and is_registered_for(x, *params):
            return dynamic_relu_registered(x, params, settings)
    return dynamic_relu_reference(x, params, settings)


def coefficients(x: Tensor, params: DyReLUParams, settings: DyReLUSettings) -> Tensor:
    """Compute the coefficients that ``dynamic_relu`` applies: (N, C or 1, 2K), in at least fp32."""
    _check_module_input(x, params)
    mean, _ = statistics_reference(x, None)
    return coefficients_reference(mean, params, settings)


@torch.fx.wrap
def static_coefficients(bias: Tensor, x: Tensor, settings: DyReLUSettings) -> Tensor:
    """Compute coefficients that do not depend on the input, for each of its samples: (N, C, 2K), in at least fp32.

    Args:
        bias: What ``fc2`` would add to the same for all inputs, (2KC,).
        x: Input of shape (N, C, *spatial).
        settings: Settings of a ``layers.DyReLU``.

    Raises:
        ValueError: If ``x`` has other dimensions or channels, or a dimension other than the batch is empty.
        TypeError: If ``x`` has no floating-point dtype.
    """
    if not torch.jit.is_scripting():
        check_input(x, DIMS)
        check_channels(x, bias.shape[0] // (2 * len(settings.alpha)))
    theta = static_coefficients_reference(bias, settings)
    return theta.expand(x.shape[0], theta.shape[1], theta.shape[2])


def attention(x: Tensor, params: DyReLUParams, settings: DyReLUSettings) -> Tensor | None:
    """Compute the attention that ``dynamic_relu`` applies: (N, 1, *spatial), in at least fp32; None without one."""
    _check_module_input(x, params)
    _, logits = statistics_reference(x, params.spatial_weight)
    return None if logits is None else attention_reference(logits, params.spatial_bias, settings)


@unless_tracing
def _check_operands(x: Tensor, theta: Tensor, pi: Tensor | None, max_value: float | None) -> None:
    check_input(x, DIMS)
    check_beside('theta', theta, x)
    if pi is not None:
        check_beside('pi', pi, x)
    if max_value is not None:
        check_finite('max_value', max_value)
    n, c, *spatial = x.shape
    shape = theta.shape
    channels_fit = len(shape) == 3 and (shape[1] == c or shape[1] == 1)
    if not channels_fit or shape[0] != n or shape[2] < 2 or shape[2] % 2:
        raise ValueError(f'theta must have shape (N, C or 1, 2K) with N={n}, C={c}, K >= 1, got {tuple(shape)}')
    if pi is not None and pi.shape != (n, 1, *spatial):
        raise ValueError(f'pi must have shape {(n, 1, *spatial)}, got {tuple(pi.shape)}')


def _check_module_input(x: Tensor, params: DyReLUParams) -> None:
    check_input(x, DIMS)
    check_channels(x, params.fc1_weight.shape[1])


class _DyReLUFunction(torch.autograd.Function):
    """``dyrelu`` by kernels. Only the operands are saved: the backward pass finds the largest pieces anew."""

    @staticmethod
    def forward(ctx, kernel: backends.Kernel, *args) -> Tensor:
        *operands, ctx.max_value = args
        ctx.save_for_backward(*operands)
        return backends.run_kernel(kernel, dyrelu_reference, *args)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        args = (*ctx.saved_tensors, ctx.max_value)
        kernel = backends.find_kernel('dyrelu', 'dyrelu_backward', dy, *args)
        return None, *backends.differentiate(kernel, dyrelu_reference, args, (dy,), ctx.needs_input_grad[1:])


class _DynamicReLUFunction(torch.autograd.Function):
    """``dynamic_relu`` by kernels.

    A single function, so that it takes few passes over the input and few launches, and that what goes from one of them
    to the next, such as partial sums and gradients that are added to in place, stays inside.
    """

    @staticmethod
    def forward(ctx, kernel: backends.Kernel, *args) -> Tensor:
        x, ctx.settings, *params = args
        y, *saved = backends.run_kernel(kernel, _forward_reference, *args)
        ctx.save_for_backward(x, *params, *saved)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # read once: activation checkpointing computes them when they are read
        operands = 1 + len(DyReLUParams._fields)
        (x, *params), saved = tensors[:operands], tensors[operands:]
        # The reference, which ran in place of a forward kernel that could not be built, has kept nothing.
        kernel = backends.find_kernel('dyrelu', 'dynamic_relu_backward', dy) if saved else None
        args = x, ctx.settings, *params
        return None, *backends.differentiate(
            kernel, _flat_reference, args, (dy,), ctx.needs_input_grad[1:], saved=saved)


def _flat_reference(x: Tensor, settings: DyReLUSettings, *params: Tensor | None) -> Tensor:
    """Compute the reference from the arguments of the kernels, of which autograd sees the tensors one by one."""
    return dynamic_relu_reference(x, DyReLUParams(*params), settings)


def _forward_reference(*args) -> tuple[Tensor]:
    return _flat_reference(*args),
