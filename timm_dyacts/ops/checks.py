"""Argument checks shared by the operators: each error names the argument, the value it got and what is accepted.

They read shapes and dtypes only: no device synchronisation, and nothing left of them in a compiled graph.
"""
import functools
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = [
    'DTYPES',
    'check_beside',
    'check_bool',
    'check_channels',
    'check_choice',
    'check_factor',
    'check_finite',
    'check_input',
    'check_int',
    'check_operand',
    'check_parameter_dtype',
    'check_positive',
    'check_window_fits',
    'expand_window',
    'reachable_bound',
    'unless_tracing',
]

# The dtypes that operators compute in. Torch has more that are floating-point, and no arithmetic for them.
DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
# The largest integer that torch takes for a size
_MOST = 2 ** 63 - 1
_LARGEST = sys.float_info.max


def unless_tracing(check: Callable[..., None]) -> Callable[..., None]:
    """Skip a check of sizes while ``torch.jit.trace`` records, which would warn of each and put it into the trace."""

    @functools.wraps(check)
    def checked(*args, **kwargs) -> None:
        if not torch.jit.is_tracing():
            check(*args, **kwargs)

    return checked


def check_choice(name: str, value: str | int, choices: Sequence[str | int]) -> None:
    """Accept one of ``choices``, and nothing that merely equals one, as True and 1.0 equal 1."""
    if isinstance(value, (bool, float)) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_bool(name: str, value: bool) -> None:
    """Accept True and False."""
    if value is not True and value is not False:
        raise TypeError(f'{name} must be True or False, got {value!r}')


@unless_tracing
def check_int(name: str, value: int, minimum: int, maximum: int = _MOST) -> None:
    """Accept an int from ``minimum`` on, up to ``maximum``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f'{name} must be an int, got {value!r}')
    if value < minimum:
        raise ValueError(f'{name} must be at least {minimum}, got {value}')
    if value > maximum:
        raise ValueError(f'{name} must be at most {maximum}, got {value}')


def check_finite(name: str, value: float) -> float:
    """Accept a finite number, and return it as a float: TorchScript takes no int for one."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f'{name} must be a number, got {value!r}')
    if not -_LARGEST <= value <= _LARGEST:  # integers may be larger than any float
        raise ValueError(f'{name} must be finite, got {value}')
    return float(value)


def check_factor(name: str, value: float, dtype: torch.dtype) -> None:
    """Accept a finite number that the arithmetic for a dtype holds, which is at least that of fp32."""
    check_finite(name, value)
    largest = torch.finfo(torch.promote_types(dtype, torch.float32)).max
    if abs(value) > largest:
        raise ValueError(f'{name} must lie between {-largest:g} and {largest:g} for an input of {dtype}, got {value}')


def reachable_bound(bound: float | None, dtype: torch.dtype) -> float | None:
    """Give an upper bound, None where no number of a dtype exceeds it: torch takes no such scalars."""
    return None if bound is not None and bound > 65504 and bound > torch.finfo(dtype).max else bound


def check_positive(name: str, value: float) -> float:
    """Accept a positive finite number, and return it as a float."""
    value = check_finite(name, value)
    if value <= 0:
        raise ValueError(f'{name} must be positive, got {value}')
    return value


def check_operand(name: str, value: Tensor) -> None:
    """Accept a dense tensor of a floating-point dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f'{name} must be a tensor, got {type(value).__name__}')
    if value.dtype not in DTYPES:
        raise TypeError(f'{name} must have a 16-, 32- or 64-bit floating-point dtype, got {value.dtype}')
    if value.layout is not torch.strided:
        raise TypeError(f'{name} must be a dense tensor, got one of layout {value.layout}')


def check_beside(name: str, value: Tensor, x: Tensor) -> None:
    """Accept an operand as ``check_operand`` does, on the device of the input."""
    check_operand(name, value)
    if value.device != x.device:
        raise ValueError(f'{name} must be on the device of x, {x.device}, got one on {value.device}')


def check_parameter_dtype(dtype: torch.dtype | None) -> None:
    """Accept a dtype of parameters, None for the default one."""
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f'dtype must be a 16-, 32- or 64-bit floating-point one, got {dtype!r}')


@unless_tracing
def check_input(x: Tensor, dims: Sequence[int], channel_dim: int = 1, name: str = 'x') -> None:
    """Accept a floating-point tensor with a rank in ``dims`` and no empty dimension from ``channel_dim`` on."""
    check_operand(name, x)
    if x.dim() not in dims:
        raise ValueError(
            f'{name} must have {min(dims)} to {max(dims)} dimensions, got {x.dim()} (shape {tuple(x.shape)})')
    if any(size == 0 for size in x.shape[channel_dim:]):
        raise ValueError(f'{name} must have no empty dimension besides the batch, got shape {tuple(x.shape)}')


@unless_tracing
def check_channels(x: Tensor, channels: int, channel_dim: int = 1) -> None:
    """Accept a tensor with ``channels`` in its dimension ``channel_dim``."""
    if x.shape[channel_dim] != channels:
        raise ValueError(
            f'x must have {channels} channels (dimension {channel_dim}), got {x.shape[channel_dim]} '
            f'(shape {tuple(x.shape)})')


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
    check_input(x, (rank + 1, rank + 2), channel_dim=-rank - 1)
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
