"""Activations and max pools that are functions in a model's code, and the modules that do the same."""
import ast
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .rewrite import has_result
from .trace import Op

__all__ = ['as_module', 'reason_to_keep']

# Functions of one tensor, the further arguments of which are numbers: each calls one operator of those below.
_FUNCTIONS = tuple(getattr(source, name) for source in (torch, F) for name in (
    'relu', 'relu_', 'relu6', 'leaky_relu', 'leaky_relu_', 'elu', 'elu_', 'selu', 'selu_', 'celu', 'celu_', 'gelu',
    'silu', 'mish', 'hardswish', 'hardtanh', 'hardtanh_', 'softplus', 'max_pool1d', 'max_pool2d', 'max_pool3d',
) if hasattr(source, name))
_METHODS = ('relu', 'relu_')
# Of signals, which torch pools as images of one row
_POOLS_OF_SIGNALS = (torch.max_pool1d, F.max_pool1d)


def reason_to_keep(op: Op) -> str | None:
    """Tell why the call of a function cannot become a call of a module, ``None`` if it can."""
    site = op.site
    if site.reason is not None:
        return f'a function call, not a module: {site.reason}'
    if as_module(op) is None:
        return 'a function call, not a module: no module does the same'
    name = site.tensor_method
    if name not in _METHODS and not any(site.callee is function for function in _FUNCTIONS):
        return 'a function call, not a module: what is called there cannot be told'
    if not name and not _takes_one_tensor(site.call):
        return 'a function call, not a module: its arguments may differ from call to call'
    if op.func._schema.is_mutable and not has_result(site):
        return 'a function call, not a module: it works in place, and nothing takes its result'
    return None


def as_module(op: Op) -> nn.Module | None:
    """Give the module that does what an operator did, ``None`` if there is none."""
    make = _MODULES.get(op.name)
    if op.name == 'max_pool2d_with_indices' and any(op.site.callee is function for function in _POOLS_OF_SIGNALS):
        make = _max_pool(nn.MaxPool1d)
    # What is passed on as a keyword argument differs from one version of torch to the next.
    values = [value for value in (*op.args, *op.kwargs.values()) if not isinstance(value, torch.Tensor)]
    module = make(*values) if make is not None and len(op.inputs) == 1 else None
    if hasattr(module, 'inplace'):
        module.inplace = op.func._schema.is_mutable
    return module


def _takes_one_tensor(call: ast.Call) -> bool:
    """Whether everything but the input is written down as numbers: the module has those of the dry run."""
    inputs = [k.value for k in call.keywords if k.arg == 'input']
    others = [*call.args[1 if not inputs else 0:], *(k.value for k in call.keywords if k.arg != 'input')]
    has_input = len(inputs) == 1 or bool(call.args) and not isinstance(call.args[0], ast.Starred)
    if any(k.arg in (None, 'return_indices') for k in call.keywords) or len(call.args) > 6:
        return False
    return has_input and all(map(_is_literal, others))


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except ValueError:
        return False
    return True


def _elu(alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> nn.Module | None:
    if scale == 1 and input_scale == 1:
        return nn.ELU(alpha)
    if input_scale == 1 and abs(scale - 1.0507009873554805) < 1e-6 and abs(alpha - 1.6732632423543772) < 1e-6:
        return nn.SELU()
    return nn.CELU(alpha) if scale == 1 and abs(alpha * input_scale - 1) < 1e-6 else None


def _hardtanh(low: float = -1.0, high: float = 1.0) -> nn.Module:
    return nn.ReLU6() if (low, high) == (0, 6) else nn.Hardtanh(low, high)


def _max_pool(cls: type[nn.Module]) -> Callable[..., nn.Module]:
    def make(
            kernel: Sequence[int],
            stride: Sequence[int] = (),
            padding: int | Sequence[int] = 0,
            dilation: int | Sequence[int] = 1,
            ceil_mode: bool = False,
    ) -> nn.Module:
        if cls is nn.MaxPool1d:
            kernel, stride, padding, dilation = (
                value if isinstance(value, int) else value[-1:] for value in (kernel, stride, padding, dilation))
        window = [_compact(value) for value in (kernel, stride or kernel, padding, dilation)]
        return cls(*window, ceil_mode=ceil_mode)

    return make


def _compact(value: int | Sequence[int]) -> Any:
    """Write a window as a model's author would: one number for several that are the same."""
    values = [value] if isinstance(value, int) else list(value)
    return values[0] if len(set(values)) == 1 else tuple(values)


_MODULES: dict[str, Callable[..., nn.Module | None]] = dict(
    relu=nn.ReLU,
    relu6=nn.ReLU6,
    hardtanh=_hardtanh,
    leaky_relu=nn.LeakyReLU,
    elu=_elu,
    selu=nn.SELU,
    celu=nn.CELU,
    gelu=lambda approximate='none': nn.GELU(approximate),
    silu=nn.SiLU,
    mish=nn.Mish,
    hardswish=nn.Hardswish,
    softplus=nn.Softplus,
    max_pool2d_with_indices=_max_pool(nn.MaxPool2d),
    max_pool3d_with_indices=_max_pool(nn.MaxPool3d),
)
