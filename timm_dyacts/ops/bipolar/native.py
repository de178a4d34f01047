"""The native kernels of bipolar activations and of bipolar max pooling for CPUs, see ``native.c``."""
import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..cpu_blocks import arithmetic, dense, empty_planes, is_channels_last, laid_out_like
from ..large_pages import in_large_pages
from ..native_library import Crew, call, crew, pointer
from ..pooling.window import Window, size_of
from .reference import max_pool_with_indices_reference
from .registered import MOST_ELEMENTS
from .signs import channel_signs

__all__ = ['activation', 'activation_backward', 'brelu', 'brelu_backward', 'max_pool', 'max_pool_backward']

# The numbers of the kinds in ``native.c``
_KINDS = {'relu': 0, 'elu': 1, 'selu': 1, 'leaky_relu': 2, 'prelu': 2}
# The scale and alpha of SELU
_SELU = (1.0507009873554804934193349852946, 1.6732632423543772848170429916717)
# Positions of planes that are too small for loops of their own
_SMALL = 64


class _Operands(ctypes.Structure):
    """The same as ``operands`` in ``native.c``."""
    _fields_ = [
        *((name, ctypes.c_int64) for name in ('samples', 'channels', 'positions', 'channels_last', 'kind')),
        ('crew', Crew),
        *((name, ctypes.c_void_p) for name in ('x', 'dy', 'out', 'signs', 'slopes', 'sums')),
        ('scale', ctypes.c_double), ('parameter', ctypes.c_double),
    ]


def _run(
        name: str,
        x: Tensor,
        weight: Tensor | None,
        kind: str,
        parameter: float,
        layout: str,
        **tensors: Tensor | None,
) -> None:
    """Call a function of the library. The tensors as large as ``x`` lie in memory as it does, which is dense."""
    n, c, *spatial = x.shape
    positions = math.prod(spatial)
    channels_last = positions == 1 or is_channels_last(x)
    dtype = arithmetic(x)
    signs = channel_signs(c, layout, dtype=dtype)
    slopes = signs  # not read, but by the kinds that have some
    if weight is not None:
        slopes = weight.to(dtype).expand(c).contiguous()
    elif kind == 'leaky_relu':
        slopes = torch.full((c,), parameter, dtype=dtype)
    if name != 'slopes' and not channels_last and positions < _SMALL:
        # Short loops over planes become long ones over samples.
        signs, slopes = (t.repeat_interleave(positions) for t in (signs, slopes))
        c, positions, channels_last = c * positions, 1, True
    scale, parameter = _SELU if kind == 'selu' else (1.0, parameter)
    if parameter == math.inf:
        parameter = math.nan  # no bound: outputs that are infinite have reached none
    call(f'bipolar_{name}', x.dtype, _Operands(
        n, c, positions, channels_last, _KINDS[kind], crew(),
        x=pointer(x), signs=pointer(signs), slopes=pointer(slopes), scale=scale, parameter=parameter,
        **{field: pointer(t) for field, t in tensors.items()}))


def activation(x: Tensor, weight: Tensor | None, kind: str, parameter: float, layout: str, inplace: bool) -> Tensor:
    """Compute a member of the family, see ``reference.activation_reference``."""
    z = dense(x)
    y = z if inplace and z is x else in_large_pages(torch.empty_like(z))
    _run('forward', z, weight, kind, parameter, layout, out=y)
    return x.copy_(y) if inplace and z is not x else y


def activation_backward(
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        kind: str,
        parameter: float,
        layout: str,
        inplace: bool,
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of ``x``, of which ReLU gets its output, and of ``weight``."""
    x = dense(x)
    dy = laid_out_like(dy, x)
    dx = in_large_pages(torch.empty_like(x))
    _run('backward', x, weight, kind, parameter, layout, dy=dy, out=dx)
    dweight = None
    if weight is not None:
        dweight = torch.empty(x.shape[:2], dtype=arithmetic(x))
        _run('slopes', x, weight, kind, parameter, layout, dy=dy, sums=dweight)
        dweight = dweight.sum(0).sum_to_size(weight.shape).to(weight.dtype)
    return dx, dweight, None, None, None, None


# ReLU has other names, as in the other back ends: it keeps its output for the backward pass.
brelu, brelu_backward = activation, activation_backward


class _Pooling(ctypes.Structure):
    """The same as ``pooling`` in ``native.c``."""
    _fields_ = [
        *((name, ctypes.c_int64) for name in ('samples', 'channels', 'channels_last')),
        *((name, ctypes.c_int64 * 2) for name in (
            'size', 'out_size', 'kernel_size', 'stride', 'padding', 'dilation')),
        ('crew', Crew),
        *((name, ctypes.c_void_p) for name in ('x', 'signs', 'out', 'winner')),
    ]


def _run_pooling(
        name: str,
        x: Tensor,
        out: Tensor,
        winner: Tensor,
        size: Sequence[int],
        window: Window,
        signs: Tensor | None = None,
) -> None:
    """Call a function of the library: ``x``, ``out`` and ``winner`` are all contiguous, or all channels_last."""
    call(f'bipolar_{name}', x.dtype, _Pooling(
        *winner.shape[:2], is_channels_last(winner), tuple(size), winner.shape[2:], *(part[1:] for part in window),
        crew(), *map(pointer, (x, signs, out, winner))))


def max_pool(x: Tensor, window: Window, ceil_mode: bool, layout: str) -> tuple[Tensor, Tensor]:
    """Compute bipolar max pooling of (N, C, H, W), and which element of each window has won."""
    if window.elements > MOST_ELEMENTS:  # PyTorch operations compute
        return max_pool_with_indices_reference(x, window, ceil_mode, layout)
    x = dense(x)
    _, *out_size = window.out_size(size_of(x.shape), ceil_mode)
    y = in_large_pages(empty_planes(x, out_size))
    winner = torch.empty_like(y, dtype=torch.int8)
    _run_pooling(
        'max_pool', x.to(memory_format=_format_of(y)), y, winner, x.shape[2:], window,
        channel_signs(x.shape[1], layout, dtype=arithmetic(x)))
    return y, winner


def max_pool_backward(dy: Tensor, winner: Tensor, size: tuple[int, int], window: Window) -> Tensor:
    """Compute the gradient of the input, whose spatial dimensions are ``size``."""
    dx = in_large_pages(empty_planes(winner, size, dy.dtype))
    _run_pooling('max_pool_backward', dy.contiguous(memory_format=_format_of(winner)), dx, winner, size, window)
    return dx


def _format_of(planes: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(planes) else torch.contiguous_format
