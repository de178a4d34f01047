"""What pooling modules share: the window and its arguments, those of ``nn.MaxPool2d``."""
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..ops.checks import check_bool, expand_window

__all__ = ['WindowPool', 'window_arguments']

_WINDOW = ('kernel_size', 'stride', 'padding', 'dilation', 'ceil_mode')


def window_arguments(pool: nn.Module) -> dict[str, Any]:
    """Give the arguments of the window of a pooling module."""
    return {name: getattr(pool, name) for name in _WINDOW}


class WindowPool(nn.Module):
    """A pooling of windows. Subclasses say over how many spatial dimensions, their ``rank``."""

    rank: int

    def __init__(
            self,
            kernel_size: int | Sequence[int],
            stride: int | Sequence[int] | None,
            padding: int | Sequence[int],
            dilation: int | Sequence[int],
            ceil_mode: bool,
    ) -> None:
        super().__init__()
        window = expand_window(self.rank, kernel_size, stride, padding, dilation)
        self.kernel_size, self.stride, self.padding, self.dilation = window
        check_bool('ceil_mode', ceil_mode)
        self.ceil_mode = ceil_mode

    @classmethod
    def in_place_of(cls, pool: nn.Module, **kwargs: Any) -> 'WindowPool':
        """Make the module with the window, and so with the output shape, of another pooling module.

        Args:
            pool: The other module, ``nn.MaxPool2d`` for example.
            **kwargs: Further arguments of the class; they win over those of ``pool``.
        """
        return cls(**window_arguments(pool) | kwargs)

    def extra_repr(self) -> str:
        return ', '.join(f'{name}={value}' for name, value in window_arguments(self).items())
