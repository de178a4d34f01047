"""Dynamic ReLU: a piecewise linear activation whose slopes and intercepts are computed from its own input.

Paper: `Dynamic ReLU` (Chen et al., 2020) - https://arxiv.org/abs/2003.10027
"""
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter, is_lazy

from ..ops.checks import (
    check_bool,
    check_choice,
    check_finite,
    check_input,
    check_int,
    check_parameter_dtype,
    check_positive,
)
from ..ops.dyrelu import functional
from ..ops.dyrelu.functional import dyrelu
from ..ops.dyrelu.settings import DyReLUParams, DyReLUSettings
from .forms import Form, Place

__all__ = ['DyReLU', 'DyReLUA', 'DyReLUB', 'DyReLUC', 'LazyDyReLU', 'dyrelu']


class DyReLU(nn.Module):
    """Dynamic ReLU.

    ``y = max_k(a_k(x) * x + b_k(x))`` with ``a = alpha + lambda_a * da``, ``b = beta + lambda_b * db``, where
    ``(da, db) = 2 * sigmoid(fc2(relu(fc1(mean(x))))) - 1`` and ``fc1: C -> max(C // reduction, 1)``. ``fc2`` starts at
    zero, so a fresh module is exactly the static activation ``max_k(alpha_k * x + beta_k)``: ReLU by default, leaky
    ReLU with ``alpha=(1, negative_slope)``, ReLU6 with ``max_value=6``.

    In mode "a", all channels and positions share the coefficients; in mode "b", all positions do; mode "c" multiplies
    the output of "b" by a weight for each position, ``pi = min(HW * softmax(conv1x1(x) / tau), 3)``, which starts at
    exactly 1.

    The hyper function and the spatial weight are computed in at least fp32, under autocast and in a half-precision
    module too: the sums inside leave the fp16 range. Those of an input near the limit of fp32 leave that, as they would
    in ``nn.Linear``: from about 1e36 on, coefficients may be NaN.

    Paper: `Dynamic ReLU` - https://arxiv.org/abs/2003.10027. The values of ``tau`` and of the bound 3 are those of
    public re-implementations; the paper has not been consulted for them.

    Shape:
        - Input: (N, C, *spatial), with 0 to 3 spatial dimensions.
        - Output: the shape, dtype and memory format of the input.

    Args:
        channels: Number of channels C. If None, the module is a lazy one until its first forward pass (parameters
            then appear on the device of the input) or until it loads a state dict.
        mode: Variant, "a", "b" or "c".
        reduction: Ratio of the channels to the hidden width of the hyper function.
        k: Number of linear pieces K.
        lambda_a: Range of the slopes around ``alpha``.
        lambda_b: Range of the intercepts around ``beta``.
        alpha: The K initial slopes. Default: one, then zeros.
        beta: The K initial intercepts. Default: zeros.
        max_value: Upper bound of the piecewise linear function. Default: none.
        tau: Temperature of the spatial softmax, mode "c" only.
        paper_scale: Scale the spatial weight as in the paper, to ``pi / 3``. A fresh module is then a third of
            the static activation. Mode "c" only.
        static: Learn the coefficients themselves, as PReLU learns its slopes, instead of computing them from the input:
            all that is left of the hyper function is the bias of ``fc2``. The same functions as in mode "b", which it
            needs, without what is dynamic about them: a control, to see what that is worth.
        channel_dim: 1, or -1 for inputs of shape (N, *spatial, C), as the MLPs of transformers have.
        inplace: Whether the memory of the input may be overwritten, in inference: a backward pass needs the input.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        max_hidden: Upper bound of the hidden width, which is ``min(max(C // reduction, 1), max_hidden)``. It caps what
            the widest layers cost. Default: none.

    Raises:
        ValueError: If an argument is out of range; on forward, if the rank or the number of channels of the input
            differs from the above, or a dimension other than the batch is empty.
        TypeError: If an argument has the wrong type; on forward, if the input has no floating-point dtype.
    """

    static: torch.jit.Final[bool]  # TorchScript compiles one of the two ways only

    def __init__(
            self,
            channels: int | None = None,
            mode: str = 'b',
            reduction: int = 8,
            k: int = 2,
            lambda_a: float = 1.0,
            lambda_b: float = 0.5,
            alpha: Sequence[float] | None = None,
            beta: Sequence[float] | None = None,
            max_value: float | None = None,
            tau: float = 10.0,
            paper_scale: bool = False,
            static: bool = False,
            channel_dim: int = 1,
            inplace: bool = False,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
            max_hidden: int | None = None,
    ) -> None:
        super().__init__()
        if channels is not None:
            check_int('channels', channels, 1)
        check_choice('mode', mode, ('a', 'b', 'c'))
        check_int('reduction', reduction, 1)
        if max_hidden is not None:
            check_int('max_hidden', max_hidden, 1)
        check_int('k', k, 1)
        alpha = [1.0] + [0.0] * (k - 1) if alpha is None else alpha
        beta = [0.0] * k if beta is None else beta
        for name, values in (('alpha', alpha), ('beta', beta)):
            if not hasattr(values, '__getitem__'):
                raise TypeError(f'{name} must be a sequence of k={k} numbers, got {values!r}')
            if len(values) != k:
                raise ValueError(f'{name} must hold k={k} numbers, got {values}')
        self.channels = channels
        self.mode = mode
        self.reduction = reduction
        self.max_hidden = max_hidden
        self.k = k
        self.lambda_a: float = check_finite('lambda_a', lambda_a)
        self.lambda_b: float = check_finite('lambda_b', lambda_b)
        self.alpha: list[float] = [check_finite('alpha', value) for value in alpha]
        self.beta: list[float] = [check_finite('beta', value) for value in beta]
        self.max_value: float | None = None if max_value is None else check_finite('max_value', max_value)
        self.tau: float = check_positive('tau', tau)
        self.paper_scale = paper_scale
        for name, value in (('paper_scale', paper_scale), ('static', static), ('inplace', inplace)):
            check_bool(name, value)
        check_parameter_dtype(dtype)
        if static and mode != 'b':
            raise ValueError(f'static must be False in mode {mode!r}, got True: it is for mode "b" alone')
        self.static = static
        check_choice('channel_dim', channel_dim, (1, -1))
        self.channel_dim = channel_dim
        self.inplace = inplace

        # Parameters, not nn.Linear children: the weight initialisers of models walk over modules by type and
        # would take the zero start away.
        for name in DyReLUParams._fields:
            unused = name != 'fc2_bias' if static else name.startswith('spatial') and mode != 'c'
            self.register_parameter(name, None if unused else UninitializedParameter(device=device, dtype=dtype))
        if channels is not None:
            self._materialize(channels)
        elif not isinstance(self, LazyDyReLU):
            LazyDyReLU.defer(self)

    def _materialize(self, channels: int, device: torch.device | None = None) -> None:
        self.channels = channels
        hidden = max(channels // self.reduction, 1)
        if self.max_hidden is not None:
            hidden = min(hidden, self.max_hidden)
        out = 2 * self.k * (1 if self.mode == 'a' else channels)
        shapes = {
            'fc1_weight': (hidden, channels),
            'fc1_bias': (hidden,),
            'fc2_weight': (out, hidden),
            'fc2_bias': (out,),
            'spatial_weight': (1, channels),
            'spatial_bias': (1,),
        }
        for name, param in self.named_parameters():
            param.materialize(shapes[name], device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw ``fc1`` as ``nn.Linear`` does and zero the rest, which makes the module the static activation again."""
        for param in self.parameters():
            nn.init.zeros_(param)
        if self.static:
            return
        nn.init.kaiming_uniform_(self.fc1_weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(self.channels)
        nn.init.uniform_(self.fc1_bias, -bound, bound)

    def is_fresh(self) -> bool:
        """Tell whether the module still is the static activation: all parameters but those of ``fc1`` are zero.

        On the meta device there are no values to read, and the answer is yes.
        """
        moved = [param for name, param in self.named_parameters() if not name.startswith('fc1') and not param.is_meta]
        return not any(param.any() for param in moved)

    def static_form(self) -> Form:
        """Give the function of a fresh module if it is a plain one: ReLU, with or without a bound, or leaky ReLU."""
        slope, *rest = self.alpha
        if not self.is_fresh() or slope != 1 or len(set(rest)) != 1 or any(self.beta) or not 0 <= rest[0] <= 1:
            return Form('dynamic', {})
        if rest[0] == 0:
            return Form('relu', dict(max_value=self.max_value))
        return Form('leaky_relu', dict(negative_slope=rest[0]))

    @classmethod
    def starting_as(cls, form: Form, place: Place, **kwargs: Any) -> 'DyReLU':
        """Make the module that starts as another activation, or as ReLU where it cannot.

        Args:
            form: The activation to start as.
            place: Where the module goes.
            **kwargs: Further arguments of the class, which have precedence over those that follow from ``form``.
        """
        kwargs.setdefault('inplace', place.inplace)
        kind, options = form.canonical()
        if kind == 'relu':
            kwargs.setdefault('max_value', options['max_value'])
        elif kind == 'leaky_relu':
            kwargs.setdefault('alpha', (1.0,) + (options['negative_slope'],) * (kwargs.get('k', 2) - 1))
        return cls(
            place.channels, channel_dim=place.channel_dim, device=place.device, dtype=place.dtype, **kwargs)

    def coefficients(self, x: Tensor) -> Tensor:
        """Compute the coefficients for an input.

        Args:
            x: Input of shape (N, C, *spatial).

        Returns:
            Shape (N, C, 2K), or (N, 1, 2K) in mode "a": K slopes, then K intercepts. At least fp32.
        """
        if self.static:
            return functional.static_coefficients(self.fc2_bias, x, self._settings())
        return functional.coefficients(x, self._params(), self._settings())

    def attention(self, x: Tensor) -> Tensor | None:
        """Compute the spatial weight for an input.

        Args:
            x: Input of shape (N, C, *spatial).

        Returns:
            Shape (N, 1, *spatial), at least fp32; None in modes "a" and "b".
        """
        return functional.attention(x, self._params(), self._settings())

    def _params(self) -> DyReLUParams:
        return DyReLUParams(
            self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias, self.spatial_weight, self.spatial_bias)

    def _settings(self) -> DyReLUSettings:
        return DyReLUSettings(
            self.alpha, self.beta, self.lambda_a, self.lambda_b, self.tau, self.paper_scale, self.max_value,
            self.inplace)

    def forward(self, x: Tensor) -> Tensor:
        if self.channel_dim != 1:
            x = functional.channels_first(x, self.channels)
        if self.static:
            theta = functional.static_coefficients(self.fc2_bias, x, self._settings())
            y = functional.dyrelu(x, theta, None, self.max_value)
        else:
            y = functional.dynamic_relu(x, self._params(), self._settings())
        return y if self.channel_dim == 1 else y.movedim(1, -1)

    def extra_repr(self) -> str:
        text = f'{self.channels}, mode={self.mode!r}, reduction={self.reduction}, k={self.k}, alpha={self.alpha}'
        if self.max_hidden is not None:
            text += f', max_hidden={self.max_hidden}'
        if any(self.beta):
            text += f', beta={self.beta}'
        if self.max_value is not None:
            text += f', max_value={self.max_value:g}'
        if self.paper_scale:
            text += ', paper_scale=True'
        if self.static:
            text += ', static=True'
        if self.channel_dim != 1:
            text += f', channel_dim={self.channel_dim}'
        if self.inplace:
            text += ', inplace=True'
        return text


class DyReLUA(DyReLU):
    """``DyReLU`` in mode "a": one set of coefficients for all channels and positions. Arguments as there."""

    def __init__(self, channels: int | None = None, **kwargs: Any) -> None:
        super().__init__(channels, mode='a', **kwargs)


class DyReLUB(DyReLU):
    """``DyReLU`` in mode "b": a set of coefficients for each channel. Arguments as there."""

    def __init__(self, channels: int | None = None, **kwargs: Any) -> None:
        super().__init__(channels, mode='b', **kwargs)


class DyReLUC(DyReLU):
    """``DyReLU`` in mode "c": mode "b" and a weight for each position. Arguments as there."""

    def __init__(self, channels: int | None = None, **kwargs: Any) -> None:
        super().__init__(channels, mode='c', **kwargs)


class LazyDyReLU(LazyModuleMixin, DyReLU):
    """What a ``DyReLU`` built without ``channels`` is until it knows them.

    The first forward pass, or a state dict that is loaded, turns it into the class that was asked for. As with any lazy
    module of PyTorch, that has to happen before tracing, scripting or counting parameters.
    """

    cls_to_become: type[DyReLU] = DyReLU

    @staticmethod
    def defer(module: DyReLU) -> None:
        """Make a module without channels lazy."""
        cls_to_become, module.__class__ = module.__class__, LazyDyReLU
        module.cls_to_become = cls_to_become
        module._load_hook = module._register_load_state_dict_pre_hook(module._lazy_load_hook)
        module._initialize_hook = module.register_forward_pre_hook(module._infer_parameters, with_kwargs=True)

    def initialize_parameters(self, x: Tensor) -> None:
        check_input(x, functional.DIMS)
        self._materialize(x.shape[self.channel_dim], x.device)

    def _infer_parameters(self, module: DyReLU, args: tuple, kwargs: dict | None = None) -> None:
        super()._infer_parameters(module, args, kwargs)
        del module.cls_to_become

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        tensor = state_dict.get(prefix + ('fc2_bias' if self.static else 'fc1_weight'))
        if tensor is not None and not is_lazy(tensor):
            # An empty batch with the channels of the checkpoint stands in for the first input.
            channels = len(tensor) // (2 * self.k) if self.static else tensor.shape[1]
            self._infer_parameters(self, (torch.empty(0, channels, device=self.fc2_bias.device),))
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)

    def reset_parameters(self) -> None:
        if not self.has_uninitialized_params():
            super().reset_parameters()

    def is_fresh(self) -> bool:
        return True
