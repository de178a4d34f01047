"""What names of variants would give: found out on the meta device, where a model takes no memory and no time."""
import fnmatch
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import timm
import torch
from timm.models import is_model
from torch import nn

from ..convert import ConversionError, ConversionReport, finish_transition
from ..convert.transition import REFUSED, transitions
from .registry import bases, find_variant, parse, suggest

__all__ = ['Preview', 'preview', 'resolve_warm_start', 'select_names']


@dataclass(frozen=True)
class Preview:
    """What a name gives.

    Attributes:
        name: The name.
        base: timm's architecture that the model is made from.
        start: How the model starts with weights of its base: ``'exact'`` if it computes what the base does, up to
            rounding; ``'exact by transition'`` if it does with ``transition=True``, and only then; ``'approximate'`` if
            it does not. ``'refused'`` if there is no such model.
        replaced: How many modules of each kind are replaced, e.g. ``{'ReLU -> BReLU': 17}``.
        skipped: How many candidates are left alone.
        base_params: Parameters of the base.
        params: Parameters of the model, ``None`` if it is refused; of one that starts in a transition, those that it
            has at its end.
        reason: Why it is refused, else empty.
    """
    name: str
    base: str
    start: str
    replaced: dict[str, int] = field(default_factory=dict)
    skipped: int = 0
    base_params: int = 0
    params: int | None = None
    reason: str = ''


def select_names(patterns: Iterable[str], operators: Iterable[str]) -> list[str]:
    """Give the names of variants that patterns stand for, registered or not, sorted as timm sorts architectures.

    Args:
        patterns: Each an architecture of timm, a wildcard for some, a part of their names, or the name of a variant.
        operators: What follows the architectures in the names, e.g. ``'dyrelu_b'`` or ``'brelu_nobn'``.

    Raises:
        ValueError: A pattern that matches nothing. Names those that are close.
    """
    known = bases()
    found: dict[str, Collection[str]] = {}  # by architecture, in the order of the operators
    for pattern in patterns:
        if pattern in known:
            matches = {pattern}
        elif is_model(pattern):
            variant = parse(pattern)
            found[variant.base] = dict.fromkeys((*found.get(variant.base, ()), variant.name))
            continue
        else:
            matches = set(fnmatch.filter(known, pattern if set(pattern) & set('*?[') else f'*{pattern}*'))
        if not matches:
            raise ValueError(f'No architecture of timm matches {pattern!r}.{suggest(pattern)}')
        for base in matches:
            names = (f'{base}_{operator}' for operator in operators)
            found[base] = dict.fromkeys((*found.get(base, ()), *names))
    return [name for base in known for name in found.get(base, ())]


def preview(names: Iterable[str], **options: Any) -> Iterator[Preview]:
    """Find out what names give, one after the other.

    Args:
        names: Names of variants, those of one architecture together.
        **options: Options of ``convert`` that ``timm.create_model`` takes for them, e.g. ``where='late'``. With
            ``transition=False``, what a transition would make exact is ``'approximate'``.

    Raises:
        ValueError: A name that does not follow the grammar, or an option that is none of a variant.
    """
    for name in names:
        base = parse(name).base
        base_params = _count_base(base)
        try:
            model, start = _convert(name, options)
        except ConversionError as e:
            yield Preview(name, base, 'refused', base_params=base_params, reason=' '.join(str(e).split()))
            continue
        report = model.conversion
        yield Preview(name, base, start, report.counts, len(report.skipped), base_params, _count(model))


def resolve_warm_start(name: str) -> str | None:
    """Give how a model starts with weights of its base, ``'exact'`` or ``'approximate'``; ``None`` if it has no base.

    Args:
        name: Any architecture. A variant that the table does not list is made, on the meta device.
    """
    variant = find_variant(name)
    if variant is None:
        return None
    if variant.warm_start is not None:
        return variant.warm_start
    found = next(preview([name], transition=False))
    return None if found.reason else found.start


def _convert(name: str, options: dict[str, Any]) -> tuple[nn.Module, str]:
    """Make a variant, and tell how it starts.

    With ``transition=True`` one conversion tells both: whether the variant starts exactly, and whether it does in a
    transition. A second one is needed only where no transition leads to what is converted without.
    """
    if options.get('transition') is None:
        try:
            model = _build(name, **options | dict(transition=True))
            if not _lacks_transitions(model.conversion):
                return _finish(model)
        except ConversionError as e:
            if 'transition' not in str(e):  # of another reason, which would be the same without
                raise
    return _finish(_build(name, **options))


def _lacks_transitions(report: ConversionReport) -> bool:
    return any(skip.reason.startswith(REFUSED) for skip in report.skipped)


def _finish(model: nn.Module) -> tuple[nn.Module, str]:
    if not transitions(model):
        return model, model.conversion.function
    return finish_transition(model), 'exact by transition'


@lru_cache(maxsize=1)
def _count_base(base: str) -> int:
    return _count(_build(base))


def _build(name: str, **options: Any) -> nn.Module:
    with torch.device('meta'):
        return timm.create_model(name, **options)


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
