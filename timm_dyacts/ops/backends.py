"""Fused forward and backward passes of the operators, which `layers` runs instead of their definitions in eager mode.

Two back ends with the same functions: Triton kernels on CUDA (`bipolar`, `dyrelu`, `softpool`) and, on CPUs, PyTorch
operations on blocks that stay in the cache (`cpu`). `layers` asks for a pass at one place per operator and has the
definition in plain operations where there is none: whatever compiles, records or transforms operations sees only these.
"""
import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

__all__ = ['differentiate', 'find_pass', 'run']

_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_broken = False


def find_pass(module: str, name: str, *operands: Any) -> Callable | None:
    """Finds the fused pass for some operands.

    Args:
        module: The module of Triton kernels that has the pass.
        name: Name of the function, there and in the module of this name in `cpu`.
        operands: What enters the pass, tensors and other things.

    Returns:
        The function, or None where plain operations have to do: under compilation, export, tracing, dispatch modes,
        the transforms of `torch.func` and forward-mode differentiation; with tensor subclasses, on other devices, on
        CUDA in fp64; and where Triton is missing or has failed.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None or _get_current_dispatch_mode() is not None:
        return None
    tensors = [t for t in operands if isinstance(t, Tensor)]
    if not all(_is_plain(t) for t in tensors):
        return None
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        return None
    device_type = devices.pop().type
    if device_type == 'cpu':
        return _find_on_cpu(module, name)
    if device_type == 'cuda' and all(t.dtype in _TRITON_DTYPES for t in tensors):
        return _find_kernel(module, name)
    return None


def _is_plain(t: Tensor) -> bool:
    return (
        type(t) in (Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_legacy_batchedtensor(t)  # the gradients of `is_grads_batched`
        and forward_ad.unpack_dual(t).tangent is None
    )


def _find_on_cpu(module: str, name: str) -> Callable | None:
    return getattr(importlib.import_module(f'.{module}.cpu', __package__), name, None)


def _find_kernel(module: str, name: str) -> Callable | None:
    if _broken:
        return None
    try:
        return getattr(importlib.import_module(f'.{module}.triton', __package__), name)
    except ImportError as e:
        _give_up(e)
        return None


def _give_up(error: Exception) -> None:
    global _broken
    _broken = True
    warnings.warn(
        f'timm_dyacts runs without its fused kernels, and more slowly: Triton does not work here ({error!r})',
        RuntimeWarning, stacklevel=3)


def run(fused: Callable, definition: Callable, *args: Any) -> Any:
    """Runs a pass on its arguments, or the definition if Triton cannot build it. Memory running out stays an error."""
    try:
        return fused(*args)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as e:
        if fused.__module__.endswith('.cpu'):
            raise
        _give_up(e)
        return definition(*args)


def differentiate(
        fused: Callable | None,
        definition: Callable,
        args: Sequence[Any],
        grads: Sequence[Tensor | None],
        needs_input_grad: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Computes the gradients of an operator.

    Args:
        fused: Its backward pass, a function of `grads` and `args`, if there is one for them.
        definition: The operator in differentiable operations, a function of `args`.
        args: Its arguments, some of which are tensors.
        grads: Gradients of its outputs.
        needs_input_grad: Which arguments need a gradient.

    Returns:
        A gradient or None for each argument. Those of a backward pass that will itself be differentiated are formed
        by autograd from the definition.
    """
    def from_definition(*_) -> tuple[Tensor | None, ...]:
        return _differentiate_definition(definition, args, grads, needs_input_grad)

    if fused is None or torch.is_grad_enabled():
        return from_definition()
    return run(fused, from_definition, *grads, *args)


def _differentiate_definition(
        definition: Callable,
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
        outputs = definition(*inputs)
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
