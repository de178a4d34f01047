"""Dynamic ReLU as a registered operator, see ``ops.registered``."""
import torch
from torch import Tensor

from ..cpu_blocks import arithmetic, dense
from ..registered import register
from .settings import DyReLUParams, DyReLUSettings

__all__ = ['MOST_PIECES', 'dynamic_relu_registered']

_SETTINGS = (
    'float[] alpha, float[] beta, float lambda_a, float lambda_b, float tau, bool paper_scale, float? max_value, '
    'bool inplace')
_PARAMS = (
    'Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias, Tensor? spatial_weight, '
    'Tensor? spatial_bias')
# With more pieces than there are loops for, PyTorch operations compute. They would take most of the time of building.
MOST_PIECES = 2
_COUNT = len(DyReLUSettings._fields)


def dynamic_relu_registered(x: Tensor, params: DyReLUParams, settings: DyReLUSettings) -> Tensor:
    """Compute ``functional.dynamic_relu``."""
    return _forward(x, *settings._replace(inplace=False), *params)[0]


def _some(tensors: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    """Put something that is there in the place of each None: what an operator returns are tensors."""
    return tuple(like.new_empty(0) if t is None else t for t in tensors)


def _forward_kernel(x: Tensor, *args) -> tuple[Tensor, ...]:
    from . import native
    return _some(native.dynamic_relu(x, DyReLUSettings(*args[:_COUNT]), *args[_COUNT:]), x)


def _forward_fake(x: Tensor, *args) -> tuple[Tensor, ...]:
    settings, params = DyReLUSettings(*args[:_COUNT]), DyReLUParams(*args[_COUNT:])
    n, channels, *spatial = x.shape
    k, outputs = len(settings.alpha), params.fc2_weight.shape[0]
    mean = x.new_empty(n, channels, dtype=arithmetic(x))
    theta = mean.new_empty(n, 2 * k, outputs // (2 * k)).transpose(1, 2)
    # As ``mlp`` has them, with the samples side by side.
    hidden, residual = mean.new_empty(params.fc1_weight.shape[0], n).t(), mean.new_empty(outputs, n).t()
    pi = share = None
    if params.spatial_weight is not None:
        pi, share = mean.new_empty(n, 1, *spatial), mean.new_empty(n, 1, *spatial)
    return _some((torch.empty_like(dense(x)), theta, mean, hidden, residual, pi, share), x)


def _backward_kernel(dy: Tensor, x: Tensor, *args) -> tuple[Tensor, ...]:
    from . import native
    *args, saved = args
    params = args[_COUNT:]
    saved = (*saved[:4], *(None if params[-1] is None else t for t in saved[4:]))
    dx, _, *dparams = native.dynamic_relu_backward(dy, x, DyReLUSettings(*args[:_COUNT]), *params, saved=saved)
    return _some((dx, *dparams), x)


def _backward_fake(dy: Tensor, x: Tensor, *args) -> tuple[Tensor, ...]:
    params = args[_COUNT:-1]
    return _some((torch.empty_like(dense(x)), *(None if p is None else p.new_empty(p.shape) for p in params)), x)


def _setup_context(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, *args = inputs
    ctx.settings = args[:_COUNT]
    ctx.save_for_backward(x, *args[_COUNT:], *output[1:])
    ctx.set_materialize_grads(False)


def _gradient(ctx, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x, *tensors = ctx.saved_tensors
    params, saved = tensors[:len(DyReLUParams._fields)], tensors[len(DyReLUParams._fields):]
    dx, *dparams = _backward(dy, x, *ctx.settings, *params, saved)
    return dx, *(None,) * _COUNT, *(None if p is None else d for p, d in zip(params, dparams, strict=True))


_forward = register(
    f'dynamic_relu(Tensor x, {_SETTINGS}, {_PARAMS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)',
    _forward_kernel, _forward_fake, _gradient, _setup_context)
_backward = register(
    f'dynamic_relu_backward(Tensor dy, Tensor x, {_SETTINGS}, {_PARAMS}, Tensor[] saved) '
    '-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)',
    _backward_kernel, _backward_fake)
