"""Layouts of pooling against the plain meaning of tensors and windows, element by element. Needs no Triton."""
import itertools
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from timm_dyacts.ops.pooling.layout import (
    MOST_HELD,
    Layout,
    empty_planes,
    layout_of,
    patches_held,
    unroll,
)
from timm_dyacts.ops.pooling.window import Window, count_windows, reach

# The tensor in another layout of memory, equal to what it was.
MEMORY = {
    'contiguous': lambda x: x.contiguous(),
    'channels_last': lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    'from an odd column': lambda x: F.pad(x, (1, 0))[..., 1:],
    'from an even column': lambda x: F.pad(x, (2, 4))[..., 2:-4],
    'odd rows': lambda x: F.pad(x, (0, 1))[..., :-1],
    'every other column': lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    'some rows': lambda x: F.pad(x, (0, 0, 1, 2))[..., 1:-2, :],
    'some channels': lambda x: torch.stack([x, x], 2).flatten(1, 2)[:, ::2],
    'batch inside': lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    'transposed': lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
}


# What kernels do with a layout, one lane at a time. It mirrors `triton_elements.py`.


def offset(index, strides, units):
    return sum(i * stride * unit for i, stride, unit in zip(index, strides, units, strict=True))


def each_lane(layout):
    """Sample, channel, row and column of all lanes."""
    lanes = (layout.lanes[0] * layout.lanes[1], layout.channels, layout.lanes[2])
    for tiles, block, count in zip(layout.blocks[1:], layout.block, lanes, strict=True):
        assert (tiles - 1) * block < count <= tiles * block or count == tiles == 0
    # What the compiler is told of the lengths of vectors
    assert layout.channels % layout.units[4] == layout.lanes[2] % layout.units[1] == 0
    return itertools.product(range(layout.blocks[0]), range(layout.channels), range(lanes[0]), range(lanes[2]))


def pairs(layout, at):
    """The offsets of elements behind an offset, which is one of pairs where they are packed."""
    return [2 * at, 2 * at + 1] if layout.packed else [at]


def windows_read(layout):
    """For the offset of each element of the output, the offsets of the elements of its window, None in padding."""
    kernel_size, stride, padding, dilation, reaches_outside, before, beyond = layout.window
    read = {}
    for n, c, row, w in each_lane(layout):
        window = (row // layout.out_size[1], row % layout.out_size[1], w)
        elements = []
        for number, e in enumerate(itertools.product(*map(range, kernel_size))):
            position = [w * s - p + i * d for w, i, s, p, d in zip(window, e, stride, padding, dilation, strict=True)]
            inside = [0 <= at < size for at, size in zip(position, layout.size, strict=True)]
            assert all(inside[dim] or reaches_outside[dim] for dim in range(3))
            # What is known of each element
            assert all(at >= 0 or i < end for at, i, end in zip(position, e, before, strict=True))
            assert all(at < s or i >= first for at, s, i, first in zip(position, layout.size, e, beyond, strict=True))
            assert all(inside) or layout.outside[number]
            found = pairs(layout, offset((n, c, *position), layout.strides[0], layout.units))
            if layout.packed:
                column = 2 * (number % -(-layout.columns[1] // 2))
                found = [at for i, at in enumerate(found, column) if layout.columns[0] <= i < layout.columns[1]]
            elements += found if all(inside) else [None] * len(found)
        at = offset((n, c, *window), layout.out_strides[0], layout.units)
        assert at not in read
        read[at] = elements
    return read


def patches_shared(layout):
    """For the offset of each element of the input, the windows that hold it: their offsets and which element it is."""
    held = {}
    stride = layout.window[1]
    columns = 1 if layout.packed else stride[2]
    for n, c, row, w in each_lane(layout):
        patch = (row // layout.lanes[1], row % layout.lanes[1], w)
        elements = []
        for i in itertools.product(range(stride[0]), range(stride[1]), range(columns)):
            position = [p * s + j for p, s, j in zip(patch, (*stride[:2], columns), i, strict=True)]
            # A column of pairs has half the size.
            size = (*layout.size[:2], layout.size[2] // 2 if layout.packed else layout.size[2])
            found = pairs(layout, offset((n, c, *position), layout.strides[0], layout.units))
            inside = all(at < s for at, s in zip(position, size, strict=True))
            elements += found if inside else [None] * len(found)
        for share in layout.shares:
            window = [p + shift for p, shift in zip(patch, share[:3], strict=True)]
            exists = [0 <= at < size for at, size in zip(window, layout.out_size, strict=True)]
            assert all(there or may_lack for there, may_lack in zip(exists, share[3:6], strict=True))
            if all(exists):
                at = offset((n, c, *window), layout.out_strides[0], layout.units)
                for element, e in zip(elements, share[6:], strict=True):
                    if element is not None and e >= 0:
                        held.setdefault(element, set()).add((at, e))
    return held


def elements_held(layout):
    """The same, for layouts whose lanes are elements."""
    held = {}
    kernel_size, stride, padding, dilation, *_ = layout.window
    for n, c, row, w in each_lane(layout):
        position = (row // layout.size[1], row % layout.size[1], w)
        at = offset((n, c, *position), layout.strides[0], layout.units)
        for back in itertools.product(*map(range, layout.overlap)):
            window = [(x + p) // s - b for x, p, s, b in zip(position, padding, stride, back, strict=True)]
            distance = [x + p - v * s for x, p, v, s in zip(position, padding, window, stride, strict=True)]
            e = [step // d for step, d in zip(distance, dilation, strict=True)]
            if (all(step % d == 0 for step, d in zip(distance, dilation, strict=True))
                    and all(i < k for i, k in zip(e, kernel_size, strict=True))
                    and all(0 <= v < size for v, size in zip(window, layout.out_size, strict=True))):
                number = (e[0] * kernel_size[1] + e[1]) * kernel_size[2] + e[2]
                to = offset((n, c, *window), layout.out_strides[0], layout.units)
                held.setdefault(at, set()).add((to, number))
    return held


# What it should be


def expected_windows(window, x, y):
    read = {}
    for n, c, *out in itertools.product(*map(range, y.shape)):
        elements = []
        for e in itertools.product(*map(range, window.kernel_size)):
            position = [
                w * s - p + i * d
                for w, i, s, p, d in zip(out, e, window.stride, window.padding, window.dilation, strict=True)]
            inside = all(0 <= at < size for at, size in zip(position, x.shape[2:], strict=True))
            elements.append(offset((n, c, *position), x.stride(), [1] * 5) if inside else None)
        read[offset((n, c, *out), y.stride(), [1] * 5)] = elements
    return read


def turned(read):
    """From the elements of each window to the windows of each element."""
    held = {}
    for at, elements in read.items():
        for e, element in enumerate(elements):
            if element is not None:
                held.setdefault(element, set()).add((at, e))
    return held


@st.composite
def poolings(draw):
    """A window, the input and the output."""
    per_dim = []
    for most in (2, 5, 8):
        kernel_size, dilation = draw(st.sampled_from([1, 2, 2, 3])), draw(st.sampled_from([1, 1, 2]))
        padding = draw(st.sampled_from([0, 0, kernel_size // 2]))
        least = max(dilation, dilation * (kernel_size - 1) + 1 - 2 * padding)
        per_dim.append((draw(st.integers(least, max(least, most))), kernel_size, draw(st.integers(1, 3)), padding,
                        dilation))
    size, *window = zip(*per_dim, strict=True)
    window = Window(*window)
    shape = draw(st.integers(1, 2)), draw(st.integers(1, 3)), *size
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    x = MEMORY[draw(st.sampled_from(sorted(MEMORY)))](torch.zeros(shape, dtype=dtype))
    return window, x, empty_planes(x, window.out_size(size, draw(st.booleans())))


each_memory = pytest.mark.parametrize('memory', MEMORY)


class TestAgainstBruteForce:
    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(poolings(), st.booleans())
    def test_any_pooling(self, pooling, merge_channels):
        window, x, y = pooling
        expected = expected_windows(window, x, y)
        for partial_pairs in (False, True):
            layout = layout_of(window, (x,), (y,), 'windows', merge_channels, partial_pairs)
            assert windows_read(layout) == expected
        held = turned(expected)
        assert elements_held(layout_of(window, (x,), (y,), 'elements', merge_channels)) == held
        if patches_held(window):
            assert patches_shared(layout_of(window, (x,), (y,), 'patches', merge_channels)) == held

    @each_memory
    @pytest.mark.parametrize('size', [(1, 6, 8), (2, 4, 6), (1, 5, 8), (1, 4, 7), (1, 2, 2)], ids=str)
    @pytest.mark.parametrize('arguments', [
        ((1, 2, 2), (1, 2, 2), (0, 0, 0), (1, 1, 1)),
        ((1, 3, 3), (1, 2, 2), (0, 1, 1), (1, 1, 1)),
        ((1, 1, 2), (1, 1, 2), (0, 0, 0), (1, 1, 1)),
        ((1, 3, 2), (1, 2, 2), (0, 1, 0), (1, 1, 1)),
        ((1, 3, 3), (1, 2, 2), (0, 0, 0), (1, 1, 1)),
        ((1, 2, 4), (1, 1, 2), (0, 1, 1), (1, 1, 1)),
        ((1, 2, 4), (1, 2, 2), (0, 0, 2), (1, 1, 1)),
        ((1, 1, 5), (1, 2, 2), (0, 0, 1), (1, 1, 1)),
    ], ids=str)
    def test_windows_of_two_columns(self, arguments, size, memory):
        window = Window(*arguments)
        x = MEMORY[memory](torch.zeros(2, 3, *size))
        if any(n + 2 * p < k for n, p, k in zip(size, window.padding, window.kernel_size, strict=True)):
            pytest.skip('does not fit')
        y = empty_planes(x, window.out_size(size, False))
        expected = expected_windows(window, x, y)
        for partial_pairs in (False, True):
            assert windows_read(layout_of(window, (x,), (y,), partial_pairs=partial_pairs)) == expected
        assert patches_shared(layout_of(window, (x,), (y,), 'patches')) == turned(expected)

    @settings(max_examples=200, deadline=None)
    @given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2), st.integers(1, 3), st.booleans())
    def test_windows_along_a_dimension(self, size, kernel_size, stride, padding, dilation, ceil_mode):
        """How many there are, as max pooling says, and where their elements lie."""
        padding = min(padding, kernel_size // 2)
        if size + 2 * padding < dilation * (kernel_size - 1) + 1:
            return
        dim = kernel_size, stride, padding, dilation
        count = count_windows(size, *dim, ceil_mode)
        assert count == F.max_pool1d(torch.zeros(1, 1, size), *dim, ceil_mode).shape[2]
        reached = {
            (window, position)
            for first, last, start, stop in reach(size, count, *dim)
            for window, position in zip(range(first, last), range(start, stop, stride), strict=True)
        }
        assert reached == {
            (window, position)
            for window in range(count) for e in range(kernel_size)
            if 0 <= (position := window * stride - padding + e * dilation) < size
        }


def plan(shape, kernel_size=2, stride=2, padding=0, dtype=torch.float32, channels_last=False, change=None, **kwargs) \
        -> Layout:
    """The layout of a pooling of (N, C, H, W). Nothing is allocated."""
    window = Window.of([kernel_size] * 2, [stride] * 2, [padding] * 2, (1, 1))
    x = torch.empty(*shape[:2], 1, *shape[2:], device='meta', dtype=dtype)
    y = x.new_empty(*shape[:2], *window.out_size((1, *shape[2:]), False))
    if channels_last:
        x, y = (t.to(memory_format=torch.channels_last_3d) for t in (x, y))
    return layout_of(window, (change(x) if change else x,), (y,), **kwargs)


class TestMerging:
    def test_all_dimensions_of_contiguous_tensors(self):
        """What is left of (2, 3, 8, 16): rows of windows, and the two rows of the input that each takes."""
        layout = plan((2, 3, 8, 16))
        assert layout.packed and layout.channels == layout.blocks[0] == 1
        # 8 windows to a row of 16 columns; 2 pairs of fp32 make 16 bytes
        assert math.prod(layout.lanes) == 2 * 3 * 4 * 8
        assert layout.lanes == layout.out_size == (2 * 3 * 4, 4, 2) and layout.size == (2 * 3 * 8, 4, 2)
        assert layout.window[:2] == ((2, 1, 1), (2, 1, 1))

    def test_channels_that_are_told_apart(self):
        layout = plan((2, 3, 8, 16), merge_channels=False)
        assert layout.channels == 3 and layout.lanes == (2, 4, 8)

    def test_windows_that_overlap_keep_rows_apart(self):
        layout = plan((2, 3, 8, 16), 3, 2, 1)
        assert not layout.packed and any(layout.outside) and layout.size == (2 * 3, 8, 16)
        assert layout.window[0] == (1, 3, 3) and layout.window[4] == (False, True, True)

    def test_channels_last(self):
        layout = plan((2, 40, 8, 16), channels_last=True)
        assert layout.channels == 40 and not layout.packed and layout.units[1] == 1
        assert layout.block[1] == 32 or layout.block[1] >= 40
        assert layout.strides[0][1] == layout.out_strides[0][1] == 1

    @pytest.mark.parametrize('change, merged', [
        (lambda x: x, True),
        (lambda x: x.new_empty(2, 3, 1, 8, 24)[..., :16], True),
        (lambda x: x.new_empty(2, 3, 1, 10, 16)[..., :8, :], False),
        (lambda x: x.new_empty(2, 6, 1, 8, 16)[:, ::2], False),
    ], ids=['contiguous', 'columns', 'rows', 'channels'])
    def test_slices_are_merged_where_one_stride_does(self, change, merged):
        layout = plan((2, 3, 8, 16), change=change)
        # The rows of all planes in one dimension
        assert (48 in layout.size) == merged

    def test_dimensions_of_size_1_are_dropped(self):
        assert plan((1, 1, 8, 16)).size == (8, 4, 2)

    @pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize('channels_last', [False, True])
    @pytest.mark.parametrize('columns', [112, 56, 28, 14])
    def test_no_lane_is_idle(self, columns, channels_last, dtype):
        layout = plan((256, 64, columns, columns), channels_last=channels_last, dtype=dtype)
        assert layout.packed != channels_last and layout.blocks[0] == layout.blocks[3] == 1
        assert layout.programs * math.prod(layout.block) == 256 * 64 * columns ** 2 // 4

    def test_rows_that_32_bits_do_not_count(self):
        few, many = plan((2 ** 6, 2 ** 10, 2 ** 6, 4)), plan((2 ** 16, 2 ** 10, 2 ** 6, 4))
        assert few.blocks[0] == 1 and many.blocks[0] == 2 ** 16
        assert many.channels == 2 ** 10 and many.lanes == (1, 2 ** 5, 2)


class TestPackedPairs:
    @pytest.mark.parametrize('memory, packed', [
        ('contiguous', True), ('from an even column', True), ('some rows', True), ('batch inside', True),
        ('some channels', True),
        ('channels_last', False), ('from an odd column', False), ('odd rows', False), ('every other column', False),
        ('transposed', False),
    ])
    @pytest.mark.parametrize('lanes', ['windows', 'patches'])
    def test_need_even_offsets(self, lanes, memory, packed):
        window = Window.of((2, 2), (2, 2), (0, 0), (1, 1))
        x = MEMORY[memory](torch.zeros(2, 3, 1, 6, 8))
        layout = layout_of(window, (x,), (empty_planes(x, (1, 3, 4)),), lanes)
        assert layout.packed == packed

    @pytest.mark.parametrize('lanes', ['windows', 'patches'])
    def test_of_all_tensors_of_the_size_of_the_input(self, lanes):
        window = Window.of((2, 2), (2, 2), (0, 0), (1, 1))
        x = torch.zeros(2, 3, 1, 6, 8)
        y = empty_planes(x, (1, 3, 4))
        assert layout_of(window, (x, x.clone()), (y,), lanes).packed
        assert not layout_of(window, (x, MEMORY['odd rows'](x)), (y,), lanes).packed
        # The output is not read in pairs: its rows may be odd.
        assert layout_of(window, (x,), (MEMORY['odd rows'](y),), lanes).packed

    @pytest.mark.parametrize('size, kernel_size, stride, padding, lanes, packed', [
        ((6, 8), 2, 2, 0, 'windows', True),
        ((6, 9), 2, 2, 0, 'windows', False),  # odd rows
        ((6, 8), 2, 2, 1, 'windows', False),  # windows reach into the padding
        ((6, 8), 3, 2, 1, 'windows', False),  # windows have three columns
        ((6, 8), 3, 2, 1, 'patches', True),  # ... patches two
        ((6, 9), 3, 2, 1, 'patches', False),
        ((6, 8), 3, 1, 1, 'patches', False),
        ((6, 8), 2, 2, 0, 'elements', False),
        ((8, 8), 4, 2, 0, 'patches', False),  # too many elements for registers
    ])
    def test_of_two_columns_side_by_side(self, size, kernel_size, stride, padding, lanes, packed):
        assert plan((2, 3, *size), kernel_size, stride, padding, lanes=lanes).packed == packed

    @pytest.mark.parametrize('width, kernel_size, stride, padding, packed', [
        (8, 3, 2, 1, (2, 1)), (8, 3, 2, 0, (2, 0)), (9, 3, 2, 1, None), (8, 3, 1, 1, None), (8, 2, 2, 1, None),
    ])
    def test_of_which_windows_hold_a_part(self, width, kernel_size, stride, padding, packed):
        layout = plan((2, 3, 6, width), kernel_size, stride, padding, partial_pairs=True)
        assert layout.packed == (packed is not None)
        if packed:
            # In pairs: the size of the window, its step and the padding
            assert [of_dim[2] for of_dim in layout.window[:3]] == [packed[0], 1, packed[1]]

    @pytest.mark.parametrize('dtype, columns, vector', [
        (torch.float32, 16, 2), (torch.float32, 14, 1), (torch.bfloat16, 16, 4), (torch.bfloat16, 12, 2),
        (torch.bfloat16, 14, 1),
    ], ids=str)
    def test_rows_are_cut_into_vectors(self, dtype, columns, vector):
        layout = plan((2, 3, 8, columns), dtype=dtype)
        assert layout.lanes[2] == (vector if vector > 1 else layout.lanes[2])
        assert math.prod(layout.lanes) == 2 * 3 * 4 * columns // 2
        assert layout.lanes[2] % vector == 0


class TestShares:
    def test_windows_that_elements_of_a_patch_share(self):
        """Of 3x3/2, the first of two elements is in one window, the second in two."""
        shares = plan((1, 1, 1, 8), 3, 2, 1, lanes='patches').shares
        assert {share[2:3] + share[6:8] for share in shares if share[:2] == (0, 0)} == {(0, 4, 5), (1, -1, 3)}

    def test_windows_side_by_side_hold_a_patch_each(self):
        share, = plan((2, 3, 8, 16), lanes='patches').shares
        assert share == (0, 0, 0, False, False, False, 0, 1, 2, 3)

    @pytest.mark.parametrize('kernel_size, stride, dilation, overlap', [
        (2, 2, 1, 1), (3, 2, 1, 2), (3, 1, 1, 3), (2, 3, 1, 1), (2, 1, 3, 4), (5, 2, 2, 5),
    ])
    def test_overlap(self, kernel_size, stride, dilation, overlap):
        window = Window.of((kernel_size,), (stride,), (0,), (dilation,))
        assert window.overlap == (1, 1, overlap)
        # No position is in more windows, and where the dilation is 1, one is in as many.
        size = 40
        held = [0] * size
        for start in range(0, size - dilation * (kernel_size - 1), stride):
            for e in range(kernel_size):
                held[start + e * dilation] += 1
        assert max(held) <= overlap and (dilation > 1 or max(held) == overlap)

    @pytest.mark.parametrize('size, ceil_mode, covers', [(8, False, True), (9, False, False), (9, True, True)])
    def test_windows_that_cover_the_input(self, size, ceil_mode, covers):
        window = Window.of((2, 2), (2, 2), (0, 0), (1, 1))
        size = (1, 8, size)
        assert window.covers(size, window.out_size(size, ceil_mode)) == covers


def test_what_registers_hold():
    assert patches_held(Window.of((3, 3), (3, 3), (0, 0), (1, 1)))
    assert not patches_held(Window.of((4, 3), (2, 2), (0, 0), (1, 1)))
    assert not patches_held(Window.of((1, 1), (4, 4), (0, 0), (1, 1)))
    assert unroll(MOST_HELD) == MOST_HELD and unroll(MOST_HELD + 1) == 1


def test_empty_planes():
    x = torch.zeros(2, 4, 1, 3, 5, dtype=torch.bfloat16)
    for memory_format in (torch.contiguous_format, torch.channels_last_3d):
        y = empty_planes(x.contiguous(memory_format=memory_format), (2, 3, 2), torch.float32, count=3)
        assert y.shape == (6, 4, 2, 3, 2) and y.dtype == torch.float32
        assert y.is_contiguous(memory_format=memory_format)
    assert empty_planes(x, (1, 1, 1)).dtype == torch.bfloat16


def test_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import timm_dyacts.ops.pooling.layout"
    subprocess.run([sys.executable, '-c', code], check=True)
