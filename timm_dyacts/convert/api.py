"""Swaps operators into a built timm model and keeps its trained weights.

One dry run tells what every activation, pool and norm really does in the network (see ``trace``). New modules come from
timm's factories. What ``convert`` says about the function being kept is checked on a probe batch before it returns, and
a model that does not fit is left as it was.
"""
import copy
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.layers import AdaptiveAvgMaxPool2d, MixedConv2d, create_aa, create_act_layer, get_act_layer
from timm.layers import activations as timm_activations
from timm.layers import activations_me as timm_activations_me
from timm.layers.pool2d_same import MaxPool2dSame
from torch import nn

from ..layers import (
    BELU,
    BSELU,
    Bipolar,
    BipolarMaxPool2d,
    BLeakyReLU,
    BPReLU,
    BReLU,
    ChannelAffine,
    DyReLU,
    SoftPool2d,
    SoftPool2dSame,
    channel_signs,
)
from ..operators import OPERATORS
from ..piecewise_fit import fit_pieces
from .signs import SignConflict, SignFlip, solve_signs
from .trace import Call, Trace, trace_forward

__all__ = ['ConversionError', 'ConversionReport', 'Replacement', 'Skip', 'convert']

DYRELU = ('dyrelu_a', 'dyrelu_b', 'dyrelu_c')
# Each member of the bipolar family and the plain activation that it is the bipolar form of.
BIPOLAR = dict(brelu='relu', belu='elu', bselu='selu', bleaky_relu='leaky_relu', bprelu='prelu')

_BIPOLAR_TYPES = (Bipolar, BReLU, BELU, BSELU, BLeakyReLU, BPReLU)
_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Softplus, nn.Softsign, nn.Hardtanh,
    *(getattr(source, name)
      for source in (timm_activations, timm_activations_me)
      for name in ('Swish', 'SwishMe', 'Mish', 'MishMe', 'HardSwish', 'HardSwishMe', 'HardMish', 'HardMishMe', 'PReLU',
                   'GELU', 'GELUTanh', 'QuickGELU')
      if hasattr(source, name)),
    DyReLU, *_BIPOLAR_TYPES,
)
_MAX_POOLS = (nn.MaxPool2d, nn.AdaptiveMaxPool2d, AdaptiveAvgMaxPool2d)
_ACTIVATION_OPS = frozenset({
    'celu', 'elu', 'gelu', 'hardswish', 'hardtanh', 'leaky_relu', 'mish', 'prelu', 'relu', 'relu6', 'selu', 'silu',
    'softplus',
})


class ConversionError(ValueError):
    """The model cannot be converted as asked. It is as it was."""


class _OutputsDiffer(ConversionError):
    """What should be exact by construction gave other outputs: an error in it, or amplified rounding."""

    def __init__(self, report: 'ConversionReport'):
        super().__init__(
            f'The converted model gives outputs that differ by {report.max_diff:.3g} from the original '
            f'(largest output {report.scale:.3g}), though every step should be exact. Nothing was changed. '
            f'Steps: {report.counts}')
        self.max_diff = report.max_diff
        self.scale = report.scale


@dataclass(frozen=True)
class Replacement:
    """One module that was replaced.

    Attributes:
        name: Its path in the model.
        old: Class name before.
        new: Class name now.
        exact: Whether the new module, as it starts, computes what the old one did.
    """
    name: str
    old: str
    new: str
    exact: bool


@dataclass(frozen=True)
class Skip:
    """Something that looked like a candidate and was left alone.

    Attributes:
        name: Path of the module (of the caller, for a functional call).
        kind: Class or function name.
        reason: Why.
    """
    name: str
    kind: str
    reason: str


@dataclass
class ConversionReport:
    """What ``convert`` did.

    Attributes:
        replaced: The modules that were replaced.
        skipped: The candidates that were left alone, with the reason.
        function: ``'exact'`` if the network computes what it did before, up to rounding, else ``'approximate'``.
        max_diff: Largest absolute difference of an output element on the probe batch. ``None`` if not run.
        scale: Largest absolute output element on the probe batch, to judge ``max_diff`` by.
        flipped_output: Whether channels of the output changed their sign, as where it ends in an activation: those
            of features, never logits.
        notes: Further remarks.
        new_keys: Entries of the state dict that the model did not have before.
    """
    replaced: list[Replacement] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    function: str = 'exact'
    max_diff: float | None = None
    scale: float | None = None
    flipped_output: bool = False
    notes: list[str] = field(default_factory=list)
    new_keys: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """How many modules of each kind were replaced, e.g. ``{'ReLU -> BReLU': 17}``."""
        return dict(Counter(f'{r.old} -> {r.new}' for r in self.replaced))

    def __str__(self) -> str:
        lines = [f'{count} x {kind}' for kind, count in self.counts.items()] or ['nothing replaced']
        function = f'function: {self.function}'
        if self.max_diff is not None:
            function += f' (largest difference {self.max_diff:.3g} at outputs up to {self.scale:.3g}, probe batch)'
        lines.append(function)
        lines += self.notes
        lines += [f'left alone: {s.name} ({s.kind}): {s.reason}' for s in self.skipped]
        return '\n'.join(lines)


def convert(
        model: nn.Module,
        act: str | None = None,
        pool: str | None = None,
        norm: str | None = None,
        *,
        where: str = 'inner',
        layout: str = 'interleaved',
        start: str = 'relu',
        act_kwargs: dict[str, Any] | None = None,
        pool_kwargs: dict[str, Any] | None = None,
        input_size: tuple[int, int, int] | None = None,
        check: bool = True,
) -> nn.Module:
    """Swap operators into a built model, in place, and keep its weights.

    * ``act='dyrelu_a' | 'dyrelu_b' | 'dyrelu_c'``: Dynamic ReLU for the activations of the backbone, not for those in
      squeeze-excite or attention gates or in the classifier head. It starts as the activation that it replaces:
      the function is kept exactly for ReLU, ReLU6, leaky ReLU and one-slope PReLU.
    * ``act='bipolar'``: the bipolar form of every activation outside gates. ``act='brelu'`` and the other members
      of that family put this member everywhere. The weights get a sign flip (see ``signs``) and max pools their bipolar
      form; the function is kept exactly where the activation replaced is the plain form of its member. A bipolar
      network is the plain one in other coordinates: it trains the same, too.
    * ``act='relu'`` or any other plain name of timm's: back, or to something else.
    * ``pool='softpool'``: SoftPool of the same output shape for each max pool; in networks without one that downsample
      by strided convolutions with an anti-aliasing slot (MobileNet, EfficientNet), stride 1 and SoftPool in
      the slot. The weights fit, the function changes.
    * ``norm='none'``: BatchNorm folded into the convolution or linear layer before it; where there is none, a scale and
      a shift are left of it. Exact in eval mode, up to rounding.

    Args:
        model: Model to change, with or without trained weights.
        act: Activation to put in.
        pool: ``'softpool'``.
        norm: ``'none'``.
        where: For Dynamic ReLU, ``'inner'`` keeps the plain activation after the addition of bottleneck blocks (these
            have the most channels and so would cost the most parameters), ``'all'`` replaces it too.
        layout: Channel layout of bipolar activations, ``'interleaved'`` or ``'halves'``.
        start: What a Dynamic ReLU starts as where it cannot be the activation replaced (SiLU, GELU, hard-swish):
            ``'relu'``, or with ``'fit'`` the maximum of K lines that is nearest to it (see ``fit_pieces``).
        act_kwargs: Further arguments for each new activation, e.g. ``dict(reduction=16)``.
        pool_kwargs: Further arguments for each new pool, e.g. ``dict(beta=2.0)``; they win over the old pool's.
        input_size: ``(C, H, W)`` of the probe batch. Default: a small one that suits the model's config.
        check: Compare the outputs before and after on a probe batch.

    Returns:
        The model, with a ``ConversionReport`` as ``model.conversion``.

    Raises:
        ConversionError: If there is nothing to replace, or no sign flip fits, or the check fails. The model is then as
            it was, and the message names the module.
        ValueError: If an argument is not one of the accepted values.
    """
    _check_choice('pool', pool, (None, 'softpool'))
    _check_choice('norm', norm, (None, 'none'))
    _check_choice('where', where, ('inner', 'all'))
    _check_choice('layout', layout, ('interleaved', 'halves'))
    _check_choice('start', start, ('relu', 'fit'))
    if act is None and pool is None and norm is None:
        raise ValueError('Nothing to do: act, pool and norm are all None.')
    if act is not None and not isinstance(act, str):
        raise ValueError(f'act must be the name of an activation, e.g. one of {", ".join(OPERATORS)}, got {act!r}.')

    options = dict(
        act=act,
        pool=pool,
        norm=norm,
        where=where,
        layout=layout,
        start=start,
        act_kwargs=act_kwargs or {},
        pool_kwargs=pool_kwargs or {},
        input_size=input_size,
    )
    # The signs are worked out on the CPU, also inside `with torch.device('meta'):`.
    with torch.device('cpu'):
        try:
            model.conversion = _convert(model, check=check, **options)
        except _OutputsDiffer as single:
            # Some networks amplify rounding errors to the size of their outputs. In double precision these stay small.
            _convert(copy.deepcopy(model).to('cpu', torch.float64), check=True, **options)
            report = model.conversion = _convert(model, check=False, **options)
            report.max_diff, report.scale = single.max_diff, single.scale
            report.notes.append('the difference is rounding: a copy of the model in double precision kept its outputs')
    return model


def _convert(
        model: nn.Module,
        act: str | None,
        pool: str | None,
        norm: str | None,
        where: str,
        layout: str,
        start: str,
        act_kwargs: dict[str, Any],
        pool_kwargs: dict[str, Any],
        input_size: tuple[int, int, int] | None,
        check: bool,
) -> ConversionReport:
    keys = set(model.state_dict())
    conversion = _Conversion(model, _dry_run(model, input_size))
    try:
        if act is not None:
            conversion.activations(act, where, layout, start, act_kwargs)
        if pool is not None:
            conversion.pools(pool_kwargs)
        if norm is not None:
            conversion.fold_norms()
        report = conversion.report
        if not report.replaced and not conversion.already:
            raise ConversionError(_nothing_found(act, pool, norm, report))
        if check:
            conversion.check()
    except BaseException:
        conversion.undo()
        raise
    report.new_keys = tuple(sorted(set(model.state_dict()) - keys))
    return report


class _Conversion:
    """One run of ``convert``: the steps share the trace, the report and the way back."""

    def __init__(self, model: nn.Module, trace: Trace):
        self.model = model
        self.trace = trace
        self.report = ConversionReport()
        self.already = False
        self.output_signs: torch.Tensor | None = None
        self.way_back: list[Callable[[], None]] = []
        self.names: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.names.setdefault(id(module), []).append(name)
        self.calls: dict[int, list[Call]] = {}
        for call in trace.calls:
            self.calls.setdefault(id(call.module), []).append(call)
        self.path = trace.main_path()
        self.uses = trace.uses()
        layers = (m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)))
        self.layers = {id(m.weight): m for m in layers}
        self.untransposed = {id(op.out): op.args[0] for op in trace.ops if op.name == 't'}

    # Activations

    def activations(self, act: str, where: str, layout: str, start: str, act_kwargs: dict[str, Any]) -> None:
        try:
            get_act_layer(act)
        except KeyError as e:
            raise ValueError(f'act: {e}') from None
        like = next(iter(self.model.parameters()), torch.empty(0))
        candidates = self._candidates(_ACTIVATIONS, _ACTIVATION_OPS)
        head = self._head() if act in DYRELU else frozenset()
        plan = []
        for module in candidates:
            reason = self._reason_to_skip(module, act, where, head)
            if reason:
                self._skip(module, reason)
                continue
            new, exact = _make_activation(act, module, self.calls[id(module)][0], layout, start, act_kwargs, like)
            if new is None:
                self.already = True
                continue
            plan.append((module, new, exact))

        if any(_form(old).layout != _form(new).layout for old, new, _ in plan):
            self._flip_signs(plan)
        for old, new, exact in plan:
            self._replace(old, new, exact)
        if act in DYRELU and hasattr(type(self.model), 'group_matcher'):
            if 'group_matcher' not in vars(self.model):
                self.model.group_matcher = partial(_group_matcher, self.model)
                self.way_back.append(lambda: delattr(self.model, 'group_matcher'))
        if plan and any(_form(new).layout for _, new, _ in plan):
            self._mark_bipolar()
        elif plan:
            self._unmark_bipolar()

    def _candidates(self, types: tuple[type, ...], functions: frozenset) -> list[nn.Module]:
        """Modules of these types that are not part of another one; what cannot be replaced goes into the report."""
        found, covered = [], set()
        for module in self.model.modules():
            if not isinstance(module, types) or id(module) in covered:
                continue
            if types is _ACTIVATIONS and _is_wrapped(module):
                continue
            covered.update(id(m) for m in module.modules())
            if module is self.model:
                continue
            if id(module) in self.calls:
                found.append(module)
            else:
                self._skip(module, 'not called in a forward pass in eval mode')
        spans = [(c.start, c.stop) for m in found for c in self.calls[id(m)]]
        for index in sorted(self.path):
            op = self.trace.ops[index]
            if op.name in functions and not any(start <= index < stop for start, stop in spans):
                self.report.skipped.append(Skip(op.module, op.name, 'a function call, not a module'))
        return found

    def _reason_to_skip(self, module: nn.Module, act: str, where: str, head: set[int]) -> str | None:
        calls = self.calls[id(module)]
        if not any(self.path.intersection(range(c.start, c.stop)) for c in calls):
            return 'inside a gate'
        dims = {_channel_dim(c) for c in calls}
        if len(dims) > 1 or None in dims:
            return 'in which dimension its channels are cannot be told'
        if act not in DYRELU:
            return None
        if id(module) in head:
            return 'in the classifier head'
        if len({c.shape[c.channel_dim] for c in calls}) > 1:
            return 'shared by tensors with different numbers of channels'
        if where == 'inner' and self._after_addition(module):
            return "after the addition of a bottleneck block (where='inner')"
        return None

    def _head(self) -> set[int]:
        """Activations that run in the model's ``forward`` but not in its ``forward_features``."""
        if not hasattr(self.model, 'forward_features'):
            return set()
        reached: set[int] = set()
        handles = [m.register_forward_pre_hook(lambda m, args: reached.add(id(m))) for m in self.model.modules()]
        training = [(m, m.training) for m in self.model.modules()]
        try:
            self.model.eval()
            with torch.no_grad():
                self.model.forward_features(self.trace.input)
        finally:
            for handle in handles:
                handle.remove()
            for module, mode in training:
                module.training = mode
        return set(self.calls) - reached

    def _after_addition(self, module: nn.Module) -> bool:
        parent = self.model.get_submodule(self.names[id(module)][0].rpartition('.')[0])
        in_bottleneck = any('Bottleneck' in cls.__name__ for cls in type(parent).__mro__)
        return in_bottleneck and any(
            c.producer is not None and c.producer.name == 'add' and len(c.producer.inputs) == 2
            for c in self.calls[id(module)])

    def _flip_signs(self, plan: list[tuple[nn.Module, nn.Module, bool]]) -> None:
        anchors = []
        for old, new, _ in plan:
            for call in self.calls[id(old)]:
                anchors.append((call, _pattern(old, call) * _pattern(new, call)))
        pools = [
            call for call in self.trace.calls
            if _is_wrapped(call.module) or isinstance(call.module, _MAX_POOLS) and isinstance(call.output, torch.Tensor)
        ]
        tensors = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        try:
            try:
                flip = solve_signs(self.trace, anchors, pools, tensors)
                new_pools = self._pools_for(flip)
            except SignConflict:
                # Gates that mix channels and computed weights do not commute with signs, but can be wrapped.
                flip = solve_signs(self.trace, anchors, [*pools, *self._wrappable(anchors)], tensors)
                new_pools = self._pools_for(flip)
        except SignConflict as e:
            raise ConversionError(
                f'No sign flip keeps the function of this model: {e}. Nothing was changed.') from None
        self.way_back.append(flip.apply_)
        flip.apply_()
        for old, new in new_pools:
            self._replace(old, new, True)
        unread = [name for name, p in self.model.named_parameters() if id(p) not in self.uses]
        if unread:
            self.report.notes.append(
                f'not read in eval mode, so not part of the flip and not exact in training: {", ".join(unread)}')
        self.output_signs = flip.output
        self.report.flipped_output = flip.output is not None
        if flip.output is not None:
            self.report.notes.append('the sign of the odd output channels is flipped: the model ends in an activation')

    def _pools_for(self, flip: SignFlip) -> list[tuple[nn.Module, nn.Module]]:
        wanted: dict[int, tuple[nn.Module, str | None]] = {}
        for call, *signs in flip.pools:
            signs = [s * _layout_signs(getattr(call.module, 'layout', None), len(s)) for s in signs]
            fitting = (
                layout for layout in (None, 'interleaved', 'halves')
                if all(torch.equal(s, _layout_signs(layout, len(s))) for s in signs))
            layout = next(fitting, '')
            if layout == '' or wanted.setdefault(id(call.module), (call.module, layout))[1] != layout:
                raise SignConflict(self.names[id(call.module)][0], 'its channel signs are neither plain nor bipolar')
        new_pools = []
        for pool, layout in wanted.values():
            if layout != getattr(pool, 'layout', None):
                new_pools.append((pool, _with_layout(pool, layout)))
        return new_pools

    def _wrappable(self, anchors: list[tuple[Call, torch.Tensor]]) -> list[Call]:
        """Calls of gates, ``x * g(x)``, of scales and shifts, and of convolutions that compute their weight."""
        found = []
        starts = [call.start for call, _ in anchors]
        for module in self.model.modules():
            calls = self.calls.get(id(module), ())
            if len(calls) != 1 or not isinstance(calls[0].output, torch.Tensor) or calls[0].shape is None:
                continue
            call, = calls
            own = {id(p) for p in module.parameters(recurse=False)}
            last = self.trace.ops[call.stop - 1] if call.stop > call.start else None
            if call.channel_dim != 1 or last is None or not any(t is call.output for t in last.outputs):
                continue
            if any(call.start <= start < call.stop for start in starts):
                continue  # an activation that is replaced has signs of its own
            is_gate = last.name == 'mul' and any(t is call.input for t in last.inputs) and call.output.ndim == 4
            is_affine = last.name in ('add', 'mul') and any(id(t) in own for t in last.inputs)
            computes_weight = isinstance(module, nn.Conv2d) and last.name == 'convolution' \
                and last.args[1] is not module.weight
            if is_gate or is_affine or computes_weight:
                found.append(call)
        return found

    def _mark_bipolar(self) -> None:
        # Plain and bipolar weights have the same names and shapes. This entry of the state dict tells them apart,
        # so that neither can be loaded into the other by mistake.
        if 'bipolar' not in self.model._buffers:
            device = next(iter(self.model.parameters())).device
            self.model.register_buffer('bipolar', torch.ones((), dtype=torch.uint8, device=device))
            self.way_back.append(lambda: delattr(self.model, 'bipolar'))

    def _unmark_bipolar(self) -> None:
        if 'bipolar' in self.model._buffers and not any(isinstance(m, _BIPOLAR_TYPES) for m in self.model.modules()):
            mark = self.model.bipolar
            del self.model.bipolar
            self.way_back.append(lambda: self.model.register_buffer('bipolar', mark))

    # Pools

    def pools(self, pool_kwargs: dict[str, Any]) -> None:
        candidates = self._candidates((nn.MaxPool2d, BipolarMaxPool2d), frozenset({'max_pool2d_with_indices'}))
        for old in candidates:
            if _is_wrapped(old):
                self._skip(old, 'bipolar: SoftPool does not commute with the channel signs')
            elif old.return_indices:
                self._skip(old, 'returns indices')
            else:
                soft = SoftPool2dSame if isinstance(old, MaxPool2dSame) else SoftPool2d
                self._replace(old, soft(**{**_pool_args(old), **pool_kwargs}), False)
        self.already |= any(isinstance(m, SoftPool2d) for m in self.model.modules())
        if not candidates:
            self._antialias(pool_kwargs)

    def _antialias(self, pool_kwargs: dict[str, Any]) -> None:
        """Stride 1 and SoftPool in the blocks that have a free slot for an anti-aliasing layer."""
        for name, slot in list(self.model.named_modules()):
            if name.rpartition('.')[2] != 'aa' or not isinstance(slot, nn.Identity) or id(slot) not in self.calls:
                continue
            call = self.calls[id(slot)][0]
            convs = self._convs_before(call)
            strides = {tuple(conv.stride) for conv in convs}
            if len(strides) != 1 or strides == {(1, 1)}:
                continue
            old_stride, = strides
            new = create_aa('softpool', channels=call.shape[1], stride=old_stride[0])
            if pool_kwargs:
                new = SoftPool2d(**{**dict(kernel_size=old_stride, stride=old_stride, ceil_mode=True), **pool_kwargs})
            for conv in convs:
                conv.stride = (1, 1)
                self.way_back.append(lambda conv=conv, stride=old_stride: setattr(conv, 'stride', stride))
            self._replace(slot, new, False, old_name='strided Conv2d')

    def _convs_before(self, call: Call) -> list[nn.Conv2d]:
        """The last convolution that ran in the block before this call; several where they share the channels out."""
        block = self.names[id(call.module)][0].rpartition('.')[0]
        for op in reversed(self.trace.ops[:call.start]):
            if op.name == 'convolution' and op.module.startswith(f'{block}.'):
                conv = self.layers.get(id(op.args[1]))
                parent = self.model.get_submodule(op.module.rpartition('.')[0])
                return [conv] if not isinstance(parent, MixedConv2d) else list(parent.children())
        return []

    # Norms

    def fold_norms(self) -> None:
        """BatchNorm into the layer before it; where there is none, into a scale and shift of its own."""
        affine = 0
        for norm in self._candidates((nn.modules.batchnorm._BatchNorm,), frozenset()):
            if not norm.track_running_stats:
                self._skip(norm, 'keeps no running statistics')
                continue
            layer = self._layer_before(norm)
            if layer is None:
                affine += 1
            self._fold(layer, norm)
        if affine:
            self.report.notes.append(
                f'{affine} norms follow no layer that could take them in: what is left of them is a scale and shift')

    def _layer_before(self, norm: nn.Module) -> nn.Module | None:
        """The convolution or linear layer whose output goes into the norm and nowhere else."""
        if len(self.calls[id(norm)]) > 1:
            return None
        call, = self.calls[id(norm)]
        tensor, index = call.input, call.start
        while self.uses[id(tensor)] == 1:
            made_by = (i for i in range(index - 1, -1, -1) if any(t is tensor for t in self.trace.ops[i].outputs))
            index = next(made_by, -1)
            op = self.trace.ops[index]
            if index < 0 or op.name not in ('view', '_unsafe_view', 'reshape'):
                break
            tensor = op.args[0]
        if self.uses[id(tensor)] != 1 or index < 0:
            return None
        weights = [t for t in op.inputs if id(t) in self.layers]
        if op.name in ('addmm', 'mm'):
            weights = [w for w in (self.untransposed.get(id(t)) for t in op.inputs) if w is not None]
        layer = self.layers.get(id(weights[0])) if len(weights) == 1 else None
        if layer is None or getattr(layer, 'transposed', False) or self.uses[id(layer.weight)] != 1:
            return None
        in_place = op.outputs[0].shape[1 if op.name == 'convolution' else -1] == norm.num_features
        return layer if in_place else None

    @torch.no_grad()
    def _fold(self, layer: nn.Module | None, norm: nn.modules.batchnorm._BatchNorm) -> None:
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        shift = -norm.running_mean.double() * scale
        if norm.bias is not None:
            shift = shift + norm.bias.double()

        # timm's norms with a built-in activation keep that
        rest = [m for m in (getattr(norm, 'drop', None), getattr(norm, 'act', None))
                if m is not None and not isinstance(m, nn.Identity)]
        if layer is None:
            like = norm.running_mean
            affine = ChannelAffine(norm.num_features, device=like.device, dtype=like.dtype)
            affine.weight.copy_(scale)
            affine.bias.copy_(shift)
            affine.requires_grad_(norm.weight is None or norm.weight.requires_grad)
            rest.insert(0, affine)
        else:
            weight, bias = layer.weight, layer.bias
            if bias is not None:
                shift = shift + bias.double() * scale
            new_weight = weight.double() * scale.view(-1, *[1] * (weight.ndim - 1))
            layer.weight = nn.Parameter(new_weight.to(weight.dtype), requires_grad=weight.requires_grad)
            layer.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=weight.requires_grad)
            self.way_back.append(lambda: (setattr(layer, 'weight', weight), setattr(layer, 'bias', bias)))
        self._replace(norm, nn.Identity() if not rest else rest[0] if len(rest) == 1 else nn.Sequential(*rest), True)

    # All of them

    def _replace(self, old: nn.Module, new: nn.Module, exact: bool, old_name: str | None = None) -> None:
        new.train(old.training)
        for name in self.names[id(old)]:
            parent, _, child = name.rpartition('.')
            parent = self.model.get_submodule(parent)
            setattr(parent, child, new)
            self.way_back.append(lambda parent=parent, child=child: setattr(parent, child, old))
        self.names[id(new)] = self.names[id(old)]
        self.report.replaced.append(
            Replacement(self.names[id(old)][0], old_name or type(old).__name__, type(new).__name__, exact))
        if not exact:
            self.report.function = 'approximate'

    def _skip(self, module: nn.Module, reason: str) -> None:
        self.report.skipped.append(Skip(self.names[id(module)][0], type(module).__name__, reason))

    def check(self) -> None:
        if self.trace.input.is_meta:
            return
        before, after = self.trace.output, trace_forward(self.model, self.trace.input).output
        if not isinstance(before, torch.Tensor):
            return
        if self.output_signs is not None:
            before = before * self.output_signs.to(before)
        before, after = before.double(), after.double()
        report = self.report
        report.scale = before.abs().max().item()
        report.max_diff = torch.where(before == after, 0.0, (before - after).abs()).max().item()
        # As many ulps in either precision would be too strict in double, where amplified rounding must pass.
        tolerance = 1e-9 if self.trace.output.dtype == torch.float64 else 1e3 * torch.finfo(self.trace.output.dtype).eps
        if report.function == 'exact' and not report.max_diff <= tolerance * max(report.scale, 1e-6):
            raise _OutputsDiffer(report)

    def undo(self) -> None:
        for step in reversed(self.way_back):
            step()
        self.way_back.clear()


# What activations compute


class _Form(NamedTuple):
    """What an activation module computes as it stands: a plain activation and the layout of a bipolar wrapping."""
    kind: str
    options: dict[str, Any]
    layout: str | None = None

    def same_function(self, other: '_Form') -> bool:
        """Whether the plain activations are the same one."""
        (kind, options), (other_kind, others) = self.canonical(), other.canonical()
        if kind != other_kind or kind == 'dynamic':
            return False
        return all(_equal(value, others[key]) for key, value in options.items())

    def canonical(self) -> tuple[str, dict[str, Any]]:
        if self.kind == 'prelu' and self.options['weight'].numel() == 1 and not self.options['weight'].is_meta:
            return 'leaky_relu', dict(negative_slope=self.options['weight'].item())
        return self.kind, self.options


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.is_meta or torch.equal(a, b)
    return a == b


def _form(module: nn.Module) -> _Form:
    if isinstance(module, DyReLU):
        slope, *rest = module.alpha
        if not module.is_fresh() or slope != 1 or len(set(rest)) != 1 or any(module.beta) or not 0 <= rest[0] <= 1:
            return _Form('dynamic', {})
        if rest[0] == 0:
            return _Form('relu', dict(max_value=module.max_value))
        return _Form('leaky_relu', dict(negative_slope=rest[0]))
    layout = getattr(module, 'layout', None)
    if isinstance(module, Bipolar):
        return _form(module.f)._replace(layout=layout)
    if isinstance(module, nn.Hardtanh) and module.min_val == 0:  # ReLU6 is one
        return _Form('relu', dict(max_value=float(module.max_val)))
    if isinstance(module, (nn.ReLU, BReLU)):
        return _Form('relu', dict(max_value=getattr(module, 'max_value', None)), layout)
    if isinstance(module, (nn.LeakyReLU, BLeakyReLU)):
        return _Form('leaky_relu', dict(negative_slope=module.negative_slope), layout)
    if isinstance(module, (nn.PReLU, BPReLU)):
        return _Form('prelu', dict(weight=module.weight), layout)
    if isinstance(module, (nn.ELU, BELU)):
        return _Form('elu', dict(alpha=module.alpha), layout)
    if isinstance(module, (nn.SELU, BSELU)):
        return _Form('selu', {}, layout)
    return _Form(type(module).__name__, dict(approximate=getattr(module, 'approximate', None)))


def _make_activation(
        act: str,
        old: nn.Module,
        call: Call,
        layout: str,
        start: str,
        act_kwargs: dict[str, Any],
        like: torch.Tensor,
) -> tuple[nn.Module | None, bool]:
    """The activation to put in place of ``old`` (``None``: it is there already), and whether it starts as the same."""
    form = _form(old)
    if act in DYRELU:
        if isinstance(old, DyReLU) and old.mode == act[-1]:
            return None, True
        kwargs = dict(act_kwargs, channel_dim=_channel_dim(call), device=like.device, dtype=like.dtype)
        if start == 'fit' and form.kind not in ('relu', 'leaky_relu', 'prelu', 'dynamic'):
            alpha, beta = fit_pieces(old.f if isinstance(old, Bipolar) else old, kwargs.get('k', 2))
            kwargs = dict(alpha=alpha, beta=beta) | kwargs
        new = _make_dyrelu(act, form, call.shape[call.channel_dim], kwargs)
    elif act == 'bipolar' or act in BIPOLAR:
        new = _make_bipolar(act, old, form, dict(act_kwargs, layout=layout, channel_dim=_channel_dim(call)), like)
    else:
        new = _make_plain(act, old, form, act_kwargs, like)
    exact = form.same_function(_form(new))
    if exact and type(new) is type(old) and form.layout == _form(new).layout:
        return None, True
    return new, exact


def _make_dyrelu(act: str, form: _Form, channels: int, kwargs: dict[str, Any]) -> nn.Module:
    kind, options = form.canonical()
    slope = options['negative_slope'] if kind == 'leaky_relu' else None
    if kind == 'relu':
        kwargs.setdefault('max_value', options['max_value'])
    if slope is not None:
        kwargs.setdefault('alpha', (1.0,) + (slope,) * (kwargs.get('k', 2) - 1))
    return create_act_layer(act, channels=channels, **kwargs)


def _make_bipolar(act: str, old: nn.Module, form: _Form, kwargs: dict[str, Any], like: torch.Tensor) -> nn.Module:
    if act == 'bipolar':
        act = next((member for member, kind in BIPOLAR.items() if kind == form.kind), act)
    if act == 'bipolar':
        return create_act_layer(act, f=old.f if isinstance(old, Bipolar) else old, **kwargs)
    options = form.options if BIPOLAR[act] == form.kind else {}
    return _create_with(act, {**options, **kwargs}, old, like)


def _make_plain(act: str, old: nn.Module, form: _Form, kwargs: dict[str, Any], like: torch.Tensor) -> nn.Module:
    ours = isinstance(old, (DyReLU, *_BIPOLAR_TYPES))
    options = dict(form.options) if ours and act == form.kind and act in BIPOLAR.values() else {}
    if act == 'relu':
        bound = options.pop('max_value', None)
        if bound is not None:
            return nn.ReLU6(inplace=_inplace(old)) if bound == 6 else nn.Hardtanh(0., bound, inplace=_inplace(old))
    new = _create_with(act, {**options, **kwargs}, old, like)
    if isinstance(old, Bipolar) and type(new) is type(old.f):
        return old.f  # with the options that it was made with
    return new


def _create_with(act: str, kwargs: dict[str, Any], old: nn.Module, like: torch.Tensor) -> nn.Module:
    weight = kwargs.pop('weight', None)
    if weight is None:
        return create_act_layer(act, inplace=_inplace(old), **kwargs)
    new = create_act_layer(act, num_parameters=weight.numel(), **kwargs).to(like)
    with torch.no_grad():
        new.weight.copy_(weight)
    return new


def _inplace(module: nn.Module) -> bool:
    return bool(getattr(module.f if isinstance(module, Bipolar) else module, 'inplace', False))


def _layout_signs(layout: str | None, channels: int) -> torch.Tensor:
    signs = torch.ones(channels) if layout is None else channel_signs(channels, layout)
    return signs.to(device='cpu', dtype=torch.int64)


def _pattern(module: nn.Module, call: Call) -> torch.Tensor:
    """The channel signs under which the module, as it is, commutes with the plain form."""
    return _layout_signs(getattr(module, 'layout', None), call.shape[call.channel_dim])


def _channel_dim(call: Call) -> int | None:
    """1 or -1, as the operators take it; ``None`` if the channels are elsewhere or nobody knows where."""
    dim = call.channel_dim
    return 1 if dim == 1 else -1 if dim is not None and dim == len(call.shape) - 1 else None


# Pools, and other modules that take part in the flip as a whole


def _is_wrapped(module: nn.Module) -> bool:
    """Whether this is the bipolar form of something other than an activation."""
    if isinstance(module, Bipolar):
        return isinstance(module.f, nn.Module) and not isinstance(module.f, _ACTIVATIONS)
    return isinstance(module, BipolarMaxPool2d)


def _with_layout(pool: nn.Module, layout: str | None) -> nn.Module:
    """A pool (or other module), plain or bipolar, in the form for this layout."""
    if isinstance(pool, Bipolar):
        pool = pool.f
    if type(pool) not in (nn.MaxPool2d, BipolarMaxPool2d):
        return pool if layout is None else Bipolar(pool, layout=layout)
    return nn.MaxPool2d(**_pool_args(pool)) if layout is None else BipolarMaxPool2d(**_pool_args(pool), layout=layout)


def _pool_args(pool: nn.Module) -> dict[str, Any]:
    names = ('kernel_size', 'stride', 'padding', 'dilation', 'ceil_mode')
    return {name: getattr(pool, name) for name in names}


def _group_matcher(model: nn.Module, coarse: bool = False) -> dict[str, Any]:
    """timm's parameter groups for layer-wise decay, with each Dynamic ReLU in the group of what stands before it."""
    matcher = type(model).group_matcher(model, coarse=coarse)
    if not isinstance(matcher, dict):
        return matcher
    matcher = dict(matcher)
    specs = {
        group: [spec[0] for spec in specs] if isinstance(specs, (list, tuple)) else [specs]
        for group, specs in matcher.items() if specs is not None
    }
    unplaced = {f'{name}.fc1_weight': name for name, module in model.named_modules() if isinstance(module, DyReLU)}
    group = None
    for name, _ in model.named_parameters():
        found = next((g for g, patterns in specs.items() if any(re.match(p, name) for p in patterns)), None)
        if found is not None:
            group = found
        elif name in unplaced and group is not None:
            pattern, spec = rf'^{re.escape(unplaced[name])}\.', matcher[group]
            matcher[group] = f'{spec}|{pattern}' if isinstance(spec, str) else [*spec, (pattern, None)]
    return matcher


# The dry run


def _dry_run(model: nn.Module, input_size: tuple[int, int, int] | None) -> Trace:
    if input_size is not None and (len(input_size) != 3 or min(input_size) < 1):
        raise ValueError(f'input_size must be a positive (C, H, W), got {input_size!r}.')
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    sizes = [tuple(input_size)] if input_size is not None else _input_sizes(model)
    for size in sizes:
        # A generator of its own: the user's random state stays as it is.
        x = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
        try:
            return trace_forward(model, x.to(device=like.device, dtype=like.dtype))
        except (RuntimeError, AssertionError, ValueError):
            if size == sizes[-1]:
                raise
    raise AssertionError('unreachable')


def _input_sizes(model: nn.Module) -> list[tuple[int, int, int]]:
    """Input sizes to try: a small one if the model takes any, the one that it was made for."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    channels, height, width = cfg.get('input_size', (3, 224, 224))
    first_conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first_conv is not None:
        channels = getattr(model, 'in_chans', first_conv.in_channels)
    full = (channels, height, width)
    small = (channels, min(height, 64), min(width, 64))
    return [full] if cfg.get('fixed_input_size', False) or small == full else [small, full]


def _check_choice(name: str, value: str | None, accepted: tuple[str | None, ...]) -> None:
    if value not in accepted:
        raise ValueError(f'{name} must be one of {", ".join(map(repr, accepted))}, got {value!r}.')


def _nothing_found(act: str | None, pool: str | None, norm: str | None, report: ConversionReport) -> str:
    asked = ', '.join(f'{k}={v!r}' for k, v in dict(act=act, pool=pool, norm=norm).items() if v is not None)
    reasons = ''.join(f'\n  {s.name} ({s.kind}): {s.reason}' for s in report.skipped[:20])
    return f'Nothing in this model can be replaced for {asked}.{reasons}'
