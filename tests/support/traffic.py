"""The bytes that operators move: those that their Triton kernels load and store under Triton's interpreter.

The interpreter is asked for every access; what a mask hides is not counted. PyTorch's operations between the kernels
count too: each reads its inputs and writes its outputs.
"""
import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

from support.kernels import forget_plans, kernel_modules, replace_launch, set_constant
from timm_dyacts.ops import backends, triton_tiles

__all__ = ['Moved', 'Operations', 'count_bytes', 'full_runs', 'kernels_on_cpus', 'run_passes']


@dataclass
class Moved:
    """What a launch moves.

    Attributes:
        kernel: The name of a kernel, or of an operation of PyTorch.
        programs: The number of its programs, 0 for an operation of PyTorch.
        loaded: Bytes that programs load, each time that they do.
        stored: Bytes that they store, likewise.
        read: Different bytes among those: what memory has to deliver where caches do the rest.
        written: Likewise.
    """
    kernel: str
    programs: int = 0
    loaded: int = 0
    stored: int = 0
    read: int = 0
    written: int = 0

    @property
    def issued(self) -> int:
        """Bytes of all accesses."""
        return self.loaded + self.stored

    @property
    def moved(self) -> int:
        """Bytes between memory and caches."""
        return self.read + self.written


class _Accesses:
    """The addresses that a launch loads from, or stores to."""

    def __init__(self) -> None:
        self.bytes = 0
        self._touched: dict[int, list[np.ndarray]] = {}  # by the width of the accesses

    def add(self, pointers: Any, mask: Any) -> None:
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        at = pointers.data[mask.data.astype(bool)].ravel()
        self.bytes += at.size * width
        self._touched.setdefault(width, []).append(at)

    @property
    def different(self) -> int:
        if not self._touched:
            return 0
        # Some kernels read pairs of elements and single ones: all are cut into pieces as long as the shortest.
        unit = min(self._touched)
        pieces = [
            (np.unique(np.concatenate(at))[:, None] // unit + np.arange(width // unit, dtype=np.uint64)).ravel()
            for width, at in self._touched.items()
        ]
        return np.unique(np.concatenate(pieces)).size * unit


class Operations(TorchDispatchMode):
    """Counts what PyTorch's own operations move. Those that make views or allocate memory move nothing."""
    _ALLOCATE = ('empty', 'empty_like', 'empty_strided', 'new_empty', 'new_empty_strided')
    _FILL = ('zero_', 'fill_')

    def __init__(self, launches: list[Moved]) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix('aten::')
        if name == 'max_pool2d_with_indices_backward':
            args = (args[0], args[-1])  # of the input, it takes the shape alone
        is_view = any(a.alias_info is not None and not a.alias_info.is_write for a in function._schema.arguments)
        if not is_view and name not in self._ALLOCATE:
            read, written = (
                sum(_bytes(t) for t in tree_leaves(tree) if isinstance(t, Tensor))
                for tree in (() if name in self._FILL else (args, kwargs), out))
            self.launches.append(Moved(name, 0, read, written, read, written))
        return out


def _bytes(t: Tensor) -> int:
    """Count the different bytes of a tensor: expanded dimensions have none."""
    return t.element_size() * math.prod(size for size, stride in zip(t.shape, t.stride(), strict=True) if stride)


@contextmanager
def kernels_on_cpus(launch: Callable[..., None], around: Callable[[], Any] = nullcontext) -> Iterator[None]:
    """Have CPU tensors take the path of CUDA tensors.

    Args:
        launch: What launches the kernels.
        around: Makes the context that each call of a kernel function runs in.
    """
    backend, = (backend for backend in backends.BACKENDS if backend.name == 'triton')
    run_kernel = backends.run_kernel

    def run(*args: Any, **kwargs: Any) -> Any:
        with around():
            return run_kernel(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, 'BACKENDS', (dataclasses.replace(backend, device_type='cpu'),))
        patch.setattr(backends, 'run_kernel', run)
        replace_launch(patch, launch)
        yield


@contextmanager
def count_bytes() -> Iterator[list[Moved]]:
    """Run kernels under the interpreter, and give what each launch moves, in their order."""
    launches: list[Moved] = []

    def launch(planned: triton_tiles.Launch, *tensors: Tensor | None) -> None:
        loads, stores = _Accesses(), _Accesses()
        builder = interpreter.interpreter_builder
        load, store = builder.create_masked_load, builder.create_masked_store

        def counted_load(pointers: Any, mask: Any, *args: Any) -> Any:
            loads.add(pointers, mask)
            return load(pointers, mask, *args)

        def counted_store(pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
            stores.add(pointers, mask)
            return store(pointers, value, mask, *args)

        with pytest.MonkeyPatch.context() as patch, _disable_current_modes():
            patch.setattr(builder, 'create_masked_load', counted_load)
            patch.setattr(builder, 'create_masked_store', counted_store)
            triton_tiles.launch(planned, *tensors)
        launches.append(Moved(
            planned.kernel.fn.__name__, planned.programs, loads.bytes, stores.bytes, loads.different, stores.different))

    with kernels_on_cpus(launch, lambda: Operations(launches)):
        yield launches


@contextmanager
def full_runs() -> Iterator[None]:
    """Have programs go through as many tiles as they do for tensors that keep a whole GPU busy."""
    with pytest.MonkeyPatch.context() as patch:
        for module in kernel_modules():
            if hasattr(module, '_ENOUGH'):
                set_constant(patch, module, '_ENOUGH', 1)
        yield
    forget_plans()


def run_passes(module: nn.Module, x: Tensor, launches: list) -> dict[str, list]:
    """Run a module forward and backward, and give the ``launches`` that each pass adds to the list."""
    x = x.detach().requires_grad_()
    y = module(x)
    forward = len(launches)
    torch.autograd.grad(y, [x, *module.parameters()], torch.empty_like(y).copy_(y.detach()), allow_unused=True)
    return {'forward': launches[:forward], 'backward': launches[forward:]}
