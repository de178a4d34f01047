"""Which implementation of an operator runs.

Each operator has its functions in ``functional.py`` and, in ``reference.py``, what they compute in plain operations
that autograd, ``torch.compile``, export and the transforms of ``torch.func`` understand. Beside these it may have a
module for each back end of the table below, named like the back end (``cpu.py``, ``triton.py``), with *kernels*: fused
functions that run in place of a reference, or of its backward pass, in eager mode.

The protocol is small. A kernel module lists in ``__all__`` the kernels that it offers; a kernel has the same name and
signature in all modules of its operator. A kernel must give what the reference gives, up to rounding, for every input
that passes the checks of the function. ``find_kernel`` is asked once per call and gives the kernel for the operands at
hand, or None, with which the reference runs. A kernel that cannot be built raises ``KernelBuildError``: it is then left
out for the rest of the process, it alone, with a warning. Any other error is a bug and surfaces.

The environment variable ``TIMM_DYACTS_BACKEND`` (or ``use_backend``, for a while) chooses: ``auto`` takes the back end
of the operands' device; ``cpu`` or ``triton`` takes this one alone, the reference on other devices, and turns a kernel
that cannot be built into an error; ``reference`` takes none.
"""
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..version import unsupported

try:
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    _peek_interpreter_stack = torch._C._functorch.peek_interpreter_stack
    _is_legacy_batchedtensor = torch._C._functorch.is_legacy_batchedtensor
except (AttributeError, ImportError) as e:
    raise unsupported('torch', torch.__version__, f'what tells transforms and dispatch modes ({e})') from e

__all__ = [
    'BACKENDS',
    'CHOICES',
    'Backend',
    'Kernel',
    'KernelBuildError',
    'current_backend',
    'describe_backends',
    'differentiate',
    'find_kernel',
    'run_kernel',
    'use_backend',
]


class KernelBuildError(RuntimeError):
    """A kernel cannot be compiled on this machine. The cause is what the compiler raised."""


@dataclass(frozen=True)
class Backend:
    """A way to compute on a kind of device.

    Attributes:
        name: Its name, and that of its modules in the folders of the operators.
        device_type: The device type that it is for.
        dtypes: The dtypes that its kernels take, None for all.
        requires: A package that its modules import, None if torch is enough.
        interpreter: An environment variable under which, if it is ``1``, the kernels run on CPU tensors too, where this
            back end is asked for by name. For tests.
    """
    name: str
    device_type: str
    dtypes: frozenset[torch.dtype] | None = None
    requires: str | None = None
    interpreter: str | None = None

    def takes(self, device_type: str) -> bool:
        """Whether it computes on such a device."""
        if device_type == 'cpu' and self.interpreter is not None and _choice == self.name:
            return os.environ.get(self.interpreter) == '1'
        return device_type == self.device_type

    def why_not(self) -> str | None:
        """Why it does not work on this machine, None if it does."""
        if self.requires is not None:
            try:
                importlib.import_module(self.requires)
            except ImportError as e:
                return f'{self.requires} cannot be imported: {e}'
        if self.device_type == 'cuda' and not torch.cuda.is_available():
            return 'PyTorch sees no GPU'
        return None


BACKENDS = (
    Backend('cpu', 'cpu'),
    Backend(
        'triton', 'cuda', frozenset({torch.float32, torch.float16, torch.bfloat16}), 'triton', 'TRITON_INTERPRET'),
)
CHOICES = ('auto', 'reference', *(backend.name for backend in BACKENDS))


@dataclass(frozen=True)
class Kernel:
    """A kernel and where it comes from. Called like its function."""
    backend: str
    operator: str
    name: str
    function: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def _checked(choice: str, where: str) -> str:
    if choice not in CHOICES:
        raise ValueError(f'{where} must be one of {", ".join(CHOICES)}, got {choice!r}')
    return choice


_choice = _checked(os.environ.get('TIMM_DYACTS_BACKEND') or 'auto', 'TIMM_DYACTS_BACKEND')
# What cannot be built: a kernel (back end, operator, name), or all of a back end (its name)
_unusable: set[tuple[str, str, str] | str] = set()


def current_backend() -> str:
    """The choice in force, one of ``CHOICES``."""
    return _choice


@contextmanager
def use_backend(choice: str) -> Iterator[None]:
    """Choose a back end for a while, for all threads of the process.

    Args:
        choice: One of ``CHOICES``.

    Raises:
        ValueError: If it is another.
    """
    global _choice
    before, _choice = _choice, _checked(choice, 'choice')
    try:
        yield
    finally:
        _choice = before


def describe_backends() -> dict[str, str]:
    """Tell for each back end whether it works on this machine and, if not, why."""
    return {backend.name: backend.why_not() or 'works' for backend in BACKENDS}


def find_kernel(operator: str, name: str, *operands: Any) -> Kernel | None:
    """Find the kernel for some operands.

    Args:
        operator: Name of the operator's folder.
        name: Name of the kernel.
        operands: What enters it, tensors and other things.

    Returns:
        The kernel, or None where the reference has to run: under compilation, export, tracing, dispatch modes, the
        transforms of ``torch.func`` and forward-mode differentiation; with tensor subclasses; where no back end takes
        the device and dtypes, or it does not offer the kernel, or cannot build it.
    """
    if _choice == 'reference' or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    if _peek_interpreter_stack() is not None or _get_current_dispatch_mode() is not None:
        return None
    tensors = [t for t in operands if isinstance(t, Tensor)]
    if not all(_is_plain(t) for t in tensors):
        return None
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        return None
    device_type = devices.pop().type
    for backend in BACKENDS:
        if _choice in ('auto', backend.name) and backend.takes(device_type) and backend.name not in _unusable:
            if backend.dtypes is None or all(t.dtype in backend.dtypes for t in tensors):
                return _offered(backend, operator, name)
    return None


def _is_plain(t: Tensor) -> bool:
    return (
        type(t) in (Tensor, torch.nn.Parameter)
        and not _is_legacy_batchedtensor(t)  # the gradients of `is_grads_batched`
        and forward_ad.unpack_dual(t).tangent is None
    )


def _offered(backend: Backend, operator: str, name: str) -> Kernel | None:
    if (backend.name, operator, name) in _unusable:
        return None
    try:
        module = _import_kernels(backend, operator)
    except ImportError as e:
        if _choice == backend.name:
            raise
        _give_up(backend.name, f'its back end {backend.name}', e)
        return None
    if module is None or name not in module.__all__:
        return None
    return Kernel(backend.name, operator, name, getattr(module, name))


@functools.cache
def _import_kernels(backend: Backend, operator: str) -> ModuleType | None:
    """The kernel module of an operator for a back end, None if there is none."""
    full_name = f'{__package__}.{operator}.{backend.name}'
    if importlib.util.find_spec(full_name) is None:
        return None
    return importlib.import_module(full_name)


def _give_up(key: tuple[str, str, str] | str, what: str, error: Exception) -> None:
    _unusable.add(key)
    warnings.warn(
        f'timm_dyacts runs without {what}, and more slowly: it cannot be built here ({error!r})',
        RuntimeWarning, stacklevel=4)


def run_kernel(kernel: Kernel, reference: Callable[..., Any], *args: Any) -> Any:
    """Run a kernel on its arguments, or the reference if the kernel cannot be built."""
    try:
        return kernel.function(*args)
    except KernelBuildError as e:
        if _choice == kernel.backend:
            raise
        _give_up(
            (kernel.backend, kernel.operator, kernel.name),
            f'the {kernel.backend} kernel {kernel.name} of {kernel.operator}', e.__cause__ or e)
        return reference(*args)


def differentiate(
        kernel: Kernel | None,
        reference: Callable[..., Any],
        args: Sequence[Any],
        grads: Sequence[Tensor | None],
        needs_input_grad: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of an operator.

    Args:
        kernel: Its backward pass, a function of `grads` and `args`, if there is one for them.
        reference: The operator in differentiable operations, a function of `args`.
        args: Its arguments, some of which are tensors.
        grads: Gradients of its outputs.
        needs_input_grad: Which arguments need a gradient.

    Returns:
        A gradient or None for each argument. Those of a backward pass that will itself be differentiated are formed
        by autograd from the reference.
    """
    def from_reference(*_: Any) -> tuple[Tensor | None, ...]:
        return _differentiate_reference(reference, args, grads, needs_input_grad)

    if kernel is None or torch.is_grad_enabled():
        return from_reference()
    return run_kernel(kernel, from_reference, *grads, *args)


def _differentiate_reference(
        reference: Callable[..., Any],
        args: Sequence[Any],
        grads: Sequence[Tensor | None],
        needs_input_grad: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views keep the arguments apart where one has been computed from another.
        inputs = [
            (arg.view_as(arg) if create_graph else arg.detach().requires_grad_()) if needed else arg
            for arg, needed in zip(args, needs_input_grad, strict=True)
        ]
        outputs = reference(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
        found = iter(torch.autograd.grad(
            [out for out, _ in pairs],
            [arg for arg, needed in zip(inputs, needs_input_grad, strict=True) if needed],
            [grad for _, grad in pairs],
            create_graph=create_graph,
            allow_unused=True,
        ))
    return tuple(next(found) if needed else None for needed in needs_input_grad)
