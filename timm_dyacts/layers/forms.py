"""What an activation module computes as it stands, in terms that two modules can be compared in.

A module of this package tells by its method ``static_form()``; the plain ones of torch and timm are in the table below.
A Dynamic ReLU that has not been trained yet has the form of a ReLU: that is how ``convert`` knows that it may take the
place of one and keep the function of the network.
"""
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timm.layers import activations, activations_me
from torch import Tensor, nn

__all__ = ['PLAIN_ACTIVATIONS', 'Form', 'Place', 'plain_part', 'static_form']


class Form(NamedTuple):
    """A static activation function.

    Attributes:
        kind: timm's name of the plain activation (``'relu'``), the class name of one that is not in the table, or
            ``'dynamic'`` for a function that depends on more than the element.
        options: Its arguments.
        layout: Channel layout of a bipolar form, ``None`` for a plain one.
    """
    kind: str
    options: dict[str, Any]
    layout: str | None = None

    def same_function(self, other: 'Form') -> bool:
        """Whether the plain activations are the same one."""
        (kind, options), (other_kind, others) = self.canonical(), other.canonical()
        if kind != other_kind or kind == 'dynamic' or options.keys() != others.keys():
            return False
        return all(_equal(value, others[name]) for name, value in options.items())

    def canonical(self) -> tuple[str, dict[str, Any]]:
        """Give kind and options, with a PReLU that has a single slope written as the leaky ReLU that it is."""
        if self.kind == 'prelu' and self.options['weight'].numel() == 1 and not self.options['weight'].is_meta:
            return 'leaky_relu', dict(negative_slope=self.options['weight'].item())
        return self.kind, self.options


class Place(NamedTuple):
    """Where in a network an activation is about to be replaced.

    Attributes:
        module: The activation that is there.
        channels: Number of channels of its input.
        channel_dim: Dimension of the channels, 1 or -1.
        device: Device of the network.
        dtype: Dtype of the network.
    """
    module: nn.Module
    channels: int
    channel_dim: int
    device: torch.device
    dtype: torch.dtype

    @property
    def inplace(self) -> bool:
        """Whether the activation that is there works in place."""
        return bool(getattr(plain_part(self.module), 'inplace', False))


def plain_part(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Give the ``f`` of a ``Bipolar``, which is a module or a function, and any other module as it is."""
    is_wrapper = getattr(module, 'layout', None) is not None and hasattr(module, 'f')
    return module.f if is_wrapper else module


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        # On the meta device there are no values to compare.
        return a.shape == b.shape and (a.is_meta or b.is_meta or torch.equal(a.double(), b.double().to(a.device)))
    return a == b


def _hardtanh(module: nn.Hardtanh) -> Form:
    if module.min_val == 0:  # ReLU6 is one
        return Form('relu', dict(max_value=float(module.max_val)))
    return _other(module)


def _other(module: nn.Module) -> Form:
    """Give the form of a module that is not in the table: its class, and what its constructor has left in it."""
    names = (name for name in vars(module) if not name.startswith('_') and name not in ('inplace', 'training'))
    return Form(type(module).__name__, {name: getattr(module, name) for name in names})


# Looked up along the bases of a class, so that subclasses such as timm's PReLU are found.
_FORMS: dict[type[nn.Module], Callable[[Any], Form]] = {
    nn.ReLU: lambda module: Form('relu', dict(max_value=None)),
    nn.Hardtanh: _hardtanh,
    nn.LeakyReLU: lambda module: Form('leaky_relu', dict(negative_slope=module.negative_slope)),
    nn.PReLU: lambda module: Form('prelu', dict(weight=module.weight)),
    nn.ELU: lambda module: Form('elu', dict(alpha=module.alpha)),
    nn.SELU: lambda module: Form('selu', {}),
    nn.Module: _other,
}

# The plain activations that ``convert`` replaces: those of torch and of timm.
PLAIN_ACTIVATIONS: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Softplus, nn.Softsign, nn.Hardtanh,
    *(getattr(source, name)
      for source in (activations, activations_me)
      for name in ('Swish', 'SwishMe', 'Mish', 'MishMe', 'HardSwish', 'HardSwishMe', 'HardMish', 'HardMishMe', 'PReLU',
                   'GELU', 'GELUTanh', 'QuickGELU')
      if hasattr(source, name)),
)


def static_form(module: Callable[[Tensor], Tensor]) -> Form:
    """Give the function that an activation computes as it stands. A function that is no module is its own form."""
    if hasattr(module, 'static_form'):
        return module.static_form()
    for cls in type(module).__mro__:
        if cls in _FORMS:
            return _FORMS[cls](module)
    return Form(type(module).__name__, dict(function=module))
