"""SoftPool as a registered operator, see ``ops.registered``."""
from collections.abc import Sequence

import torch
from torch import Tensor

from ..cpu_blocks import dense, empty_planes
from ..pooling.window import Window, size_of
from ..registered import WINDOW, register

__all__ = ['softpool_registered']

_ARGS = f'{WINDOW}, bool ceil_mode, float beta, bool detach_weights'


def softpool_registered(
        x: Tensor,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        ceil_mode: bool,
        beta: float,
        detach_weights: bool,
) -> Tensor:
    """Compute ``functional.softpool``."""
    batch = x if x.dim() == len(kernel_size) + 2 else x.unsqueeze(0)
    y = _forward(batch, kernel_size, stride, padding, dilation, ceil_mode, beta, detach_weights)
    return y if batch is x else y.squeeze(0)


def _forward_kernel(x: Tensor, *args) -> Tensor:
    from . import native
    return native.softpool(x, Window.of(*args[:4]), *args[4:])


def _forward_fake(x: Tensor, *args) -> Tensor:
    *window, ceil_mode, _, _ = args
    out_size = Window.of(*window).out_size(size_of(x.shape), ceil_mode)
    return empty_planes(dense(x), out_size).reshape(*x.shape[:2], *out_size[5 - x.dim():])


def _backward_kernel(dy: Tensor, x: Tensor, *args) -> Tensor:
    from . import native
    return native.softpool_backward(dy, x, Window.of(*args[:4]), *args[4:])[0]


def _backward_fake(dy: Tensor, x: Tensor, *args) -> Tensor:
    return torch.empty_like(dense(x))


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    x, *ctx.args = inputs
    ctx.save_for_backward(x)


def _gradient(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, = ctx.saved_tensors
    return _backward(dy, x, *ctx.args), *(None,) * len(ctx.args)


_forward = register(f'softpool(Tensor x, {_ARGS}) -> Tensor', _forward_kernel, _forward_fake, _gradient, _setup_context)
_backward = register(f'softpool_backward(Tensor dy, Tensor x, {_ARGS}) -> Tensor', _backward_kernel, _backward_fake)
