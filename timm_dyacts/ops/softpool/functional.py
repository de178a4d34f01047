"""SoftPool: pooling by the softmax-weighted average of each window.

Paper: `Refining activation downsampling with SoftPool` (Stergiou et al., 2021) - https://arxiv.org/abs/2101.00440
"""
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import backends
from ..checks import check_bool, check_finite, check_input, check_window_fits, expand_window
from ..compat import as_constants
from ..exporting import is_exporting_onnx
from ..pooling.window import Window, trim_large
from ..registered import is_registered_for
from .exported import can_export, softpool_exported
from .reference import batch_reference, global_softpool2d_reference, softpool_reference
from .registered import softpool_registered

__all__ = [
    'global_softpool2d',
    'softpool',
    'softpool1d',
    'softpool2d',
    'softpool2d_same',
    'softpool3d',
]


class _SoftPool(torch.autograd.Function):
    """Keeps the input and nothing else for the backward pass, which forms the weights anew."""

    @staticmethod
    def forward(ctx, kernel: backends.Kernel, x: Tensor, *args) -> Tensor:
        ctx.save_for_backward(x)
        ctx.args = args
        return backends.run_kernel(kernel, batch_reference, x, *args)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, = ctx.saved_tensors
        kernel = backends.find_kernel('softpool', 'softpool_backward', dy, x)
        return None, *backends.differentiate(kernel, batch_reference, (x, *ctx.args), (dy,), ctx.needs_input_grad[1:])


class _GlobalSoftPool(torch.autograd.Function):
    """Keeps the input and, for each plane, what the forward kernel leaves."""

    @staticmethod
    def forward(ctx, kernel: backends.Kernel, x: Tensor, *args) -> Tensor:
        y, *saved = backends.run_kernel(kernel, _global_forward_reference, x, *args)
        ctx.save_for_backward(x, *saved)
        ctx.args = args
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        # The reference, which ran in place of a forward kernel that could not be built, has kept nothing.
        kernel = backends.find_kernel('softpool', 'global_softpool_backward', dy, x) if saved else None
        return None, *backends.differentiate(
            kernel, global_softpool2d_reference, (x, *ctx.args), (dy,), ctx.needs_input_grad[1:], saved=saved)


def _global_forward_reference(*args) -> tuple[Tensor]:
    return global_softpool2d_reference(*args),


# FX keeps the functions marked by `wrap` as single nodes: a symbolic input has no shape for their checks to read. It
# finds them by their names in this module, so other modules have to call them as `functional.<name>`.
@torch.fx.wrap
def softpool(
        x: Tensor,
        kernel_size: list[int],
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        ceil_mode: bool,
        beta: float,
        detach_weights: bool,
) -> Tensor:
    """Compute SoftPool over as many spatial dimensions as ``kernel_size`` has; arguments as of ``softpool2d``."""
    detach_weights = detach_weights or beta == 0  # they are constants, and their gradient may be 0 times infinity
    if not torch.jit.is_scripting():
        check_window_fits(x, kernel_size, stride, padding, dilation, ceil_mode)
        kernel_size, stride, padding = trim_large(x, kernel_size, stride, padding, dilation, ceil_mode)
        kernel = backends.find_kernel('softpool', 'softpool', x)
        if kernel is not None:
            batch = x if x.dim() == len(kernel_size) + 2 else x.unsqueeze(0)
            window = Window.of(kernel_size, stride, padding, dilation)
            args = batch, window, ceil_mode, beta, detach_weights
            if backends.needs_grad(x):
                y = _SoftPool.apply(kernel, *args)
            else:
                y = backends.run_kernel(kernel, batch_reference, *args)
            return y if batch is x else y.squeeze(0)
        if torch.compiler.is_compiling():
            kernel_size, stride = as_constants(kernel_size), as_constants(stride)
            padding, dilation = as_constants(padding), as_constants(dilation)
        if is_exporting_onnx() and can_export(x, kernel_size, beta):
            return softpool_exported(x, kernel_size, stride, padding, dilation, ceil_mode, beta)
        if is_registered_for(x):
            return softpool_registered(x, kernel_size, stride, padding, dilation, ceil_mode, beta, detach_weights)
    return softpool_reference(x, kernel_size, stride, padding, dilation, ceil_mode, beta, detach_weights)


@torch.fx.wrap
def softpool2d_same(
        x: Tensor,
        kernel_size: list[int],
        stride: list[int],
        dilation: list[int],
        beta: float,
        detach_weights: bool,
) -> Tensor:
    """Compute SoftPool with the padding that TensorFlow calls "SAME", which makes ``ceil(size / stride)`` windows.

    Strides of 1 take kernels of odd size only: with others, one side would need more padding than the other.
    """
    if not torch.jit.is_scripting():
        check_input(x, (3, 4), channel_dim=-3)
    padding: list[int] = []
    for size, k, s, d in zip(x.shape[-2:], kernel_size, stride, dilation):  # noqa: B905  TorchScript has no strict
        padding.append(max((math.ceil(size / s) - 1) * s + d * (k - 1) + 1 - size, 0) // 2)
    # An odd number of padded rows leaves one more at the end: with `ceil_mode`, the last window reaches beyond it.
    return softpool(x, kernel_size, stride, padding, dilation, True, beta, detach_weights)


_DOCSTRING = """Average each window with the softmax of its own elements as weights, ``softmax(beta * x)``.

    The result is finite for every finite input. Half-precision inputs accumulate in fp32.

    Args:
        x: Input of shape {shapes}.
        kernel_size: Size of the window.
        stride: Step of the window. Default: ``kernel_size``.
        padding: Positions added on both sides, at most half of the kernel. They take no part in the average.
        dilation: Step between the elements of a window.
        ceil_mode: Whether windows may start inside the input and end outside.
        beta: Sharpness: 0 gives the average, large values approach the maximum, negative ones the minimum.
        detach_weights: Treat the weights as constants in the backward pass, as the authors' CUDA code does.

    Returns:
        A tensor of the dtype and memory format of ``x``, with the shape that ``F.max_pool{rank}d`` gives.

    Raises:
        ValueError: If an argument is out of range, the rank is another, a dimension other than the batch is empty,
            or the window does not fit into the padded input.
        TypeError: If an argument has the wrong type, or ``x`` no floating-point dtype.
    """


def _softpool_of(rank: int, shapes: str) -> Callable[..., Tensor]:
    """Make the public function for a number of spatial dimensions."""
    def softpool_nd(
            x: Tensor,
            kernel_size: int | Sequence[int],
            stride: int | Sequence[int] | None = None,
            padding: int | Sequence[int] = 0,
            dilation: int | Sequence[int] = 1,
            ceil_mode: bool = False,
            beta: float = 1.0,
            detach_weights: bool = False,
    ) -> Tensor:
        window = expand_window(rank, kernel_size, stride, padding, dilation)
        check_bool('ceil_mode', ceil_mode)
        check_bool('detach_weights', detach_weights)
        return softpool(x, *window, ceil_mode, check_finite('beta', beta), detach_weights)

    softpool_nd.__name__ = softpool_nd.__qualname__ = f'softpool{rank}d'
    softpool_nd.__doc__ = _DOCSTRING.format(rank=rank, shapes=shapes)
    return softpool_nd


softpool1d = _softpool_of(1, '(N, C, L) or (C, L)')
softpool2d = _softpool_of(2, '(N, C, H, W) or (C, H, W)')
softpool3d = _softpool_of(3, '(N, C, D, H, W) or (C, D, H, W)')


@torch.fx.wrap
def global_softpool2d(x: Tensor, beta: float = 1.0, keepdim: bool = True, detach_weights: bool = False) -> Tensor:
    """Compute the SoftPool whose window is the whole plane.

    Args:
        x: Input of shape (N, C, H, W) or (C, H, W).
        beta: Sharpness, see ``softpool2d``.
        keepdim: Whether the spatial dimensions stay, with size 1.
        detach_weights: Treat the weights as constants in the backward pass.

    Returns:
        A tensor of the dtype of ``x`` and shape (N, C, 1, 1), or (N, C) without ``keepdim``.

    Raises:
        ValueError: If the rank is another, a dimension other than the batch is empty, or ``beta`` is not finite.
        TypeError: If ``x`` has no floating-point dtype.
    """
    if not torch.jit.is_scripting():
        check_input(x, (3, 4), channel_dim=-3)
        check_finite('beta', beta)
        check_bool('keepdim', keepdim)
        check_bool('detach_weights', detach_weights)
    detach_weights = detach_weights or beta == 0  # see ``softpool``
    if not torch.jit.is_scripting():
        kernel = backends.find_kernel('softpool', 'global_softpool', x)
        if kernel is not None:
            args = x if x.dim() == 4 else x.unsqueeze(0), beta, detach_weights
            if backends.needs_grad(x):
                y = _GlobalSoftPool.apply(kernel, *args)
            else:
                y, *_ = backends.run_kernel(kernel, _global_forward_reference, *args)
            y = y if x.dim() == 4 else y.squeeze(0)
            return y.unsqueeze(-1) if keepdim else y.squeeze(-1)
    y = global_softpool2d_reference(x, beta, detach_weights)
    return y.unsqueeze(-1) if keepdim else y.squeeze(-1)
