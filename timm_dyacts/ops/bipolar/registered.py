"""Bipolar max pooling as a registered operator, see ``ops.registered``.

Activations have none: what the compiler makes of them is fused with what stands around them.
"""
from collections.abc import Sequence

import torch
from torch import Tensor

from ..cpu_blocks import dense, empty_planes
from ..pooling.window import Window, size_of
from ..registered import WINDOW, register

__all__ = ['MOST_ELEMENTS', 'max_pool_registered']

# Numbers of the elements of larger windows do not fit into a byte.
MOST_ELEMENTS = 127


def max_pool_registered(
        x: Tensor,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        ceil_mode: bool,
        layout: str,
) -> Tensor:
    """Compute ``functional.bipolar_max_pool`` of (N, C, H, W)."""
    return _forward(x, kernel_size, stride, padding, dilation, ceil_mode, layout)[0]


def _forward_kernel(x: Tensor, *args) -> tuple[Tensor, Tensor]:
    from . import native
    return native.max_pool(x, Window.of(*args[:4]), *args[4:])


def _forward_fake(x: Tensor, *args) -> tuple[Tensor, Tensor]:
    *window, ceil_mode, _ = args
    _, *out_size = Window.of(*window).out_size(size_of(x.shape), ceil_mode)
    y = empty_planes(dense(x), out_size)
    return y, torch.empty_like(y, dtype=torch.int8)


def _backward_kernel(dy: Tensor, winner: Tensor, size: Sequence[int], *window) -> Tensor:
    from . import native
    return native.max_pool_backward(dy, winner, tuple(size), Window.of(*window))


def _backward_fake(dy: Tensor, winner: Tensor, size: Sequence[int], *window) -> Tensor:
    return empty_planes(winner, size, dy.dtype)


def _setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, *window, _, _ = inputs
    ctx.size, ctx.window = x.shape[2:], window
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradient(ctx, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    winner, = ctx.saved_tensors
    return _backward(dy, winner, ctx.size, *ctx.window), *(None,) * 6


_forward = register(
    f'bipolar_max_pool(Tensor x, {WINDOW}, bool ceil_mode, str layout) -> (Tensor, Tensor)',
    _forward_kernel, _forward_fake, _gradient, _setup_context)
_backward = register(
    f'bipolar_max_pool_backward(Tensor dy, Tensor winner, SymInt[] size, {WINDOW}) -> Tensor',
    _backward_kernel, _backward_fake)
