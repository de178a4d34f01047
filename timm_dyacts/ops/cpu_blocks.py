"""How the kernels for CPUs cut tensors into blocks."""
import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ['BLOCK', 'arithmetic', 'as_rows', 'cut', 'dense', 'empty_planes', 'is_channels_last', 'laid_out_like']

# Elements of a block: few enough for several blocks to fit into a second-level cache, enough for the time of a call to
# matter little.
BLOCK = 128 * 1024


def cut(sizes: Sequence[int], limit: int = BLOCK) -> Iterator[tuple[slice, ...]]:
    """Cut a shape, its dimensions in the order of memory, into blocks of up to ``limit`` elements."""
    ranges = []
    for size in reversed(sizes):
        step = max(1, min(size, limit))
        limit //= max(size, 1)
        ranges.insert(0, [slice(start, start + step) for start in range(0, size, step)])
    return itertools.product(*ranges)


def is_channels_last(x: Tensor) -> bool:
    """Tell whether a tensor of shape (N, C, *spatial) is dense with its channels last in memory."""
    return x.dim() > 2 and x.stride(1) == 1 and x.shape[1] > 1 and x.movedim(1, -1).is_contiguous()


def dense(x: Tensor) -> Tensor:
    """Give the tensor itself if it is contiguous or channels_last, else a contiguous copy."""
    return x if is_channels_last(x) else x.contiguous()


def laid_out_like(t: Tensor, x: Tensor) -> Tensor:
    """Give a tensor of the shape of ``x``, which is dense, in the dtype and memory layout of ``x``."""
    return t if t.dtype == x.dtype and t.stride() == x.stride() else torch.empty_like(x).copy_(t)


def empty_planes(x: Tensor, size: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Make an empty tensor (N, C, *size), of two or three sizes, in the memory layout of ``x``, which is dense."""
    channels_last = torch.channels_last if len(size) == 2 else torch.channels_last_3d
    memory_format = channels_last if is_channels_last(x) else torch.contiguous_format
    return torch.empty(*x.shape[:2], *size, dtype=dtype or x.dtype, memory_format=memory_format)


def as_rows(x: Tensor, channels_last: bool) -> Tensor:
    """View (N, C, *spatial) as (N, C, P, 1), or as (N, 1, P, C) with the channels last. Both are contiguous."""
    x = x.reshape(*x.shape[:2], math.prod(x.shape[2:]), 1)
    return x.transpose(1, 3) if channels_last else x


def arithmetic(x: Tensor, *others: Tensor) -> torch.dtype:
    """Choose the dtype to compute in: that of the operands, but at least fp32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    for t in others:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype
