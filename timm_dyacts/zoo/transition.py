"""Variants that are created with ``transition=True``: which checkpoints they take, and what is on record of them."""
import inspect
from collections.abc import Mapping
from typing import Any

from timm.models import PretrainedCfg, build_model_with_cfg
from torch import nn

from ..convert.transition import transitions

__all__ = ['check_start', 'record_start']


def check_start(name: str, kwargs: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if a checkpoint of a variant itself is to start a transition: it is at the end of one.

    Args:
        name: Name of the variant.
        kwargs: What timm passes to its entrypoint.
    """
    cfg = kwargs.get('pretrained_cfg')
    cfg = cfg.to_dict() if isinstance(cfg, PretrainedCfg) else cfg
    if 'pretrained_model_args' not in inspect.signature(build_model_with_cfg).parameters:
        return  # older releases of timm do not say what is of the checkpoint, and what of the user
    source = cfg.get('source') if isinstance(cfg, Mapping) else None
    saved = kwargs.get('pretrained_model_args') or {}
    if source in ('hf-hub', 'local-dir') and not saved.get('transition'):
        raise ValueError(
            f'transition must be left out for this checkpoint, which is one of {name} itself, got True: a transition '
            f'starts from a checkpoint of the base.')


def record_start(model: nn.Module, warm_start: str | None, takes_start: bool) -> None:
    """Note in a model what makes its transition, and what was said of its base does not say.

    Args:
        model: The variant, as built.
        warm_start: That of the variant without a transition.
        takes_start: Whether ``start`` is one of the options of the variant. Its default is another one in a
            transition, and no entry of the state dict, so it has to be saved by name.
    """
    if not transitions(model):
        return
    if takes_start:
        model._model_args = {'start': 'fit', **getattr(model, '_model_args', {})}  # timm adds what it was created with
    notes = model.pretrained_cfg.get('notes') or ()
    notes = tuple(
        note.replace(f'warm start {warm_start}', 'warm start exact, by transition') if isinstance(note, str) else note
        for note in notes)
    if notes:
        model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, 'notes': notes}
