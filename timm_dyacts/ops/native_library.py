"""Load the native kernels: the library for this machine, and the threads that it computes with.

Importing this module loads the library. It is, in this order, one that the installation brought or built, one that an
earlier process compiled into the cache, or compiled now, which takes seconds, once. With
``TIMM_DYACTS_NATIVE_BUILD=0`` nothing is compiled here.

Threads. The library has no OpenMP of its own: it is handed the function by which PyTorch's OpenMP runtime starts its
team, and so computes with PyTorch's very threads. A second pool, OpenMP's or another, has each pool's idle threads spin
on the cores that the other needs. A forked child has lost those threads, and starting the team would wait for them
forever; there, and where PyTorch does without OpenMP, each call starts threads of its own. Data loaders have one thread
per worker, which never gets that far.
"""
import ctypes
import os
from pathlib import Path

import torch
from torch import Tensor

from .backends import NotBuilt
from .native_build import LEVELS, build, compiler, library_name

__all__ = ['DTYPES', 'PATH', 'Crew', 'call', 'crew', 'pointer']

DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
_SHIPPED = Path(__file__).resolve().parent / 'native_libraries'


def cache_folder() -> Path:
    """Give the folder that libraries are compiled into."""
    root = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(root, 'timm_dyacts', 'native')


def _level() -> str:
    level = torch.backends.cpu.get_cpu_capability()
    return level if level in LEVELS else 'DEFAULT'


def _find_or_build() -> Path:
    name = library_name(_level())
    for path in (_SHIPPED / name, cache_folder() / name):
        if path.exists():
            return path
    if os.environ.get('TIMM_DYACTS_NATIVE_BUILD') == '0':
        raise NotBuilt('no library of this version, and TIMM_DYACTS_NATIVE_BUILD=0', name=__name__)
    if compiler() is None:
        raise NotBuilt('no library of this version, and no C compiler', name=__name__)
    return build(cache_folder(), _level())


def _load() -> tuple[Path, ctypes.CDLL]:
    try:
        path = _find_or_build()
        return path, ctypes.CDLL(str(path))
    except (OSError, RuntimeError) as e:
        raise ImportError(f'the native library cannot be built or loaded: {e}', name=__name__) from e


def _find_team() -> tuple[int | None, int | None]:
    """Find how PyTorch's OpenMP runtime starts a team, and tells its threads apart.

    The runtime is among what PyTorch's extension module is linked with.
    """
    if not torch.backends.openmp.is_available():
        return None, None
    try:
        runtime = ctypes.CDLL(torch._C.__file__)
        functions = runtime.GOMP_parallel, runtime.omp_get_thread_num
    except (OSError, AttributeError):
        return None, None
    return tuple(ctypes.cast(function, ctypes.c_void_p).value for function in functions)


class Crew(ctypes.Structure):
    """``crew`` in ``native.h``: with how many threads to compute, and who starts them."""
    _fields_ = [('threads', ctypes.c_int64), ('team', ctypes.c_void_p), ('number', ctypes.c_void_p)]


PATH, _library = _load()
_team = _find_team()


def _forget_team() -> None:
    global _team
    _team = None, None


os.register_at_fork(after_in_child=_forget_team)


def crew() -> Crew:
    """Give the threads that PyTorch computes with."""
    return Crew(torch.get_num_threads(), *_team)


def pointer(t: Tensor | None) -> int | None:
    """Give the address of a tensor's first element."""
    return None if t is None else t.data_ptr()


def call(name: str, dtype: torch.dtype, operands: ctypes.Structure) -> None:
    """Call a function of the library, without the interpreter's lock.

    Args:
        name: Its name without the dtype.
        dtype: One of ``DTYPES``.
        operands: What it gets a pointer to.

    Raises:
        MemoryError: If it cannot allocate what it needs for a while.
    """
    function = getattr(_library, f'{name}_{str(dtype)[6:]}')
    if function(ctypes.byref(operands)):
        raise MemoryError(f'{name} could not allocate memory')
