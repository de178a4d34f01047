"""``convert``: the steps of a conversion one after the other, each on the model as the one before has left it.

One dry run tells what every activation, pool and norm really does in the network (see ``trace``). What ``convert`` says
about the function being kept is checked on a probe batch before it returns, and a model that does not fit is left as it
was.
"""
import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..layers.calls import accept_old_entries, places_left_plain
from ..modes import evaluating
from ..operators import is_mirrored
from ..rng import get_rng_state, set_rng_state
from .activations import swap_activations
from .arguments import Request
from .edits import Edits, Snapshot
from .inputs import Inputs, probing
from .norms import fold_norms
from .places import Places
from .pools import swap_pools
from .probe import REFUSALS, Difference, compare_outputs, dry_run, probe_batch
from .report import ConversionError, ConversionReport, OutputsDiffer
from .step import Step
from .trace import Trace, trace_forward
from .transition import check_finished

__all__ = ['convert']

# The steps that can be asked for, in the order in which they are taken
_STEPS: dict[str, Callable[[Step, Request], None]] = dict(act=swap_activations, pool=swap_pools, norm=fold_norms)
# What one pass may take for the outputs to be compared unasked
_MOST_FLOPS = 1e12
# What a model lacks in which a step has not even found anything to leave alone
_ABSENT = dict(
    act=' It has no activation.',
    pool=' It has no max pool, and no strided convolution with a slot for an anti-aliasing layer.',
    norm=' It has no BatchNorm.',
)


def convert(
        model: nn.Module,
        act: str | None = None,
        pool: str | None = None,
        norm: str | None = None,
        *,
        where: str | None = None,
        layout: str | None = None,
        start: str | None = None,
        act_kwargs: dict[str, Any] | None = None,
        pool_kwargs: dict[str, Any] | None = None,
        input_size: Sequence[int] | None = None,
        transition: bool = False,
        example_inputs: Any = None,
        check: bool | None = None,
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

    Asked for together, they are the same as in turn: first ``act``, then ``pool``, then ``norm``, each on the model as
    the one before has left it. If one of them cannot be done, none is: max pools that ``act='brelu'`` made bipolar, for
    example, cannot become SoftPool.

    Where the new operator does not compute what was there, ``transition=True`` puts in both, as
    ``Transition(old, new)``: the function is kept exactly whatever the operator, and ``set_transition(model, t)``
    leads it to the new one while the model is trained. ``finish_transition(model)`` then leaves the model that is
    converted without. In batches that are not yet normalised (training mode) a convolution that lost its stride has
    the statistics of more positions; in eval mode the start is exact there, too.

    Args:
        model: Model to change, with or without trained weights.
        act: Activation to put in.
        pool: ``'softpool'``.
        norm: ``'none'``.
        where: For Dynamic ReLU only. ``'inner'`` keeps the plain activation after the addition of bottleneck blocks
            (these have the most channels and so would cost the most parameters), ``'all'`` replaces it too.
            ``'late'`` is ``'inner'`` in the second half of the network: of the activations outside gates and the
            classifier head, those that a forward pass gets to last. A wildcard such as ``'layer4.*'`` or
            ``'blocks.[3-6].*'`` names the activations by their paths in the model. Default: ``'inner'``.
        layout: For bipolar activations only: their channel layout, ``'interleaved'`` or ``'halves'``. Default:
            ``'interleaved'``.
        start: For Dynamic ReLU only: what it starts as where it cannot be the activation replaced (SiLU, GELU,
            hard-swish): ``'relu'``, or with ``'fit'`` the maximum of K lines that is nearest to it (see
            ``fit_pieces``). Default: ``'relu'``, and with ``transition`` ``'fit'``, to which the way is shorter. The
            lines are no part of the state dict: name ``start`` when the finished model is built again.
        act_kwargs: Further arguments for each new activation, e.g. ``dict(reduction=16)``.
        pool_kwargs: Further arguments for each new pool, e.g. ``dict(beta=2.0)``; they win over the old pool's.
        input_size: Size of the probe batch without its first dimension: ``(C, H, W)``, ``(C, L)`` or ``(C, D, H, W)``.
            Default: a small one that suits the model's config and its first convolution.
        transition: Whether to start exactly where the new operator does not compute what was there.
        example_inputs: What to call the model with in place of a probe batch: a tensor, a list of tensors (images of
            different sizes, for a detector), a tuple of positional arguments, a dictionary of keyword arguments, or a
            pair of a tuple and a dictionary, on the device of the model. For models that take anything but one batch.
        check: Whether to compare the outputs before and after on a probe batch. Default: unless one pass takes more
            than 1 TFLOP (5 to 25 s on two cores), as that of SAM at 1,024 pixels does. The model is then looked at
            without computing anything, and the report says ``unchecked`` for ``exact``.

    Returns:
        The model, with a ``ConversionReport`` as ``model.conversion``.

    Raises:
        ConversionError: If there is nothing to replace, or no sign flip fits, or the check fails, or the model does not
            take the probe batch, or has unfinished transitions. The model is then as it was, and the message says
            where it broke.
        ValueError: If an argument is not one of the accepted values, or cannot have an effect.
    """
    request = Request(
        act, pool, norm, where, layout, start, act_kwargs, pool_kwargs, input_size, transition, example_inputs)
    check_finished(model)
    # The signs are worked out on the CPU, also inside ``with torch.device('meta'):``.
    with torch.device('cpu'), _all_or_nothing(model) as edits, probing(model, resize=example_inputs is None):
        model.conversion = _convert(edits, request, check)
    return model


@contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[Edits]:
    """Leave the model and the random generators as they were if anything goes wrong."""
    device = next((p.device for p in model.parameters()), None)
    random_state = get_rng_state(device)
    edits, state = Edits(model), Snapshot(model)
    try:
        yield edits
    except BaseException:
        edits.undo()
        state.restore()
        set_rng_state(random_state, device)
        raise


def _convert(edits: Edits, request: Request, check: bool | None) -> ConversionReport:
    model = edits.model
    keys = set(model.state_dict())
    accepts_old_entries = bool(places_left_plain(model))
    trace = dry_run(model, request.input_size, request.example_inputs, float('inf') if check else _MOST_FLOPS)
    has_values = not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    is_costly = check is None and has_values and trace.given.is_meta
    check = check is not False and not trace.given.is_meta
    flops = trace.flops if is_costly else 0
    before, signs = trace.output, None
    places = Places(edits, trace, request)
    trace = places.trace
    report = ConversionReport()
    names = [name for name in _STEPS if getattr(request, name) is not None]
    for name in names:
        if check:
            step, trace = _take_checked_step(name, request, trace, edits)
        else:
            step = _take_step(name, request, trace, edits)
            trace = trace_forward(model, trace.given) if name != names[-1] else trace
        report.add(step.report)
        signs = step.output_signs or signs
    if check:
        difference = compare_outputs(before, trace.output, signs)
        if difference is None:
            report.leave_unchecked('the output holds no tensor that could be compared')
        else:
            report.max_diff, report.scale = difference.largest, difference.scale
    elif is_costly:
        report.leave_unchecked(
            f'the outputs were not compared, as one pass takes {flops / 1e12:.1f} TFLOPs: check=True compares them')
    if request.transition:
        report.notes.insert(0, report.transition_note)
    places.tidy(report)
    if not accepts_old_entries and places_left_plain(model):
        accept_old_entries(model)
    report.new_keys = tuple(sorted(set(model.state_dict()) - keys))
    return report


def _take_step(name: str, request: Request, trace: Trace, edits: Edits) -> Step:
    step = Step(trace, edits)
    _STEPS[name](step, request)
    if not step.report.replaced and not step.already:
        reasons = ''.join(f'\n  {s.name} ({s.kind}): {s.reason}' for s in step.report.skipped[:20]) or _ABSENT[name]
        raise ConversionError(
            f'Nothing in this model can be replaced for {name}={getattr(request, name)!r}.{reasons}')
    return step


def _take_checked_step(name: str, request: Request, trace: Trace, edits: Edits) -> tuple[Step, Trace]:
    """Take a step and compare the outputs. Give it, and the record of the model as it is then."""
    model, mark = edits.model, edits.mark()
    device = next((p.device for p in model.parameters()), None)
    random_state = get_rng_state(device)
    larger, before = _larger_input(model, name, request, trace)
    step = _take_step(name, request, trace, edits)
    after = trace_forward(model, trace.given)
    if not any(_find_differences(step, after, before, _output(model, larger))):
        return step, after

    # Some networks amplify rounding errors to the size of their outputs. In double precision these stay small.
    edits.undo(mark)
    twin = copy.deepcopy(model).to('cpu', torch.float64)
    larger = None if larger is None else larger.double()
    trace_of_twin, before = trace_forward(twin, trace.given.double()), _output(twin, larger)
    step = _take_step(name, request, trace_of_twin, Edits(twin))
    after = trace_forward(twin, trace_of_twin.given)
    difference, with_larger = _find_differences(step, after, before, _output(twin, larger))
    if difference is not None:
        raise OutputsDiffer(difference.largest, difference.scale, step.report.counts)
    if with_larger is not None:
        sizes = (tuple(inputs.first.shape[1:]) for inputs in (trace.given, larger))
        raise ConversionError(
            'No sign flip keeps the function of this model: one that fits inputs of {} does not fit those of {}, '
            'as positions are viewed as channels. Nothing was changed.'.format(*sizes))
    set_rng_state(random_state, device)
    step = _take_step(name, request, trace, edits)
    step.report.notes.append('the difference is rounding: a copy of the model in double precision kept its outputs')
    return step, trace_forward(model, trace.given)


def _larger_input(model: nn.Module, name: str, request: Request, trace: Trace) -> tuple[Inputs | None, Any]:
    """Give images of another size, and their output, for a step that flips signs.

    Where a network views positions as channels, as the attention of MA-Net does, the signs that fit one size may not
    fit another.
    """
    flips = request.has_signs or any(map(is_mirrored, model.modules()))
    is_given = request.input_size is not None or request.example_inputs is not None
    x = trace.given.first
    if name != 'act' or not flips or is_given or x.ndim != 4 or max(x.shape[2:]) > 128:
        return None, None
    larger = Inputs((probe_batch(model, [x.shape[1], *(size * 3 // 2 for size in x.shape[2:])]),), {})
    try:
        return larger, _output(model, larger)
    except REFUSALS:  # it is made for one size
        return None, None


@torch.no_grad()
def _output(model: nn.Module, inputs: Inputs | None) -> Any:
    if inputs is None:
        return None
    with evaluating(model):
        return inputs.clone().call(model)


def _find_differences(
        step: Step,
        after: Trace,
        larger_before: Any,
        larger_after: Any,
) -> tuple[Difference | None, Difference | None]:
    """Compare the outputs of the probe and those of the larger input, if the step should have kept them.

    Returns:
        The difference of either, ``None`` where rounding explains it.
    """
    if step.report.function != 'exact':
        return None, None
    found = [compare_outputs(step.trace.output, after.output, step.output_signs), None]
    if step.output_signs is None:
        found[1] = compare_outputs(larger_before, larger_after)
    first, second = (None if d is None or d.is_rounding else d for d in found)
    return first, second
