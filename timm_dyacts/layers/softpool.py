"""SoftPool as modules.

Paper: `Refining activation downsampling with SoftPool` (Stergiou et al., 2021) - https://arxiv.org/abs/2101.00440
"""
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.pool2d_same import MaxPool2dSame
from torch import Tensor, nn

from ..ops.checks import check_bool, check_finite
from ..ops.softpool import functional
from .pooling import WindowPool, window_arguments

__all__ = [
    'GlobalSoftPool2d',
    'SoftPool1d',
    'SoftPool2d',
    'SoftPool2dSame',
    'SoftPool3d',
]


class _SoftPool(WindowPool):
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
        if kernel_size is None:
            kernel_size = 2 if stride is None else stride
        super().__init__(kernel_size, stride, padding, dilation, ceil_mode)
        self.beta: float = check_finite('beta', beta)
        check_bool('detach_weights', detach_weights)
        self.detach_weights = detach_weights
        self._check_window()

    def _check_window(self) -> None:
        """Check what else a subclass asks of the window."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.softpool(
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
        return f'{super().extra_repr()}, beta={self.beta:g}, detach_weights={self.detach_weights}'


class SoftPool1d(_SoftPool):
    """SoftPool of (N, C, L) or (C, L); arguments and errors as of ``softpool1d`` and ``SoftPool2d``."""

    rank = 1


class SoftPool2d(_SoftPool):
    """SoftPool of (N, C, H, W) or (C, H, W); arguments and errors as of ``softpool2d``.

    Without a ``kernel_size`` it is that of ``stride``, or 2. ``channels``, ``device`` and ``dtype`` change nothing, but
    timm passes them to anti-aliasing layers, and this can be one (``aa_layer=SoftPool2d``).

    Paper: `Refining activation downsampling with SoftPool` - https://arxiv.org/abs/2101.00440
    """

    rank = 2

    @classmethod
    def in_place_of(cls, pool: nn.Module, **kwargs: Any) -> WindowPool:
        """Make the SoftPool with the window, and so with the output shape, of a max pool.

        Args:
            pool: The max pool. timm's ``MaxPool2dSame`` gets a ``SoftPool2dSame``, one of signals or volumes a
                ``SoftPool1d`` or ``SoftPool3d``, any other a ``SoftPool2d``.
            **kwargs: Further arguments of the class; they win over those of ``pool``.
        """
        others = {MaxPool2dSame: SoftPool2dSame, nn.MaxPool1d: SoftPool1d, nn.MaxPool3d: SoftPool3d}
        chosen = next((new for old, new in others.items() if isinstance(pool, old)), SoftPool2d)
        return chosen(**window_arguments(pool) | kwargs)


class SoftPool2dSame(SoftPool2d):
    """``SoftPool2d`` with the padding that TensorFlow calls "SAME": the output has ``ceil(H / stride)`` rows.

    Takes the place of timm's ``MaxPool2dSame``. ``padding`` and ``ceil_mode`` are not used.

    Raises:
        ValueError: If ``stride`` is 1 and ``kernel_size`` even: one side would need more padding than the other.
    """

    def _check_window(self) -> None:
        for k, s in zip(self.kernel_size, self.stride, strict=True):
            if s == 1 and k % 2 == 0:
                raise ValueError(f'kernel_size must be odd where stride is 1, got {self.kernel_size}')

    def forward(self, x: Tensor) -> Tensor:
        return functional.softpool2d_same(
            x, self.kernel_size, self.stride, self.dilation, self.beta, self.detach_weights)


class SoftPool3d(_SoftPool):
    """SoftPool of (N, C, D, H, W) or (C, D, H, W); arguments and errors as of ``softpool3d`` and ``SoftPool2d``."""

    rank = 3


class GlobalSoftPool2d(nn.Module):
    """SoftPool over the whole plane; arguments and errors as of ``global_softpool2d``."""

    def __init__(self, beta: float = 1.0, keepdim: bool = True, detach_weights: bool = False) -> None:
        super().__init__()
        self.beta: float = check_finite('beta', beta)
        check_bool('keepdim', keepdim)
        check_bool('detach_weights', detach_weights)
        self.keepdim = keepdim
        self.detach_weights = detach_weights

    def forward(self, x: Tensor) -> Tensor:
        return functional.global_softpool2d(x, self.beta, self.keepdim, self.detach_weights)

    def extra_repr(self) -> str:
        return f'beta={self.beta:g}, keepdim={self.keepdim}, detach_weights={self.detach_weights}'
