"""How a tensor is cut into tiles for kernels that compute elements where they lie: planning on the host.

These kernels see a tensor as (N, C, P), the positions P being all spatial dimensions in one, with one stride each. That
covers contiguous and channels_last tensors and most slices of them, which are read where they lie. A tile has channels
and positions; whichever of the two is contiguous in memory gets the longer side, so that neighbouring threads read
neighbouring addresses in vectors of 16 bytes. Coefficients of a channel are loaded once per tile, and no thread divides
to find its channel.
"""
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

__all__ = [
    'Space',
    'Tiling',
    'alignment',
    'cdiv',
    'channels_inner',
    'fold_of',
    'planned',
    'power_of_2',
    'readable',
    'strides',
    'tiling_of',
]

T = TypeVar('T')

# The plans of a function that are kept. Beyond, all are made anew.
_MOST_PLANS = 4096


def planned(plan: Callable[..., T]) -> Callable[..., T]:
    """Keep what a function plans: small inputs are computed in less time than it takes to plan that.

    Of the tensors among its arguments, the function may look at the shape, the strides and the dtype, and at how their
    memory is aligned, up to 16 bytes. Its other arguments are hashable. The plans are in the attribute ``plans``.
    """
    plans: dict[tuple[Any, ...], T] = {}

    @functools.wraps(plan)
    def find(*args: Any) -> T:
        key = tuple([
            (arg.shape, arg.stride(), arg.dtype, arg.data_ptr() % 16) if isinstance(arg, Tensor) else arg
            for arg in args
        ])
        found = plans.get(key)
        if found is None:
            if len(plans) >= _MOST_PLANS:
                plans.clear()
            found = plans[key] = plan(*args)
        return found

    find.plans = plans
    return find


class Space(NamedTuple):
    """What a tensor takes in memory, to allocate more like it."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, t: Tensor) -> 'Space':
        """Give that of a tensor, which may be on the meta device."""
        return cls(tuple(t.shape), t.stride(), t.dtype)

    @classmethod
    def fp32(cls, *shape: int) -> 'Space':
        """Give that of a contiguous tensor in fp32."""
        return cls.of(torch.empty(shape, dtype=torch.float32, device='meta'))

    def allocate(self, beside: Tensor) -> Tensor:
        """Allocate a tensor on the device of another."""
        return beside.new_empty_strided(self.shape, self.strides, dtype=self.dtype)


# Triton has the next two as well, but for the host they are several times as slow as these.


def cdiv(size: int, block: int) -> int:
    """Count the blocks that cover a size."""
    return -(-size // block)


def power_of_2(size: int) -> int:
    """Give the smallest power of 2 that is at least ``size``."""
    return 1 << (size - 1).bit_length()


class Tiling(NamedTuple):
    """Sizes of a tensor of shape (N, C, *spatial) and of the tiles that it is cut into."""
    batch: int
    channels: int
    positions: int
    channels_inner: bool
    block_c: int
    block_p: int

    @property
    def size(self) -> tuple[int, int]:
        """Channels and positions of a sample."""
        return self.channels, self.positions

    @property
    def blocks(self) -> tuple[int, int]:
        """The numbers of tiles along the channels and along the positions of a sample."""
        return cdiv(self.channels, self.block_c), cdiv(self.positions, self.block_p)

    @property
    def programs(self) -> int:
        """The number of all tiles."""
        return self.batch * self.blocks[0] * self.blocks[1]

    @property
    def constants(self) -> dict[str, int]:
        """The arguments that tell a kernel how tiles lie."""
        return dict(CHANNELS_INNER=self.channels_inner, BLOCK_C=self.block_c, BLOCK_P=self.block_p)


def channels_inner(x: Tensor) -> bool:
    """Tell whether the channels of a tensor of shape (N, C, *spatial) are contiguous in memory."""
    return x.stride(1) == 1 and x.shape[1] > 1


def tiling_of(x: Tensor, elements: int = 2048, positions: int = 2048, channels: int = 128) -> Tiling:
    """Cut a tensor into tiles.

    Args:
        x: Shape (N, C, *spatial).
        elements: Upper bound of the elements of a tile.
        positions: Upper bound of the positions of a tile.
        channels: Upper bound of the channels of a tile where the channels are contiguous in memory.
    """
    n, c = x.shape[:2]
    p = math.prod(x.shape[2:])
    if channels_inner(x):
        block_c = min(power_of_2(c), channels)
        block_p = min(power_of_2(p), positions, elements // block_c)
    else:
        block_p = min(power_of_2(p), positions, elements)
        block_c = min(power_of_2(c), elements // block_p)
    return Tiling(n, c, p, channels_inner(x), block_c, block_p)


def strides(x: Tensor) -> tuple[int, int, int] | None:
    """Give the strides of batch, channel and position; None if no single stride steps through all positions."""
    step, reached = 1, None
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size == 1:
            continue
        if reached is None:
            step = stride
        elif stride != reached:
            return None
        reached = size * stride
    return x.stride(0), x.stride(1), step


@planned
def _is_readable(x: Tensor) -> bool:
    return strides(x) is not None


def readable(x: Tensor) -> Tensor:
    """Give the tensor itself, or a contiguous copy where its positions have no common stride."""
    return x if _is_readable(x) else x.contiguous()


def alignment(tiling: Tiling, *tensors: Tensor) -> int:
    """Compute the largest power of 2, up to 16, that divides the length and the distances of a tile's vectors.

    Triton finds out about divisors of 16 by itself, but not about smaller ones: planes of 14 x 14 have the divisor 4,
    which is all that fp32 needs.
    """
    outer, length = (2, tiling.channels) if tiling.channels_inner else (1, tiling.positions)
    steps = [strides(t) for t in tensors]
    return math.gcd(16, length, *(step[dim] for step in steps for dim in (0, outer)))


def fold_of(tiling: Tiling, align: int, element_size: int, warps: int = 4) -> int:
    """Count the positions of a tile that each thread holds, in vectors of up to 16 bytes.

    What a thread keeps from tile to tile takes that many times fewer registers if these are reduced to one at once.
    """
    vector = min(align, 16 // element_size)
    if tiling.channels_inner:
        return min(max(1, tiling.block_c * tiling.block_p // (32 * warps * vector)), tiling.block_p)
    return min(vector, tiling.block_p)
