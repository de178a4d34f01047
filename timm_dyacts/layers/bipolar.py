"""Bipolar activations: every second channel gets the activation function mirrored through the origin.

``f_B(x)_c = s_c * f(s_c * x_c)`` with ``s_c`` +1 or -1. Flipping signs is exact in floating point, hence so is
``f_B(s * x) = s * f(x)``: a network with bipolar activations is, up to the signs of its channels, the network with the
plain ones.

Paper: `Shifting Mean Activation Towards Zero with Bipolar Activation Functions` (Eidnes & Nøkland, 2018)
    - https://arxiv.org/abs/1709.04054
"""
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import (
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
    y = _flip(x, layout, inplace, channel_dim)
    y = F.relu(y, inplace=True) if max_value is None else F.hardtanh(y, 0.0, max_value, inplace=True)
    return _flip_back(y, layout, inplace, channel_dim)


@torch.fx.wrap
def belu(
        x: Tensor,
        alpha: float = 1.0,
        layout: str = 'interleaved',
        inplace: bool = False,
        channel_dim: int = 1,
) -> Tensor:
    """Bipolar form of `F.elu`. See `bipolar`."""
    return _flip_back(F.elu(_flip(x, layout, inplace, channel_dim), alpha), layout, inplace, channel_dim)


@torch.fx.wrap
def bselu(x: Tensor, layout: str = 'interleaved', inplace: bool = False, channel_dim: int = 1) -> Tensor:
    """Bipolar form of `F.selu`. See `bipolar`."""
    return _flip_back(F.selu(_flip(x, layout, inplace, channel_dim)), layout, inplace, channel_dim)


@torch.fx.wrap
def bleaky_relu(
        x: Tensor,
        negative_slope: float = 0.01,
        layout: str = 'interleaved',
        inplace: bool = False,
        channel_dim: int = 1,
) -> Tensor:
    """Bipolar form of `F.leaky_relu`. See `bipolar`."""
    y = F.leaky_relu(_flip(x, layout, inplace, channel_dim), negative_slope)
    return _flip_back(y, layout, inplace, channel_dim)


@unless_tracing
def _check_slopes(x: Tensor, weight: Tensor, channel_dim: int) -> None:
    check_input(x, (2, 3, 4, 5))
    if weight.numel() != 1:
        check_channels(x.movedim(channel_dim, 1), weight.numel())


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
    if not torch.jit.is_scripting():
        _check_slopes(x, weight, channel_dim)
    # F.prelu knows dimension 1 only
    y = F.prelu(_flip(x, layout, inplace, channel_dim).movedim(channel_dim, 1), weight).movedim(1, channel_dim)
    return _flip_back(y, layout, inplace, channel_dim)


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
    batch = x if x.dim() == 4 else x.unsqueeze(0)
    pooled = F.max_pool2d(_flip(batch, layout, False, 1), kernel_size, stride, padding, dilation, ceil_mode)
    y = _flip(pooled, layout, False, 1)
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

    def __init__(
            self,
            inplace: bool = False,
            max_value: float | None = None,
            layout: str = 'interleaved',
            channel_dim: int = 1,
    ) -> None:
        super().__init__(layout, inplace, channel_dim)
        self.max_value = None if max_value is None else check_positive('max_value', max_value)

    def forward(self, x: Tensor) -> Tensor:
        return brelu(x, self.max_value, self.layout, self.inplace, self.channel_dim)

    def extra_repr(self) -> str:
        return ('' if self.max_value is None else f'max_value={self.max_value:g}, ') + super().extra_repr()


class BELU(_BipolarActivation):
    """Bipolar form of `nn.ELU`; `layout` and `channel_dim` as in `Bipolar`."""

    def __init__(
            self,
            alpha: float = 1.0,
            inplace: bool = False,
            layout: str = 'interleaved',
            channel_dim: int = 1,
    ) -> None:
        super().__init__(layout, inplace, channel_dim)
        self.alpha = check_finite('alpha', alpha)

    def forward(self, x: Tensor) -> Tensor:
        return belu(x, self.alpha, self.layout, self.inplace, self.channel_dim)

    def extra_repr(self) -> str:
        return f'alpha={self.alpha:g}, ' + super().extra_repr()


class BSELU(_BipolarActivation):
    """Bipolar form of `nn.SELU`; `layout` and `channel_dim` as in `Bipolar`."""

    def __init__(self, inplace: bool = False, layout: str = 'interleaved', channel_dim: int = 1) -> None:
        super().__init__(layout, inplace, channel_dim)

    def forward(self, x: Tensor) -> Tensor:
        return bselu(x, self.layout, self.inplace, self.channel_dim)


class BLeakyReLU(_BipolarActivation):
    """Bipolar form of `nn.LeakyReLU`; `layout` and `channel_dim` as in `Bipolar`."""

    def __init__(
            self,
            negative_slope: float = 0.01,
            inplace: bool = False,
            layout: str = 'interleaved',
            channel_dim: int = 1,
    ) -> None:
        super().__init__(layout, inplace, channel_dim)
        self.negative_slope = check_finite('negative_slope', negative_slope)

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
