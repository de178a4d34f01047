"""What the Triton kernels of pooling share: how tensors are laid out for them, tiles of windows, and their elements.

A tile has rows (D and H in one), channels and columns; of the last two, the one that is contiguous in memory is long.
Each dimension has its own stride: whatever lies in memory is read in place. The window is a constant of the compiled
kernel: loops over its elements have known bounds, divisions become shifts.

An H200 reads 16-bit numbers so fast that no more than 20 instructions are left for each. That is what layouts are for:

- Neighbouring dimensions become one where all tensors allow it, N, C, D and H of 2x2/2 all four. Small planes then fill
  tiles as large ones do, and few of the divisions that find a row are left.
- Windows of two columns, side by side, are read as words: one of 32 bits for two elements of 16, one of 64 for two of
  32. All tensors have a column for each window then, and no thread has to hand elements to another.
- A row of words is cut into vectors of 16 bytes. Each is a row of the tile, whatever the width: no lane is idle, and
  neighbouring threads read on beyond the end of a row.
"""
import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_tiles import aligned, cdiv, channels_inner, power_of_2
from .window import Sizes, Window

__all__ = [
    'MOST_HELD',
    'Layout',
    'as_words',
    'candidate',
    'empty_planes',
    'existing_sites',
    'join_word',
    'layout_of',
    'locate_sites',
    'plane_offsets',
    'shared_window',
    'site_offsets',
    'site_position',
    'split_word',
    'steps_held',
    'store_positions',
    'unroll',
    'window_element',
    'zeros',
]

# The most elements of a window that registers hold
MOST_HELD = 9
# Rows are numbered in 32 bits, those beyond the end of the last tile too.
_MOST_ROWS = 2 ** 30


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
        """Whether windows stand side by side and hold all elements."""
        return (
            self.kernel_size == self.stride and self.padding == 0 and (self.dilation == 1 or self.kernel_size == 1)
            and self.size == self.out_size * self.stride
        )

    @property
    def hangs_over(self) -> bool:
        """Whether any window reaches into the padding or over the end."""
        last = (self.out_size - 1) * self.stride + self.dilation * (self.kernel_size - 1)
        return self.padding > 0 or last >= self.size

    @property
    def strides_taken(self) -> tuple[int, ...]:
        """The strides that lead anywhere."""
        return (self.strides if self.size > 1 else ()) + (self.out_strides if self.out_size > 1 else ())

    def sites(self, kind: str) -> int:
        """The number of sites, see `layout_of`."""
        return {'windows': self.out_size, 'positions': self.size, 'steps': -(-self.size // self.stride)}[kind]


class Layout(NamedTuple):
    """How a kernel sees tensors of shape (N, C, D, H, W), after dimensions have been merged and cut.

    Attributes:
        channels: C.
        sites: Sites along D, H and W.
        size: D, H and W of the input.
        out_size: D, H and W of the output.
        blocks: The number of samples, and of tiles along the rows, the channels and the columns.
        strides: Of each tensor with the size of the input, along the five dimensions, in multiples of `units`.
        out_strides: Of each tensor with the size of the output, likewise.
        window: Kernel size, stride, padding and dilation in D, H and W, and in which of them windows hang over.
        units: What divides the strides, for the compiler to know where vectors are aligned; 1 where memory is
            contiguous. The size there has the same divisor.
        block: Rows, channels and columns of a tile.
        words: Whether the tensors of the size of the input are seen as words of two columns.
    """

    channels: int
    sites: Sizes
    size: Sizes
    out_size: Sizes
    blocks: tuple[int, int, int, int]
    strides: tuple[tuple[int, ...], ...]
    out_strides: tuple[tuple[int, ...], ...]
    window: tuple[tuple[int, int, int], ...]
    units: tuple[int, ...]
    block: tuple[int, int, int]
    words: bool

    @property
    def programs(self) -> int:
        return math.prod(self.blocks)

    @property
    def padded(self) -> bool:
        """Whether any window reaches into the padding or over the end."""
        return any(self.window[4])

    @property
    def overlap(self) -> Sizes:
        """The number of windows, along D, H and W, that an element may belong to."""
        return Window(*self.window[:4]).overlap

    @property
    def shares(self) -> tuple[tuple[int, ...], ...]:
        """Which windows the positions of a site are in, see `_shares`."""
        return _shares(Window(*self.window[:4]), self.sites, self.out_size)


def layout_of(
        window: Window,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        sites: str = 'windows',
        merge_channels: bool = True,
) -> Layout:
    """Finds the layout for tensors of shape (N, C, D, H, W), some of the size of the input and some of the output.

    Args:
        window: The window.
        inputs: The input, and other tensors of its size.
        outputs: Tensors of the size of the output.
        sites: What the sites of a tile are: "windows", "positions" of the input, or "steps": as many positions, along
            each dimension, as windows step over.
        merge_channels: Whether channels need not be told apart.
    """
    x, item = inputs[0], inputs[0].element_size()
    return _layout(
        window, x.shape, outputs[0].shape, tuple(t.stride() for t in inputs), tuple(t.stride() for t in outputs),
        channels_inner(x), sites, merge_channels, item, all(t.data_ptr() % (2 * item) == 0 for t in inputs),
    )


@functools.lru_cache(maxsize=4096)
def _layout(
        window: Window,
        shape: Sequence[int],
        out_shape: Sequence[int],
        strides: Sequence[Sequence[int]],
        out_strides: Sequence[Sequence[int]],
        inner: bool,
        sites: str,
        merge_channels: bool,
        item: int,
        even: bool,
) -> Layout:
    windows = [(1, 1, 0, 1)] * 2 + list(zip(*window, strict=True))
    sizes = zip(shape, out_shape, zip(*strides, strict=True), zip(*out_strides, strict=True), strict=True)
    dims = [_Dim(*of_dim, *rest) for of_dim, rest in zip(windows, sizes, strict=True)]
    words = even and not inner and window.elements <= MOST_HELD and _has_words(dims, sites)
    if words:
        dims = _in_words(dims, sites)
    slots = _merged_slots(dims, inner or not merge_channels, inner, 8 // item if words and sites == 'windows' else 1)
    if slots[2].size * slots[3].size > _MOST_ROWS:
        slots = dims
    return _cut_into_tiles(slots, inner, sites, words)


def _has_words(dims: Sequence[_Dim], sites: str) -> bool:
    """Whether a site has two columns, side by side in memory, of which the first has an even offset."""
    *outer, w = dims
    if sites == 'windows':
        two = (w.kernel_size, w.stride, w.padding, w.dilation) == (2, 2, 0, 1) and not w.hangs_over
    else:
        two = sites == 'steps' and w.stride == 2 and w.size % 2 == 0
    return (
        two and all(stride == 1 for stride in w.strides)
        and all(stride % 2 == 0 for dim in outer if dim.size > 1 for stride in dim.strides)
    )


def _in_words(dims: Sequence[_Dim], sites: str) -> list[_Dim]:
    """The dimensions of tensors that are seen as words. A window of two columns has a window of one word."""
    *outer, w = [dim._replace(strides=tuple(stride // 2 for stride in dim.strides)) for dim in dims]
    w = w._replace(strides=dims[-1].strides)
    return [*outer, w._replace(kernel_size=1, stride=1, size=w.out_size) if sites == 'windows' else w]


def _merged_slots(dims: Sequence[_Dim], channels_apart: bool, inner: bool, vector: int) -> list[_Dim]:
    """N, C, D, H and W after everything has been merged that can be, and a row of words cut into vectors."""
    no_strides = (0,) * len(dims[0].strides), (0,) * len(dims[0].out_strides)
    unit = _Dim(1, 1, 0, 1, 1, 1, *no_strides)
    if channels_apart:
        n, c, *others = dims
        merged = _merge([n, *others])
    else:
        c, merged = unit, _merge(dims)
    if vector > 1 and len(merged) < 3 and merged[-1].elementwise:
        merged[-1:] = _cut(merged[-1], math.gcd(merged[-1].size, vector))
    while len(merged) < 3:
        merged.insert(len(merged) if inner else -1, unit)
    if len(merged) > 4:
        return merged
    return [*[unit] * (4 - len(merged)), *merged[:-3], c, *merged[-3:]]


def _cut(dim: _Dim, vector: int) -> tuple[_Dim, _Dim]:
    """A dimension whose elements are windows as two, of which the second has the length of a vector."""
    outer = dim._replace(
        size=dim.size // vector, out_size=dim.out_size // vector,
        strides=tuple(vector * stride for stride in dim.strides),
        out_strides=tuple(vector * stride for stride in dim.out_strides),
    )
    return outer, dim._replace(size=vector, out_size=vector)


def _merge(dims: Sequence[_Dim]) -> list[_Dim]:
    merged = list(dims[:1])
    for dim in dims[1:]:
        joined = _join(merged[-1], dim)
        merged[-1:] = [merged[-1], dim] if joined is None else [joined]
    return merged


def _join(outer: _Dim, inner: _Dim) -> _Dim | None:
    """Two neighbouring dimensions as one, if one stride and one window do for both."""
    if outer.elementwise and outer.size == 1:
        return inner
    if inner.elementwise and inner.size == 1:
        return outer
    strides = tuple(stride * inner.size for stride in inner.strides)
    out_strides = tuple(stride * inner.out_size for stride in inner.out_strides)
    if outer.elementwise and inner.tiled and (outer.strides, outer.out_strides) == (strides, out_strides):
        return inner._replace(size=outer.size * inner.size, out_size=outer.out_size * inner.out_size)
    return None


def _cut_into_tiles(slots: Sequence[_Dim], inner: bool, sites: str, words: bool, elements: int = 1024) -> Layout:
    counts = [dim.sites(sites) for dim in slots]
    n, c, d, h, w = counts
    block_c = _block(c, 128, 32) if inner else 1
    block_w = _block(w, elements // block_c, 1 if inner else 16)
    block_r = _block(d * h, elements // (block_c * block_w), elements)
    contiguous = 1 if inner else 4
    divisor = math.gcd(16, counts[contiguous], *(
        stride for i, dim in enumerate(slots) if i != contiguous for stride in dim.strides_taken))
    units = tuple(1 if i == contiguous else divisor for i in range(5))
    return Layout(
        channels=c,
        sites=(d, h, w),
        size=tuple(dim.size for dim in slots[2:]),
        out_size=tuple(dim.out_size for dim in slots[2:]),
        blocks=(n, cdiv(d * h, block_r), cdiv(c, block_c), cdiv(w, block_w)),
        strides=_in_units([dim.strides for dim in slots], units),
        out_strides=_in_units([dim.out_strides for dim in slots], units),
        window=tuple(zip(*((*dim[:4], dim.hangs_over) for dim in slots[2:]), strict=True)),
        units=units,
        block=(block_r, block_c, block_w),
        words=words,
    )


def _block(size: int, most: int, least: int) -> int:
    """The power of 2 that leaves the fewest lanes idle, and of several the largest."""
    largest = min(power_of_2(max(size, 1)), most)
    smallest = min(largest, least)
    powers = [2 ** i for i in range(largest.bit_length() - 1, smallest.bit_length() - 2, -1)]
    return min(powers, key=lambda block: cdiv(size, block) * block)


def _in_units(strides: Sequence[Sequence[int]], units: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """From the strides of all tensors along each dimension, those of each tensor along all dimensions."""
    return tuple(
        tuple(stride // unit for stride, unit in zip(of_tensor, units, strict=True))
        for of_tensor in zip(*strides, strict=True)
    )


def steps_held(window: Window) -> bool:
    """Whether registers hold what the positions of a site share."""
    return window.elements <= MOST_HELD and math.prod(window.stride) <= MOST_HELD


@functools.lru_cache(maxsize=4096)
def _shares(window: Window, sites: Sizes, out_size: Sizes) -> tuple[tuple[int, ...], ...]:
    """Where the windows lie that hold positions of a site, a site having as many positions as windows step over.

    Returns:
        For each of these windows, in one row of numbers since Triton takes no deeper tables: how far it lies from the
        window with the number of the site, in D, H and W; whether there are sites without it, in D, H and W; and for
        each position, which element of the window it is, or -1.
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
        (*shift, *(i < 0 or n + i > out for i, n, out in zip(shift, sites, out_size, strict=True)), *elements)
        for shift, elements in shares.items()
    )


def unroll(count: int) -> int:
    """How often a loop is unrolled: wholly, if it is over few elements."""
    return count if count <= MOST_HELD else 1


def empty_planes(x: Tensor, size: Sizes, dtype: torch.dtype | None = None, count: int = 1) -> Tensor:
    """An empty tensor of shape (count * N, C, *size) in the memory format of `x`."""
    memory_format = torch.channels_last_3d if channels_inner(x) else torch.contiguous_format
    shape = (count * x.shape[0], x.shape[1], *size)
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=memory_format)


@triton.jit
def locate_sites(blocks, BLOCK: tl.constexpr):
    """The sample, rows, channels and columns of this program's tile.

    Rows come last: where there is one sample, and one tile in every other dimension, nothing is divided.
    """
    pid = tl.program_id(0)
    w = pid % blocks[3] * BLOCK[2] + tl.arange(0, BLOCK[2])
    pid //= blocks[3]
    c = pid % blocks[2] * BLOCK[1] + tl.arange(0, BLOCK[1])
    pid //= blocks[2]
    row = pid // blocks[0] * BLOCK[0] + tl.arange(0, BLOCK[0])
    return pid % blocks[0], row, c, w


@triton.jit
def existing_sites(row, c, w, channels, size, UNITS: tl.constexpr):
    """Which sites of a tile exist. Of channels and columns, what is contiguous has as its divisor the other's unit."""
    c_exists = c < aligned(channels, UNITS[4])
    w_exists = w < aligned(size[2], UNITS[1])
    return (row < size[0] * size[1])[:, None, None] & c_exists[None, :, None] & w_exists[None, None, :]


@triton.jit
def plane_offsets(n, c, strides, UNITS: tl.constexpr):
    """Where the planes of a tile begin."""
    return n.to(tl.int64) * strides[0] * UNITS[0] + (c.to(tl.int64) * strides[1] * UNITS[1])[None, :, None]


@triton.jit
def _offsets_in_plane(d, h, w, strides, UNITS: tl.constexpr):
    rows = d.to(tl.int64) * strides[2] * UNITS[2] + h.to(tl.int64) * strides[3] * UNITS[3]
    return rows[:, None, None] + (w.to(tl.int64) * strides[4] * UNITS[4])[None, None, :]


@triton.jit
def site_offsets(row, w, size, strides, UNITS: tl.constexpr):
    """Where in their plane the sites of a tile lie."""
    return _offsets_in_plane(row // size[1], row % size[1], w, strides, UNITS)


@triton.jit
def _within(at, size):
    return (at >= 0) & (at < size)


@triton.jit
def _reach(at, e, size, WINDOW: tl.constexpr, DIM: tl.constexpr):
    """Position in the input of element `e` of the windows `at`, along one dimension, and whether it is there."""
    position = at * WINDOW[1][DIM] - WINDOW[2][DIM] + e * WINDOW[3][DIM]
    if WINDOW[4][DIM]:
        return position, _within(position, size[DIM])
    else:
        return position, tl.full(position.shape, True, tl.int1)


@triton.jit
def window_element(e, row, w, size, out_size, strides, WINDOW: tl.constexpr, UNITS: tl.constexpr):
    """Where in their plane the elements number `e` of the windows of a tile lie, and which of them are no padding."""
    KERNEL: tl.constexpr = WINDOW[0]
    d, d_inside = _reach(row // out_size[1], e // (KERNEL[1] * KERNEL[2]), size, WINDOW, 0)
    h, h_inside = _reach(row % out_size[1], e // KERNEL[2] % KERNEL[1], size, WINDOW, 1)
    w, w_inside = _reach(w, e % KERNEL[2], size, WINDOW, 2)
    inside = (d_inside & h_inside)[:, None, None] & w_inside[None, None, :]
    return _offsets_in_plane(d, h, w, strides, UNITS), inside


@triton.jit
def _stepped(at, phase, size, STEP: tl.constexpr):
    """Position number `phase` of the sites `at`, along one dimension, and whether it is there."""
    position = at * STEP + phase
    if STEP == 1:
        return position, tl.full(position.shape, True, tl.int1)
    else:
        return position, position < size


@triton.jit
def site_position(
        phase, row, w, sites, size, strides, WINDOW: tl.constexpr, UNITS: tl.constexpr, WORDS: tl.constexpr,
):
    """Where in their plane the positions (or words) number `phase` of the sites of a tile lie, and which are there."""
    STEP: tl.constexpr = WINDOW[1]
    COLUMNS: tl.constexpr = 1 if WORDS else STEP[2]
    d, d_inside = _stepped(row // sites[1], phase // (COLUMNS * STEP[1]), size[0], STEP[0])
    h, h_inside = _stepped(row % sites[1], phase // COLUMNS % STEP[1], size[1], STEP[1])
    w, w_inside = _stepped(w, phase % COLUMNS, size[2], COLUMNS)
    inside = (d_inside & h_inside)[:, None, None] & w_inside[None, None, :]
    return _offsets_in_plane(d, h, w, strides, UNITS), inside


@triton.jit
def _shifted(at, size, SHARES: tl.constexpr, NUMBER: tl.constexpr, DIM: tl.constexpr):
    """The windows that sites have a share in, along one dimension, and whether they are there."""
    window = at + SHARES[NUMBER][DIM]
    if SHARES[NUMBER][3 + DIM]:
        return window, _within(window, size[DIM])
    else:
        return window, tl.full(window.shape, True, tl.int1)


@triton.jit
def shared_window(row, w, sites, out_size, strides, SHARES: tl.constexpr, NUMBER: tl.constexpr, UNITS: tl.constexpr):
    """Where in their plane windows lie that the sites of a tile have a share in, and which of them exist."""
    d, d_exists = _shifted(row // sites[1], out_size, SHARES, NUMBER, 0)
    h, h_exists = _shifted(row % sites[1], out_size, SHARES, NUMBER, 1)
    w, w_exists = _shifted(w, out_size, SHARES, NUMBER, 2)
    exists = (d_exists & h_exists)[:, None, None] & w_exists[None, None, :]
    return _offsets_in_plane(d, h, w, strides, UNITS), exists


@triton.jit
def store_positions(
        pointer, values, row, w, mask, sites, size, strides,
        DTYPE: tl.constexpr, WINDOW: tl.constexpr, UNITS: tl.constexpr, WORDS: tl.constexpr,
):
    """Stores a number for each position of the sites of a tile."""
    for phase in tl.static_range(len(values) // 2 if WORDS else len(values)):
        at, inside = site_position(phase, row, w, sites, size, strides, WINDOW, UNITS, WORDS)
        if WORDS:
            value = join_word(values[2 * phase].to(DTYPE), values[2 * phase + 1].to(DTYPE))
        else:
            value = values[phase].to(DTYPE)
        tl.store(pointer + at, value, mask & inside)


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


@triton.jit
def zeros(WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """A sum to start with for each position of the sites of a tile."""
    sums = ()
    for _ in tl.static_range(WINDOW[1][0] * WINDOW[1][1] * WINDOW[1][2]):
        sums = sums + (tl.zeros(BLOCK, tl.float32),)
    return sums


@triton.jit
def as_words(pointer):
    """A pointer to pairs of elements of 16 or 32 bits."""
    if pointer.dtype.element_ty.primitive_bitwidth == 16:
        return pointer.to(tl.pointer_type(tl.int32), bitcast=True)
    else:
        return pointer.to(tl.pointer_type(tl.int64), bitcast=True)


@triton.jit
def split_word(word, DTYPE: tl.constexpr):
    """The two elements of each word, in fp32."""
    if DTYPE == tl.bfloat16:
        # They are the upper halves of fp32 numbers.
        return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
    elif DTYPE == tl.float16:
        first, second = word.to(tl.int16).to(DTYPE, bitcast=True), (word >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        return first.to(tl.float32), second.to(tl.float32)
    else:
        return word.to(tl.int32).to(DTYPE, bitcast=True), (word >> 32).to(tl.int32).to(DTYPE, bitcast=True)


@triton.jit
def join_word(first, second):
    """Words of two elements each."""
    if first.dtype.primitive_bitwidth == 16:
        low, high = first.to(tl.uint16, bitcast=True).to(tl.int32), second.to(tl.uint16, bitcast=True).to(tl.int32)
        return low | high << 16
    else:
        low, high = first.to(tl.uint32, bitcast=True).to(tl.int64), second.to(tl.uint32, bitcast=True).to(tl.int64)
        return low | high << 32
