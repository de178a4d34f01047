"""What the Triton kernels of pooling share: where the windows and elements of a tile lie, and packed pairs.

``layout.py`` plans what is computed here and explains the words: lanes, windows, patches, packed pairs. Arguments:

- ``row`` and ``w``: the row and the column of each lane. A row is D and H in one.
- ``size``, ``out_size``, ``lanes``: D, H and W of the input, of the output, and in lanes.
- ``strides``: those of a tensor along N, C, D, H and W, in multiples of ``UNITS``.
- ``WINDOW``, ``SHARES``, ``OVERLAP``, ``BLOCK``, ``PACKED``: attributes of the ``Layout``. They are constants of the
  compiled kernel: loops over a window have known bounds, and divisions become shifts.

Offsets come in two parts, that of a plane (N, C) and that within it. Those of packed pairs count pairs.
"""
import triton
import triton.language as tl

from ..triton_tiles import aligned

__all__ = [
    'as_pairs',
    'candidate_window',
    'join_pair',
    'lane_offsets',
    'lanes_exist',
    'locate_lanes',
    'patch_element',
    'patch_zeros',
    'plane_offsets',
    'sharing_window',
    'split_pair',
    'store_patches',
    'window_element',
]


@triton.jit
def locate_lanes(blocks, BLOCK: tl.constexpr):
    """Give the sample, rows, channels and columns of this program's tile.

    The number of the tile along the rows is divided out last: where there is one sample, and one tile along the
    channels and columns, no division is left.
    """
    pid = tl.program_id(0)
    w = pid % blocks[3] * BLOCK[2] + tl.arange(0, BLOCK[2])
    pid //= blocks[3]
    c = pid % blocks[2] * BLOCK[1] + tl.arange(0, BLOCK[1])
    pid //= blocks[2]
    row = pid // blocks[0] * BLOCK[0] + tl.arange(0, BLOCK[0])
    return pid % blocks[0], row, c, w


@triton.jit
def lanes_exist(row, c, w, channels, lanes, UNITS: tl.constexpr):
    """Whether lanes lie within the tensor: the last tiles may go beyond its end.

    The size of the dimension that is contiguous is a multiple of the units of the others.
    """
    c_exists = c < aligned(channels, UNITS[4])
    w_exists = w < aligned(lanes[2], UNITS[1])
    return (row < lanes[0] * lanes[1])[:, None, None] & c_exists[None, :, None] & w_exists[None, None, :]


@triton.jit
def plane_offsets(n, c, strides, UNITS: tl.constexpr):
    """Give the offsets of the planes of a tile."""
    return n.to(tl.int64) * strides[0] * UNITS[0] + (c.to(tl.int64) * strides[1] * UNITS[1])[None, :, None]


@triton.jit
def _offsets_in_plane(d, h, w, strides, UNITS: tl.constexpr):
    rows = d.to(tl.int64) * strides[2] * UNITS[2] + h.to(tl.int64) * strides[3] * UNITS[3]
    return rows[:, None, None] + (w.to(tl.int64) * strides[4] * UNITS[4])[None, None, :]


@triton.jit
def lane_offsets(row, w, size, strides, UNITS: tl.constexpr):
    """Give the offsets of lanes that are elements of a tensor of this size, within their plane."""
    return _offsets_in_plane(row // size[1], row % size[1], w, strides, UNITS)


@triton.jit
def _within(position, size):
    return (position >= 0) & (position < size)


@triton.jit
def _position(window, e, size, WINDOW: tl.constexpr, DIM: tl.constexpr, KNOWN: tl.constexpr):
    """Give the position of element ``e`` of windows along one dimension, and whether it lies within the input."""
    # A sum of which the compiler sees that it is aligned, where the element is known and as far on as the padding.
    position = window * WINDOW[1][DIM] + (e * WINDOW[3][DIM] - WINDOW[2][DIM])
    inside = tl.full(position.shape, True, tl.int1)
    if KNOWN:
        if e < WINDOW[5][DIM]:
            inside = inside & (position >= 0)
        if e >= WINDOW[6][DIM]:
            inside = inside & (position < size[DIM])
    elif WINDOW[4][DIM]:
        inside = _within(position, size[DIM])
    return position, inside


@triton.jit
def window_element(
        e, row, w, size, out_size, strides, WINDOW: tl.constexpr, UNITS: tl.constexpr, KNOWN: tl.constexpr = False,
):
    """Give the offsets of element number ``e`` of windows, and whether it lies within the input.

    If the compiler is to know ``e``, it leaves out what need not be asked.
    """
    KERNEL: tl.constexpr = WINDOW[0]
    d, d_inside = _position(row // out_size[1], e // (KERNEL[1] * KERNEL[2]), size, WINDOW, 0, KNOWN)
    h, h_inside = _position(row % out_size[1], e // KERNEL[2] % KERNEL[1], size, WINDOW, 1, KNOWN)
    w, w_inside = _position(w, e % KERNEL[2], size, WINDOW, 2, KNOWN)
    inside = (d_inside & h_inside)[:, None, None] & w_inside[None, None, :]
    return _offsets_in_plane(d, h, w, strides, UNITS), inside


@triton.jit
def _position_in_patch(patch, i, size, STRIDE: tl.constexpr):
    """Give the position of element ``i`` of patches along one dimension, and whether it lies within the input."""
    position = patch * STRIDE + i
    if STRIDE == 1:
        return position, tl.full(position.shape, True, tl.int1)
    else:
        return position, position < size


@triton.jit
def patch_element(
        i, row, w, lanes, size, strides, WINDOW: tl.constexpr, UNITS: tl.constexpr, PACKED: tl.constexpr,
):
    """Give the offsets of element (or packed pair) number ``i`` of patches, and whether it lies within the input."""
    STRIDE: tl.constexpr = WINDOW[1]
    COLUMNS: tl.constexpr = 1 if PACKED else STRIDE[2]
    d, d_inside = _position_in_patch(row // lanes[1], i // (COLUMNS * STRIDE[1]), size[0], STRIDE[0])
    h, h_inside = _position_in_patch(row % lanes[1], i // COLUMNS % STRIDE[1], size[1], STRIDE[1])
    w, w_inside = _position_in_patch(w, i % COLUMNS, size[2], COLUMNS)
    inside = (d_inside & h_inside)[:, None, None] & w_inside[None, None, :]
    return _offsets_in_plane(d, h, w, strides, UNITS), inside


@triton.jit
def _shifted(patch, out_size, SHARES: tl.constexpr, NUMBER: tl.constexpr, DIM: tl.constexpr):
    """Give the windows number ``NUMBER`` of patches along one dimension, and whether they exist."""
    window = patch + SHARES[NUMBER][DIM]
    if SHARES[NUMBER][3 + DIM]:
        return window, _within(window, out_size[DIM])
    else:
        return window, tl.full(window.shape, True, tl.int1)


@triton.jit
def sharing_window(row, w, lanes, out_size, strides, SHARES: tl.constexpr, NUMBER: tl.constexpr, UNITS: tl.constexpr):
    """Of the windows that hold elements of patches, give the offsets of number ``NUMBER``, and whether it exists."""
    d, d_exists = _shifted(row // lanes[1], out_size, SHARES, NUMBER, 0)
    h, h_exists = _shifted(row % lanes[1], out_size, SHARES, NUMBER, 1)
    w, w_exists = _shifted(w, out_size, SHARES, NUMBER, 2)
    exists = (d_exists & h_exists)[:, None, None] & w_exists[None, None, :]
    return _offsets_in_plane(d, h, w, strides, UNITS), exists


@triton.jit
def patch_zeros(WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """Give a sum to start with for each element of patches."""
    sums = ()
    for _ in tl.static_range(WINDOW[1][0] * WINDOW[1][1] * WINDOW[1][2]):
        sums = sums + (tl.zeros(BLOCK, tl.float32),)
    return sums


@triton.jit
def store_patches(
        pointer, values, row, w, mask, lanes, size, strides,
        DTYPE: tl.constexpr, WINDOW: tl.constexpr, UNITS: tl.constexpr, PACKED: tl.constexpr,
):
    """Store a value for each element of patches."""
    for i in tl.static_range(len(values) // 2 if PACKED else len(values)):
        at, inside = patch_element(i, row, w, lanes, size, strides, WINDOW, UNITS, PACKED)
        if PACKED:
            value = join_pair(values[2 * i].to(DTYPE), values[2 * i + 1].to(DTYPE))
        else:
            value = values[i].to(DTYPE)
        tl.store(pointer + at, value, mask & inside)


@triton.jit
def _candidate(position, i, out_size, WINDOW: tl.constexpr, DIM: tl.constexpr):
    """Of the windows that may hold elements along one dimension, give the ``i``-th from the end.

    Returns:
        The window, which of its elements lies at the position, and whether one does.
    """
    padded = position + WINDOW[2][DIM]
    window = padded // WINDOW[1][DIM] - i
    distance = padded - window * WINDOW[1][DIM]
    e = distance // WINDOW[3][DIM]
    holds = (distance % WINDOW[3][DIM] == 0) & (e < WINDOW[0][DIM]) & (window >= 0) & (window < out_size[DIM])
    return window, e, holds


@triton.jit
def candidate_window(i, row, w, size, out_size, WINDOW: tl.constexpr, OVERLAP: tl.constexpr):
    """Of the windows that may hold elements of the input, give number ``i``.

    Returns:
        Which element of the window it is, the row and the column of the window, and whether the window holds it.
    """
    KERNEL: tl.constexpr = WINDOW[0]
    d, d_e, d_holds = _candidate(row // size[1], i // (OVERLAP[1] * OVERLAP[2]), out_size, WINDOW, 0)
    h, h_e, h_holds = _candidate(row % size[1], i // OVERLAP[2] % OVERLAP[1], out_size, WINDOW, 1)
    out_w, w_e, w_holds = _candidate(w, i % OVERLAP[2], out_size, WINDOW, 2)
    e = ((d_e * KERNEL[1] + h_e) * KERNEL[2])[:, None, None] + w_e[None, None, :]
    return e, d * out_size[1] + h, out_w, (d_holds & h_holds)[:, None, None] & w_holds[None, None, :]


@triton.jit
def as_pairs(pointer):
    """Make a pointer to elements of 16 or 32 bits one to packed pairs."""
    if pointer.dtype.element_ty.primitive_bitwidth == 16:
        return pointer.to(tl.pointer_type(tl.int32), bitcast=True)
    else:
        return pointer.to(tl.pointer_type(tl.int64), bitcast=True)


@triton.jit
def split_pair(pair, DTYPE: tl.constexpr):
    """Give the two elements of packed pairs, in fp32."""
    if DTYPE == tl.bfloat16:
        # They are the upper halves of fp32 numbers.
        return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)
    elif DTYPE == tl.float16:
        first, second = pair.to(tl.int16).to(DTYPE, bitcast=True), (pair >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        return first.to(tl.float32), second.to(tl.float32)
    else:
        return pair.to(tl.int32).to(DTYPE, bitcast=True), (pair >> 32).to(tl.int32).to(DTYPE, bitcast=True)


@triton.jit
def join_pair(first, second):
    """Pack pairs of elements."""
    if first.dtype.primitive_bitwidth == 16:
        low, high = first.to(tl.uint16, bitcast=True).to(tl.int32), second.to(tl.uint16, bitcast=True).to(tl.int32)
        return low | high << 16
    else:
        low, high = first.to(tl.uint32, bitcast=True).to(tl.int64), second.to(tl.uint32, bitcast=True).to(tl.int64)
        return low | high << 32
