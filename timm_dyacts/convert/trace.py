"""A record of one forward pass: which operators ran, inside which modules, on which tensors.

``convert`` has to know things that module trees do not tell: how many channels an activation sees, whether it sits
inside a squeeze-excite gate, whether it follows a residual addition, which convolution a BatchNorm belongs to. One
dry run in eval mode answers all of them. It is recorded below autograd, as ATen operators, so that functional
calls, operators written with ``*`` and ``+``, and in-place updates are seen like any others, and no model needs to be
symbolically traceable.
"""
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

__all__ = ['Call', 'Op', 'Trace', 'trace_forward']

# A tensor that went through one of these only scales or selects others: it is the control input of a gate.
GATES = frozenset({'sigmoid', 'hardsigmoid', '_softmax', '_log_softmax'})


@dataclass
class Op:
    """One ATen operator call.

    Attributes:
        name: Operator name without namespace, overload and in-place mark, e.g. ``relu`` for ``aten::relu_``.
        func: The operator overload itself.
        args: Positional arguments.
        kwargs: Keyword arguments.
        out: Result, a tensor or a sequence of tensors.
        module: Path of the innermost module that was running.
    """
    name: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    module: str

    @property
    def inputs(self) -> list[torch.Tensor]:
        return _tensors((self.args, self.kwargs))

    @property
    def outputs(self) -> list[torch.Tensor]:
        return _tensors(self.out)


@dataclass
class Call:
    """One call of a module.

    Attributes:
        module: The module.
        input: Its first tensor argument.
        shape: Shape of the input.
        channel_dim: Dimension of the input that holds channels: what the last convolution, linear layer or norm before
            it left them in. ``None`` if that cannot be told.
        producer: The operator that made the input, ``None`` for the model's own input.
        start: Index of the first operator that ran inside the call.
        stop: Index after the last operator that ran inside the call.
        output: Its result.
    """
    module: nn.Module
    input: torch.Tensor | None
    shape: torch.Size | None
    channel_dim: int | None
    producer: Op | None
    start: int
    stop: int = -1
    output: Any = None


@dataclass
class Trace:
    """The record of one forward pass. Tensors are kept alive, so their identities stay unique."""
    input: torch.Tensor
    output: Any = None
    ops: list[Op] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def calls_of(self, module: nn.Module) -> list[Call]:
        return [call for call in self.calls if call.module is module]

    def uses(self) -> dict[int, int]:
        """How many operators read each tensor, by ``id``."""
        count: dict[int, int] = {}
        for op in self.ops:
            for tensor in op.inputs:
                count[id(tensor)] = count.get(id(tensor), 0) + 1
        return count

    def main_path(self) -> set[int]:
        """Indices of the operators whose result reaches the output other than as the control input of a gate."""
        live = {id(t) for t in _tensors(self.output)}
        path = set()
        for index in range(len(self.ops) - 1, -1, -1):
            op = self.ops[index]
            outputs = {id(t) for t in op.outputs}
            if live.isdisjoint(outputs):
                continue
            path.add(index)
            live -= outputs
            if op.name not in GATES:
                live.update(id(t) for t in op.inputs)
        return path


class _Recorder(TorchDispatchMode):
    def __init__(self, trace: Trace, sees_compound_ops: bool):
        super().__init__()
        self.trace = trace
        self.sees_compound_ops = sees_compound_ops
        self.stack: list[tuple[str, Call]] = []
        self.producer: dict[int, Op] = {}
        self.channel_dim: dict[int, int | None] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.sees_compound_ops:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        name = func._schema.name.split('::')[-1]
        if func._schema.is_mutable and name.endswith('_'):
            name = name[:-1]
        op = Op(name, func, args, kwargs, out, self.stack[-1][0] if self.stack else '')
        self.trace.ops.append(op)
        for tensor in op.outputs:
            self.producer[id(tensor)] = op
            self.channel_dim[id(tensor)] = _channel_dim(op, tensor, self.channel_dim)
        return out

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = _tensors((args, kwargs))
        x = tensors[0] if tensors else None
        call = Call(
            module,
            input=x,
            shape=None if x is None else x.shape,
            channel_dim=self.channel_dim.get(id(x)),
            producer=self.producer.get(id(x)),
            start=len(self.trace.ops),
        )
        self.trace.calls.append(call)
        self.stack.append((name, call))

    def leave(self, output: Any) -> None:
        _, call = self.stack.pop()
        call.stop = len(self.trace.ops)
        call.output = output


@torch.no_grad()
def trace_forward(model: nn.Module, x: torch.Tensor) -> Trace:
    """Run ``model(x)`` in eval mode and record it. Parameters, buffers and training flags are left as they were.

    Args:
        model: Any module.
        x: Its input.

    Returns:
        The record of the pass.
    """
    trace = Trace(input=x)
    # Autograd, where it takes part, even under `no_grad`, splits compound operations before they get to the recorder.
    inference = any(t.is_inference() for t in (x, *model.parameters(), *model.buffers()))
    recorder = _Recorder(trace, sees_compound_ops=inference or torch.is_inference_mode_enabled())
    handles = []
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(
                lambda m, args, kwargs, name=name: recorder.enter(name, m, args, kwargs), with_kwargs=True))
            handles.append(module.register_forward_hook(lambda m, args, out: recorder.leave(out)))
        with recorder:
            trace.output = model(x)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return trace


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def _channel_dim(op: Op, out: torch.Tensor, known: dict[int, int | None]) -> int | None:
    """Where the channels of a result are, given where they are in what it was made from."""
    if op.name in ('convolution', '_convolution', 'native_batch_norm', 'cudnn_batch_norm', 'native_group_norm'):
        return 1
    if op.name == 'bmm' and known.get(id(op.args[0])) == 1 and known.get(id(op.args[1])) != 2:
        return 1  # the rows of a product are those of its first factor
    if op.name in ('addmm', 'mm', 'linear', 'bmm', 'baddbmm', 'native_layer_norm', '_fused_rms_norm'):
        return out.ndim - 1
    source = next((t for t in op.inputs if known.get(id(t)) is not None), None)
    if source is None:
        return None
    dim = known[id(source)]
    if op.name in ('permute', 'transpose', 't'):
        # Take the same way with a tensor whose sizes say which dimension is which.
        moved = op.func(torch.empty(list(range(source.ndim)), device='meta'), *op.args[1:])
        return list(moved.shape).index(dim)
    if op.name in ('view', '_unsafe_view', 'reshape', '_reshape_alias'):
        channels = source.shape[dim]
        if out.ndim > 1 and dim == 1 and out.shape[:2] == source.shape[:2]:
            return 1
        return out.ndim - 1 if dim == source.ndim - 1 and out.shape[-1] == channels else None
    if out.ndim == source.ndim:
        return dim
    if op.name in ('mean', 'sum', 'amax') and len(op.args) > 1 and op.args[1]:
        dims = {d % source.ndim for d in op.args[1]}
        return None if dim in dims else dim - sum(d < dim for d in dims)
    at = op.args[1] if len(op.args) > 1 else 0
    if op.name == 'unsqueeze':
        return dim + (at % out.ndim <= dim)
    if op.name in ('select', 'unbind'):
        at %= source.ndim
        return None if at == dim else dim - (at < dim)
    return None
