"""What the Triton kernels share: how a kernel is launched, how a program finds its tile, and a function.

``tiling`` plans the tiles on the host. Offsets are 64 bits wide: tensors may hold more than 2^31 elements.
"""
from collections.abc import Callable, Sequence
from subprocess import CalledProcessError
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

from .backends import KernelBuildError
from .compat import triton_build_errors

__all__ = ['Launch', 'aligned', 'existing', 'expm1', 'grouped', 'launch', 'locate', 'offsets']


class Launch:
    """A launch that is planned: a kernel with all that it takes but its tensors.

    It is made once for tensors of some shapes, strides and dtypes, and launched as often as such tensors come.

    Args:
        kernel: The kernel. Its tensors are its first arguments.
        programs: The number of its programs. None are no launch.
        **arguments: The other arguments of the kernel, and options such as ``num_warps``.
    """

    def __init__(self, kernel: Any, programs: int, **arguments: Any) -> None:
        self.kernel = kernel
        self.programs = programs
        self.arguments = arguments
        # By device: how the compiled kernel is launched, and all of its arguments that are not tensors.
        self._compiled: dict[int, tuple[Callable[..., None], tuple[Any, ...]]] = {}

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> dict[str, Any]:
        """Give all arguments of the kernel by name, and the options."""
        return dict(zip(self.kernel.arg_names, tensors), **self.arguments)  # noqa: B905  the others have other names


def launch(planned: Launch, *tensors: Tensor | None) -> None:
    """Launch a kernel on the device of its first tensor, which need not be the current one.

    Triton looks at each argument of a call before it knows which code to run: whether numbers are 1 or multiples of 16,
    how pointers are aligned. Those of a plan do not change but for the pointers. So Triton is asked once, and what it
    has compiled for pointers that are multiples of 16 runs for all that are.

    Args:
        planned: The kernel, and its other arguments.
        *tensors: Its tensors, in the order of its arguments; None where it has none.

    Raises:
        KernelBuildError: If the kernel cannot be compiled or loaded.
    """
    if not planned.programs:
        return
    first = tensors[0]
    bits = 0
    for t in tensors:
        if t is not None:
            bits |= t.data_ptr()
    compiled = planned._compiled.get(first.get_device()) if bits % 16 == 0 else None
    with torch.cuda.device_of(first):
        if compiled is not None:
            run, others = compiled
            run(*tensors, *others)
            return
        try:
            # Products and sums may be fused, as compilers for CPUs and inductor do.
            kernel = planned.kernel[(planned.programs,)](**planned.with_tensors(tensors), enable_fp_fusion=True)
        except Exception as e:
            if _is_build_failure(e):
                raise KernelBuildError(f'{planned.kernel.fn.__name__} cannot be compiled') from e
            raise
    if bits % 16 == 0 and isinstance(kernel, CompiledKernel) and torch.version.hip is None:
        # For AMD, Triton also looks at the size of tensors.
        others = tuple(planned.arguments[name] for name in planned.kernel.arg_names[len(tensors):])
        planned._compiled[first.get_device()] = kernel[(planned.programs, 1, 1)], others


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
