"""What the Triton kernels share: how a kernel is launched, how a program finds its tile, and a function.

``tiling`` plans the tiles on the host. Offsets are 64 bits wide: tensors may hold more than 2^31 elements.
"""
from subprocess import CalledProcessError
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backends import KernelBuildError
from .compat import triton_build_errors

__all__ = ['aligned', 'existing', 'expm1', 'grouped', 'launch', 'locate', 'offsets']


def launch(kernel: Any, programs: int, **kwargs: Any) -> None:
    """Launch a kernel on the device of its first tensor, which need not be the current one.

    Args:
        kernel: The kernel.
        programs: The number of its programs. None are no launch.
        **kwargs: Arguments of the kernel, and options such as ``num_warps``.

    Raises:
        KernelBuildError: If the kernel cannot be compiled or loaded.
    """
    if not programs:
        return
    first = next(value for value in kwargs.values() if isinstance(value, Tensor))
    with torch.cuda.device_of(first):
        try:
            # Products and sums may be fused, as compilers for CPUs and inductor do.
            kernel[(programs,)](**kwargs, enable_fp_fusion=True)
        except Exception as e:
            if _is_build_failure(e):
                raise KernelBuildError(f'{kernel.fn.__name__} cannot be compiled') from e
            raise


# What the driver says of compiled code that it cannot load: for another GPU, or of a newer CUDA.
_NOT_LOADABLE = ('kernel image', 'PTX')


def _is_build_failure(error: Exception) -> bool:
    """Tell whether Triton, or a compiler that it calls, failed to build a kernel.

    Any other error is a bug, or the device's.
    """
    if type(error) is RuntimeError:
        # No C compiler, no driver, a pass of the compiler that fails; but also, after these words, any error of CUDA.
        message = str(error)
        of_cuda = message.startswith(('Triton Error [', 'CUDA error:'))
        return not of_cuda or any(text in message for text in _NOT_LOADABLE)
    # Compilers are files, and so is what they write.
    return isinstance(error, (*triton_build_errors(), CalledProcessError, OSError, ImportError))


@triton.jit
def locate(
        blocks,
        BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STEPS_C: tl.constexpr = 1, STEPS_P: tl.constexpr = 1,
        BACKWARDS: tl.constexpr = False,
):
    """Find the sample, channels and positions of this program's (first) tile.

    A sample has ``blocks`` = (along C, along P) of them. Programs start about in their order. One that goes over a
    tensor for the second time does so backwards: what the first has touched last is still in the L2 cache.
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
    """Give a length that is a multiple of ``ALIGN`` in a form that shows it to the compiler."""
    return length // ALIGN * ALIGN


@triton.jit
def existing(c, p, size, ALIGN: tl.constexpr, CHANNELS_INNER: tl.constexpr):
    """Tell which elements of a tile exist, of a sample of ``size`` = (C, P)."""
    if CHANNELS_INNER:
        return (c < aligned(size[0], ALIGN))[:, None] & (p < size[1])[None, :]
    else:
        return (c < size[0])[:, None] & (p < aligned(size[1], ALIGN))[None, :]


@triton.jit
def offsets(n, c, p, strides, ALIGN: tl.constexpr, CHANNELS_INNER: tl.constexpr):
    """Compute the offsets of a tile of shape (channels, positions)."""
    start = n.to(tl.int64) * aligned(strides[0], ALIGN)
    if CHANNELS_INNER:
        rows, columns = c.to(tl.int64) * strides[1], p.to(tl.int64) * aligned(strides[2], ALIGN)
    else:
        rows, columns = c.to(tl.int64) * aligned(strides[1], ALIGN), p.to(tl.int64) * strides[2]
    return start + rows[:, None] + columns[None, :]


@triton.jit
def grouped(tile, FOLD: tl.constexpr, CHANNELS_INNER: tl.constexpr):
    """View the positions of a tile in groups of ``FOLD``, the positions that one thread holds.

    The dimension of the group is 1 where channels are contiguous in memory, else 2.
    """
    if CHANNELS_INNER:
        return tl.reshape(tile, [tile.shape[0], FOLD, tile.shape[1] // FOLD])
    else:
        return tl.reshape(tile, [tile.shape[0], tile.shape[1] // FOLD, FOLD])


@triton.jit
def expm1(u):
    """Compute exp(u) - 1 for u <= 0, without cancellation near 0."""
    series = 1 + u / 8
    for i in tl.static_range(1, 7):
        series = 1 + u / (8 - i) * series
    return tl.where(u > -0.5, u * series, tl.exp(u) - 1)
