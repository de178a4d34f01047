"""What the Triton kernels of pooling share: tiles of sites, and where the elements of the windows around them lie.

A tile has rows (D and H in one), channels and columns; of the last two, the one that is contiguous in memory is long.
Each dimension has its own stride: whatever lies in memory is read in place. The window is a constant of the compiled
kernel: loops over its elements have known bounds, divisions become shifts.
"""
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import channels_inner
from .window import Sizes

__all__ = [
    'SiteTiling',
    'candidate',
    'empty_planes',
    'existing_sites',
    'locate_sites',
    'plane_offsets',
    'site_offsets',
    'unroll',
    'window_element',
]


class SiteTiling(NamedTuple):
    """How a tensor of shape (N, C, D, H, W) is cut into tiles of (rows, channels, columns)."""

    batch: int
    blocks: tuple[int, int, int]
    block: tuple[int, int, int]

    @classmethod
    def of(cls, batch: int, channels: int, size: Sizes, channels_inner: bool, elements: int = 1024) -> 'SiteTiling':
        rows, columns = size[0] * size[1], size[2]
        block_c = min(triton.next_power_of_2(channels), 128) if channels_inner else 1
        block_w = min(triton.next_power_of_2(columns), elements // block_c)
        block_r = min(triton.next_power_of_2(rows), elements // (block_c * block_w))
        blocks = (triton.cdiv(rows, block_r), triton.cdiv(channels, block_c), triton.cdiv(columns, block_w))
        return cls(batch, blocks, (block_r, block_c, block_w))

    @property
    def programs(self) -> int:
        return self.batch * math.prod(self.blocks)


def unroll(count: int) -> int:
    """How often a loop is unrolled: wholly, if it is over up to 3 x 3 elements."""
    return count if count <= 9 else 1


def empty_planes(x: Tensor, size: Sizes, dtype: torch.dtype | None = None, count: int = 1) -> Tensor:
    """An empty tensor of shape (count * N, C, *size) in the memory format of `x`."""
    memory_format = torch.channels_last_3d if channels_inner(x) else torch.contiguous_format
    shape = (count * x.shape[0], x.shape[1], *size)
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=memory_format)


@triton.jit
def locate_sites(blocks, BLOCK: tl.constexpr):
    """The sample, rows, channels and columns of this program's tile."""
    pid = tl.program_id(0)
    w = pid % blocks[2] * BLOCK[2] + tl.arange(0, BLOCK[2])
    pid //= blocks[2]
    c = pid % blocks[1] * BLOCK[1] + tl.arange(0, BLOCK[1])
    pid //= blocks[1]
    row = pid % blocks[0] * BLOCK[0] + tl.arange(0, BLOCK[0])
    return pid // blocks[0], row, c, w


@triton.jit
def existing_sites(row, c, w, channels, size):
    """Which sites of a tile exist."""
    return (row < size[0] * size[1])[:, None, None] & (c < channels)[None, :, None] & (w < size[2])[None, None, :]


@triton.jit
def plane_offsets(n, c, strides):
    """Where the planes of a tile begin."""
    return n.to(tl.int64) * strides[0] + (c.to(tl.int64) * strides[1])[None, :, None]


@triton.jit
def site_offsets(row, w, size, strides):
    """Where in their plane the sites of a tile lie."""
    depth = (row // size[1]).to(tl.int64) * strides[2]
    height = (row % size[1]).to(tl.int64) * strides[3]
    return (depth + height)[:, None, None] + (w.to(tl.int64) * strides[4])[None, None, :]


@triton.jit
def _reach(at, e, size, WINDOW: tl.constexpr, DIM: tl.constexpr):
    """Position in the input of element `e` of the windows `at`, along one dimension, and whether it is there."""
    position = at * WINDOW[1][DIM] - WINDOW[2][DIM] + e * WINDOW[3][DIM]
    return position, (position >= 0) & (position < size[DIM])


@triton.jit
def window_element(e, row, w, size, out_size, strides, WINDOW: tl.constexpr):
    """Where in their plane the elements number `e` of the windows of a tile lie, and which of them are no padding."""
    KERNEL: tl.constexpr = WINDOW[0]
    d, d_inside = _reach(row // out_size[1], e // (KERNEL[1] * KERNEL[2]), size, WINDOW, 0)
    h, h_inside = _reach(row % out_size[1], e // KERNEL[2] % KERNEL[1], size, WINDOW, 1)
    w, w_inside = _reach(w, e % KERNEL[2], size, WINDOW, 2)
    rows = d.to(tl.int64) * strides[2] + h.to(tl.int64) * strides[3]
    at = rows[:, None, None] + (w.to(tl.int64) * strides[4])[None, None, :]
    return at, (d_inside & h_inside)[:, None, None] & w_inside[None, None, :]


@triton.jit
def _owner(at, i, size, out_size, WINDOW: tl.constexpr, DIM: tl.constexpr):
    """The `i`-th last window that may hold the positions `at`, which element they are there, and whether they are."""
    padded = at + WINDOW[2][DIM]
    window = padded // WINDOW[1][DIM] - i
    distance = padded - window * WINDOW[1][DIM]
    e = distance // WINDOW[3][DIM]
    holds = (distance % WINDOW[3][DIM] == 0) & (e < WINDOW[0][DIM]) & (window >= 0) & (window < out_size[DIM])
    return window, e, holds


@triton.jit
def candidate(i, row, w, size, out_size, WINDOW: tl.constexpr, OVERLAP: tl.constexpr):
    """Of the windows that may hold the sites of a tile of the input, number `i`.

    Returns:
        Which element of the window the sites are, the rows and columns of the windows, and which of all this is so.
    """
    KERNEL: tl.constexpr = WINDOW[0]
    d, d_e, d_holds = _owner(row // size[1], i // (OVERLAP[1] * OVERLAP[2]), size, out_size, WINDOW, 0)
    h, h_e, h_holds = _owner(row % size[1], i // OVERLAP[2] % OVERLAP[1], size, out_size, WINDOW, 1)
    out_w, w_e, w_holds = _owner(w, i % OVERLAP[2], size, out_size, WINDOW, 2)
    e = ((d_e * KERNEL[1] + h_e) * KERNEL[2])[:, None, None] + w_e[None, None, :]
    return e, d * out_size[1] + h, out_w, (d_holds & h_holds)[:, None, None] & w_holds[None, None, :]
