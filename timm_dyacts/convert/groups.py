"""Parameter groups: timm's, which layer-wise learning rates are made from, with the parameters of our operators."""
import re
from functools import partial
from typing import Any

from torch import nn

from ..operators import operator_parameters
from .edits import Edits

__all__ = ['group_matcher', 'update_group_matcher']

_NAME = 'group_matcher'


def update_group_matcher(edits: Edits) -> None:
    """Give a model the ``group_matcher`` below if its operators have parameters, its own again if they have none."""
    model = edits.model
    if not hasattr(type(model), _NAME):
        return
    own = vars(model).get(_NAME)
    is_ours = isinstance(own, partial) and own.func is group_matcher
    if operator_parameters(model) and own is None:
        edits.set_attribute(model, _NAME, partial(group_matcher, model))
    elif is_ours and not operator_parameters(model):
        edits.delete_attribute(model, _NAME)


def group_matcher(model: nn.Module, coarse: bool = False) -> dict[str, Any]:
    """Give timm's parameter groups for layer-wise decay.

    An operator whose parameters no pattern of the model matches is put into the group of what stands before it.

    Args:
        model: A timm model.
        coarse: As timm has it.
    """
    matcher = type(model).group_matcher(model, coarse=coarse)
    if not isinstance(matcher, dict):
        return matcher
    matcher = dict(matcher)
    specs = {
        group: [spec[0] for spec in specs] if isinstance(specs, (list, tuple)) else [specs]
        for group, specs in matcher.items() if specs is not None
    }
    unplaced = {name: name.rpartition('.')[0] for name in operator_parameters(model)}
    placed = set()
    group = None
    for name, _ in model.named_parameters():
        found = next((g for g, patterns in specs.items() if any(re.match(p, name) for p in patterns)), None)
        owner = unplaced.get(name)
        if found is not None:
            group = found
        elif owner is not None and group is not None and owner not in placed:
            placed.add(owner)
            pattern, spec = rf'^{re.escape(owner)}\.', matcher[group]
            matcher[group] = f'{spec}|{pattern}' if isinstance(spec, str) else [*spec, (pattern, None)]
    return matcher
