"""What the Triton kernels share: how a tensor is cut into tiles, how a kernel is launched, and a function.

Activations see a tensor as (N, C, P), the positions P being all spatial dimensions in one, with one stride each. That
covers contiguous and channels_last tensors and most slices of them, which are read where they lie. A tile has channels
and positions; whichever of the two is contiguous in memory gets the longer side, so that neighbouring threads read
neighbouring addresses in vectors of 16 bytes. Coefficients of a channel are loaded once per tile, and no thread divides
to find its channel. Offsets are 64 bits wide: tensors may hold more than 2^31 elements.
"""
import math
from subprocess import CalledProcessError
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from .backends import KernelBuildError
from .tiling import cdiv, channels_inner, power_of_2

__all__ = [
    'Tiling',
    'aligned',
    'alignment',
    'cdiv',
    'channels_inner',
    'existing',
    'expm1',
    'launch',
    'locate',
    'offsets',
    'power_of_2',
    'readable',
    'strides',
    'tiling_of',
]


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
        return self.channels, self.positions

    @property
    def blocks(self) -> tuple[int, int]:
        """Tiles along the channels and along the positions of a sample."""
        return cdiv(self.channels, self.block_c), cdiv(self.positions, self.block_p)

    @property
    def programs(self) -> int:
        return self.batch * self.blocks[0] * self.blocks[1]


def tiling_of(x: Tensor, elements: int = 2048, positions: int = 2048, channels: int = 128) -> Tiling:
    """Cuts a tensor into tiles of up to `elements` elements.

    Args:
        x: Shape (N, C, *spatial).
        elements: Most elements of a tile.
        positions: Most positions of a tile.
        channels: Most channels of a tile where the channels are contiguous in memory.
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
    """Strides of batch, channel and position; None if no single stride steps through all positions."""
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


def readable(x: Tensor) -> Tensor:
    """The tensor itself, or a contiguous copy where its positions have no common stride."""
    return x.contiguous() if strides(x) is None else x


def alignment(tiling: Tiling, *tensors: Tensor) -> int:
    """The largest power of 2 up to 16 that divides the length of the vectors of a tile and the strides between them.

    Triton finds out about divisors of 16 by itself; planes of 14 x 14 have the divisor 4, all that fp32 needs.
    """
    outer, length = (2, tiling.channels) if tiling.channels_inner else (1, tiling.positions)
    steps = [strides(t) for t in tensors]
    return math.gcd(16, length, *(step[dim] for step in steps for dim in (0, outer)))


def launch(kernel, programs: int, *args, **kwargs) -> None:
    """Launch a kernel on the device of the first tensor among its arguments, which need not be the current one.

    Args:
        kernel: The kernel.
        programs: How many programs run it.
        *args: Its arguments, by position
        **kwargs: or by name.
    """
    if programs:
        with torch.cuda.device_of(next(arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor))):
            try:
                # Products and sums may be fused, as compilers for CPUs and inductor do.
                kernel[(programs,)](*args, **kwargs, enable_fp_fusion=True)
            except Exception as e:
                if _is_of_the_compiler(e):
                    raise KernelBuildError(f'{kernel.fn.__name__} cannot be compiled') from e
                raise


def _is_of_the_compiler(error: Exception) -> bool:
    """Whether Triton, or a compiler that it calls, could not build a kernel. Anything else is a bug or the device's."""
    if type(error) is RuntimeError:  # no C compiler, no driver; what CUDA itself says begins like this
        return not str(error).startswith('Triton Error [CUDA]')
    return isinstance(error, (CompilationError, OutOfResources, PTXASError, CalledProcessError, FileNotFoundError))


@triton.jit
def locate(
        blocks,
        BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STEPS_C: tl.constexpr = 1, STEPS_P: tl.constexpr = 1,
        BACKWARDS: tl.constexpr = False,
):
    """The sample, channels and positions of this program's (first) tile, of `blocks` = (along C, along P) a sample.

    Programs start about in their order. One that goes over a tensor for the second time does so backwards: what the
    first has touched last is still in the L2 cache.
    """
    pid = tl.program_id(0)
    if BACKWARDS:
        pid = tl.num_programs(0) - 1 - pid
    n = pid // (blocks[0] * blocks[1])
    c = pid // blocks[1] % blocks[0] * (STEPS_C * BLOCK_C) + tl.arange(0, BLOCK_C)
    p = pid % blocks[1] * (STEPS_P * BLOCK_P) + tl.arange(0, BLOCK_P)
    return n, c, p


@triton.jit
def aligned(length, ALIGN: tl.constexpr):
    """A length that is a multiple of `ALIGN`, in a form that shows it to the compiler."""
    return length // ALIGN * ALIGN


@triton.jit
def existing(c, p, size, ALIGN: tl.constexpr, CHANNELS_INNER: tl.constexpr):
    """Which elements of a tile exist, of a sample of `size` = (C, P)."""
    if CHANNELS_INNER:
        return (c < aligned(size[0], ALIGN))[:, None] & (p < size[1])[None, :]
    else:
        return (c < size[0])[:, None] & (p < aligned(size[1], ALIGN))[None, :]


@triton.jit
def offsets(n, c, p, strides, ALIGN: tl.constexpr, CHANNELS_INNER: tl.constexpr):
    """The offsets of a tile of shape (channels, positions)."""
    start = n.to(tl.int64) * aligned(strides[0], ALIGN)
    if CHANNELS_INNER:
        rows, columns = c.to(tl.int64) * strides[1], p.to(tl.int64) * aligned(strides[2], ALIGN)
    else:
        rows, columns = c.to(tl.int64) * aligned(strides[1], ALIGN), p.to(tl.int64) * strides[2]
    return start + rows[:, None] + columns[None, :]


@triton.jit
def expm1(u):
    """exp(u) - 1 for u <= 0, without cancellation near 0."""
    series = 1 + u / 8
    for i in tl.static_range(1, 7):
        series = 1 + u / (8 - i) * series
    return tl.where(u > -0.5, u * series, tl.exp(u) - 1)
