"""Kernels as operators that PyTorch knows by name, for ``torch.compile`` on CPUs.

The compiler sees through a reference, and makes code of its own of it. A kernel it can only call, and so it has to be
told what comes out of it: a registered operator has its kernel, a *fake* that makes empty outputs of the same shapes,
dtypes and strides, and a formula for its gradient, which calls a second operator. Operators are registered where they
are faster than the compiler's code. They take any strides: the compiler need not copy what it has laid out otherwise.

Who changes the shapes or strides of what an operator returns gives the operator another name: the compiler keeps
programs on disk, by the names of the operators in them, and an old one would find the new strides wrong.

To import a module of native kernels loads their library, or builds it, so those that are registered do that when they
run.
"""
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backends
from .compat import TELLS_EXPORTS, torch_exports

__all__ = ['WINDOW', 'is_registered_for', 'register']

_NAMESPACE = 'timm_dyacts'
# The arguments of a pooling window, in a schema
WINDOW = 'SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation'


def register(
        signature: str,
        kernel: Callable[..., Any],
        fake: Callable[..., Any],
        gradient: Callable[..., Any] | None = None,
        setup_context: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Register an operator on CPU tensors.

    Args:
        signature: Its name and schema, as ``torch.library.define`` takes them: ``'f(Tensor x) -> Tensor'``.
        kernel: What computes it. It returns new tensors, none of which shares memory with another.
        fake: What makes its outputs without their values.
        gradient: Its gradient, as ``torch.library.register_autograd`` takes it. By default it has none, and says so.
        setup_context: What keeps for ``gradient`` what that needs.

    Returns:
        The operator. Before PyTorch 2.8, the kernel: no program that is exported may have such operators in it.
    """
    if not TELLS_EXPORTS:
        return kernel
    name = signature[:signature.index('(')]
    qualified = f'{_NAMESPACE}::{name}'
    tags = torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag
    torch.library.define(qualified, signature[len(name):], tags=tags)
    torch.library.impl(qualified, 'cpu', kernel)
    torch.library.register_fake(qualified, fake)

    def refuse(ctx: Any, *grads: Tensor | None) -> None:
        raise RuntimeError(
            f'{qualified} cannot be differentiated: compiled with TIMM_DYACTS_BACKEND=reference, there are no such '
            f'operators, and without torch.compile gradients can be differentiated again')

    torch.library.register_autograd(qualified, gradient or refuse, setup_context=setup_context)
    return getattr(getattr(torch.ops, _NAMESPACE), name).default


def is_registered_for(*operands: Any) -> bool:
    """Tell whether the compiler, which is at work on these operands, has to call native kernels.

    It has on CPUs where they work, in the dtypes that they take, but for programs to be exported, and but for the
    transforms of ``torch.func``: some of them know no registered operators, and ``jvp`` gives zeros for those.
    """
    if not TELLS_EXPORTS or not torch.compiler.is_compiling() or torch_exports():
        return False
    tensors = [t for t in operands if isinstance(t, Tensor)]
    return (
        backends.current_backend() in ('auto', 'native')
        and all(t.device.type == 'cpu' and t.dtype in _DTYPES for t in tensors)
        and _works()
    )


_DTYPES = next(backend.dtypes for backend in backends.BACKENDS if backend.name == 'native')


# Within the compiler, what asks for transforms has no answer that one can go by; a constant is found out beforehand.
@torch.compiler.assume_constant_result
def _works() -> bool:
    return not backends.is_transforming() and any(
        backend.name == 'native' and backend.why_not() is None for backend in backends.BACKENDS)
