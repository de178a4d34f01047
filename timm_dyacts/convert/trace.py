"""A record of one forward pass: which operators ran, inside which modules, on which tensors.

``convert`` has to know things that module trees do not tell: how many channels an activation sees, whether it sits
inside a squeeze-excite gate, whether it follows a residual addition, which convolution a BatchNorm belongs to. One
dry run in eval mode answers all of them. It is recorded below autograd, as ATen operators, so that functional
calls, operators written with ``*`` and ``+``, and in-place updates are seen like any others, and no model needs to be
symbolically traceable.
"""
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from ..modes import evaluating
from .inputs import Inputs
from .leaves import tensors_in
from .sites import Site, find_site
from .stand_ins import SpreadMeta, StandIns

__all__ = ['Call', 'Op', 'Trace', 'bases_of_views', 'trace_forward']

# A tensor that went through one of these only scales or selects others: it is the control input of a gate.
GATES = frozenset({'sigmoid', 'hardsigmoid', '_softmax', '_log_softmax'})
# What a gate multiplies with
PRODUCTS = frozenset({'mul', 'div', 'bmm', 'baddbmm', 'mm', 'addmm', 'convolution', '_convolution', 'grid_sampler_2d'})
VIEWS = frozenset({
    'alias', 'clone', 'detach', 'expand', 'permute', 'reshape', 'select', 'slice', 'split', 'split_with_sizes',
    'squeeze', 't', 'transpose', 'unbind', 'unsqueeze', 'view', '_unsafe_view', '_reshape_alias',
})
# Operators of which it is recorded where in a model's code they are called: what is a module elsewhere
SITED = frozenset({
    'celu', 'elu', 'gelu', 'hardswish', 'hardtanh', 'leaky_relu', 'max_pool2d_with_indices', 'max_pool3d_with_indices',
    'mish', 'prelu', 'relu', 'relu6', 'selu', 'silu', 'softplus',
})


@dataclass(eq=False)
class Op:
    """One ATen operator call.

    Attributes:
        name: Operator name without namespace, overload and in-place mark, e.g. ``relu`` for ``aten::relu_``.
        func: The operator overload itself.
        args: Positional arguments.
        kwargs: Keyword arguments.
        out: Result, a tensor or a sequence of tensors.
        module: Path of the innermost module that was running.
        site: Where it was called, of an operator of ``SITED`` only.
    """
    name: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    module: str
    site: Site | None = None

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors that it reads."""
        return tensors_in((self.args, self.kwargs))

    @property
    def outputs(self) -> list[Tensor]:
        """The tensors that it gives."""
        return tensors_in(self.out)


@dataclass(eq=False)
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
        site: Where it was called.
    """
    module: nn.Module
    input: Tensor | None
    shape: torch.Size | None
    channel_dim: int | None
    producer: Op | None
    start: int
    stop: int = -1
    output: Any = None
    site: Site | None = None

    @property
    def span(self) -> range:
        """Indices of the operators that ran inside the call."""
        return range(self.start, self.stop)

    @property
    def channels(self) -> int:
        """Number of channels of the input, of which ``channel_dim`` must be known."""
        return self.shape[self.channel_dim]


@dataclass(eq=False)
class Trace:
    """The record of one forward pass.

    Its tensors stay alive, so that the ``id`` of each stays its own. What was computed on the way, other than the
    output, is there as a tensor without elements (see ``stand_ins``).

    Attributes:
        given: The arguments, as they were.
        inputs: The copy of them that the model was called with, and may have written to.
        names: The paths of each module, in the order of the module tree. A shared module has several.
        output: What the model returned.
        ops: The operators in the order in which they ran.
        calls: The calls of modules in the order in which they began.
    """
    given: Inputs
    inputs: Inputs
    names: dict[nn.Module, list[str]]
    output: Any = None
    ops: list[Op] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    @property
    def input(self) -> Tensor:
        """The first tensor that the model was given."""
        return self.inputs.first

    def name(self, module: nn.Module) -> str:
        """The first path of a module."""
        return self.names[module][0]

    @cached_property
    def flops(self) -> int:
        """Floating-point operations of the products and convolutions: two for each multiplication."""
        return sum(
            flop_registry[op.func.overloadpacket](*op.args, **op.kwargs, out_val=op.out)
            for op in self.ops if op.func.overloadpacket in flop_registry)

    @cached_property
    def calls_by_module(self) -> dict[nn.Module, list[Call]]:
        """The calls of each module that ran, by module, in the order of the first calls."""
        calls: dict[nn.Module, list[Call]] = {}
        for call in self.calls:
            calls.setdefault(call.module, []).append(call)
        return calls

    def calls_of(self, module: nn.Module) -> list[Call]:
        """The calls of a module, none if it did not run."""
        return self.calls_by_module.get(module, [])

    @cached_property
    def uses(self) -> Counter[int]:
        """How many operators read each tensor, by ``id``."""
        return Counter(id(tensor) for op in self.ops for tensor in op.inputs)

    @cached_property
    def main_path(self) -> frozenset[int]:
        """Indices of the operators whose result reaches the output other than as the control input of a gate.

        What goes through a sigmoid or softmax and then straight to the output, as the scores of a detector do, controls
        nothing: a gate multiplies something.
        """
        computed = self._computed
        output = tensors_in(self.output) or [t for op in self.ops[-1:] for t in op.outputs]
        live = {id(t) for t in output}
        straight = set(live)  # without a product of two computed tensors on the way
        path = set()
        for index in range(len(self.ops) - 1, -1, -1):
            op = self.ops[index]
            outputs = {id(t) for t in op.outputs}
            written = self._written_by(op)
            if live.isdisjoint(written):
                continue
            path.add(index)
            is_straight = not straight.isdisjoint(written)
            inputs = {id(t) for t in op.inputs}
            live -= outputs
            straight -= outputs
            if op.name in GATES and not is_straight:
                continue
            live |= inputs
            factors = [t for t in op.inputs if id(t) in computed] if op.name in PRODUCTS else []
            if is_straight and (len(factors) < 2 or all(id(t) in self._gate_values for t in factors)):
                straight |= inputs
        return frozenset(path)

    @cached_property
    def _live(self) -> frozenset[int]:
        """Indices of the operators whose result reaches the output in whatever way."""
        live = {id(t) for t in tensors_in(self.output) or [t for op in self.ops[-1:] for t in op.outputs]}
        found = set()
        for index in range(len(self.ops) - 1, -1, -1):
            op = self.ops[index]
            if not live.isdisjoint(self._written_by(op)):
                found.add(index)
                live |= {id(t) for t in op.inputs}
        return frozenset(found)

    def _written_by(self, op: Op) -> set[int]:
        """What an operator writes to, by ``id``: what is written to a slice reaches those who read the whole."""
        outputs = {id(t) for t in op.outputs}
        return outputs | self._views_of(op.out) if op.func._schema.is_mutable else outputs

    def _views_of(self, tensor: Any) -> set[int]:
        """The tensors with the same memory, by ``id``."""
        base = self._bases.get(id(tensor), id(tensor))
        return {base, *self._views.get(base, ())}

    @cached_property
    def _bases(self) -> dict[int, int]:
        return bases_of_views(self.ops)

    @cached_property
    def _views(self) -> dict[int, list[int]]:
        views: dict[int, list[int]] = {}
        for view, base in self._bases.items():
            views.setdefault(base, []).append(view)
        return views

    @cached_property
    def _computed(self) -> frozenset[int]:
        """The tensors that depend on what the model was given, by ``id``."""
        computed = {id(t) for t in self.inputs.tensors}
        for op in self.ops:
            if any(id(t) in computed for t in op.inputs):
                computed.update(id(t) for t in op.outputs)
        return frozenset(computed)

    @cached_property
    def _gate_values(self) -> frozenset[int]:
        """The results of sigmoids and softmaxes, and views of them, by ``id``."""
        values: set[int] = set()
        for op in self.ops:
            if op.name in GATES or op.name in VIEWS and any(id(t) in values for t in op.inputs):
                values.update(id(t) for t in op.outputs)
        return frozenset(values)

    @cached_property
    def _before_weights(self) -> frozenset[int]:
        """The tensors that reach an operator which reads parameters or buffers as well, by ``id``."""
        tensors = (t for module in self.names for t in (*module._parameters.values(), *module._buffers.values()))
        weights = {id(t) for t in tensors if t is not None}
        for op in self.ops:
            if op.inputs and all(id(t) in weights for t in op.inputs):
                weights.update(id(t) for t in op.outputs)
        found: set[int] = set()
        for op in reversed(self.ops):
            inputs = {id(t) for t in op.inputs}
            if not weights.isdisjoint(inputs) or not found.isdisjoint(self._written_by(op)):
                found |= inputs
        return frozenset(found)

    def is_behind_weights(self, module: nn.Module) -> bool:
        """Whether no parameter or buffer is read on the ways from the outputs of a module to those of the model."""
        outputs = (t for call in self.calls_of(module) for t in tensors_in(call.output))
        return not any(id(t) in self._before_weights for t in outputs)

    def is_on_main_path(self, module: nn.Module) -> bool:
        """Whether an operator of the main path ran inside the module."""
        return any(not self.main_path.isdisjoint(call.span) for call in self.calls_of(module))

    def reaches_output(self, module: nn.Module) -> bool:
        """Whether what was computed inside the module reaches the output, be it through a gate."""
        return any(not self._live.isdisjoint(call.span) for call in self.calls_of(module))

    def find_producer(self, tensor: Tensor, before: int) -> int | None:
        """The index of the last operator, of those before an index, that gave a tensor."""
        indices = range(before - 1, -1, -1)
        return next((i for i in indices if any(t is tensor for t in self.ops[i].outputs)), None)

    @cached_property
    def _layers(self) -> dict[int, nn.Module]:
        """The convolutions and linear layers, by the ``id`` of their weight and of what was read of it transposed."""
        layers = {
            id(module._parameters['weight']): module
            for module in self.names
            if isinstance(module, (_ConvNd, nn.Linear)) and module._parameters.get('weight') is not None
        }
        views = [op for op in self.ops if op.name == 't' and id(op.args[0]) in layers]
        return layers | {id(op.out): layers[id(op.args[0])] for op in views}

    def layer_of(self, op: Op) -> nn.Module | None:
        """The convolution or linear layer whose weight an operator multiplies with."""
        layers = [self._layers[id(t)] for t in op.inputs if id(t) in self._layers]
        return layers[0] if len(layers) == 1 else None


def bases_of_views(ops: Iterable[Op]) -> dict[int, int]:
    """Give the ``id`` of the tensor whose memory a view shares, by the ``id`` of the view."""
    bases: dict[int, int] = {}
    for op in ops:
        returns = op.func._schema.returns
        if op.args and isinstance(op.args[0], Tensor) and any(r.alias_info is not None for r in returns):
            base = bases.get(id(op.args[0]), id(op.args[0]))
            bases.update((id(out), base) for out in op.outputs if id(out) != base)
    return bases


class _Recorder(TorchDispatchMode):
    def __init__(self, trace: Trace, sees_compound_ops: bool) -> None:
        super().__init__()
        self.trace = trace
        self.sees_compound_ops = sees_compound_ops
        self.stack: list[tuple[str, Call]] = []
        self.producer: dict[int, Op] = {}
        self.channel_dim: dict[int, int | None] = {}
        self.stand_ins = StandIns()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.sees_compound_ops:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        given = self.stand_ins.of((args, kwargs))
        out = func(*args, **kwargs)
        self.stand_ins.add(tensors_in(out), tensors_in((args, kwargs)))
        name = func._schema.name.split('::')[-1]
        if func._schema.is_mutable and name.endswith('_'):
            name = name[:-1]
        site = self._site() if name in SITED else None
        op = Op(name, func, *given, self.stand_ins.of(out), self.stack[-1][0] if self.stack else '', site)
        self.trace.ops.append(op)
        for tensor in op.outputs:
            self.producer[id(tensor)] = op
            self.channel_dim[id(tensor)] = _channel_dim(op, tensor, self.channel_dim)
        return out

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = self.stand_ins.of(tensors_in((args, kwargs)))
        x = tensors[0] if tensors else None
        call = Call(
            module,
            input=x,
            shape=None if x is None else x.shape,
            channel_dim=self.channel_dim.get(id(x)),
            producer=self.producer.get(id(x)),
            start=len(self.trace.ops),
            site=self._site(),
        )
        self.trace.calls.append(call)
        self.stack.append((name, call))

    def _site(self) -> Site:
        call = self.stack[-1][1] if self.stack else None
        return find_site(call and call.module, call)

    def leave(self, output: Any) -> None:
        _, call = self.stack.pop()
        call.stop = len(self.trace.ops)
        call.output = self.stand_ins.of(output)

    def finish(self, output: Any) -> None:
        """Note the output, of which the record has the tensors themselves."""
        self.trace.output = output
        real = self.stand_ins.back(tensors_in(output))

        def restore(tree: Any) -> Any:
            return tree_map_only(Tensor, lambda t: real.get(id(t), t), tree)

        for op in self.trace.ops:
            if any(id(t) in real for t in (*op.inputs, *op.outputs)):
                op.args, op.kwargs, op.out = restore((op.args, op.kwargs, op.out))
        for call in self.trace.calls:
            call.input, call.output = restore((call.input, call.output))


@torch.no_grad()
def trace_forward(model: nn.Module, x: Tensor | Inputs) -> Trace:
    """Run ``model(x)`` in eval mode and record it. Parameters, buffers and training flags are left as they were.

    Args:
        model: Any module.
        x: Its input, or its arguments, of which it gets a copy. With meta tensors, what depends on them is computed
            without values, whatever the device of the model.

    Returns:
        The record of the pass.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    given = x if isinstance(x, Inputs) else Inputs((x,), {})
    inputs = x.clone() if isinstance(x, Inputs) else given
    trace = Trace(given, inputs, names)
    # Autograd, where it takes part, even under ``no_grad``, splits compound operations before they get to the recorder.
    inference = any(t.is_inference() for t in (*inputs.tensors, *model.parameters(), *model.buffers()))
    recorder = _Recorder(trace, sees_compound_ops=inference or torch.is_inference_mode_enabled())
    handles = []
    try:
        for module, (name, *_) in names.items():
            handles.append(module.register_forward_pre_hook(
                lambda m, args, kwargs, name=name: recorder.enter(name, m, args, kwargs), with_kwargs=True))
            handles.append(module.register_forward_hook(lambda m, args, out: recorder.leave(out)))
        with evaluating(model), SpreadMeta() if given.is_meta else nullcontext(), recorder:
            output = inputs.call(model)
        recorder.finish(output)
    finally:
        for handle in handles:
            handle.remove()
    return trace


def _channel_dim(op: Op, out: Tensor, known: dict[int, int | None]) -> int | None:
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
        return _channel_dim_of_view(source, out, dim)
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


def _channel_dim_of_view(source: Tensor, out: Tensor, dim: int) -> int | None:
    if out.ndim > 1 and dim == 1 and out.shape[:2] == source.shape[:2]:
        return 1
    return out.ndim - 1 if dim == source.ndim - 1 and out.shape[-1] == source.shape[dim] else None
