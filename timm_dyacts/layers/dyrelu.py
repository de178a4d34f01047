"""Dynamic ReLU: a piecewise linear activation whose slopes and intercepts are computed from its own input.

Paper: `Dynamic ReLU` (Chen et al., 2020) - https://arxiv.org/abs/2003.10027
"""
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter, is_lazy

from ..ops import backends
from ..ops.checks import (
    check_channels,
    check_choice,
    check_finite,
    check_input,
    check_int,
    check_positive,
    unless_tracing,
)
from ..ops.dyrelu.settings import DyReLUSettings
from .forms import Form, Place

__all__ = ['DyReLU', 'DyReLUA', 'DyReLUB', 'DyReLUC', 'LazyDyReLU', 'dyrelu']

_DIMS = (2, 3, 4, 5)


@unless_tracing
def _check_operands(x: Tensor, theta: Tensor, pi: Tensor | None) -> None:
    check_input(x, _DIMS)
    n, c, *spatial = x.shape
    shape = theta.shape
    channels_fit = len(shape) == 3 and (shape[1] == c or shape[1] == 1)
    if not channels_fit or shape[0] != n or shape[2] < 2 or shape[2] % 2:
        raise ValueError(f'theta must have shape (N, C or 1, 2K) with N={n}, C={c}, K >= 1, got {tuple(shape)}')
    if pi is not None and pi.shape != (n, 1, *spatial):
        raise ValueError(f'pi must have shape {(n, 1, *spatial)}, got {tuple(pi.shape)}')


# FX keeps the functions marked by `wrap` as single nodes: a symbolic input has no shape for their checks to read.
@torch.fx.wrap
def dyrelu(x: Tensor, theta: Tensor, pi: Tensor | None = None, max_value: float | None = None) -> Tensor:
    """Applies given piecewise linear functions: ``y = pi * min(max_k(a_k * x + b_k), max_value)``.

    Of pieces that tie, the last has the gradient: ``max(x, 0)`` has that of ReLU, zero at zero.

    Args:
        x: Input of shape (N, C, *spatial), with 0 to 3 spatial dimensions.
        theta: Coefficients of shape (N, C, 2K), or (N, 1, 2K) where all channels share them: the K slopes ``a``,
            then the K intercepts ``b``.
        pi: Weight of each position, of shape (N, 1, *spatial).
        max_value: Upper bound of the piecewise linear functions.

    Returns:
        A tensor like `x`. A half-precision `x` is computed in the precision of `theta`.

    Raises:
        ValueError: If a shape is not as above, or a dimension of `x` other than the batch is empty.
        TypeError: If `x` has no floating-point dtype.
    """
    if not torch.jit.is_scripting():
        _check_operands(x, theta, pi)
        fused = backends.find_kernel('dyrelu', 'apply', x, theta, pi)
        if fused is not None:
            return _DyReLUFunction.apply(fused, x, theta, pi, max_value)
    return _dyrelu_definition(x, theta, pi, max_value)


def _dyrelu_definition(x: Tensor, theta: Tensor, pi: Tensor | None, max_value: float | None) -> Tensor:
    """`dyrelu` in plain operations."""
    k = theta.shape[2] // 2
    shape = [theta.shape[0], theta.shape[1]] + [1] * (x.dim() - 2)
    coefs = [coef.reshape(shape) for coef in theta.unbind(2)]
    # Products and sums, as in the passes on CPUs: the results are the same to the last bit.
    y = x * coefs[0] + coefs[k]
    for i in range(1, k):
        piece = x * coefs[i] + coefs[k + i]
        if not torch.jit.is_scripting() and torch.compiler.is_compiling() and not torch.is_grad_enabled():
            y = torch.maximum(y, piece)
        else:
            # The same in two passes more, but pieces that tie do not share the gradient.
            y = torch.where((y > piece) | (y != y), y, piece)
    if max_value is not None:
        # The function that ReLU6 calls, so that the gradient at the bound itself is the same too.
        y = F.hardtanh(y, -math.inf, max_value)
    if pi is not None:
        y = y * pi
    return y.to(x.dtype)


class _DyReLUFunction(torch.autograd.Function):
    """Keeps the operands and nothing else for the backward pass, which finds the largest pieces anew."""

    @staticmethod
    def forward(ctx, fused: Callable, *args) -> Tensor:
        *operands, ctx.max_value = args
        ctx.save_for_backward(*operands)
        return backends.run_kernel(fused, _dyrelu_definition, *args)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        args = (*ctx.saved_tensors, ctx.max_value)
        fused = backends.find_kernel('dyrelu', 'apply_backward', dy, *args)
        return None, *backends.differentiate(fused, _dyrelu_definition, args, (dy,), ctx.needs_input_grad[1:])


def _check_input(x: Tensor, fc1_weight: Tensor) -> None:
    check_input(x, _DIMS)
    check_channels(x, fc1_weight.shape[1])


def _statistics(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What the coefficients need to know of the input.

    Returns:
        The mean of each plane, (N, C); with a spatial weight of shape (1, C), its product with x, (N, 1, *spatial).
        In fp32 for half-precision inputs.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean = x.unsqueeze(-1).flatten(2).mean(2, dtype=dtype)
    logits: Tensor | None = None
    if weight is not None:
        # Product and sum, not a convolution: autograd keeps x in its own dtype, autocast and TF32 keep out, and
        # torch.compile makes one pass of it.
        product = x * weight.to(dtype).reshape([1, weight.shape[1]] + [1] * (x.dim() - 2))
        logits = product.sum(1, keepdim=True)
    return mean, logits


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer in the dtype of `x`, under autocast too: a sum over channels easily leaves the fp16 range.

    Scripted modules are the exception, as TorchScript applies autocast itself.
    """
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if not torch.jit.is_scripting():
        kind = x.device.type
        available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
        if available and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return F.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def _coefficients(
        mean: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor,
        settings: DyReLUSettings,
) -> Tensor:
    """The hyper function: (N, C) -> (N, C or 1, 2K)."""
    k = len(settings.alpha)
    z = _linear(_linear(mean, fc1_weight, fc1_bias).relu(), fc2_weight, fc2_bias)
    # 2 * sigmoid(z) - 1 = tanh(z / 2)
    residuals = torch.tanh(z / 2).reshape(mean.shape[0], fc2_bias.shape[0] // (2 * k), 2 * k).unbind(2)
    # The constants enter as scalars: a tensor made of them here would be a synchronising copy to the device.
    slopes = [settings.alpha[i] + settings.lambda_a * residuals[i] for i in range(k)]
    intercepts = [settings.beta[i] + settings.lambda_b * residuals[k + i] for i in range(k)]
    # In memory the channels are last, for kernels that read those of many at once.
    return torch.stack(slopes + intercepts, 1).transpose(1, 2)


def _attention(logits: Tensor, bias: Tensor, settings: DyReLUSettings) -> Tensor:
    """The spatial weight of DyReLU-C from its logits without bias, (N, 1, *spatial)."""
    z = (logits + bias.to(logits.dtype)).flatten(1) / settings.tau
    # exp / mean(exp) is HW * softmax, and exactly 1 where the attention is uniform.
    e = torch.exp(z - z.detach().amax(1, keepdim=True))
    pi = torch.clamp(e / e.mean(1, keepdim=True), max=3.0)
    if settings.paper_scale:
        pi = pi / 3
    return pi.reshape(logits.shape)


@torch.fx.wrap
def _dynamic_relu(
        x: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor,
        spatial_weight: Tensor | None,
        spatial_bias: Tensor | None,
        settings: DyReLUSettings,
) -> Tensor:
    """A module as a function of its input, parameters and settings."""
    if not torch.jit.is_scripting():
        _check_input(x, fc1_weight)
        operands = x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight, spatial_bias
        fused = backends.find_kernel('dyrelu', 'dynamic_relu', *operands)
        if fused is not None:
            return _DynamicReLUFunction.apply(fused, settings, *operands)
    return _dynamic_relu_definition(
        x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight, spatial_bias, settings)


def _dynamic_relu_definition(
        x: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor,
        spatial_weight: Tensor | None,
        spatial_bias: Tensor | None,
        settings: DyReLUSettings,
) -> Tensor:
    """`_dynamic_relu` step by step."""
    mean, logits = _statistics(x, spatial_weight)
    theta = _coefficients(mean, fc1_weight, fc1_bias, fc2_weight, fc2_bias, settings)
    pi: Tensor | None = None
    if logits is not None and spatial_bias is not None:
        pi = _attention(logits, spatial_bias, settings)
    return dyrelu(x, theta, pi, settings.max_value)


class _DynamicReLUFunction(torch.autograd.Function):
    """The whole module as one function: few passes over the input, few launches, and what goes from one of them to the
    next, such as partial sums and gradients to be added to in place, stays inside.
    """

    @staticmethod
    def forward(ctx, fused: Callable, settings: DyReLUSettings, *operands: Tensor | None) -> Tensor:
        def definition(*args) -> tuple[Tensor]:
            return _dynamic_relu_definition(*args),

        y, *found = backends.run_kernel(fused, definition, *operands, settings)
        ctx.settings = settings
        ctx.save_for_backward(*operands, *found)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: activation checkpointing computes them at that
        operands, found = saved[:7], saved[7:]
        fused = backends.find_kernel('dyrelu', 'dynamic_relu_backward', dy) if found else None
        if fused is not None:
            fused = dataclasses.replace(fused, function=functools.partial(fused.function, found=found))
        args = (*operands, ctx.settings)
        *grads, _ = backends.differentiate(
            fused, _dynamic_relu_definition, args, (dy,), (*ctx.needs_input_grad[2:], False))
        return None, None, *grads


class DyReLU(nn.Module):
    """Dynamic ReLU.

    ``y = max_k(a_k(x) * x + b_k(x))`` with ``a = alpha + lambda_a * da``, ``b = beta + lambda_b * db``, where
    ``(da, db) = 2 * sigmoid(fc2(relu(fc1(mean(x))))) - 1`` and ``fc1: C -> max(C // reduction, 1)``. As `fc2` starts at
    zero, a fresh module is exactly the static activation ``max_k(alpha_k * x + beta_k)``: ReLU by default, leaky ReLU
    with ``alpha=(1, negative_slope)``, ReLU6 with ``max_value=6``.

    The modes differ in what shares the coefficients: all channels and positions ("a"), all positions ("b"), or
    all positions but for a spatial weight that multiplies the output of "b" ("c"):
    ``pi = min(HW * softmax(conv1x1(x) / tau), 3)``, which starts at exactly 1.

    The hyper function and the spatial weight are computed in at least fp32, under autocast and in a half-precision
    module too: the sums inside leave the fp16 range.

    Paper: `Dynamic ReLU` - https://arxiv.org/abs/2003.10027. The values of `tau` and of the bound 3 are as
    re-implemented in public re-implementations, not read in the paper.

    Shape:
        - Input: (N, C, *spatial), with 0 to 3 spatial dimensions.
        - Output: the shape, dtype and memory format of the input.

    Args:
        channels: Number of channels C. If None, the module is a lazy one until its first forward pass (parameters
            then appear on the device of the input) or until it loads a state dict.
        mode: Variant, "a", "b" or "c".
        reduction: Ratio of the channels to the hidden width of the hyper function.
        k: Number of linear pieces K.
        lambda_a: Range of the slopes around `alpha`.
        lambda_b: Range of the intercepts around `beta`.
        alpha: The K initial slopes. Default: one, then zeros.
        beta: The K initial intercepts. Default: zeros.
        max_value: Upper bound of the piecewise linear function. Default: none.
        tau: Temperature of the spatial softmax, mode "c" only.
        paper_scale: Scale the spatial weight as in the paper, to ``pi / 3``. A fresh module is then a third of
            the static activation. Mode "c" only.
        channel_dim: 1, or -1 for inputs of shape (N, *spatial, C), as the MLPs of transformers have.
        inplace: Accepted for timm's activation factory, without effect: the input is needed for the backward pass.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If an argument is out of range; on forward, if the rank or the number of channels of the input
            differs from the above, or a dimension other than the batch is empty.
        TypeError: If an argument has the wrong type; on forward, if the input has no floating-point dtype.
    """

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
            channel_dim: int = 1,
            inplace: bool = False,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channels is not None:
            check_int('channels', channels, 1)
        check_choice('mode', mode, ('a', 'b', 'c'))
        check_int('reduction', reduction, 1)
        check_int('k', k, 1)
        alpha = [1.0] + [0.0] * (k - 1) if alpha is None else alpha
        beta = [0.0] * k if beta is None else beta
        for name, values in (('alpha', alpha), ('beta', beta)):
            if len(values) != k:
                raise ValueError(f'{name} must hold k={k} numbers, got {values}')
        self.channels = channels
        self.mode = mode
        self.reduction = reduction
        self.k = k
        self.lambda_a = check_finite('lambda_a', lambda_a)
        self.lambda_b = check_finite('lambda_b', lambda_b)
        self.alpha = [check_finite('alpha', value) for value in alpha]
        self.beta = [check_finite('beta', value) for value in beta]
        self.max_value = None if max_value is None else check_finite('max_value', max_value)
        self.tau = check_positive('tau', tau)
        self.paper_scale = paper_scale
        check_choice('channel_dim', channel_dim, (1, -1))
        self.channel_dim = channel_dim

        # Parameters, not nn.Linear children: the weight initialisers of models walk over modules by type and
        # would take the zero start away.
        for name in ('fc1_weight', 'fc1_bias', 'fc2_weight', 'fc2_bias', 'spatial_weight', 'spatial_bias'):
            unused = name.startswith('spatial') and mode != 'c'
            self.register_parameter(name, None if unused else UninitializedParameter(device=device, dtype=dtype))
        if channels is not None:
            self._materialize(channels)
        elif not isinstance(self, LazyDyReLU):
            LazyDyReLU.defer(self)

    def _materialize(self, channels: int, device: torch.device | None = None) -> None:
        self.channels = channels
        hidden = max(channels // self.reduction, 1)
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
        """Draws `fc1` as `nn.Linear` does and zeroes the rest, which makes the module the static activation again."""
        for param in self.parameters():
            nn.init.zeros_(param)
        nn.init.kaiming_uniform_(self.fc1_weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(self.channels)
        nn.init.uniform_(self.fc1_bias, -bound, bound)

    def is_fresh(self) -> bool:
        """Whether the module still is the static activation: all parameters but those of `fc1` are zero.

        On the meta device there are no values to read, and the answer is yes.
        """
        moved = [param for name, param in self.named_parameters() if not name.startswith('fc1') and not param.is_meta]
        return not any(param.any() for param in moved)

    def static_form(self) -> Form:
        """The function of a fresh module, if it is a plain one: ReLU, up to a bound, or leaky ReLU."""
        slope, *rest = self.alpha
        if not self.is_fresh() or slope != 1 or len(set(rest)) != 1 or any(self.beta) or not 0 <= rest[0] <= 1:
            return Form('dynamic', {})
        if rest[0] == 0:
            return Form('relu', dict(max_value=self.max_value))
        return Form('leaky_relu', dict(negative_slope=rest[0]))

    @classmethod
    def starting_as(cls, form: Form, place: Place, **kwargs) -> 'DyReLU':
        """Make the module that starts as another activation, or as ReLU where it cannot.

        Args:
            form: What it is to start as.
            place: Where it goes.
            **kwargs: Further arguments of the class; they win over what follows from `form`.
        """
        kind, options = form.canonical()
        if kind == 'relu':
            kwargs.setdefault('max_value', options['max_value'])
        elif kind == 'leaky_relu':
            kwargs.setdefault('alpha', (1.0,) + (options['negative_slope'],) * (kwargs.get('k', 2) - 1))
        return cls(
            place.channels, channel_dim=place.channel_dim, device=place.device, dtype=place.dtype, **kwargs)

    def coefficients(self, x: Tensor) -> Tensor:
        """Computes the coefficients for an input.

        Args:
            x: Input of shape (N, C, *spatial).

        Returns:
            Shape (N, C, 2K), or (N, 1, 2K) in mode "a": K slopes, then K intercepts. At least fp32.
        """
        _check_input(x, self.fc1_weight)
        mean, _ = _statistics(x, None)
        return _coefficients(
            mean, self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias, self._settings())

    def attention(self, x: Tensor) -> Tensor | None:
        """Computes the spatial weight for an input.

        Args:
            x: Input of shape (N, C, *spatial).

        Returns:
            Shape (N, 1, *spatial), at least fp32; None in modes "a" and "b".
        """
        _check_input(x, self.fc1_weight)
        _, logits = _statistics(x, self.spatial_weight)
        return None if logits is None else _attention(logits, self.spatial_bias, self._settings())

    def _settings(self) -> DyReLUSettings:
        return DyReLUSettings(
            self.alpha,
            self.beta,
            self.lambda_a,
            self.lambda_b,
            self.tau,
            self.paper_scale,
            self.max_value,
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.channel_dim != 1:
            x = x.movedim(-1, 1)
        y = _dynamic_relu(
            x,
            self.fc1_weight,
            self.fc1_bias,
            self.fc2_weight,
            self.fc2_bias,
            self.spatial_weight,
            self.spatial_bias,
            self._settings(),
        )
        return y if self.channel_dim == 1 else y.movedim(1, -1)

    def extra_repr(self) -> str:
        text = f'{self.channels}, mode={self.mode!r}, reduction={self.reduction}, k={self.k}, alpha={self.alpha}'
        if any(self.beta):
            text += f', beta={self.beta}'
        if self.max_value is not None:
            text += f', max_value={self.max_value:g}'
        if self.paper_scale:
            text += ', paper_scale=True'
        if self.channel_dim != 1:
            text += f', channel_dim={self.channel_dim}'
        return text


class DyReLUA(DyReLU):
    """`DyReLU` in mode "a": one set of coefficients for all channels and positions. Arguments as there."""

    def __init__(self, channels: int | None = None, **kwargs) -> None:
        super().__init__(channels, mode='a', **kwargs)


class DyReLUB(DyReLU):
    """`DyReLU` in mode "b": a set of coefficients for each channel. Arguments as there."""

    def __init__(self, channels: int | None = None, **kwargs) -> None:
        super().__init__(channels, mode='b', **kwargs)


class DyReLUC(DyReLU):
    """`DyReLU` in mode "c": mode "b" and a weight for each position. Arguments as there."""

    def __init__(self, channels: int | None = None, **kwargs) -> None:
        super().__init__(channels, mode='c', **kwargs)


class LazyDyReLU(LazyModuleMixin, DyReLU):
    """What a `DyReLU` built without `channels` is until it knows them.

    The first forward pass or a loaded state dict tells, and turns it into the class that was asked for. As with any
    lazy module of PyTorch, that has to happen before tracing, scripting or counting parameters.
    """

    cls_to_become = DyReLU

    @staticmethod
    def defer(module: DyReLU) -> None:
        """Makes a module without channels lazy."""
        cls_to_become, module.__class__ = module.__class__, LazyDyReLU
        module.cls_to_become = cls_to_become
        module._load_hook = module._register_load_state_dict_pre_hook(module._lazy_load_hook)
        module._initialize_hook = module.register_forward_pre_hook(module._infer_parameters, with_kwargs=True)

    def initialize_parameters(self, x: Tensor) -> None:
        check_input(x, _DIMS)
        self._materialize(x.shape[self.channel_dim], x.device)

    def _infer_parameters(self, module: DyReLU, args: tuple, kwargs: dict | None = None) -> None:
        super()._infer_parameters(module, args, kwargs)
        del module.cls_to_become

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        weight = state_dict.get(prefix + 'fc1_weight')
        if weight is not None and not is_lazy(weight):
            # An empty batch with the channels of the checkpoint stands in for the first input.
            self._infer_parameters(self, (torch.empty(0, weight.shape[1], device=self.fc1_weight.device),))
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)

    def reset_parameters(self) -> None:
        if not self.has_uninitialized_params():
            super().reset_parameters()

    def is_fresh(self) -> bool:
        return True
