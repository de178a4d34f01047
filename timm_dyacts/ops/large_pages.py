"""Large pages of memory for what the kernels on CPUs write.

An allocator gives large tensors back to the system when they are freed, and so gets them anew at each step. The system
then maps, and clears, each page when it is first written to. With pages of 4 KiB this takes several times as long as
the write itself: on two cores of an AMD EPYC with Linux 6, copying (32, 64, 112, 112) numbers of fp32 into new memory
takes 18 to 19 ms, and 6 ms with pages of 2 MiB (medians of three runs that took turns). Where Linux gives these to
those who ask (``madvise`` in ``/sys/kernel/mm/transparent_hugepage/enabled``, the default of most distributions),
asking is all that it takes.
"""
import ctypes
import mmap

from torch import Tensor

__all__ = ['in_large_pages']

_PAGE = 2 << 20
# Below, allocators keep the memory of what is freed, and there is hardly a whole page in it.
_LEAST = 4 << 20


def _find_madvise():
    if not hasattr(mmap, 'MADV_HUGEPAGE'):
        return None
    try:
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise


_madvise = _find_madvise()


def in_large_pages(t: Tensor) -> Tensor:
    """Ask for large pages under a tensor on the CPU that is about to be written for the first time.

    Args:
        t: Any tensor, dense. Its values are kept.

    Returns:
        The tensor itself.
    """
    size = t.nbytes
    if _madvise is not None and size >= _LEAST:
        begin = -(-t.data_ptr() // _PAGE) * _PAGE
        # Refused where the kernel is built without: then the pages are small, as they were.
        _madvise(begin, (t.data_ptr() + size) // _PAGE * _PAGE - begin, mmap.MADV_HUGEPAGE)
    return t
