"""How tensors are cut into tiles, without Triton."""
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from timm_dyacts.ops.tiling import (
    Tiling,
    alignment,
    cdiv,
    channels_inner,
    power_of_2,
    readable,
    strides,
    tiling_of,
)


def empty(*shape, channels_last=False, dtype=torch.float32):
    x = torch.empty(shape, device='meta', dtype=dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x


def test_needs_no_triton():
    code = 'import sys; sys.modules["triton"] = None; import timm_dyacts.ops.tiling'
    subprocess.run([sys.executable, '-c', code], check=True)


@given(size=st.integers(1, 2 ** 40), block=st.integers(1, 2 ** 20))
def test_cdiv_and_power_of_2(size, block):
    assert (cdiv(size, block) - 1) * block < size <= cdiv(size, block) * block
    power = power_of_2(size)
    assert power & (power - 1) == 0 and power / 2 < size <= power


def test_channels_inner():
    assert not channels_inner(empty(2, 3, 4, 5))
    assert channels_inner(empty(2, 3, 4, 5, channels_last=True))
    assert channels_inner(empty(2, 3))
    assert not channels_inner(empty(2, 1, 4, 5, channels_last=True))


class TestStrides:
    @pytest.mark.parametrize('x, expected', [
        (empty(2, 3, 4, 5), (60, 20, 1)),
        (empty(2, 3, 4, 5, channels_last=True), (60, 1, 3)),
        (empty(2, 6, 4, 5)[:, ::2], (120, 40, 1)),
        (empty(2, 3, 4, 5)[..., ::5], (60, 20, 5)),
        (empty(2, 3, 4, 5)[..., :1, ::2], (60, 20, 2)),
        (empty(2, 3), (3, 1, 1)),
        (empty(2, 3, 1, 1), (3, 1, 1)),
        (empty(2, 3, 2, 3, 4), (72, 24, 1)),
        (empty(2, 3, 1, 1).expand(2, 3, 4, 5), (3, 1, 0)),
    ])
    def test_of_what_is_read_where_it_lies(self, x, expected):
        assert strides(x) == expected
        assert readable(x) is x

    @pytest.mark.parametrize('x', [
        empty(2, 3, 4, 5).transpose(2, 3),
        empty(2, 3, 4, 5)[..., ::2],
        empty(2, 3, 4, 6)[..., :5],
    ], ids=['transposed', 'every other column', 'some columns'])
    def test_of_what_is_copied(self, x):
        assert strides(x) is None
        copy = readable(x)
        assert copy.is_contiguous() and copy.shape == x.shape


class TestTiling:
    @pytest.mark.parametrize('x, sides', [
        (empty(8, 64, 56, 56), (1, 2048)),
        (empty(8, 64, 14, 14), (8, 256)),
        (empty(8, 64, 1), (64, 1)),
        (empty(8, 64), (64, 1)),
        (empty(8, 64, 56, 56, channels_last=True), (64, 32)),
        (empty(8, 512, 7, 7, channels_last=True), (128, 16)),
        (empty(8, 3, 5, 5, channels_last=True), (4, 32)),
    ])
    def test_sides(self, x, sides):
        tiling = tiling_of(x)
        assert (tiling.block_c, tiling.block_p) == sides
        assert tiling.constants == dict(CHANNELS_INNER=channels_inner(x), BLOCK_C=sides[0], BLOCK_P=sides[1])

    def test_limits(self):
        assert tiling_of(empty(8, 64, 56, 56), elements=512)[-2:] == (1, 512)
        assert tiling_of(empty(8, 64, 56, 56), positions=256)[-2:] == (8, 256)
        assert tiling_of(empty(8, 64, 56, 56, channels_last=True), channels=32)[-2:] == (32, 64)

    @given(
        batch=st.integers(0, 5),
        channels=st.integers(1, 300),
        spatial=st.lists(st.integers(1, 70), max_size=2),
        channels_last=st.booleans(),
    )
    def test_tiles_cover_the_tensor(self, batch, channels, spatial, channels_last):
        x = empty(batch, channels, *spatial, channels_last=channels_last)
        tiling = tiling_of(x)
        assert tiling[:3] == (batch, *tiling.size) == (batch, channels, math.prod(spatial))
        for size, block, blocks in zip(tiling.size, (tiling.block_c, tiling.block_p), tiling.blocks, strict=True):
            assert (blocks - 1) * block < size <= blocks * block
        assert tiling.block_c * tiling.block_p <= 2048
        assert tiling.programs == batch * math.prod(tiling.blocks)

    def test_blocks(self):
        tiling = Tiling(batch=3, channels=5, positions=100, channels_inner=False, block_c=2, block_p=32)
        assert tiling.blocks == (3, 4) and tiling.programs == 36


class TestAlignment:
    @pytest.mark.parametrize('size, expected', [(56, 16), (28, 16), (14, 4), (7, 1), (6, 4), (2, 4)])
    def test_of_planes(self, size, expected):
        x = empty(4, 64, size, size)
        assert alignment(tiling_of(x), x) == expected

    @pytest.mark.parametrize('channels, expected', [(64, 16), (24, 8), (3, 1)])
    def test_of_channels(self, channels, expected):
        x = empty(4, channels, 7, 7, channels_last=True)
        assert alignment(tiling_of(x), x) == expected

    def test_of_several_tensors(self):
        x = empty(4, 64, 8, 8)
        y = empty(4, 64, 9, 8)[..., :8, :]  # planes of 72 elements
        assert alignment(tiling_of(x), x) == 16
        assert alignment(tiling_of(x), x, y) == alignment(tiling_of(y), y, x) == 8
