"""The native kernels of Dynamic ReLU for CPUs, see ``native.c``.

Forward two reads and a write, backward four reads and a write, whatever the mode.
"""
import ctypes
import math

import torch
from torch import Tensor

from ..cpu_blocks import arithmetic, dense, is_channels_last, laid_out_like
from ..large_pages import in_large_pages
from ..native_library import Crew, call, crew, pointer
from . import cpu
from .registered import MOST_PIECES
from .settings import DyReLUParams, DyReLUSaved, DyReLUSettings

__all__ = ['dynamic_relu', 'dynamic_relu_backward', 'dyrelu', 'dyrelu_backward']


class _Operands(ctypes.Structure):
    """The same as ``operands`` in ``native.c``."""
    _fields_ = [
        *((name, ctypes.c_int64) for name in ('samples', 'channels', 'positions', 'channels_last', 'k')),
        ('crew', Crew),
        *((name, ctypes.c_void_p) for name in (
            'x', 'dy', 'out', 'theta', 'pi', 'weight', 'dmean', 'dlogits', 'sums', 'per_position')),
        ('max_value', ctypes.c_double),
        *((name, ctypes.c_int64) for name in ('units', 'sets')),
        *((name, ctypes.c_void_p) for name in (
            'fc1_weight', 'fc1_bias', 'fc2_weight', 'fc2_bias', 'hidden', 'residual', 'coefs', 'dfc1_weight',
            'dfc1_bias', 'dfc2_weight', 'dfc2_bias')),
        *((name, ctypes.c_double * (2 * MOST_PIECES)) for name in ('starts', 'ranges')),
    ]


def _run(
        name: str,
        x: Tensor,
        k: int = 1,
        max_value: float | None = None,
        **fields: Tensor | tuple[float, ...] | int | None,
) -> None:
    """Call a function of the library.

    Args:
        name: Its name, without the operator's.
        x: The input of the operator, dense.
        k: The number of pieces.
        max_value: Their bound.
        fields: The other fields of ``operands``. Tensors as large as ``x`` lie in memory as it does, all others are
            contiguous and in the dtype of the arithmetic.
    """
    n, c, *spatial = x.shape
    positions = math.prod(spatial)
    # Without positions to speak of, channels are what lies side by side.
    channels_last = positions == 1 or is_channels_last(x)
    call(f'dyrelu_{name}', x.dtype, _Operands(
        n, c, positions, channels_last, k, crew(), x=pointer(x), max_value=math.nan if max_value is None else max_value,
        **{field: pointer(value) if isinstance(value, Tensor) else value for field, value in fields.items()}))


def _by_channels(theta: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Give coefficients of shape (N, C or 1, 2K) as (N, 2K, C), contiguous."""
    return theta.to(dtype).expand(-1, channels, -1).transpose(1, 2).contiguous()


def _weights(pi: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if pi is None else pi.to(dtype).contiguous()


def dyrelu(x: Tensor, theta: Tensor, pi: Tensor | None, max_value: float | None) -> Tensor:
    """Compute ``functional.dyrelu``."""
    k, dtype = theta.shape[2] // 2, arithmetic(x)
    if k > MOST_PIECES or arithmetic(x, theta) != dtype:
        return cpu.dyrelu(x, theta, pi, max_value)
    x = dense(x)
    y = in_large_pages(torch.empty_like(x))
    theta, pi = _by_channels(theta, x.shape[1], dtype), _weights(pi, dtype)
    _run('apply', x, k, max_value, out=y, theta=theta, pi=pi)
    return y


def _reduce(
        dy: Tensor,
        x: Tensor,
        theta: Tensor,
        pi: Tensor | None,
        max_value: float | None,
) -> tuple[Tensor, Tensor | None]:
    """Compute the gradients of coefficients, both (N, 2K, C), and of ``pi``."""
    dtheta = torch.empty_like(theta)
    dpi = None if pi is None else torch.empty_like(pi)
    _run('reduce', x, theta.shape[1] // 2, max_value, dy=dy, theta=theta, pi=pi, sums=dtheta, per_position=dpi)
    return dtheta, dpi


def dyrelu_backward(
        dy: Tensor,
        x: Tensor,
        theta: Tensor,
        pi: Tensor | None,
        max_value: float | None,
) -> tuple[Tensor, Tensor, Tensor | None, None]:
    """Compute the gradients of ``x``, ``theta`` and ``pi``."""
    k, dtype = theta.shape[2] // 2, arithmetic(x)
    if k > MOST_PIECES or arithmetic(x, theta) != dtype:
        return cpu.dyrelu_backward(dy, x, theta, pi, max_value)
    x = dense(x)
    dy = laid_out_like(dy, x)
    coefs, shares = _by_channels(theta, x.shape[1], dtype), _weights(pi, dtype)
    dtheta, dpi = _reduce(dy, x, coefs, shares, max_value)
    dx = in_large_pages(torch.empty_like(x))
    _run('finish', x, k, max_value, dy=dy, out=dx, theta=coefs, pi=shares)
    dtheta = dtheta.transpose(1, 2).sum_to_size(theta.shape).to(theta.dtype)
    return dx, dtheta, None if pi is None else dpi.to(pi.dtype), None


def dynamic_relu(x: Tensor, settings: DyReLUSettings, *params: Tensor | None) -> tuple[Tensor | None, ...]:
    """Compute ``functional.dynamic_relu``. Returns the output, then the fields of ``DyReLUSaved``."""
    k = len(settings.alpha)
    if k > MOST_PIECES:
        return cpu.dynamic_relu(x, settings, *params)
    params = DyReLUParams(*params)
    given, x = x, dense(x)
    n, channels, *spatial = x.shape
    dtype = arithmetic(x)
    *layers, spatial_weight, spatial_bias = (None if p is None else p.to(dtype).contiguous() for p in params)
    mean = torch.empty(n, channels, dtype=dtype)
    units, outputs = len(layers[0]), len(layers[2])
    sets = outputs // (2 * k)
    # The samples side by side, as the layers compute them.
    hidden, residual = mean.new_empty(units, n), mean.new_empty(outputs, n)
    coefs = mean.new_empty(n, 2 * k, sets)
    theta = coefs if sets == channels else mean.new_empty(n, 2 * k, channels)
    hyper = dict(
        zip(DyReLUParams._fields[:4], layers, strict=True), units=units, sets=sets, hidden=hidden, residual=residual,
        coefs=coefs, theta=theta, starts=settings.starts, ranges=settings.ranges)
    y = x if settings.inplace or x is not given else in_large_pages(torch.empty_like(x))
    pi = share = None
    if spatial_weight is None:
        _run('forward', x, k, settings.max_value, sums=mean, out=y, **hyper)
    else:
        logits = mean.new_empty(n, 1, *spatial)
        _run('statistics', x, weight=spatial_weight, sums=mean, per_position=logits)
        _run('hyper', x, k, sums=mean, **hyper)
        pi, share = cpu.attention(logits, spatial_bias, settings)
        _run('apply', x, k, settings.max_value, out=y, theta=theta, pi=pi)
    if y is given and not y.is_inference():
        torch.autograd.graph.increment_version(y)
    return y, *DyReLUSaved(coefs.transpose(1, 2), mean, hidden.t(), residual.t(), pi, share)


def dynamic_relu_backward(
        dy: Tensor,
        x: Tensor,
        settings: DyReLUSettings,
        *params: Tensor | None,
        saved: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of ``x`` and the parameters."""
    k = len(settings.alpha)
    if k > MOST_PIECES:
        return cpu.dynamic_relu_backward(dy, x, settings, *params, saved=saved)
    params, saved = DyReLUParams(*params), DyReLUSaved(*saved)
    x = dense(x)
    dy = laid_out_like(dy, x)
    channels, residual, pi = x.shape[1], saved.residual, saved.pi
    coefs = _by_channels(saved.theta, channels, residual.dtype)
    dcoefs, dpi = _reduce(dy, x, coefs, pi, settings.max_value)
    if saved.theta.shape[1] != channels:
        dcoefs = dcoefs.sum(2, keepdim=True)
    dlogits = weight = dspatial_weight = dspatial_bias = None
    if dpi is not None:
        dlogits = cpu.attention_backward(dpi, saved.share, settings)
        weight = params.spatial_weight.to(residual.dtype).contiguous()
        dspatial_weight = torch.empty_like(saved.mean)
        dspatial_bias = torch.zeros_like(params.spatial_bias)
    dmean, dparams = _hyper_backward(x, dcoefs, params, saved, settings)
    dx = in_large_pages(torch.empty_like(x))
    _run('finish', x, k, settings.max_value, dy=dy, out=dx, theta=coefs, pi=pi, weight=weight, dmean=dmean,
         dlogits=dlogits, sums=dspatial_weight)
    if dspatial_weight is not None:
        dspatial_weight = dspatial_weight.sum(0, keepdim=True).to(params.spatial_weight.dtype)
    return dx, None, *dparams, dspatial_weight, dspatial_bias


def _hyper_backward(
        x: Tensor,
        dcoefs: Tensor,
        params: DyReLUParams,
        saved: DyReLUSaved,
        settings: DyReLUSettings,
) -> tuple[Tensor, list[Tensor]]:
    """Compute the gradients of the sums of planes, (N, C), and of the two layers, from that of the coefficients."""
    dtype = saved.residual.dtype
    layers = dict(zip(DyReLUParams._fields[:4], (p.to(dtype).contiguous() for p in params[:4]), strict=True))
    gradients = {f'd{name}': in_large_pages(torch.empty_like(layer)) for name, layer in layers.items()}
    dmean = torch.empty_like(saved.mean)
    _run('hyper_backward', x, len(settings.alpha), **layers, **gradients, units=len(layers['fc1_bias']),
         sets=dcoefs.shape[2], sums=saved.mean, hidden=saved.hidden.t().contiguous(),
         residual=saved.residual.t().contiguous(), coefs=dcoefs, ranges=settings.ranges, dmean=dmean)
    return dmean, [gradient.to(p.dtype) for gradient, p in zip(gradients.values(), params[:4], strict=True)]
