"""How the Triton kernels of pooling see tensors, planned in plain Python.

Kernels work on tiles. A tile has rows (D and H in one), channels and columns. Each entry of a tile is a *lane*, and a
lane computes one of three things:

- a *window*: one element of the output, and in some backward passes the gradients of its elements;
- an *element* of the input;
- a *patch* of the input: as many elements, along each dimension, as the stride of the window. Patches lie side by side
  and share no element. All elements of a patch need the same few windows, which are loaded once for all of them.

Each dimension keeps its own stride: tensors are read where they lie in memory, without a copy.

GPUs read 16-bit numbers so fast that little time is left for each, about 20 instructions on an H200. Divisions, and
lanes without work, would take it all. A layout avoids them in three ways:

- *Merging*: neighbouring dimensions become one where the strides of all tensors allow it. For 2x2/2 windows of
  contiguous tensors N, C, D and H do. Small planes then fill tiles as large ones do, and fewer divisions are needed to
  find a row.
- *Packed pairs*: where each lane has two columns side by side, they are loaded and stored as one number, of 32 bits for
  two 16-bit elements, of 64 bits for two 32-bit elements. All tensors then have one column for each window, and no
  thread has to hand elements to another.
- *Vectors*: a row of packed pairs is cut into pieces of 16 bytes, and each piece becomes a row of the tile. No lane is
  then without work, whatever the width of the input, and neighbouring threads read on where a row of the input ends.
"""
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..tiling import cdiv, channels_inner, power_of_2
from .window import Sizes, Window

__all__ = [
    'MOST_HELD',
    'Layout',
    'empty_planes',
    'layout_of',
    'patches_held',
    'unroll',
    'without_dims',
]

# The most elements of a window, or of a patch, that registers hold
MOST_HELD = 9
# Rows are numbered in 32 bits. The numbers go on beyond the last row, to the end of the last tile.
_MOST_ROWS = 2 ** 30
# Lanes of a tile
_TILE = 1024
# Bytes that a thread loads or stores at once
_VECTOR_BYTES = 16


@dataclass(frozen=True)
class Layout:
    """How a kernel sees tensors of shape (N, C, D, H, W), after dimensions have been merged and cut.

    Attributes:
        channels: C.
        lanes: Lanes along D, H and W.
        size: D, H and W of the input.
        out_size: D, H and W of the output.
        blocks: The number of samples, and of tiles along the rows, the channels and the columns.
        strides: Of each tensor with the size of the input, along the five dimensions, in multiples of ``units``.
        out_strides: Of each tensor with the size of the output, likewise.
        window: Kernel size, stride, padding and dilation along D, H and W, whether windows reach outside there, and the
            end of the elements that may lie before the input and the first that may lie beyond it.
        units: A common divisor of the strides along each dimension, 1 for the dimension that is contiguous in memory.
            The kernel multiplies by it: that is how the compiler knows that vectors are aligned.
        block: Rows, channels and columns of a tile.
        packed: Whether the tensors with the size of the input are read and written as packed pairs.
        columns: The first and the end of the columns of a window, counted in the elements of its packed pairs.
    """
    channels: int
    lanes: Sizes
    size: Sizes
    out_size: Sizes
    blocks: tuple[int, int, int, int]
    strides: tuple[tuple[int, ...], ...]
    out_strides: tuple[tuple[int, ...], ...]
    window: tuple[tuple[int, int, int], ...]
    units: tuple[int, ...]
    block: tuple[int, int, int]
    packed: bool
    columns: tuple[int, int]

    @property
    def programs(self) -> int:
        """The number of tiles."""
        return math.prod(self.blocks)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that all kernels take, by name."""
        return dict(
            channels=self.channels,
            size=self.size,
            out_size=self.out_size,
            blocks=self.blocks,
            WINDOW=self.window,
            UNITS=self.units,
            PACKED=self.packed,
            BLOCK=self.block,
        )

    @property
    def outside(self) -> tuple[bool, ...]:
        """Whether each element of a window, or each packed pair, may lie in the padding or beyond the end."""
        along = [
            [e < before or e >= beyond for e in range(kernel_size)]
            for kernel_size, before, beyond in zip(self.window[0], *self.window[5:], strict=True)
        ]
        return tuple(any(e) for e in itertools.product(*along))

    @property
    def overlap(self) -> Sizes:
        """The number of windows, along D, H and W, that an element may belong to."""
        return Window(*self.window[:4]).overlap

    @property
    def shares(self) -> tuple[tuple[int, ...], ...]:
        """Which windows hold the elements of a patch, see ``_shares``."""
        return _shares(Window(*self.window[:4]), self.lanes, self.out_size)


class _Dim(NamedTuple):
    """A dimension: its window, its size in the input and in the output, and its stride in each tensor."""
    kernel_size: int
    stride: int
    padding: int
    dilation: int
    size: int
    out_size: int
    strides: tuple[int, ...]
    out_strides: tuple[int, ...]

    @property
    def elementwise(self) -> bool:
        """Whether each element is a window."""
        return (self.kernel_size, self.stride, self.padding) == (1, 1, 0)

    @property
    def tiled(self) -> bool:
        """Whether windows lie side by side and hold all elements."""
        return (
            self.kernel_size == self.stride and self.padding == 0 and (self.dilation == 1 or self.kernel_size == 1)
            and self.size == self.out_size * self.stride
        )

    @property
    def reaches_outside(self) -> bool:
        """Whether any window reaches into the padding or beyond the end."""
        last = (self.out_size - 1) * self.stride + self.dilation * (self.kernel_size - 1)
        return self.padding > 0 or last >= self.size

    @property
    def outside(self) -> tuple[bool, int, int]:
        """Whether windows reach outside, the end of their elements that do before, and the first that does beyond."""
        first = (self.out_size - 1) * self.stride - self.padding
        return self.reaches_outside, cdiv(self.padding, self.dilation), cdiv(max(self.size - first, 0), self.dilation)

    @property
    def columns(self) -> tuple[int, int]:
        """The first and the end of the columns of a window, from the first column of a pair on."""
        return self.padding % 2, self.padding % 2 + self.kernel_size

    @property
    def used_strides(self) -> tuple[int, ...]:
        """The strides that offsets are made of: not those of a dimension of size 1."""
        return (self.strides if self.size > 1 else ()) + (self.out_strides if self.out_size > 1 else ())

    def lanes(self, of: str) -> int:
        """Count the windows, elements or patches along the dimension."""
        return {'windows': self.out_size, 'elements': self.size, 'patches': cdiv(self.size, self.stride)}[of]


def layout_of(
        window: Window,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        lanes: str = 'windows',
        merge_channels: bool = True,
        partial_pairs: bool = False,
) -> Layout:
    """Find the layout for tensors of shape (N, C, D, H, W), some of the size of the input and some of the output.

    Args:
        window: The window.
        inputs: The input, and other tensors of its size.
        outputs: Tensors of the size of the output.
        lanes: What a lane computes, ``'windows'``, ``'elements'`` or ``'patches'``.
        merge_channels: Whether the kernel need not tell channels apart.
        partial_pairs: Whether the kernel can do with windows that hold one of the two columns of a packed pair, which
            two neighbouring windows then load.
    """
    x, item_bytes = inputs[0], inputs[0].element_size()
    inner_channels = channels_inner(x)
    aligned = all(t.data_ptr() % (2 * item_bytes) == 0 for t in inputs)
    strides, out_strides = ([t.stride() for t in tensors] for tensors in (inputs, outputs))
    windows = [(1, 1, 0, 1)] * 2 + list(zip(*window, strict=True))
    sizes = zip(x.shape, outputs[0].shape, zip(*strides, strict=True), zip(*out_strides, strict=True), strict=True)
    dims = [_Dim(*of_dim, *rest) for of_dim, rest in zip(windows, sizes, strict=True)]
    held = window.elements <= MOST_HELD
    packed = aligned and not inner_channels and held and _can_be_packed(dims, lanes, partial_pairs)
    columns = dims[-1].columns
    if packed and lanes == 'windows':
        *outer, w = _in_pairs(dims)
        dims = [*outer, w._replace(
            kernel_size=cdiv(columns[1], 2), stride=1, padding=cdiv(w.padding, 2), size=w.size // 2)]
    vector = _VECTOR_BYTES // (2 * item_bytes) if packed and lanes == 'windows' else 1
    merged = _merge(dims, inner_channels or not merge_channels, inner_channels, vector)
    if merged[2].size * merged[3].size > _MOST_ROWS:
        merged = dims
    if packed and lanes == 'patches':
        # Last: the window and the size of a patch still count columns, and would not fit strides that count pairs.
        merged = _in_pairs(merged)
    return _cut_into_tiles(merged, inner_channels, lanes, packed, columns)


def _can_be_packed(dims: Sequence[_Dim], lanes: str, partial_pairs: bool) -> bool:
    """Whether the columns of each lane are pairs, side by side in memory, of which the first has an even offset."""
    *outer, w = dims
    if lanes == 'windows':
        two = (w.kernel_size, w.stride, w.padding, w.dilation) == (2, 2, 0, 1) and not w.reaches_outside
        if partial_pairs and w.kernel_size > 2:
            two = w.stride == 2 and w.dilation == 1 and w.size % 2 == 0
    else:
        two = lanes == 'patches' and w.stride == 2 and w.size % 2 == 0
    return (
        two and all(stride == 1 for stride in w.strides)
        and all(stride % 2 == 0 for dim in outer if dim.size > 1 for stride in dim.strides)
    )


def _in_pairs(dims: Sequence[_Dim]) -> list[_Dim]:
    """Count the strides of tensors with the size of the input in pairs of columns. Pairs have a stride of 1."""
    *outer, w = dims
    return [*(dim._replace(strides=tuple(stride // 2 for stride in dim.strides)) for dim in outer), w]


def _merge(dims: Sequence[_Dim], channels_apart: bool, inner_channels: bool, vector: int) -> list[_Dim]:
    """Merge neighbouring dimensions where one stride and one window do for both; there are five again in the end.

    Args:
        dims: N, C, D, H and W.
        channels_apart: Whether C is left out of it.
        inner_channels: Whether channels are contiguous in memory: what is merged then makes rows, else columns.
        vector: The length to cut rows into, if each of their elements is a window.
    """
    no_strides = (0,) * len(dims[0].strides), (0,) * len(dims[0].out_strides)
    unit = _Dim(1, 1, 0, 1, 1, 1, *no_strides)
    if channels_apart:
        n, c, *others = dims
        merged = _join_neighbours([n, *others])
    else:
        c, merged = unit, _join_neighbours(dims)
    if vector > 1 and len(merged) < 3 and merged[-1].elementwise:
        merged[-1:] = _cut(merged[-1], math.gcd(merged[-1].size, vector))
    while len(merged) < 3:
        merged.insert(len(merged) if inner_channels else -1, unit)
    if len(merged) > 4:
        return merged
    return [*[unit] * (4 - len(merged)), *merged[:-3], c, *merged[-3:]]


def _join_neighbours(dims: Sequence[_Dim]) -> list[_Dim]:
    joined = list(dims[:1])
    for dim in dims[1:]:
        both = _join(joined[-1], dim)
        joined[-1:] = [joined[-1], dim] if both is None else [both]
    return joined


def _join(outer: _Dim, inner: _Dim) -> _Dim | None:
    """Make two neighbouring dimensions one, None if one stride and one window do not do for both."""
    if outer.elementwise and outer.size == 1:
        return inner
    if inner.elementwise and inner.size == 1:
        return outer
    strides = tuple(stride * inner.size for stride in inner.strides)
    out_strides = tuple(stride * inner.out_size for stride in inner.out_strides)
    if outer.elementwise and inner.tiled and (outer.strides, outer.out_strides) == (strides, out_strides):
        return inner._replace(size=outer.size * inner.size, out_size=outer.out_size * inner.out_size)
    return None


def _cut(dim: _Dim, length: int) -> tuple[_Dim, _Dim]:
    """Cut a dimension whose elements are windows into pieces: a dimension of pieces and one inside of them."""
    pieces = dim._replace(
        size=dim.size // length, out_size=dim.out_size // length,
        strides=tuple(length * stride for stride in dim.strides),
        out_strides=tuple(length * stride for stride in dim.out_strides),
    )
    return pieces, dim._replace(size=length, out_size=length)


def _cut_into_tiles(
        dims: Sequence[_Dim], inner_channels: bool, lanes: str, packed: bool, columns: tuple[int, int],
) -> Layout:
    counts = [dim.lanes(lanes) for dim in dims]
    n, c, d, h, w = counts
    block_c = _block(c, 128, 32) if inner_channels else 1
    block_w = _block(w, _TILE // block_c, 1 if inner_channels else 16)
    block_r = _block(d * h, _TILE // (block_c * block_w), _TILE)
    contiguous = 1 if inner_channels else 4
    divisor = math.gcd(16, counts[contiguous], *(
        stride for i, dim in enumerate(dims) if i != contiguous for stride in dim.used_strides))
    units = tuple(1 if i == contiguous else divisor for i in range(5))
    return Layout(
        channels=c,
        lanes=(d, h, w),
        size=tuple(dim.size for dim in dims[2:]),
        out_size=tuple(dim.out_size for dim in dims[2:]),
        blocks=(n, cdiv(d * h, block_r), cdiv(c, block_c), cdiv(w, block_w)),
        strides=_in_units([dim.strides for dim in dims], units),
        out_strides=_in_units([dim.out_strides for dim in dims], units),
        window=tuple(zip(*((*dim[:4], *dim.outside) for dim in dims[2:]), strict=True)),
        units=units,
        block=(block_r, block_c, block_w),
        packed=packed,
        columns=columns,
    )


def _block(size: int, most: int, least: int) -> int:
    """Give the power of 2 that leaves the fewest lanes without work, and of several the largest."""
    largest = min(power_of_2(max(size, 1)), most)
    smallest = min(largest, least)
    powers = [2 ** i for i in range(largest.bit_length() - 1, smallest.bit_length() - 2, -1)]
    return min(powers, key=lambda block: cdiv(size, block) * block)


def _in_units(strides: Sequence[Sequence[int]], units: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Turn the strides of all tensors along each dimension into those of each tensor along all dimensions."""
    return tuple(
        tuple(stride // unit for stride, unit in zip(of_tensor, units, strict=True))
        for of_tensor in zip(*strides, strict=True)
    )


def patches_held(window: Window) -> bool:
    """Whether registers hold the elements of a patch, with compiled code for each window that holds one of them."""
    return window.elements <= MOST_HELD and math.prod(window.stride) <= MOST_HELD


def _shares(window: Window, patches: Sizes, out_size: Sizes) -> tuple[tuple[int, ...], ...]:
    """Find the windows that hold elements of a patch. They lie in the same way around each patch.

    Args:
        window: The window.
        patches: The number of patches along D, H and W.
        out_size: The number of windows along D, H and W.

    Returns:
        A row of numbers for each window (Triton takes no deeper tables): where it lies, counted from the window that
        has the number of the patch, along D, H and W; whether there are patches that lack it, along D, H and W; and
        for each element of the patch, which element of the window it is, -1 if none.
    """
    shares: dict[Sizes, list[int]] = {}
    along = [
        [divmod(e * dilation - padding, stride) for e in range(kernel_size)]
        for kernel_size, stride, padding, dilation in zip(*window, strict=True)
    ]
    for e, ((d, d_at), (h, h_at), (w, w_at)) in enumerate(itertools.product(*along)):
        elements = shares.setdefault((-d, -h, -w), [-1] * math.prod(window.stride))
        elements[(d_at * window.stride[1] + h_at) * window.stride[2] + w_at] = e
    return tuple(
        (*shift, *(i < 0 or n + i > out for i, n, out in zip(shift, patches, out_size, strict=True)), *elements)
        for shift, elements in shares.items()
    )


def unroll(count: int) -> int:
    """How often a loop is unrolled: wholly, if it is over few elements."""
    return count if count <= MOST_HELD else 1


def empty_planes(x: Tensor, size: Sizes, dtype: torch.dtype | None = None, count: int = 1) -> Tensor:
    """Plan a tensor of shape (count * N, C, *size) in the memory format of ``x``, on the meta device."""
    memory_format = torch.channels_last_3d if channels_inner(x) else torch.contiguous_format
    shape = (count * x.shape[0], x.shape[1], *size)
    return torch.empty(shape, dtype=dtype or x.dtype, device='meta', memory_format=memory_format)


def without_dims(planes: Tensor, rank: int) -> Tensor:
    """View (N, C, D, H, W) as a tensor of ``rank`` dimensions. Those that are left out have size 1."""
    return planes.reshape(*planes.shape[:2], *planes.shape[2 + 5 - rank:])
