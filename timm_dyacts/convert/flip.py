"""The sign flip of a model: the weights take the signs in, and pools and other modules their bipolar form.

See ``signs`` for how the signs are found.
"""
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from timm.layers import AdaptiveAvgMaxPool2d
from torch import Tensor, nn

from ..layers import Bipolar, BipolarMaxPool2d, channel_signs
from ..layers.forms import static_form
from ..layers.pooling import window_arguments
from ..operators import activation_types, is_mirrored
from .report import ConversionError
from .signs import SignConflict, SignFlip, solve_signs
from .step import Step
from .trace import Call

__all__ = ['flip_signs', 'is_wrapped', 'update_mark']

_MAX_POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    AdaptiveAvgMaxPool2d,
)
# Plain and bipolar weights have the same names and shapes. A buffer of this name, an entry of the state dict, tells
# them apart, so that neither can be loaded into the other by mistake.
_MARK = 'bipolar'

_Swap = TypeVar('_Swap', bound=tuple)


def flip_signs(step: Step, swaps: Sequence[_Swap]) -> list[_Swap]:
    """Flip the signs of a model for activations that are about to be replaced.

    Args:
        step: The step to take.
        swaps: Tuples that begin with the activation that is there and the one that is to take its place.

    Returns:
        The swaps that the signs are flipped for: all, but for activations behind the last weights where the rest of the
        model needs the sign of what they give, as a detector does that takes distances from it.

    Raises:
        ConversionError: If no sign flip keeps the function. Names the module where the signs contradict each other.
    """
    swaps = list(swaps)
    try:
        flip, new_pools = _find_flip(step, swaps)
    except SignConflict as e:
        flips = [swap for swap in swaps if static_form(swap[0]).layout != static_form(swap[1]).layout]
        final = [swap for swap in flips if step.trace.is_behind_weights(swap[0])]
        rest = [swap for swap in swaps if swap not in final]
        try:
            if not final:
                raise
            flip, new_pools = _find_flip(step, rest)
        except SignConflict:
            raise ConversionError(
                f'No sign flip keeps the function of this model: {e}. Nothing was changed.') from None
        for old, *_ in final:
            step.skip(old, 'behind the last weights, and what is computed from it needs its sign')
        swaps = rest
    step.edits.multiply(flip.factors)
    for old, new in new_pools:
        step.replace(old, new, True)
    unread = [name for name, p in step.model.named_parameters() if id(p) not in step.trace.uses]
    if unread:
        step.report.notes.append(
            f'not read in eval mode, so not part of the flip and not exact in training: {", ".join(unread)}')
    if flip.flips_output:
        step.output_signs = flip.outputs
        step.report.flipped_output = True
        step.report.notes.append('the sign of the odd output channels is flipped: the model ends in an activation')
    return swaps


def _find_flip(step: Step, swaps: Sequence[_Swap]) -> tuple[SignFlip, list[tuple[nn.Module, nn.Module]]]:
    """Find the signs, and the pools that get another form.

    Raises:
        SignConflict: If there are none.
    """
    anchors = [
        (call, _layout_signs(old, call.channels) * _layout_signs(new, call.channels))
        for old, new, *_ in swaps for call in step.trace.calls_of(old)
    ]
    pools = [
        call for call in step.trace.calls
        if is_wrapped(call.module) or isinstance(call.module, _MAX_POOLS) and isinstance(call.output, Tensor)
    ]
    tensors = {id(t): t for t in (*step.model.parameters(), *step.model.buffers())}
    try:
        flip = solve_signs(step.trace, anchors, pools, tensors)
        return flip, _new_pools(step, flip)
    except SignConflict:
        # Gates and norms that mix channels and computed weights do not commute with signs, but can be wrapped.
        flip = solve_signs(step.trace, anchors, [*pools, *_wrappable(step, anchors)], tensors)
        return flip, _new_pools(step, flip)


def is_wrapped(module: nn.Module) -> bool:
    """Whether a module is the bipolar form of something other than an activation."""
    if isinstance(module, Bipolar):
        return isinstance(module.f, nn.Module) and not isinstance(module.f, activation_types())
    return isinstance(module, BipolarMaxPool2d)


def update_mark(step: Step, new: Iterable[nn.Module]) -> None:
    """Mark a model as bipolar in its state dict if new activations are, else take a mark away that holds no more."""
    has_mark = _MARK in step.model._buffers
    if any(is_mirrored(module) for module in new):
        if not has_mark:
            step.edits.register_buffer(_MARK, torch.ones((), dtype=torch.uint8, device=step.like.device))
    elif has_mark:
        types = activation_types()
        if not any(isinstance(module, types) and is_mirrored(module) for module in step.model.modules()):
            step.edits.delete_buffer(_MARK)


def _new_pools(step: Step, flip: SignFlip) -> list[tuple[nn.Module, nn.Module]]:
    """The pools, and what else was taken as a whole, that need another form, each with that form."""
    wanted: dict[nn.Module, str | None] = {}
    for call, *signs in flip.pools:
        signs = [s * _layout_signs(call.module, len(s)) for s in signs]
        fitting = (
            layout for layout in (None, 'interleaved', 'halves')
            if all(torch.equal(s, _signs(layout, len(s))) for s in signs))
        layout = next(fitting, '')
        if layout == '' or wanted.setdefault(call.module, layout) != layout:
            raise SignConflict(step.trace.name(call.module), 'its channel signs are neither plain nor bipolar')
    return [
        (module, _with_layout(module, layout)) for module, layout in wanted.items()
        if layout != getattr(module, 'layout', None)
    ]


def _wrappable(step: Step, anchors: Sequence[tuple[Call, Tensor]]) -> Iterator[Call]:
    """Calls of gates, ``x * g(x)``, of norms, scales and shifts, and of convolutions that compute their weight."""
    starts = [call.start for call, _ in anchors]
    for module in step.model.modules():
        calls = step.trace.calls_of(module)
        if len(calls) != 1 or not isinstance(calls[0].output, Tensor) or calls[0].shape is None:
            continue
        call, = calls
        last = step.trace.ops[call.stop - 1] if call.span else None
        if call.channel_dim != 1 or last is None or not any(t is call.output for t in last.outputs):
            continue
        if any(start in call.span for start in starts):
            continue  # an activation that is replaced has signs of its own
        own = {id(p) for p in module.parameters(recurse=False)}
        is_gate = last.name == 'mul' and any(t is call.input for t in last.inputs) and call.output.ndim == 4
        is_affine = last.name in ('add', 'mul') and any(id(t) in own for t in last.inputs)
        computes_weight = isinstance(module, nn.Conv2d) and last.name == 'convolution' \
            and last.args[1] is not module.weight
        if is_gate or is_affine or computes_weight or isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            yield call


def _with_layout(module: nn.Module, layout: str | None) -> nn.Module:
    """A pool or other module, plain or bipolar, in the form for a layout."""
    if isinstance(module, Bipolar):
        module = module.f
    if type(module) not in (nn.MaxPool2d, BipolarMaxPool2d):
        return module if layout is None else Bipolar(module, layout=layout)
    if layout is None:
        return nn.MaxPool2d(**window_arguments(module))
    return BipolarMaxPool2d.in_place_of(module, layout=layout)


def _layout_signs(module: nn.Module, channels: int) -> Tensor:
    """The channel signs under which a module, as it is, commutes with its plain form."""
    return _signs(getattr(module, 'layout', None), channels)


def _signs(layout: str | None, channels: int) -> Tensor:
    signs = torch.ones(channels) if layout is None else channel_signs(channels, layout)
    return signs.to(device='cpu', dtype=torch.int64)
