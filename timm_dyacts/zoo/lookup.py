"""Names that timm does not hold: its registry answers for them as if they were registered, and lists none of them.

timm looks models up in tables of its registry, private ones, through functions (``is_model``, ``model_entrypoint``,
``get_pretrained_cfg`` and others) that its modules and its users have imported by name. So it is the tables that have
to know more: each becomes a table of its own kind that asks ``find`` for what it lacks. What such a table holds, and
lists, is what was registered.
"""
import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import timm
from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    _factory,
    _registry,
    get_arch_pretrained_cfgs,
    get_pretrained_cfg,
    is_model,
    is_model_pretrained,
    model_entrypoint,
)
from torch import nn

from ..version import unsupported

__all__ = ['Entry', 'current_name', 'install', 'is_registered', 'registered_only', 'suggest_names']

# The tables that answer for more than they hold, and what timm makes them of
_TABLES = dict(
    _model_entrypoints=dict,
    _model_default_cfgs=dict,
    _model_pretrained_cfgs=dict,
    _model_with_tags=defaultdict,
    _model_has_pretrained=set,
)
_DEPRECATED = '_deprecated_models'


@dataclass(frozen=True)
class Entry:
    """What timm's registry has of an architecture.

    Attributes:
        name: Its name.
        entrypoint: What creates it.
        default_cfg: Its pretrained configs by tag, the default one first.
    """
    name: str
    entrypoint: Callable[..., nn.Module]
    default_cfg: DefaultCfg

    @property
    def names(self) -> list[str]:
        """Its names with each of the tags."""
        return [self._with(tag) for tag in self.default_cfg.tags]

    @cached_property
    def cfgs(self) -> dict[str, PretrainedCfg]:
        """Its pretrained configs by name with tag, and by name alone, as timm's ``register_model`` files them."""
        cfgs = {
            self._with(tag): replace(self.default_cfg.cfgs[tag], architecture=self.name, tag=tag or None)
            for tag in self.default_cfg.tags
        }
        if self.names:
            cfgs[self.name] = cfgs[self.names[0]]
        return cfgs

    def _with(self, tag: str) -> str:
        return f'{self.name}.{tag}' if tag else self.name


class _Table(dict):
    """A table that asks for what it lacks."""

    def __init__(self, table: dict[str, Any], find: Callable[[str], Any]) -> None:
        super().__init__(table)
        self.find = find

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or self.find(name) is not None

    def __missing__(self, name: str) -> Any:
        found = self.find(name)
        if found is None:
            raise KeyError(name)
        return found

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default


class _ListTable(defaultdict):
    """A table of lists that asks for what it lacks.

    A new list, to which timm adds, is kept for what is registered. Of other names nothing is kept.
    """

    def __init__(self, table: dict[str, list[str]], find: Callable[[str], list[str] | None]) -> None:
        super().__init__(list, table)
        self.find = find

    def __reduce__(self) -> tuple[Any, ...]:  # for those who copy timm's tables, and put them back later
        return type(self), (dict(self), self.find)

    def copy(self) -> '_ListTable':
        return type(self)(self, self.find)

    __copy__ = copy

    def get(self, name: str, default: Any = None) -> Any:
        if name in self:
            return self[name]
        found = self.find(name)
        return default if found is None else found

    def __missing__(self, name: str) -> list[str]:  # what timm before 1.0.31 asks, where later ones use ``get``
        found = self.find(name)
        if found is not None:
            return found
        return super().__missing__(name) if is_registered(name) else []


class _Set(set):
    """A set that asks for what it lacks."""

    def __init__(self, names: set[str], find: Callable[[str], bool]) -> None:
        super().__init__(names)
        self.find = find

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (set(self), self.find)

    def copy(self) -> '_Set':
        return type(self)(self, self.find)

    __copy__ = copy

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or self.find(name)


_asks = True


@contextmanager
def registered_only() -> Iterator[None]:
    """Let the tables know what they hold, no more, while models are registered."""
    global _asks
    before, _asks = _asks, False
    try:
        yield
    finally:
        _asks = before


def is_registered(name: str) -> bool:
    """Whether timm holds an architecture, as opposed to answering for it."""
    return dict.__contains__(_registry._model_entrypoints, name)


def current_name(name: str) -> str | None:
    """The name, perhaps with a tag, that timm now has for one that is deprecated; the name itself for any other.

    ``None`` for a deprecated name without a replacement.
    """
    return getattr(_registry, _DEPRECATED).get(name, name)


def install(find: Callable[[str], Entry | None], example: str) -> None:
    """Let timm's registry ask for what it lacks. Doing it again changes nothing.

    Args:
        find: Gives the entry of an architecture, by its name with or without a tag, ``None`` for an unknown one.
        example: A name that ``find`` knows and timm does not hold.

    Raises:
        ImportError: timm's registry is not the one that is known here. It is then left as it was.
    """
    before = {name: getattr(_registry, name, None) for name in (*_TABLES, _DEPRECATED)}
    if not all(isinstance(before[name], kind) for name, kind in (_TABLES | {_DEPRECATED: dict}).items()):
        raise _unsupported()
    if isinstance(before['_model_entrypoints'], _Table):
        return

    def look(name: str, get: Callable[[Entry], Any]) -> Any:
        entry = find(name) if _asks and isinstance(name, str) else None
        return None if entry is None else get(entry)

    def by_arch(get: Callable[[Entry], Any]) -> Callable[[str], Any]:
        return lambda name: look(name, lambda entry: get(entry) if name == entry.name else None)

    def find_cfg(name: str) -> PretrainedCfg | None:
        return look(name, lambda entry: entry.cfgs.get(name))

    def has_weights(name: str) -> bool:
        cfg = find_cfg(name)
        return cfg is not None and bool(cfg.has_weights)

    tables = dict(
        _model_entrypoints=_Table(before['_model_entrypoints'], by_arch(lambda entry: entry.entrypoint)),
        _model_default_cfgs=_Table(
            before['_model_default_cfgs'], by_arch(lambda entry: entry.default_cfg if entry.names else None)),
        _model_pretrained_cfgs=_Table(before['_model_pretrained_cfgs'], find_cfg),
        _model_with_tags=_ListTable(before['_model_with_tags'], by_arch(lambda entry: entry.names)),
        _model_has_pretrained=_Set(before['_model_has_pretrained'], has_weights),
    )
    vars(_registry).update(tables)
    if not _answers_for(find(example)):
        vars(_registry).update(before)
        raise _unsupported()


def _answers_for(entry: Entry) -> bool:
    """Whether timm's functions know a model that none of its tables holds."""
    name = entry.name
    try:
        return (
            is_model(name)
            and model_entrypoint(name) is entry.entrypoint
            and get_pretrained_cfg(name) == entry.cfgs[name]
            and get_arch_pretrained_cfgs(name).keys() == set(entry.names)
            and is_model_pretrained(name) == bool(entry.cfgs[name].has_weights)
        )
    except (KeyError, RuntimeError):
        return False


def _unsupported() -> ImportError:
    return unsupported('timm', timm.__version__, "the registry's tables of models")


def suggest_names(suggest: Callable[[str], str]) -> None:
    """Let timm's error for an unknown model end with names that are close. Doing it again changes nothing.

    Only the text of an error depends on it, so a timm that raises this error elsewhere is no reason to give up.

    Args:
        suggest: Gives what to add to the message for a name, with a space in front, or an empty text.
    """
    if hasattr(_factory, '_resolve_model_source'):
        _replace_in_factory('_resolve_model_source', lambda resolve: _with_suggestions(resolve, suggest))
    else:  # timm before 1.0.31: ``create_model`` raises it itself, if ``is_model`` says no
        _replace_in_factory('is_model', lambda known: _known_or_suggest(known, suggest))


def _replace_in_factory(name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    function = getattr(_factory, name, None)
    if callable(function) and not hasattr(function, 'timm_dyacts'):
        wrapped = functools.wraps(function)(wrap(function))
        wrapped.timm_dyacts = True
        setattr(_factory, name, wrapped)


def _with_suggestions(resolve: Callable[..., Any], suggest: Callable[[str], str]) -> Callable[..., Any]:
    def resolve_model_source(*args: Any, **kwargs: Any) -> Any:
        try:
            return resolve(*args, **kwargs)
        except RuntimeError as e:
            unknown = re.fullmatch(r'Unknown model \((.*)\)', str(e))
            more = suggest(unknown[1]) if unknown else ''
            if not more:
                raise
            raise RuntimeError(f'{e}.{more}') from None

    return resolve_model_source


def _known_or_suggest(known: Callable[[str], bool], suggest: Callable[[str], str]) -> Callable[[str], bool]:
    def is_model(name: str) -> bool:
        more = '' if known(name) else suggest(name)
        if more:
            raise RuntimeError(f'Unknown model ({name}).{more}')
        return known(name)

    return is_model
