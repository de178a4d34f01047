"""Transitions: an exact start for operators that do not compute what was there before.

``convert(model, ..., transition=True)`` puts ``Transition(old, new)`` where the new operator alone would change the
function. ``set_transition`` moves all of a model's transitions, ``finish_transition`` leaves the new operators alone.
"""
import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..layers import Subsample, Transition
from ..layers.forms import static_form
from ..layers.transition import check_t
from ..operators import activation_types
from .edits import Edits
from .groups import update_group_matcher
from .report import ConversionError, ConversionReport
from .step import Step
from .trace import Call, Op, trace_forward

__all__ = [
    'REFUSED',
    'as_transition',
    'check_finished',
    'check_sizes',
    'finish_transition',
    'get_transition',
    'idle_parameters',
    'reason_against_subsampling',
    'set_transition',
    'subsampling_of',
    'transitions',
]

# What the reason of a place begins with that is left alone because no transition leads to the new operator there
REFUSED = 'no transition'

# Done for each position by itself, though not marked so in ATen
_AT_EACH_POSITION = frozenset({
    '_native_batch_norm_legit_no_training', 'alias', 'cat', 'detach', 'hardswish', 'hardtanh', 'prelu', '_prelu_kernel',
})
# As well, unless they take the statistics of the batch
_BATCH_NORMS = frozenset({'cudnn_batch_norm', 'native_batch_norm'})


# A model with transitions


def transitions(model: nn.Module) -> list[Transition]:
    """Give the transitions of a model, none if it has no unfinished ones."""
    return [module for module in model.modules() if isinstance(module, Transition)]


def get_transition(model: nn.Module) -> float | None:
    """Give ``t`` of a model, ``None`` if it has no unfinished transitions.

    Args:
        model: Any model, also one that is wrapped or compiled.

    Returns:
        From 0 to 1: of modules that are not at the same ``t`` the smallest one.
    """
    return min((module.get() for module in transitions(model)), default=None)


def set_transition(model: nn.Module, t: float) -> nn.Module:
    """Set ``t`` of all transitions of a model: ``y = (1 - t) * old(x) + t * new(x)``.

    Args:
        model: A model that was converted with ``transition=True``, also a wrapped or compiled one.
        t: From 0, where the model computes what it did before, to 1, where it is the converted one.

    Returns:
        The model.

    Raises:
        ValueError: If ``t`` is not a number from 0 to 1, or the model has no unfinished transitions.
    """
    check_t(t)
    for module in _require(model):
        module.set(t)
    return model


def finish_transition(model: nn.Module) -> nn.Module:
    """Leave the new operators alone, in place: the model is then as if converted without ``transition``.

    It has the same entries in its state dict, and ``timm`` saves it as the plain variant. At ``t = 1`` this does not
    change what the model computes. Before, it does: the operators jump to the new ones, which the weights have not been
    trained with.

    Args:
        model: A model that was converted with ``transition=True``, at any ``t``.

    Returns:
        The model, with ``model.conversion`` brought up to date.

    Raises:
        ValueError: If the model has no unfinished transitions, or is itself one.
    """
    _require(model)
    if isinstance(model, Transition):
        raise ValueError('model is itself a Transition, which cannot be replaced in it: take model.new')
    reports = {
        module: _finished(module) for module in model.modules()
        if isinstance(vars(module).get('conversion'), ConversionReport)
    }
    for name, module in _places(model):
        parent, _, child = name.rpartition('.')
        setattr(model.get_submodule(parent), child, module.new.train(module.training))
    for module, report in reports.items():
        module.conversion = report
        update_group_matcher(Edits(module))
    for module in model.modules():
        if 'transition' in vars(module).get('_model_args', {}):  # what timm saves a model with
            module._model_args = {k: v for k, v in module._model_args.items() if k != 'transition'}
    return model


def idle_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Give the parameters that are to be trained and get no gradient: those of the branches not computed at this t."""
    idle = [m.new if m.stage == 0 else m.old for m in transitions(model) if m.stage != 1]
    modules = [branch for branch in idle if isinstance(branch, nn.Module)]
    return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]


def check_finished(model: nn.Module) -> None:
    """Raise ``ConversionError`` if a model has unfinished transitions: what it is converted from is not one model."""
    t = get_transition(model)
    if t is not None:
        raise ConversionError(
            f'The model has unfinished transitions (t = {t:.4g}): call finish_transition(model) first, or ask for all '
            f'operators in one call.')


def _require(model: nn.Module) -> list[Transition]:
    found = transitions(model)
    if not found:
        raise ValueError(
            'The model has no unfinished transitions: convert(model, ..., transition=True) makes them, where the '
            'start is not exact anyway.')
    return found


def _places(model: nn.Module) -> Iterator[tuple[str, Transition]]:
    """The transitions of a model and their paths, all of them where one is shared."""
    named = list(model.named_modules(remove_duplicate=False))
    return ((name, module) for name, module in named if isinstance(module, Transition))


def _finished(model: nn.Module) -> ConversionReport:
    """Give what the report of a conversion will be when its transitions are finished."""
    report = model.conversion
    keys = set(model.state_dict())
    new_keys = set(report.new_keys)
    for name, module in _places(model):
        new_keys -= {key for key in keys if key.startswith(f'{name}.')}
        # What the module before had under the same name is not new.
        new_keys |= {f'{name}.{key}' for key in module.new.state_dict() if f'{name}.old.{key}' not in keys}
    return replace(
        report,
        replaced=[replace(r, exact=r.exact and not r.transition, transition=False) for r in report.replaced],
        function='approximate' if any(r.transition for r in report.replaced) else report.function,
        max_diff=None,
        scale=None,
        notes=[*(note for note in report.notes if note != report.transition_note), 'the transitions are finished'],
        new_keys=tuple(sorted(new_keys)),
    )


# While a model is converted


def as_transition(step: Step, old: nn.Module, new: nn.Module) -> Transition:
    """Put two modules together that compute different things."""
    return Transition(old, new, device=step.like.device)


def check_sizes(step: Step, name: str, old: nn.Module, new: nn.Module, size: Sequence[int]) -> None:
    """Raise ``ConversionError`` if two pools give outputs of different sizes: there is nothing in between then.

    Args:
        step: The step to take.
        name: The path of the place.
        old: What pools there.
        new: What is to pool there.
        size: Channels, height and width of its input, or as many spatial dimensions as it pools.
    """
    channels, *spatial = size
    stride = [new.stride] if isinstance(new.stride, int) else new.stride
    for more in range(2 * max(stride)):  # all remainders of a division by the stride
        x = torch.empty(1, channels, *(n + more for n in spatial), device='meta')
        before, after = (tuple(pool(x).shape[2:]) for pool in (old, new))
        if before != after:
            raise ConversionError(
                f"No transition leads to the new pool in '{name}': for an input of {tuple(x.shape[2:])} it gives "
                f'{after} values, and what is there gives {before}. Leave out transition, or choose pool_kwargs that '
                f'keep the size (ceil_mode?).')


def subsampling_of(convs: Sequence[nn.Conv2d]) -> Subsample:
    """Make the module that takes from the output of convolutions, with stride 1, what they give with their own stride.

    Args:
        convs: The convolutions as they are, all with the same stride; several share the channels out.
    """
    phases = [(conv.out_channels, *_phases(conv)) for conv in convs]
    if all(phase[1:] == phases[0][1:] for phase in phases):
        phases = phases[:1]
    return Subsample(tuple(convs[0].stride), phases)


def _phases(conv: nn.Conv2d) -> tuple[list[int], list[int]]:
    """The first row (column) of the output with stride 1 that is one with the stride, by the size of the former.

    The output of either begins where the padding puts the first window, and that is what they differ in. How a
    convolution pads is seen when it runs. Padding that depends on the input size does so by the remainder.
    """
    dense = copy.copy(conv)
    dense.stride = (1, 1)
    smallest = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    phases: tuple[list[int], list[int]] = ([0] * conv.stride[0], [0] * conv.stride[1])
    for more in range(max(conv.stride)):
        x = conv.weight.new_zeros(1, conv.in_channels, *(n + max(conv.stride) + more for n in smallest))
        strided, full = _begin(conv, x), _begin(dense, x)
        for axis in range(2):
            (at, _), (start, size) = strided[axis], full[axis]
            phases[axis][size % conv.stride[axis]] = start - at
    return phases


def _begin(conv: nn.Conv2d, x: Tensor) -> list[tuple[int, int]]:
    """How far before an input the first window begins, and the number of windows, for each axis."""
    trace = trace_forward(conv, x)
    index = next(i for i, op in enumerate(trace.ops) if op.name == 'convolution')
    before = list(trace.ops[index].args[4])
    for op in trace.ops[:index]:
        if op.name == 'constant_pad_nd':
            left, _, top, _ = (*op.args[1], 0, 0)[:4]
            before = [before[0] + top, before[1] + left]
    return list(zip(before, trace.output.shape[-2:], strict=True))


def reason_against_subsampling(step: Step, convs: Sequence[nn.Conv2d], call: Call) -> str | None:
    """Say what stands between strided convolutions and a place behind them that looks at several positions.

    There, it makes a difference whether positions are left out before or after.

    Args:
        step: The step to take.
        convs: The convolutions.
        call: The call of what is in that place.
    """
    trace = step.trace
    last = max(i for i in range(call.start) if trace.layer_of(trace.ops[i]) in convs)
    types = activation_types()
    skipped = {
        index for inner in trace.calls
        if isinstance(inner.module, types) and static_form(inner.module).kind != 'dynamic' for index in inner.span
    }
    for index in range(last + 1, call.start):
        op = trace.ops[index]
        if op.inputs and index not in skipped and not _is_at_each_position(op):
            return f'{REFUSED}: {op.name}, between it and the strided convolution, looks at several positions'
    return None


def _is_at_each_position(op: Op) -> bool:
    if op.name in _BATCH_NORMS:
        return not op.args[5]
    return op.name in _AT_EACH_POSITION or torch.Tag.pointwise in op.func.tags
