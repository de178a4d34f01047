"""How the kernels for CPUs cut tensors into blocks."""
import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ['BLOCK', 'arithmetic', 'as_rows', 'cut', 'dense', 'is_channels_last']

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
