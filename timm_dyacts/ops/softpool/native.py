"""The native kernels of SoftPool for CPUs, see ``native.c``: one pass each over input, output and their gradients."""
import ctypes
import math

import torch
from torch import Tensor

from ..cpu_blocks import dense, empty_planes, is_channels_last
from ..large_pages import in_large_pages
from ..native_library import Crew, call, crew, pointer
from ..pooling.window import Sizes, Window, reach, size_of
from .scaling import scale_of, sharpness_of

__all__ = ['softpool', 'softpool_backward']


class _Operands(ctypes.Structure):
    """The same as ``operands`` in ``native.c``."""
    _fields_ = [
        *((name, ctypes.c_int64) for name in ('samples', 'channels', 'channels_last')),
        *((name, ctypes.c_int64 * 3) for name in (
            'size', 'out_size', 'kernel_size', 'stride', 'padding', 'dilation')),
        *((name, ctypes.c_int64) for name in ('padded', 'covers', 'detach')),
        ('crew', Crew),
        *((name, ctypes.c_void_p) for name in ('x', 'dy', 'out')),
        ('scale', ctypes.c_double), ('sharpness', ctypes.c_double),
    ]


def _run(
        name: str,
        x: Tensor,
        window: Window,
        out_size: Sizes,
        beta: float,
        out: Tensor,
        dy: Tensor | None = None,
        detach_weights: bool = False,
) -> None:
    """Call a function of the library; ``dy`` and ``out`` lie in memory as ``x`` does, which is dense."""
    channels_last = is_channels_last(x)
    samples, channels = (x.shape[0], x.shape[1]) if channels_last else (x.shape[0] * x.shape[1], 1)
    size = size_of(x.shape)
    scale, sharpness = scale_of(window.elements), sharpness_of(window.elements, beta) / math.log(2)
    call(f'softpool_{name}', x.dtype, _Operands(
        samples, channels, channels_last, size, out_size, *window,
        padded=_is_padded(size, out_size, window),
        covers=window.covers(size, out_size) and not any(window.padding),
        detach=detach_weights,
        crew=crew(), x=pointer(x), dy=pointer(dy), out=pointer(out),
        scale=math.copysign(scale, beta), sharpness=abs(sharpness)))


def _is_padded(size: Sizes, out_size: Sizes, window: Window) -> bool:
    """Tell whether some window has elements outside of the input."""
    for n, out, k, *rest in zip(size, out_size, *window, strict=True):
        reached = reach(n, out, k, *rest)
        if len(reached) < k or any((first, last) != (0, out) for first, last, _, _ in reached):
            return True
    return False


def softpool(x: Tensor, window: Window, ceil_mode: bool, beta: float, detach_weights: bool) -> Tensor:
    """Compute SoftPool of (N, C, *spatial)."""
    out_size = window.out_size(size_of(x.shape), ceil_mode)
    x = dense(x)
    y = in_large_pages(empty_planes(x, out_size))
    _run('forward', x, window, out_size, beta, y)
    return y.reshape(*x.shape[:2], *out_size[5 - x.dim():])


def softpool_backward(
        dy: Tensor,
        x: Tensor,
        window: Window,
        ceil_mode: bool,
        beta: float,
        detach_weights: bool,
) -> tuple[Tensor, None, None, None, None]:
    """Compute the gradient of the input."""
    x = dense(x)
    if is_channels_last(x):
        dy = dy.movedim(1, -1).contiguous().movedim(-1, 1)
    else:
        dy = dy.contiguous()
    dx = in_large_pages(torch.empty_like(x))
    _run('backward', x, window, size_of(dy.shape), beta, dx, dy, detach_weights)
    return dx, None, None, None, None
