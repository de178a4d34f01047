"""Bipolar activations: every second channel gets the activation function mirrored through the origin.

``f_B(x)_c = s_c * f(s_c * x_c)`` with ``s_c`` +1 or -1. Flipping signs is exact in floating point, hence so is
``f_B(s * x) = s * f(x)``: a network with bipolar activations is, up to the signs of its channels, the network with the
plain ones.

Paper: `Shifting Mean Activation Towards Zero with Bipolar Activation Functions` (Eidnes & Nøkland, 2018)
    - https://arxiv.org/abs/1709.04054
"""
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import backends
from ..ops.checks import (
    check_channels,
    check_choice,
    check_finite,
    check_input,
    check_int,
    check_positive,
    check_window_fits,
    expand_window,
    unless_tracing,
)
from ..ops.pooling.window import Window
from .forms import Form, Place, static_form

__all__ = [
    'BELU',
    'BLeakyReLU',
    'BPReLU',
    'BReLU',
    'BSELU',
    'Bipolar',
    'BipolarMaxPool2d',
    'belu',
    'bipolar',
    'bipolar_max_pool2d',
    'bleaky_relu',
    'bprelu',
    'brelu',
    'bselu',
    'channel_signs',
]

_LAYOUTS = ('interleaved', 'halves')


def channel_signs(
        channels: int,
        layout: str = 'interleaved',
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
) -> Tensor:
    """Gives the sign of each channel under a bipolar activation.

    Args:
        channels: Number of channels C.
        layout: "interleaved", as in the paper: +1 for even and -1 for odd channels; or "halves", as in the authors'
            code: +1 for the first half of the channels, which is the larger one if C is odd, -1 for the second.
        device: Device of the result.
        dtype: Dtype of the result.

    Returns:
        A tensor of shape (C,) of +1 and -1.

    Raises:
        ValueError: If `layout` is another, or `channels` is less than 1.
        TypeError: If `channels` is not an int.
    """
    if not torch.jit.is_scripting():
        check_choice('layout', layout, _LAYOUTS)
        check_int('channels', channels, 1)
    signs = torch.ones(channels, device=device, dtype=dtype)
    if layout == 'halves':
        signs[(channels + 1) // 2:] = -1
    else:
        signs[1::2] = -1
    return signs


# FX keeps the functions marked by `wrap` as single nodes: a symbolic input has no shape for their checks to read.
@torch.fx.wrap
def _flip(x: Tensor, layout: str, inplace: bool, channel_dim: int) -> Tensor:
    """Multiplies each channel by its sign."""
    if not torch.jit.is_scripting():
        check_input(x, (2, 3, 4, 5))
    signs = channel_signs(x.shape[channel_dim], layout, x.device, x.dtype)
    if channel_dim == 1:
        signs = signs.reshape([x.shape[1]] + [1] * (x.dim() - 2))
    return x.mul_(signs) if inplace else x * signs


@torch.fx.wrap
def _flip_back(y: Tensor, layout: str, inplace: bool, channel_dim: int) -> Tensor:
    """`_flip` for the result of an activation, which that may need unchanged for its backward pass."""
    return _flip(y, layout, inplace and not torch.is_grad_enabled(), channel_dim)


def bipolar(
        x: Tensor,
        fn: Callable[[Tensor], Tensor],
        layout: str = 'interleaved',
        inplace: bool = False,
        channel_dim: int = 1,
) -> Tensor:
    """Applies the bipolar form of an elementwise function: ``s_c * fn(s_c * x_c)``.

    All bipolar activations of this module share the following.

    Args:
        x: Input of shape (N, C, *spatial), with 0 to 3 spatial dimensions.
        fn: The function, tensor to tensor. It may work in place.
        layout: Which channels get the mirrored function, see `channel_signs`.
        inplace: Whether the memory of `x` may be overwritten.
        channel_dim: 1, or -1 for an input of shape (N, *spatial, C).

    Returns:
        A tensor like `x`.

    Raises:
        ValueError: If the rank is another, a dimension other than the batch is empty, or `layout` is unknown.
        TypeError: If `x` has no floating-point dtype.
    """
    return _flip_back(fn(_flip(x, layout, inplace, channel_dim)), layout, inplace, channel_dim)


def _activation_definition(
        x: Tensor,
        weight: Tensor | None,
        kind: str,
        parameter: float,
        layout: str,
        inplace: bool,
) -> Tensor:
    """The members of the family in plain operations."""
    u = _flip(x, layout, inplace, 1)
    if kind == 'relu':
        y = F.relu(u, inplace=True) if parameter == math.inf else F.hardtanh(u, 0.0, parameter, inplace=True)
    elif kind == 'elu':
        y = F.elu(u, parameter)
    elif kind == 'selu':
        y = F.selu(u)
    elif weight is None:
        y = F.leaky_relu(u, parameter)
    else:
        y = F.prelu(u, weight)
    return _flip_back(y, layout, inplace, 1)


class _ActivationFunction(torch.autograd.Function):
    """Keeps the output of a ReLU for the backward pass, as PyTorch does, and the input of the others."""

    @staticmethod
    def forward(
            ctx,
            fused: Callable,
            x: Tensor,
            weight: Tensor | None,
            kind: str,
            parameter: float,
            layout: str,
            inplace: bool,
    ) -> Tensor:
        y = backends.run_kernel(fused, _activation_definition, x, weight, kind, parameter, layout, inplace)
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
        fused = backends.find_kernel('bipolar', name, dy, *args)
        return None, *backends.differentiate(fused, _activation_definition, args, (dy,), ctx.needs_input_grad[1:])


def _activate(
        x: Tensor,
        weight: Tensor | None,
        kind: str,
        parameter: float,
        layout: str,
        inplace: bool,
        channel_dim: int,
) -> Tensor:
    """Kinds: "relu" up to `parameter`, "elu" and "leaky_relu" with that `parameter`, "selu", "prelu" with `weight`."""
    if not torch.jit.is_scripting():
        _check_operands(x, weight, layout, channel_dim)
    planes = x if channel_dim == 1 else x.movedim(channel_dim, 1)
    # Others than ReLU need their input for the backward pass.
    inplace = inplace and (kind == 'relu' or not torch.is_grad_enabled())
    if not torch.jit.is_scripting():
        fused = backends.find_kernel('bipolar', 'brelu' if kind == 'relu' else 'activation', x, weight)
        if fused is not None:
            y = _ActivationFunction.apply(fused, planes, weight, kind, parameter, layout, inplace)
            return y if channel_dim == 1 else y.movedim(1, channel_dim)
    y = _activation_definition(planes, weight, kind, parameter, layout, inplace)
    return y if channel_dim == 1 else y.movedim(1, channel_dim)


@unless_tracing
def _check_operands(x: Tensor, weight: Tensor | None, layout: str, channel_dim: int) -> None:
    check_input(x, (2, 3, 4, 5))
    check_choice('layout', layout, _LAYOUTS)
    if weight is not None and weight.numel() != 1:
        check_channels(x.movedim(channel_dim, 1), weight.numel())


@torch.fx.wrap
def brelu(
        x: Tensor,
        max_value: float | None = None,
        layout: str = 'interleaved',
        inplace: bool = False,
        channel_dim: int = 1,
) -> Tensor:
    """Bipolar ReLU: ``max(x, 0)`` on half of the channels, ``min(x, 0)`` on the others. See `bipolar`.

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
    """Bipolar form of `F.elu`. See `bipolar`."""
    return _activate(x, None, 'elu', alpha, layout, inplace, channel_dim)


@torch.fx.wrap
def bselu(x: Tensor, layout: str = 'interleaved', inplace: bool = False, channel_dim: int = 1) -> Tensor:
    """Bipolar form of `F.selu`. See `bipolar`."""
    return _activate(x, None, 'selu', 0.0, layout, inplace, channel_dim)


@torch.fx.wrap
def bleaky_relu(
        x: Tensor,
        negative_slope: float = 0.01,
        layout: str = 'interleaved',
        inplace: bool = False,
        channel_dim: int = 1,
) -> Tensor:
    """Bipolar form of `F.leaky_relu`. See `bipolar`."""
    return _activate(x, None, 'leaky_relu', negative_slope, layout, inplace, channel_dim)


@torch.fx.wrap
def bprelu(
        x: Tensor,
        weight: Tensor,
        layout: str = 'interleaved',
        inplace: bool = False,
        channel_dim: int = 1,
) -> Tensor:
    """Bipolar form of `F.prelu`. See `bipolar`.

    Args:
        weight: Slopes of the negative part, of shape (1,) or (C,).
    """
    return _activate(x, weight, 'prelu', 0.0, layout, inplace, channel_dim)


def _max_pool_definition(
        x: Tensor,
        kernel_size: list[int],
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        ceil_mode: bool,
        layout: str,
) -> Tensor:
    """Bipolar max pooling of (N, C, H, W) in plain operations."""
    y = F.max_pool2d(_flip(x, layout, False, 1), kernel_size, stride, padding, dilation, ceil_mode)
    return _flip(y, layout, False, 1)


class _MaxPoolFunction(torch.autograd.Function):
    """Keeps one byte per window for the backward pass: the number of the element that has won."""

    @staticmethod
    def forward(ctx, fused: Callable, x: Tensor, window: Window, ceil_mode: bool, layout: str) -> Tensor:
        y, winner = backends.run_kernel(fused, _max_pool_with_indices, x, window, ceil_mode, layout)
        ctx.save_for_backward(winner)
        ctx.window, ctx.size = window, tuple(x.shape[2:])
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        winner, = ctx.saved_tensors
        args = dy, winner, ctx.size, ctx.window
        fused = backends.find_kernel('bipolar', 'max_pool_backward', dy)
        if fused is None or torch.is_grad_enabled() or winner.dtype == torch.int64:
            dx = _max_pool_backward_definition(*args)
        else:
            dx = backends.run_kernel(fused, _max_pool_backward_definition, *args)
        return None, dx, None, None, None


def _max_pool_with_indices(x: Tensor, window: Window, ceil_mode: bool, layout: str) -> tuple[Tensor, Tensor]:
    """The pass in plain operations: with PyTorch's indices in place of numbers within the window."""
    kernel_size, stride, padding, dilation = (dims[1:] for dims in window)
    y, indices = F.max_pool2d(
        _flip(x, layout, False, 1), kernel_size, stride, padding, dilation, ceil_mode, return_indices=True)
    return _flip(y, layout, False, 1), indices


def _max_pool_backward_definition(dy: Tensor, winner: Tensor, size: tuple[int, int], window: Window) -> Tensor:
    """The gradient of the input in differentiable operations."""
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
    planes = (*dy.shape[:2], -1)
    dx = dy.new_zeros(*dy.shape[:2], size[0] * size[1])
    return dx.scatter_add(2, indices.reshape(planes), dy.reshape(planes)).reshape(*dy.shape[:2], *size)


@torch.fx.wrap
def _bipolar_max_pool2d(
        x: Tensor,
        kernel_size: list[int],
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        ceil_mode: bool,
        layout: str,
) -> Tensor:
    if not torch.jit.is_scripting():
        check_window_fits(x, kernel_size, stride, padding, dilation, ceil_mode)
        check_choice('layout', layout, _LAYOUTS)
    batch = x if x.dim() == 4 else x.unsqueeze(0)
    if not torch.jit.is_scripting():
        fused = backends.find_kernel('bipolar', 'max_pool', x)
        if fused is not None:
            window = Window.of(kernel_size, stride, padding, dilation)
            y = _MaxPoolFunction.apply(fused, batch, window, ceil_mode, layout)
            return y if x.dim() == 4 else y.squeeze(0)
    y = _max_pool_definition(batch, kernel_size, stride, padding, dilation, ceil_mode, layout)
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
        stride: Step of the window. Default: `kernel_size`.
        padding: Positions added on both sides, at most half of the kernel. They take no part in the pooling.
        dilation: Step between the elements of a window.
        ceil_mode: Whether windows may start inside the input and end outside.
        layout: Which channels are min-pooled, see `channel_signs`.

    Returns:
        A tensor of the dtype and memory format of `x`, with the shape that `F.max_pool2d` gives.

    Raises:
        ValueError: If an argument is out of range, the rank is another, a dimension other than the batch is empty,
            or the window does not fit into the padded input.
        TypeError: If an argument has the wrong type, or `x` no floating-point dtype.
    """
    return _bipolar_max_pool2d(x, *expand_window(2, kernel_size, stride, padding, dilation), ceil_mode, layout)


class _BipolarActivation(nn.Module):
    def __init__(self, layout: str, inplace: bool, channel_dim: int) -> None:
        super().__init__()
        check_choice('layout', layout, _LAYOUTS)
        check_choice('channel_dim', channel_dim, (1, -1))
        self.layout = layout
        self.inplace = inplace
        self.channel_dim = channel_dim

    # timm's name of the plain activation that this is the bipolar form of
    plain: str

    def static_form(self) -> Form:
        """The plain function that this is the bipolar form of, and the layout."""
        return Form(self.plain, self._options(), self.layout)

    def _options(self) -> dict[str, Any]:
        return {}

    @classmethod
    def starting_as(cls, form: Form, place: Place, **kwargs) -> '_BipolarActivation':
        """Make the module that is the bipolar form of another activation, or of its own where that is another kind.

        Args:
            form: What it is to start as.
            place: Where it goes.
            **kwargs: Further arguments of the class; they win over what follows from `form`.
        """
        options = form.options if form.kind == cls.plain else {}
        return cls(**{'inplace': place.inplace, 'channel_dim': place.channel_dim, **options, **kwargs})

    def extra_repr(self) -> str:
        channel_dim = '' if self.channel_dim == 1 else f', channel_dim={self.channel_dim}'
        return f'layout={self.layout!r}' + (', inplace=True' if self.inplace else '') + channel_dim


class Bipolar(_BipolarActivation):
    """Bipolar form of any elementwise activation: ``s_c * f(s_c * x_c)``.

    Paper: `Shifting Mean Activation Towards Zero with Bipolar Activation Functions` - https://arxiv.org/abs/1709.04054

    Args:
        f: The activation, a module or a function, tensor to tensor.
        layout: Which channels get the mirrored function: "interleaved" (the odd ones, as in the paper) or "halves" (the
            second half, as in the authors' code). See `channel_signs`.
        inplace: Whether the memory of the input may be overwritten.
        channel_dim: 1, or -1 for inputs of shape (N, *spatial, C), as the MLPs of transformers have.

    Raises:
        ValueError: If `layout` is unknown; on forward, as `bipolar`.
        TypeError: If `f` cannot be called; on forward, as `bipolar`.
    """

    def __init__(
            self,
            f: Callable[[Tensor], Tensor],
            layout: str = 'interleaved',
            inplace: bool = False,
            channel_dim: int = 1,
    ) -> None:
        super().__init__(layout, inplace, channel_dim)
        if not callable(f):
            raise TypeError(f'f must be a module or a function of a tensor, got {f!r}')
        self.f = f

    def static_form(self) -> Form:
        return static_form(self.f)._replace(layout=self.layout)

    @classmethod
    def starting_as(cls, form: Form, place: Place, **kwargs) -> 'Bipolar':
        return cls(getattr(place.module, 'f', place.module), channel_dim=place.channel_dim, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        # Not `bipolar`: neither TorchScript nor FX passes a module as an argument.
        y = self.f(_flip(x, self.layout, self.inplace, self.channel_dim))
        return _flip_back(y, self.layout, self.inplace, self.channel_dim)


class BReLU(_BipolarActivation):
    """Bipolar ReLU: ``max(x, 0)`` on even channels, ``min(x, 0)`` on odd ones. (Not the *bounded* ReLU of that name.)

    Paper: `Shifting Mean Activation Towards Zero with Bipolar Activation Functions` - https://arxiv.org/abs/1709.04054

    Args:
        inplace: Whether the memory of the input may be overwritten.
        max_value: Bound of the magnitude; 6 gives the bipolar form of ReLU6. Default: none.
        layout: Which channels get the mirrored function, see `Bipolar`.
        channel_dim: Where the channels are, see `Bipolar`.
    """

    plain = 'relu'

    def __init__(
            self,
            inplace: bool = False,
            max_value: float | None = None,
            layout: str = 'interleaved',
            channel_dim: int = 1,
    ) -> None:
        super().__init__(layout, inplace, channel_dim)
        self.max_value = None if max_value is None else check_positive('max_value', max_value)

    def _options(self) -> dict[str, Any]:
        return dict(max_value=self.max_value)

    def forward(self, x: Tensor) -> Tensor:
        return brelu(x, self.max_value, self.layout, self.inplace, self.channel_dim)

    def extra_repr(self) -> str:
        return ('' if self.max_value is None else f'max_value={self.max_value:g}, ') + super().extra_repr()


class BELU(_BipolarActivation):
    """Bipolar form of `nn.ELU`; `layout` and `channel_dim` as in `Bipolar`."""

    plain = 'elu'

    def __init__(
            self,
            alpha: float = 1.0,
            inplace: bool = False,
            layout: str = 'interleaved',
            channel_dim: int = 1,
    ) -> None:
        super().__init__(layout, inplace, channel_dim)
        self.alpha = check_finite('alpha', alpha)

    def _options(self) -> dict[str, Any]:
        return dict(alpha=self.alpha)

    def forward(self, x: Tensor) -> Tensor:
        return belu(x, self.alpha, self.layout, self.inplace, self.channel_dim)

    def extra_repr(self) -> str:
        return f'alpha={self.alpha:g}, ' + super().extra_repr()


class BSELU(_BipolarActivation):
    """Bipolar form of `nn.SELU`; `layout` and `channel_dim` as in `Bipolar`."""

    plain = 'selu'

    def __init__(self, inplace: bool = False, layout: str = 'interleaved', channel_dim: int = 1) -> None:
        super().__init__(layout, inplace, channel_dim)

    def forward(self, x: Tensor) -> Tensor:
        return bselu(x, self.layout, self.inplace, self.channel_dim)


class BLeakyReLU(_BipolarActivation):
    """Bipolar form of `nn.LeakyReLU`; `layout` and `channel_dim` as in `Bipolar`."""

    plain = 'leaky_relu'

    def __init__(
            self,
            negative_slope: float = 0.01,
            inplace: bool = False,
            layout: str = 'interleaved',
            channel_dim: int = 1,
    ) -> None:
        super().__init__(layout, inplace, channel_dim)
        self.negative_slope = check_finite('negative_slope', negative_slope)

    def _options(self) -> dict[str, Any]:
        return dict(negative_slope=self.negative_slope)

    def forward(self, x: Tensor) -> Tensor:
        return bleaky_relu(x, self.negative_slope, self.layout, self.inplace, self.channel_dim)

    def extra_repr(self) -> str:
        return f'negative_slope={self.negative_slope:g}, ' + super().extra_repr()


class BPReLU(_BipolarActivation):
    """Bipolar form of `nn.PReLU`; `layout` and `channel_dim` as in `Bipolar`.

    Args:
        num_parameters: 1, or the number of channels.
        init: Initial slope of the negative part.
        inplace: Whether the memory of the input may be overwritten.
        layout: Which channels get the mirrored function, see `Bipolar`.
        channel_dim: Where the channels are, see `Bipolar`.
        device: Device of the slopes.
        dtype: Dtype of the slopes.
    """

    plain = 'prelu'

    def __init__(
            self,
            num_parameters: int = 1,
            init: float = 0.25,
            inplace: bool = False,
            layout: str = 'interleaved',
            channel_dim: int = 1,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(layout, inplace, channel_dim)
        check_int('num_parameters', num_parameters, 1)
        self.num_parameters = num_parameters
        self.init = check_finite('init', init)
        self.weight = nn.Parameter(torch.empty(num_parameters, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, self.init)

    def _options(self) -> dict[str, Any]:
        return dict(weight=self.weight)

    @classmethod
    def starting_as(cls, form: Form, place: Place, **kwargs) -> 'BPReLU':
        kwargs = dict(inplace=place.inplace, channel_dim=place.channel_dim, device=place.device, dtype=place.dtype) \
            | kwargs
        if form.kind != cls.plain:
            return cls(**kwargs)
        weight = form.options['weight']
        module = cls(num_parameters=weight.numel(), **kwargs)
        with torch.no_grad():
            module.weight.copy_(weight)
        return module

    def forward(self, x: Tensor) -> Tensor:
        return bprelu(x, self.weight, self.layout, self.inplace, self.channel_dim)

    def extra_repr(self) -> str:
        return f'num_parameters={self.num_parameters}, ' + super().extra_repr()


class BipolarMaxPool2d(nn.Module):
    """Max pooling on even channels, min pooling on odd ones; arguments and errors as of `bipolar_max_pool2d`.

    After bipolar activations this is what `nn.MaxPool2d` is after plain ones.
    """

    def __init__(
            self,
            kernel_size: int | Sequence[int],
            stride: int | Sequence[int] | None = None,
            padding: int | Sequence[int] = 0,
            dilation: int | Sequence[int] = 1,
            ceil_mode: bool = False,
            layout: str = 'interleaved',
    ) -> None:
        super().__init__()
        window = expand_window(2, kernel_size, stride, padding, dilation)
        self.kernel_size, self.stride, self.padding, self.dilation = window
        check_choice('layout', layout, _LAYOUTS)
        self.ceil_mode = ceil_mode
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        return _bipolar_max_pool2d(
            x,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.layout,
        )

    def extra_repr(self) -> str:
        return (
            f'kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, dilation={self.dilation}, '
            f'ceil_mode={self.ceil_mode}, layout={self.layout!r}'
        )
