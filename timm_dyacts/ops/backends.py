"""Which implementation of an operator runs.

Each operator has its functions in ``functional.py`` and, in ``reference.py``, what they compute in plain operations
that autograd, ``torch.compile``, export and the transforms of ``torch.func`` understand. Beside these it may have a
module for each back end of the table below, named like the back end (``native.py``, ``cpu.py``, ``triton.py``), with
*kernels*: fused functions that run in place of a reference, or of its backward pass, in eager mode.

The protocol:

- A kernel module lists in ``__all__`` the kernels that it offers. A kernel has the same name and signature in all
  modules of its operator.
- A kernel gives what its reference gives, up to rounding, for every input that passes the checks of the function.
- The backward kernel of ``f`` takes the gradients of the outputs of ``f``, then the arguments of ``f``, and returns a
  gradient or None for each argument. If the kernel of ``f`` returns more than the outputs, namely what it keeps for the
  backward pass, the backward kernel gets that as the keyword argument ``saved``.
- A kernel that cannot be built raises ``KernelBuildError``. It alone is then left out for the rest of the process, with
  a warning. Any other error is a bug, or the device's, and surfaces.

A function asks ``find_kernel`` once per call, and runs the kernel for the operands at hand or, where there is none, the
reference.

The environment variable ``TIMM_DYACTS_BACKEND`` (or ``use_backend``, for a while) chooses: ``auto`` takes the back end
of the operands' device, the first in the table that offers the kernel; ``native``, ``cpu`` or ``triton`` takes this one
alone, the reference on other devices, and turns a kernel that cannot be built into an error; ``reference`` takes none.
"""
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor
from torch.autograd import forward_ad

from ..version import unsupported

try:
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    _peek_interpreter_stack = torch._C._functorch.peek_interpreter_stack
    _is_legacy_batchedtensor = torch._C._functorch.is_legacy_batchedtensor
    forward_ad._current_level  # noqa: B018
except (AttributeError, ImportError) as e:
    raise unsupported('torch', torch.__version__, f'a way to tell transforms and dispatch modes ({e})') from e

__all__ = [
    'BACKENDS',
    'CHOICES',
    'Backend',
    'Kernel',
    'KernelBuildError',
    'NotBuilt',
    'TooOld',
    'backend_in_use',
    'current_backend',
    'describe_backends',
    'differentiate',
    'find_kernel',
    'is_transforming',
    'needs_grad',
    'run_kernel',
    'use_backend',
]


class NotBuilt(ImportError):
    """Raised where a back end is not there, and nothing went wrong: it is an optional one, and none is missed."""


class TooOld(ImportError):
    """Raised where the package that a back end requires is there, and too old."""


class KernelBuildError(RuntimeError):
    """Raised for a kernel that cannot be compiled on this machine. Its cause is what the compiler raised."""


@dataclass(frozen=True, eq=False)
class Backend:
    """A way to compute on a kind of device.

    Attributes:
        name: Its name, and that of its modules in the folders of the operators.
        device_type: The device type that it computes on.
        dtypes: The dtypes that its kernels take, None for all.
        requires: The package, or module, that its modules import, None if torch is enough.
        least: The oldest version of this package that will do, None for any.
        interpreter: The environment variable that, set to ``1``, has the kernels run on CPU tensors too, provided that
            the back end is chosen by name. For tests.
    """
    name: str
    device_type: str
    dtypes: frozenset[torch.dtype] | None = None
    requires: str | None = None
    least: str | None = None
    interpreter: str | None = None

    def takes(self, device_type: str) -> bool:
        """Tell whether it computes on devices of a type."""
        if device_type == 'cpu' and self.interpreter is not None and _choice == self.name:
            return os.environ.get(self.interpreter) == '1'
        return device_type == self.device_type

    def why_not(self) -> str | None:
        """Give the reason why it does not work on this machine, None if it works."""
        try:
            self.require()
        except (NotBuilt, TooOld) as e:
            return str(e)
        except ImportError as e:
            return f'{self.requires} cannot be imported: {e}'
        if self.device_type == 'cuda' and not torch.cuda.is_available():
            return 'PyTorch sees no GPU'
        return None

    def require(self) -> None:
        """Import the package that it requires.

        Raises:
            ImportError: If that fails. Its ``name`` is the package, or a module of it.
        """
        if self.requires is not None:
            try:
                package = importlib.import_module(self.requires)
            except NotBuilt:
                raise
            except ImportError as e:
                raise ImportError(str(e), name=self.requires) from e
            if self.least is not None and Version(package.__version__) < Version(self.least):
                raise TooOld(
                    f'the back end {self.name} needs {self.requires}>={self.least}, got {package.__version__}',
                    name=self.requires)

    def is_missing(self, error: ImportError) -> bool:
        """Tell whether an import failed in the package that it requires, not in one of our own modules."""
        return self.requires is not None and f'{error.name}.'.startswith(f'{self.requires}.')


BACKENDS = (
    Backend(
        'native', 'cpu', frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16}),
        f'{__package__}.native_library'),
    Backend('cpu', 'cpu'),
    Backend(
        'triton', 'cuda', frozenset({torch.float32, torch.float16, torch.bfloat16}), 'triton', '3.6',
        'TRITON_INTERPRET'),  # before, SoftPool's do not compile; before 3.3, none does
)
CHOICES = ('auto', 'reference', *(backend.name for backend in BACKENDS))


@dataclass(frozen=True)
class Kernel:
    """A kernel and where it comes from."""
    backend: str
    operator: str
    name: str
    function: Callable[..., Any]


def _checked(choice: str, where: str) -> str:
    if choice not in CHOICES:
        raise ValueError(f'{where} must be one of {", ".join(CHOICES)}, got {choice!r}')
    return choice


_choice = _checked(os.environ.get('TIMM_DYACTS_BACKEND') or 'auto', 'TIMM_DYACTS_BACKEND')
# What cannot be built: kernels (back end, operator, name) and whole back ends (name).
_unusable: set[tuple[str, str, str] | str] = set()


def current_backend() -> str:
    """Give the choice in force, one of ``CHOICES``."""
    return _choice


@contextmanager
def use_backend(choice: str) -> Iterator[None]:
    """Choose a back end for a while, for all threads of the process.

    Args:
        choice: One of ``CHOICES``.

    Raises:
        ValueError: If ``choice`` is not one of them.
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


def backend_in_use(device_type: str) -> str | None:
    """Name the back end that computes on devices of a type, None if the references do."""
    works = (
        backend.name for backend in BACKENDS
        if _choice in ('auto', backend.name) and backend.takes(device_type) and backend.why_not() is None
    )
    return next(works, None)


def is_transforming() -> bool:
    """Tell whether this is inside a transform of ``torch.func``."""
    return _peek_interpreter_stack() is not None


def find_kernel(operator: str, name: str, *operands: Any) -> Kernel | None:
    """Find the kernel for some operands.

    Args:
        operator: Name of the operator's folder.
        name: Name of the kernel.
        operands: What enters it, tensors and other things.

    Returns:
        The kernel, or None where the reference has to run: under compilation, export, tracing, dispatch modes, the
        transforms of ``torch.func`` and forward-mode differentiation; with tensor subclasses; where no back end takes
        the devices and dtypes, or the one that does has no such kernel, or cannot build it.
    """
    if _choice == 'reference' or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    if is_transforming() or _get_current_dispatch_mode() is not None:
        return None
    tensors = [t for t in operands if isinstance(t, Tensor)]
    device = tensors[0].device
    for t in tensors:
        if t.device != device or not _is_plain(t):
            return None
    device_type, dtypes = device.type, {t.dtype for t in tensors}
    for backend in BACKENDS:
        if (_choice == 'auto' or _choice == backend.name) and backend.takes(device_type):
            if backend.dtypes is None or dtypes <= backend.dtypes:
                kernel = _offered(backend, operator, name)
                if kernel is not None:
                    return kernel
    return None


def _is_plain(t: Tensor) -> bool:
    return (
        (type(t) is Tensor or type(t) is torch.nn.Parameter)
        and not _is_legacy_batchedtensor(t)  # the gradients of ``is_grads_batched``
        # ``unpack_dual`` alone would do, but takes several times as long as all other questions.
        and (forward_ad._current_level < 0 or forward_ad.unpack_dual(t).tangent is None)
    )


def _offered(backend: Backend, operator: str, name: str) -> Kernel | None:
    forced = _choice == backend.name
    # Who asks for a back end by name hears each time that it does not work.
    if _unusable and not forced and (backend.name in _unusable or (backend.name, operator, name) in _unusable):
        return None
    try:
        return _load(backend, operator, name)
    except ImportError as e:
        if forced or not backend.is_missing(e):
            raise
        if isinstance(e, NotBuilt):
            _unusable.add(backend.name)
        else:
            _give_up(backend.name, f'its back end {backend.name}', e)
        return None


@functools.cache
def _load(backend: Backend, operator: str, name: str) -> Kernel | None:
    """Import a kernel, None if the back end does not offer it."""
    full_name = f'{__package__}.{operator}.{backend.name}'
    if importlib.util.find_spec(full_name) is None:
        return None
    backend.require()
    module = importlib.import_module(full_name)
    return Kernel(backend.name, operator, name, getattr(module, name)) if name in module.__all__ else None


def _give_up(key: tuple[str, str, str] | str, what: str, error: BaseException) -> None:
    _unusable.add(key)
    warnings.warn(
        f'timm_dyacts runs without {what}, and more slowly: it cannot be built here ({error!r})',
        RuntimeWarning, stacklevel=4)


def needs_grad(*operands: Any) -> bool:
    """Tell whether a gradient may be asked for, of what is computed from some operands, tensors and other things."""
    return torch.is_grad_enabled() and any([isinstance(t, Tensor) and t.requires_grad for t in operands])


def run_kernel(kernel: Kernel, reference: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a kernel on its arguments, or the reference if the kernel cannot be built."""
    try:
        return kernel.function(*args, **kwargs)
    except KernelBuildError as e:
        if _choice == kernel.backend:
            raise
        _give_up(
            (kernel.backend, kernel.operator, kernel.name),
            f'the {kernel.backend} kernel {kernel.name} of {kernel.operator}', e.__cause__ or e)
        return reference(*args, **kwargs)


def differentiate(
        kernel: Kernel | None,
        reference: Callable[..., Any],
        args: Sequence[Any],
        grads: Sequence[Tensor | None],
        needs_input_grad: Sequence[bool],
        saved: Sequence[Any] | None = None,
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of an operator.

    Args:
        kernel: Its backward kernel, if there is one for the operands.
        reference: The operator in differentiable operations, a function of ``args``.
        args: Its arguments, some of which are tensors.
        grads: Gradients of its outputs.
        needs_input_grad: Which arguments need a gradient.
        saved: What the forward kernel has kept for the backward kernel, None if nothing.

    Returns:
        A gradient or None for each argument. Those of a backward pass that will itself be differentiated are formed
        by autograd from the reference.
    """
    def from_reference(*_: Any, **__: Any) -> tuple[Tensor | None, ...]:
        return _differentiate_reference(reference, args, grads, needs_input_grad)

    if kernel is None or torch.is_grad_enabled():
        return from_reference()
    kwargs = {} if saved is None else dict(saved=saved)
    return run_kernel(kernel, from_reference, *grads, *args, **kwargs)


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
        input_grads = iter(torch.autograd.grad(
            [out for out, _ in pairs],
            [arg for arg, needed in zip(inputs, needs_input_grad, strict=True) if needed],
            [grad for _, grad in pairs],
            create_graph=create_graph,
            allow_unused=True,
        ))
    return tuple(next(input_grads) if needed else None for needed in needs_input_grad)
