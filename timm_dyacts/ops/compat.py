"""What the oldest supported releases of PyTorch and Triton lack, or have under another name."""
from collections.abc import Callable

import torch
from packaging.version import Version
from torch import nn

__all__ = ['TELLS_EXPORTS', 'as_constants', 'before_loading', 'torch_exports', 'triton_build_errors']

# Since PyTorch 2.8. Before, nothing tells export from compilation.
TELLS_EXPORTS = Version(torch.__version__).release >= (2, 8)


def torch_exports() -> bool:
    """Tell whether ``torch.export`` records: before PyTorch 2.8 never, as far as is known.

    ``torch.compiler.is_exporting()`` would say so wherever a compiler is at work, in PyTorch up to 2.11 at least.
    """
    return TELLS_EXPORTS and torch.compiler._is_exporting_flag


def as_constants(sizes: list[int]) -> list[int]:
    """Give sizes that ``torch.compile(dynamic=True)`` takes for constants, while it compiles.

    Before PyTorch 2.8 it has symbols for them, even where they are attributes of a module, and cannot slice in steps of
    a symbol. The length of a range it has to know.
    """
    return sizes if TELLS_EXPORTS else [len(range(size)) for size in sizes]


def before_loading(module: nn.Module, hook: Callable[..., None]) -> None:
    """Have a module call ``hook(module, state_dict, prefix, ...)`` before it loads a state dict."""
    if hasattr(module, 'register_load_state_dict_pre_hook'):  # since PyTorch 2.5
        module.register_load_state_dict_pre_hook(hook)
    else:
        module._register_load_state_dict_pre_hook(hook, with_module=True)


def triton_build_errors() -> tuple[type[Exception], ...]:
    """Give what Triton raises, besides a ``RuntimeError``, where it cannot build a kernel. Imports Triton."""
    from triton.compiler.errors import CompilationError
    from triton.runtime import errors

    found = [CompilationError, errors.OutOfResources]
    if hasattr(errors, 'PTXASError'):  # since Triton 3.3; before, a RuntimeError
        found.append(errors.PTXASError)
    return tuple(found)
