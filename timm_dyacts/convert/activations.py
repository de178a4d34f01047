"""Activations: which of a network's are replaced, and by what."""
import re
from collections.abc import Container, Iterable
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from timm.layers import create_act_layer
from torch import nn

from ..layers.calls import ByWidth, InTurn
from ..layers.forms import Form, Place, static_form
from ..modes import evaluating
from ..operators import OPERATORS, activation_types, is_mirrored, module_types
from ..piecewise_fit import fit_pieces
from .arguments import PLACES, Request
from .flip import flip_signs, is_wrapped, update_mark
from .groups import update_group_matcher
from .probe import REFUSALS
from .report import ConversionError
from .stand_ins import SpreadMeta
from .step import Step
from .trace import Call
from .transition import as_transition

__all__ = ['swap_activations']

# What activations call, and what is a function call elsewhere
_FUNCTIONS = frozenset({
    'celu', 'elu', 'gelu', 'hardswish', 'hardtanh', 'leaky_relu', 'mish', 'prelu', 'relu', 'relu6', 'selu', 'silu',
    'softplus',
})
# Maxima of lines, as a Dynamic ReLU starts anyhow
_PIECEWISE_LINEAR = ('relu', 'leaky_relu')


class _Swap(NamedTuple):
    """An activation, what is put in its place, and whether that starts as the same function."""
    old: nn.Module
    new: nn.Module
    exact: bool


def swap_activations(step: Step, request: Request) -> None:
    """Replace the activations of a model.

    Args:
        step: The step to take.
        request: With ``act``, and the options for it.

    Raises:
        ConversionError: If no sign flip fits, or ``act_kwargs`` has no effect.
    """
    operator = OPERATORS.get(request.act)
    has_width = request.has_width
    types = activation_types()
    candidates = step.find(lambda module: isinstance(module, types) and not is_wrapped(module), _FUNCTIONS)
    head = _find_head(step) if has_width else frozenset()
    early = _find_early(step, candidates, head) if has_width and request.where == 'late' else frozenset()
    swaps = []
    by_width = 0
    for module in candidates:
        calls = step.trace.calls_of(module)
        reason = _reason_to_skip(step, module)
        if not reason and has_width:
            reason = 'in the classifier head' if module in head else _reason_of_width(step, module, request, early)
        if reason:
            step.skip(module, reason)
        elif has_width and operator.is_one(module):
            step.already = True
        else:
            new, exact = _build_for(step, module, calls, request)
            if isinstance(new, ByWidth):
                by_width += 1
            if exact and _is_same(module, new):
                step.already = True
            else:
                swaps.append(_Swap(module, new, exact))

    if request.act_kwargs and step.already and not swaps:
        raise ConversionError(
            f'act_kwargs={dict(request.act_kwargs)!r} has no effect: all activations are {request.act!r} already.')
    if any(static_form(old).layout != static_form(new).layout for old, new, _ in swaps):
        swaps = flip_signs(step, swaps)
    for old, new, exact in swaps:
        step.replace(old, new, exact)
    if by_width:
        step.report.notes.append(
            'called with several numbers of channels from one place, so that each number has got an operator: '
            f'{by_width}')
    update_group_matcher(step.edits)
    if swaps:
        update_mark(step, [swap.new for swap in swaps])


def _is_same(old: nn.Module, new: nn.Module) -> bool:
    return type(new) is type(old) and static_form(old).layout == static_form(new).layout


# Which


def _reason_to_skip(step: Step, module: nn.Module) -> str | None:
    if not step.trace.is_on_main_path(module):
        return 'inside a gate' if step.trace.reaches_output(module) else 'what it gives does not reach the output'
    dims = {_channel_dim(call) for call in step.trace.calls_of(module)}
    if len(dims) > 1 or None in dims:
        return 'in which dimension its channels are cannot be told'
    return None


def _reason_of_width(
        step: Step,
        module: nn.Module,
        request: Request,
        early: Container[nn.Module],
) -> str | None:
    where = request.option('where')
    if where not in PLACES and not any(fnmatchcase(name, where) for name in step.trace.names[module]):
        return f'not one of where={where!r}'
    if module in early:
        return f'in the first half of the activations (where={where!r})'
    if where in ('inner', 'late') and _is_after_addition(step, module):
        return f'after the addition of a bottleneck block (where={where!r})'
    return None


def _find_early(step: Step, candidates: Iterable[nn.Module], head: Container[nn.Module]) -> set[nn.Module]:
    """The first half of the backbone's activations, in the order in which a forward pass gets to them.

    That order does not depend on the size of the input. All activations count, whether or not one of them can be
    replaced; of an odd number, the one in the middle is in the second half.
    """
    trace = step.trace
    backbone = [module for module in candidates if module not in head and trace.is_on_main_path(module)]
    backbone.sort(key=lambda module: trace.calls_of(module)[0].start)
    return set(backbone[:len(backbone) // 2])


def _find_head(step: Step) -> set[nn.Module]:
    """The modules that run in the model's ``forward`` but not in its ``forward_features``."""
    if not hasattr(step.model, 'forward_features'):
        return set()
    reached: set[nn.Module] = set()
    handles = [m.register_forward_pre_hook(lambda m, args: reached.add(m)) for m in step.model.modules()]
    try:
        with evaluating(step.model), torch.no_grad(), SpreadMeta():
            step.model.forward_features(step.trace.given.clone().first)
    except REFUSALS:  # a method of this name that is not timm's
        return set()
    finally:
        for handle in handles:
            handle.remove()
    return step.trace.calls_by_module.keys() - reached


def _is_after_addition(step: Step, module: nn.Module) -> bool:
    parent = step.model.get_submodule(step.trace.name(module).rpartition('.')[0])
    if isinstance(parent, InTurn):
        parent = step.model.get_submodule(step.trace.name(module).rpartition('.')[0].rpartition('.')[0])
    in_bottleneck = any(re.search(r'Bottle\d?neck', cls.__name__, re.IGNORECASE) for cls in type(parent).__mro__)
    return in_bottleneck and any(
        call.producer is not None and call.producer.name == 'add' and len(call.producer.inputs) == 2
        for call in step.trace.calls_of(module))


def _channel_dim(call: Call) -> int | None:
    """1 or -1, as the operators take it; ``None`` if the channels are elsewhere or nobody knows where."""
    dim = call.channel_dim
    return 1 if dim == 1 else -1 if dim is not None and dim == len(call.shape) - 1 else None


# By what


def _build_for(step: Step, module: nn.Module, calls: list[Call], request: Request) -> tuple[nn.Module, bool]:
    """Make what takes the place of an activation. Give it, and whether it starts as what is there."""
    like, form = step.like, static_form(module)
    widths = {call.channels: _channel_dim(call) for call in calls}
    if not request.has_width:
        widths = dict([next(iter(widths.items()))])
    places = {width: Place(module, width, dim, like.device, like.dtype) for width, dim in widths.items()}
    built = {width: _build(request, form, place) for width, place in places.items()}
    if request.transition:
        for width, (new, exact) in built.items():
            if not exact:
                old = _with_layout(places[width], static_form(new).layout)
                built[width] = as_transition(step, old, new), exact
    if len(built) == 1:
        return next(iter(built.values()))
    operators = {width: new.train(module.training) for width, (new, _) in built.items()}
    return ByWidth(operators, widths.popitem()[1]), all(exact for _, exact in built.values())


def _build(request: Request, form: Form, place: Place) -> tuple[nn.Module, bool]:
    """Make the activation for a place. Give it, and whether it starts as what is there."""
    operator = OPERATORS.get(request.act)
    kwargs = dict(request.act_kwargs or {})
    if operator is None:
        new = _build_plain(request.act, form, place, kwargs)
    else:
        if 'layout' in operator.options:
            kwargs['layout'] = request.option('layout')
        if 'start' in operator.options and request.option('start') == 'fit' and _can_be_fitted(form, place.module):
            alpha, beta = fit_pieces(_plain_function(form, place.module), kwargs.get('k', 2))
            kwargs = dict(alpha=alpha, beta=beta) | kwargs
        new = operator.build_activation(form, place, **kwargs)
    return new, form.same_function(static_form(new))


def _build_plain(act: str, form: Form, place: Place, kwargs: dict[str, Any]) -> nn.Module:
    ours = isinstance(place.module, module_types('act'))
    options = dict(form.options) if ours and act == form.kind else {}
    kwargs = dict(inplace=place.inplace) | kwargs
    if act == 'relu':
        bound = options.pop('max_value', None)
        if bound is not None:
            return nn.ReLU6(**kwargs) if bound == 6 else nn.Hardtanh(0., bound, **kwargs)
    weight = options.pop('weight', None)
    if weight is not None:
        options['num_parameters'] = weight.numel()
    new = create_act_layer(act, **(options | kwargs))
    new.to(place.device, place.dtype)
    if weight is not None:
        with torch.no_grad():
            new.weight.copy_(weight)
    inner = getattr(place.module, 'f', None)
    return inner if is_mirrored(place.module) and type(inner) is type(new) else new  # with its own options


def _with_layout(place: Place, layout: str | None) -> nn.Module:
    """The activation that is there, in the form for a channel layout: the same function, once the signs are flipped."""
    form = static_form(place.module)
    if form.layout == layout:
        return place.module
    if layout is not None:
        return OPERATORS['bipolar'].build_activation(form, place, layout=layout)
    return place.module.f if hasattr(place.module, 'f') else _build_plain(form.kind, form, place, {})


def _can_be_fitted(form: Form, module: nn.Module) -> bool:
    """Whether a maximum of lines would have to approximate an activation, and may: it has no parameters."""
    return form.kind not in _PIECEWISE_LINEAR and next(module.parameters(), None) is None


def _plain_function(form: Form, module: nn.Module) -> nn.Module:
    if not is_mirrored(module):
        return module
    return module.f if hasattr(module, 'f') else create_act_layer(form.kind, **form.options)
