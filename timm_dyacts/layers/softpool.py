"""SoftPool: pooling by the softmax-weighted average of each window.

Paper: `Refining activation downsampling with SoftPool` (Stergiou et al., 2021) - https://arxiv.org/abs/2101.00440
"""
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from timm.layers.pool2d_same import MaxPool2dSame
from torch import Tensor, nn

from ..ops import backends
from ..ops.checks import check_finite, check_input, check_window_fits, expand_window
from ..ops.pooling.window import Window, count_windows, five_dims, reach, scale_of, sharpness_of

__all__ = [
    'GlobalSoftPool2d',
    'SoftPool1d',
    'SoftPool2d',
    'SoftPool2dSame',
    'SoftPool3d',
    'global_softpool2d',
    'softpool1d',
    'softpool2d',
    'softpool3d',
]

# Why the arithmetic stays finite for every finite input:
# - y = top + sum(w * (x - top)), where top is the element with the largest weight. Its exponent is 0 and all others are
#   negative, so that nothing overflows and the sum of the weights is never 0. (top cancels out: it needs no gradient.)
# - It computes with fractions of x, since the difference of two elements may overflow and that of their halves cannot.


class _SoftPoolFunction(torch.autograd.Function):
    """Keeps the input and nothing else for the backward pass, which forms the weights anew."""

    @staticmethod
    def forward(ctx, fused: Callable, x: Tensor, *args) -> Tensor:
        ctx.save_for_backward(x)
        ctx.args = args
        return backends.run_kernel(fused, _define, x, *args)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, = ctx.saved_tensors
        fused = backends.find_kernel('softpool', 'softpool_backward', dy, x)
        return None, *backends.differentiate(fused, _define, (x, *ctx.args), (dy,), ctx.needs_input_grad[1:])


def _define(x: Tensor, window: Window, ceil_mode: bool, beta: float, detach_weights: bool) -> Tensor:
    y = _softpool_definition(five_dims(x), *window, ceil_mode, beta, detach_weights)
    return y.reshape(*x.shape[:2], *y.shape[7 - x.dim():])


# FX keeps the functions marked by `wrap` as single nodes: a symbolic input has no shape for their checks to read.
@torch.fx.wrap
def _softpool(
        x: Tensor,
        kernel_size: list[int],
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        ceil_mode: bool,
        beta: float,
        detach_weights: bool,
) -> Tensor:
    """SoftPool over as many spatial dimensions as `kernel_size` has."""
    if not torch.jit.is_scripting():
        check_window_fits(x, kernel_size, stride, padding, dilation, ceil_mode)
        fused = backends.find_kernel('softpool', 'softpool', x)
        if fused is not None:
            batch = x if x.dim() == len(kernel_size) + 2 else x.unsqueeze(0)
            window = Window.of(kernel_size, stride, padding, dilation)
            y = _SoftPoolFunction.apply(fused, batch, window, ceil_mode, beta, detach_weights)
            return y if batch is x else y.squeeze(0)
    return _softpool_definition(x, kernel_size, stride, padding, dilation, ceil_mode, beta, detach_weights)


def _fill_up(x: Tensor, margins: list[int], value: float) -> Tensor:
    return F.pad(x, margins, value=value) if len(margins) > 0 else x


def _softpool_definition(
        x: Tensor,
        kernel_size: list[int],
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        ceil_mode: bool,
        beta: float,
        detach_weights: bool,
) -> Tensor:
    """SoftPool in plain operations."""
    # One code for 1 to 3 spatial dimensions: those that are missing have size 1.
    missing = 3 - len(kernel_size)
    for _ in range(missing):
        x = x.unsqueeze(missing - 4)
    k = [1] * missing + list(kernel_size)
    s = [1] * missing + list(stride)
    p = [0] * missing + list(padding)
    d = [1] * missing + list(dilation)
    out_size = [count_windows(x.shape[i - 3], k[i], s[i], p[i], d[i], ceil_mode) for i in range(3)]
    count = k[0] * k[1] * k[2]

    scale, sharpness = scale_of(count), sharpness_of(count, beta)
    scaled = scale * x.to(torch.promote_types(x.dtype, torch.float32))
    # The elements of all windows, one place in the window after the other; where an element may be padding, also the
    # numbers of windows on both sides whose element it is.
    elements: list[Tensor] = []
    ranges: list[list[int]] = []
    margins: list[list[int]] = []
    for z0, z1, z_from, z_to in reach(x.shape[-3], out_size[0], k[0], s[0], p[0], d[0]):
        for y0, y1, y_from, y_to in reach(x.shape[-2], out_size[1], k[1], s[1], p[1], d[1]):
            for x0, x1, x_from, x_to in reach(x.shape[-1], out_size[2], k[2], s[2], p[2], d[2]):
                elements.append(scaled[..., z_from:z_to:s[0], y_from:y_to:s[1], x_from:x_to:s[2]])
                ranges.append([z0, z1, y0, y1, x0, x1])
                around = [x0, out_size[2] - x1, y0, out_size[1] - y1, z0, out_size[0] - z1]
                margins.append(around if ceil_mode or max(p) > 0 else around[:0])

    # torch.compile makes faster code of this than of max pooling. NaN need not get through: the sums take care of it.
    lowest = math.inf if beta < 0 else -math.inf
    top = _fill_up(elements[0].detach(), margins[0], lowest)
    for i in range(1, len(elements)):
        element = _fill_up(elements[i].detach(), margins[i], lowest)
        top = torch.where(element < top if beta < 0 else element > top, element, top)

    total = torch.zeros_like(top)
    moment = torch.zeros_like(top)
    for i in range(len(elements)):
        at = ranges[i]
        shifted = elements[i] - top[..., at[0]:at[1], at[2]:at[3], at[4]:at[5]]
        # Not powers of 2, as in the passes: torch.compile makes slower code of them.
        weights = torch.exp(shifted * sharpness)
        if detach_weights:
            weights = weights.detach()
        total += _fill_up(weights, margins[i], 0.0)
        moment += _fill_up(weights * shifted, margins[i], 0.0)
    out = (top + moment / total) / scale
    for _ in range(missing):
        out = out.squeeze(missing - 4)
    return out.to(x.dtype)


def softpool1d(
        x: Tensor,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        ceil_mode: bool = False,
        beta: float = 1.0,
        detach_weights: bool = False,
) -> Tensor:
    """SoftPool of (N, C, L) or (C, L); see `softpool2d`."""
    window = expand_window(1, kernel_size, stride, padding, dilation)
    return _softpool(x, *window, ceil_mode, check_finite('beta', beta), detach_weights)


def softpool2d(
        x: Tensor,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        ceil_mode: bool = False,
        beta: float = 1.0,
        detach_weights: bool = False,
) -> Tensor:
    """Averages each window with the softmax of its own elements as weights: ``sum_i softmax(beta * x)_i * x_i``.

    The result is finite for every finite input. Half-precision inputs accumulate in fp32.

    Args:
        x: Input of shape (N, C, H, W) or (C, H, W).
        kernel_size: Size of the window.
        stride: Step of the window. Default: `kernel_size`.
        padding: Positions added on both sides, at most half of the kernel. They take no part in the average.
        dilation: Step between the elements of a window.
        ceil_mode: Whether windows may start inside the input and end outside.
        beta: Sharpness: 0 gives the average, large values approach the maximum, negative ones the minimum.
        detach_weights: Treat the weights as constants in the backward pass, as the authors' CUDA code does.

    Returns:
        A tensor of the dtype and memory format of `x`, with the shape that `F.max_pool2d` gives.

    Raises:
        ValueError: If an argument is out of range, the rank is another, a dimension other than the batch is empty,
            or the window does not fit into the padded input.
        TypeError: If an argument has the wrong type, or `x` no floating-point dtype.
    """
    window = expand_window(2, kernel_size, stride, padding, dilation)
    return _softpool(x, *window, ceil_mode, check_finite('beta', beta), detach_weights)


def softpool3d(
        x: Tensor,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        ceil_mode: bool = False,
        beta: float = 1.0,
        detach_weights: bool = False,
) -> Tensor:
    """SoftPool of (N, C, D, H, W) or (C, D, H, W); see `softpool2d`."""
    window = expand_window(3, kernel_size, stride, padding, dilation)
    return _softpool(x, *window, ceil_mode, check_finite('beta', beta), detach_weights)


@torch.fx.wrap
def global_softpool2d(x: Tensor, beta: float = 1.0, keepdim: bool = True, detach_weights: bool = False) -> Tensor:
    """SoftPool whose window is the whole plane.

    Args:
        x: Input of shape (N, C, H, W) or (C, H, W).
        beta: Sharpness, see `softpool2d`.
        keepdim: Whether the spatial dimensions stay, with size 1.
        detach_weights: Treat the weights as constants in the backward pass.

    Returns:
        A tensor of the dtype of `x` and shape (N, C, 1, 1), or (N, C) without `keepdim`.

    Raises:
        ValueError: If the rank is another, a dimension other than the batch is empty, or `beta` is not finite.
        TypeError: If `x` has no floating-point dtype.
    """
    if not torch.jit.is_scripting():
        check_input(x, (3, 4), channel_dim=x.dim() - 3)
        check_finite('beta', beta)
    half = 0.5 * x.flatten(-2).to(torch.promote_types(x.dtype, torch.float32))
    top = half.detach().amin(-1, keepdim=True) if beta < 0 else half.detach().amax(-1, keepdim=True)
    shifted = half - top
    # Bounded, since infinity times a difference of zero is NaN.
    weights = torch.softmax(shifted * max(-1e38, min(2 * beta, 1e38)), -1)
    if detach_weights:
        weights = weights.detach()
    out = 2 * (top + (weights * shifted).sum(-1, keepdim=True))
    out = out.unsqueeze(-1) if keepdim else out.squeeze(-1)
    return out.to(x.dtype)


class _SoftPool(nn.Module):
    rank: int

    def __init__(
            self,
            kernel_size: int | Sequence[int] | None = None,
            stride: int | Sequence[int] | None = None,
            padding: int | Sequence[int] = 0,
            dilation: int | Sequence[int] = 1,
            ceil_mode: bool = False,
            beta: float = 1.0,
            detach_weights: bool = False,
            *,
            channels: int | None = None,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kernel_size is None:
            kernel_size = 2 if stride is None else stride
        window = expand_window(self.rank, kernel_size, stride, padding, dilation)
        self.kernel_size, self.stride, self.padding, self.dilation = window
        self.ceil_mode = ceil_mode
        self.beta = check_finite('beta', beta)
        self.detach_weights = detach_weights

    def forward(self, x: Tensor) -> Tensor:
        return _softpool(
            x,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.beta,
            self.detach_weights,
        )

    def extra_repr(self) -> str:
        return (
            f'kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, dilation={self.dilation}, '
            f'ceil_mode={self.ceil_mode}, beta={self.beta:g}, detach_weights={self.detach_weights}'
        )


class SoftPool1d(_SoftPool):
    """SoftPool of (N, C, L) or (C, L); arguments and errors as of `softpool2d`."""

    rank = 1


class SoftPool2d(_SoftPool):
    """SoftPool of (N, C, H, W) or (C, H, W); arguments and errors as of `softpool2d`.

    Without a `kernel_size` it is that of `stride`, or 2. `channels`, `device` and `dtype` change nothing: timm builds
    its anti-aliasing layers with them, and this is one (`aa_layer=SoftPool2d`).

    Paper: `Refining activation downsampling with SoftPool` - https://arxiv.org/abs/2101.00440
    """

    rank = 2

    @classmethod
    def in_place_of(cls, pool: nn.Module, **kwargs) -> 'SoftPool2d':
        """Make the SoftPool with the output shape of a max pool.

        Args:
            pool: The max pool.
            **kwargs: Further arguments of the class; they win over those of the pool.
        """
        names = ('kernel_size', 'stride', 'padding', 'dilation', 'ceil_mode')
        args = {name: getattr(pool, name) for name in names} | kwargs
        return SoftPool2dSame(**args) if isinstance(pool, MaxPool2dSame) else SoftPool2d(**args)


@torch.fx.wrap
def _softpool2d_same(
        x: Tensor,
        kernel_size: list[int],
        stride: list[int],
        dilation: list[int],
        beta: float,
        detach_weights: bool,
) -> Tensor:
    padding: list[int] = []
    for size, k, s, d in zip(x.shape[-2:], kernel_size, stride, dilation):  # noqa: B905  TorchScript has no strict
        padding.append(max((math.ceil(size / s) - 1) * s + d * (k - 1) + 1 - size, 0) // 2)
    # Where the whole padding is odd, its last row lies to the right: there the last window hangs over.
    return _softpool(x, kernel_size, stride, padding, dilation, True, beta, detach_weights)


class SoftPool2dSame(SoftPool2d):
    """`SoftPool2d` with the padding that TensorFlow calls "SAME": the output has ``ceil(H / stride)`` rows.

    Stands in for timm's `MaxPool2dSame`. `padding` and `ceil_mode` are not used.

    Raises:
        ValueError: If `stride` is 1 and `kernel_size` even: one side would need more padding than the other.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        for k, s in zip(self.kernel_size, self.stride, strict=True):
            if s == 1 and k % 2 == 0:
                raise ValueError(f'kernel_size must be odd where stride is 1, got {self.kernel_size}')

    def forward(self, x: Tensor) -> Tensor:
        return _softpool2d_same(x, self.kernel_size, self.stride, self.dilation, self.beta, self.detach_weights)


class SoftPool3d(_SoftPool):
    """SoftPool of (N, C, D, H, W) or (C, D, H, W); arguments and errors as of `softpool2d`."""

    rank = 3


class GlobalSoftPool2d(nn.Module):
    """SoftPool over the whole plane; arguments and errors as of `global_softpool2d`."""

    def __init__(self, beta: float = 1.0, keepdim: bool = True, detach_weights: bool = False) -> None:
        super().__init__()
        self.beta = check_finite('beta', beta)
        self.keepdim = keepdim
        self.detach_weights = detach_weights

    def forward(self, x: Tensor) -> Tensor:
        return global_softpool2d(x, self.beta, self.keepdim, self.detach_weights)

    def extra_repr(self) -> str:
        return f'beta={self.beta:g}, keepdim={self.keepdim}, detach_weights={self.detach_weights}'
