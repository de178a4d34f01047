"""Argument checks shared by the operators: each error names the argument, the value it got and what is accepted.

They read shapes and dtypes only: no device synchronisation, and nothing left of them in a compiled graph.
"""
import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = [
    'check_channels',
    'check_choice',
    'check_finite',
    'check_input',
    'check_int',
    'check_positive',
    'check_window_fits',
    'expand_window',
    'unless_tracing',
]


def unless_tracing(check: Callable[..., None]) -> Callable[..., None]:
    """Skip a check of sizes while ``torch.jit.trace`` records, which would warn of each and put it into the trace."""

    @functools.wraps(check)
    def checked(*args, **kwargs) -> None:
        if not torch.jit.is_tracing():
            check(*args, **kwargs)

    return checked


def check_choice(name: str, value: str | int, choices: Sequence[str | int]) -> None:
    """Accept one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


@unless_tracing
def check_int(name: str, value: int, minimum: int, maximum: int | None = None) -> None:
    """Accept an int from ``minimum`` on, up to ``maximum`` if there is one."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f'{name} must be an int, got {value!r}')
    if value < minimum:
        raise ValueError(f'{name} must be at least {minimum}, got {value}')
    if maximum is not None and value > maximum:
        raise ValueError(f'{name} must be at most {maximum}, got {value}')


def check_finite(name: str, value: float) -> float:
    """Accept a finite number, and return it as a float: TorchScript takes no int for one."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f'{name} must be a number, got {value!r}')
    if not -math.inf < value < math.inf:
        raise ValueError(f'{name} must be finite, got {value}')
    return float(value)


def check_positive(name: str, value: float) -> float:
    """Accept a positive finite number, and return it as a float."""
    value = check_finite(name, value)
    if value <= 0:
        raise ValueError(f'{name} must be positive, got {value}')
    return value


@unless_tracing
def check_input(x: Tensor, dims: Sequence[int], channel_dim: int = 1) -> None:
    """Accept a floating-point tensor with a rank in ``dims`` and no empty dimension from ``channel_dim`` on."""
    if not isinstance(x, Tensor):
        raise TypeError(f'x must be a tensor, got {type(x).__name__}')
    if not x.is_floating_point():
        raise TypeError(f'x must have a floating-point dtype, got {x.dtype}')
    if x.dim() not in dims:
        raise ValueError(f'x must have {min(dims)} to {max(dims)} dimensions, got {x.dim()} (shape {tuple(x.shape)})')
    if any(size == 0 for size in x.shape[channel_dim:]):
        raise ValueError(f'x must have no empty dimension besides the batch, got shape {tuple(x.shape)}')


@unless_tracing
def check_channels(x: Tensor, channels: int) -> None:
    """Accept a tensor of shape (N, channels, *spatial)."""
    if x.shape[1] != channels:
        raise ValueError(f'x must have {channels} channels (dimension 1), got {x.shape[1]} (shape {tuple(x.shape)})')


def _expand(name: str, value: int | Sequence[int], minimum: int, rank: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,) * rank
    if len(values) != rank:
        raise ValueError(f'{name} must be an int or {rank} ints, got {value!r}')
    for v in values:
        check_int(name, v, minimum)
    return values


def expand_window(
        rank: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None,
        padding: int | Sequence[int],
        dilation: int | Sequence[int],
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Check the arguments of a pooling window, and expand each to one int per spatial dimension."""
    kernel_size = _expand('kernel_size', kernel_size, 1, rank)
    stride = kernel_size if stride is None else _expand('stride', stride, 1, rank)
    padding = _expand('padding', padding, 0, rank)
    dilation = _expand('dilation', dilation, 1, rank)
    if any(p > k // 2 for k, p in zip(kernel_size, padding, strict=True)):
        raise ValueError(
            f'padding must be at most half of the kernel, got padding={padding} for kernel_size={kernel_size}'
        )
    return kernel_size, stride, padding, dilation


@unless_tracing
def check_window_fits(
        x: Tensor,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        ceil_mode: bool,
) -> None:
    """Accept an input, batched or not, of which every window holds at least one element."""
    rank = len(kernel_size)
    check_input(x, (rank + 1, rank + 2), channel_dim=x.dim() - rank - 1)
    for size, k, s, p, d in zip(x.shape[-rank:], kernel_size, stride, padding, dilation, strict=True):
        slack = size + 2 * p - d * (k - 1) - 1 + (s - 1 if ceil_mode else 0)
        if slack < 0:
            raise ValueError(
                f'kernel_size must fit into the padded input, got kernel_size={tuple(kernel_size)}, '
                f'padding={tuple(padding)}, dilation={tuple(dilation)} for an input of shape {tuple(x.shape)}'
            )
        # A dilation larger than the input may step over all of it, from the padding before it to the padding after it.
        if d > size and any((i * s - p) % d >= size for i in range(min(slack // s + 1, -(-p // s)))):
            raise ValueError(
                f'dilation must leave an element in each window, got dilation={tuple(dilation)}, '
                f'padding={tuple(padding)} for an input of shape {tuple(x.shape)}'
            )
