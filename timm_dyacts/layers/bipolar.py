"""Bipolar activations and max pooling as modules.

Paper: `Shifting Mean Activation Towards Zero with Bipolar Activation Functions` (Eidnes & Nøkland, 2018)
    - https://arxiv.org/abs/1709.04054
"""
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.bipolar import functional
from ..ops.bipolar.functional import LAYOUTS
from ..ops.checks import check_bool, check_choice, check_finite, check_int, check_parameter_dtype, check_positive
from .forms import Form, Place, plain_part, static_form
from .pooling import WindowPool

__all__ = [
    'BELU',
    'BLeakyReLU',
    'BPReLU',
    'BReLU',
    'BSELU',
    'Bipolar',
    'BipolarMaxPool2d',
]


class _BipolarActivation(nn.Module):
    """What all bipolar activations share: where the mirrored channels are."""

    def __init__(self, layout: str, inplace: bool, channel_dim: int) -> None:
        super().__init__()
        check_choice('layout', layout, LAYOUTS)
        check_bool('inplace', inplace)
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
        layout: Which channels get the mirrored function: ``'interleaved'`` (the odd ones, as in the paper) or
            ``'halves'`` (the second half, as in the authors' code). See ``channel_signs``.
        inplace: Whether the memory of the input may be overwritten.
        channel_dim: 1, or -1 for inputs of shape (N, *spatial, C), as the MLPs of transformers have.

    Raises:
        ValueError: If ``layout`` is unknown; on forward, as ``bipolar``.
        TypeError: If ``f`` cannot be called; on forward, as ``bipolar``.
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
        """Give the form of ``f``, and the layout."""
        return static_form(self.f)._replace(layout=self.layout)

    @classmethod
    def starting_as(cls, form: Form, place: Place, **kwargs: Any) -> _BipolarActivation:
        """Make the bipolar form of the activation at a place: its own class, if it has one, else ``Bipolar`` around it.

        Args:
            form: What the activation computes.
            place: Where it is.
            **kwargs: Further arguments; they win over what follows from ``form`` and ``place``.
        """
        for member in _Member.__subclasses__():
            if member.plain == form.kind:
                return member.starting_as(form, place, **kwargs)
        return cls(**{'f': plain_part(place.module), 'channel_dim': place.channel_dim, **kwargs})

    def forward(self, x: Tensor) -> Tensor:
        # Not `bipolar`: neither TorchScript nor FX passes a module as an argument.
        y = self.f(functional.flip(x, self.layout, self.inplace, self.channel_dim))
        return functional.flip_back(y, self.layout, self.inplace, self.channel_dim)


class _Member(_BipolarActivation):
    """The bipolar form of a plain activation that timm knows. Subclasses have a constructor, ``forward`` and this:

    Attributes:
        plain: timm's name of the plain activation.
        options: The arguments that the plain activation has too, as attributes.
    """

    plain: str
    options: tuple[str, ...] = ()

    def static_form(self) -> Form:
        """Give the plain function that this is the bipolar form of, and the layout."""
        return Form(self.plain, {name: getattr(self, name) for name in self.options}, self.layout)

    @classmethod
    def starting_as(cls, form: Form, place: Place, **kwargs: Any) -> '_Member':
        """Make the module that is the bipolar form of another activation, or of its own where that is another kind.

        Args:
            form: What it is to start as.
            place: Where it goes.
            **kwargs: Further arguments of the class; they win over what follows from ``form`` and ``place``.
        """
        options = form.options if form.kind == cls.plain else {}
        return cls(**{'inplace': place.inplace, 'channel_dim': place.channel_dim, **options, **kwargs})

    def extra_repr(self) -> str:
        options = {name: getattr(self, name) for name in self.options}
        shown = [f'{name}={value:g}' for name, value in options.items() if value is not None]
        return ', '.join([*shown, super().extra_repr()])


class BReLU(_Member):
    """Bipolar ReLU: ``max(x, 0)`` on even channels, ``min(x, 0)`` on odd ones. (Not the *bounded* ReLU of that name.)

    Paper: `Shifting Mean Activation Towards Zero with Bipolar Activation Functions` - https://arxiv.org/abs/1709.04054

    Args:
        inplace: Whether the memory of the input may be overwritten.
        max_value: Bound of the magnitude; 6 gives the bipolar form of ReLU6. Default: none.
        layout: Which channels get the mirrored function, see ``Bipolar``.
        channel_dim: Where the channels are, see ``Bipolar``.
    """

    plain = 'relu'
    options = ('max_value',)

    def __init__(
            self,
            inplace: bool = False,
            max_value: float | None = None,
            layout: str = 'interleaved',
            channel_dim: int = 1,
    ) -> None:
        super().__init__(layout, inplace, channel_dim)
        self.max_value: float | None = None if max_value is None else check_positive('max_value', max_value)

    def forward(self, x: Tensor) -> Tensor:
        return functional.brelu(x, self.max_value, self.layout, self.inplace, self.channel_dim)


class BELU(_Member):
    """Bipolar form of ``nn.ELU``; ``layout`` and ``channel_dim`` as in ``Bipolar``."""

    plain = 'elu'
    options = ('alpha',)

    def __init__(
            self,
            alpha: float = 1.0,
            inplace: bool = False,
            layout: str = 'interleaved',
            channel_dim: int = 1,
    ) -> None:
        super().__init__(layout, inplace, channel_dim)
        self.alpha: float = check_finite('alpha', alpha)

    def forward(self, x: Tensor) -> Tensor:
        return functional.belu(x, self.alpha, self.layout, self.inplace, self.channel_dim)


class BSELU(_Member):
    """Bipolar form of ``nn.SELU``; ``layout`` and ``channel_dim`` as in ``Bipolar``."""

    plain = 'selu'

    def __init__(self, inplace: bool = False, layout: str = 'interleaved', channel_dim: int = 1) -> None:
        super().__init__(layout, inplace, channel_dim)

    def forward(self, x: Tensor) -> Tensor:
        return functional.bselu(x, self.layout, self.inplace, self.channel_dim)


class BLeakyReLU(_Member):
    """Bipolar form of ``nn.LeakyReLU``; ``layout`` and ``channel_dim`` as in ``Bipolar``."""

    plain = 'leaky_relu'
    options = ('negative_slope',)

    def __init__(
            self,
            negative_slope: float = 0.01,
            inplace: bool = False,
            layout: str = 'interleaved',
            channel_dim: int = 1,
    ) -> None:
        super().__init__(layout, inplace, channel_dim)
        self.negative_slope: float = check_finite('negative_slope', negative_slope)

    def forward(self, x: Tensor) -> Tensor:
        return functional.bleaky_relu(x, self.negative_slope, self.layout, self.inplace, self.channel_dim)


class BPReLU(_Member):
    """Bipolar form of ``nn.PReLU``; ``layout`` and ``channel_dim`` as in ``Bipolar``.

    Args:
        num_parameters: 1, or the number of channels.
        init: Initial slope of the negative part.
        inplace: Whether the memory of the input may be overwritten.
        layout: Which channels get the mirrored function, see ``Bipolar``.
        channel_dim: Where the channels are, see ``Bipolar``.
        device: Device of the slopes.
        dtype: Dtype of the slopes.
    """

    plain = 'prelu'
    options = ('weight',)

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
        self.init: float = check_finite('init', init)
        check_parameter_dtype(dtype)
        self.weight: nn.Parameter = nn.Parameter(torch.empty(num_parameters, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set all slopes to ``init``."""
        nn.init.constant_(self.weight, self.init)

    @classmethod
    def starting_as(cls, form: Form, place: Place, **kwargs: Any) -> 'BPReLU':
        # The slopes are no argument of the class: they are copied into those of the module.
        weight = form.options['weight'] if form.kind == cls.plain else None
        arguments: dict[str, Any] = dict(device=place.device, dtype=place.dtype)
        if weight is not None:
            arguments['num_parameters'] = weight.numel()
        module = super().starting_as(form._replace(options={}), place, **{**arguments, **kwargs})
        if weight is not None:
            with torch.no_grad():
                module.weight.copy_(weight)
        return module

    def forward(self, x: Tensor) -> Tensor:
        return functional.bprelu(x, self.weight, self.layout, self.inplace, self.channel_dim)

    def extra_repr(self) -> str:
        return f'num_parameters={self.num_parameters}, {_BipolarActivation.extra_repr(self)}'


class BipolarMaxPool2d(WindowPool):
    """Max pooling on even channels, min pooling on odd ones; arguments and errors as of ``bipolar_max_pool2d``.

    After bipolar activations this is what ``nn.MaxPool2d`` is after plain ones.
    """

    rank = 2

    def __init__(
            self,
            kernel_size: int | Sequence[int],
            stride: int | Sequence[int] | None = None,
            padding: int | Sequence[int] = 0,
            dilation: int | Sequence[int] = 1,
            ceil_mode: bool = False,
            layout: str = 'interleaved',
    ) -> None:
        super().__init__(kernel_size, stride, padding, dilation, ceil_mode)
        check_choice('layout', layout, LAYOUTS)
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        return functional.bipolar_max_pool(
            x,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.layout,
        )

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, layout={self.layout!r}'
