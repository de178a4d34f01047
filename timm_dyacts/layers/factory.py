"""Teaches timm's own layer factories our names.

timm has no public call to register an activation or an anti-aliasing layer, so this file, and no other, adds to timm's
tables. It checks first that they are the tables it knows.

After ``register(...)`` these work everywhere in timm::

    timm.create_model('resnet50', act_layer='brelu')
    timm.layers.create_act_layer('dyrelu_b', channels=64)
    timm.layers.create_aa('softpool', stride=2)
"""
import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import timm
from timm.layers import blur_pool, create_act
from torch import Tensor, nn

from ..suggest import close_names
from ..version import unsupported
from .softpool import SoftPool2d

__all__ = ['UnknownActivation', 'register']

# What looks up the names of anti-aliasing layers, and its parameters: since timm 1.0.21, and before
_AA_LOOKUPS = dict(
    _normalize_aa_layer=['aa_layer'],
    create_aa=['aa_layer', 'channels', 'stride', 'enable', 'noop'],
)


class UnknownActivation(KeyError):
    """No activation has this name. A ``KeyError``, as timm raises, whose message names those that there are."""

    def __str__(self) -> str:
        return self.args[0]


class _ActTable(dict):
    """One of timm's tables of activations by name, with an error that helps whoever misspelt a name."""

    def __missing__(self, name: str) -> None:
        known = ', '.join(sorted(self))
        raise UnknownActivation(f'Unknown activation {name!r}.{close_names(name, self)} Known: {known}.')


def register(activations: Mapping[str, type[nn.Module]], functions: Mapping[str, Callable[..., Tensor]]) -> None:
    """Add activations and ``softpool`` to timm's factories. Doing it again changes nothing.

    Args:
        activations: Modules by name.
        functions: Functional forms by name.

    Raises:
        ImportError: If timm's factories are not the ones known here. Names the supported versions.
    """
    _check_timm()
    create_act._ACT_LAYER_DEFAULT = _extended(create_act._ACT_LAYER_DEFAULT, activations)
    create_act._ACT_FN_DEFAULT = _extended(create_act._ACT_FN_DEFAULT, functions)
    _add_softpool()


def _check_timm() -> None:
    tables = [getattr(create_act, name, None) for name in ('_ACT_LAYER_DEFAULT', '_ACT_FN_DEFAULT')]
    known = all(isinstance(table, dict) and 'relu' in table for table in tables)
    lookup = getattr(blur_pool, _aa_lookup(), None)
    if not known or not callable(lookup) or list(inspect.signature(lookup).parameters) != _AA_LOOKUPS[_aa_lookup()]:
        raise unsupported('timm', timm.__version__, 'the tables of activations and of anti-aliasing layers')


def _extended(table: dict[str, Any], entries: Mapping[str, Any]) -> dict[str, Any]:
    """Add entries to a table of timm, in place once it has an error of its own for unknown names."""
    if not hasattr(type(table), '__missing__'):
        table = _ActTable(table)
    table.update(entries)
    return table


def _aa_lookup() -> str:
    """The function of timm that knows what the names of anti-aliasing layers stand for."""
    return next((name for name in _AA_LOOKUPS if hasattr(blur_pool, name)), 'create_aa')


def _add_softpool() -> None:
    name = _aa_lookup()
    before = getattr(blur_pool, name)
    if hasattr(before, 'timm_dyacts'):
        return
    after = _with_softpool(before)
    for module in [m for key, m in sys.modules.items() if key.startswith('timm.')]:
        if vars(module).get(name) is before:  # timm's modules have imported ``create_aa`` by name
            setattr(module, name, after)


def _with_softpool(lookup: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(lookup)
    def with_softpool(aa_layer: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(aa_layer, str) and aa_layer.lower().replace('_', '') in ('softpool', 'softpool2d'):
            # It then has as many outputs as the strided convolution in whose place it is, for odd sizes too.
            aa_layer = functools.partial(SoftPool2d, ceil_mode=True)
        try:
            return lookup(aa_layer, *args, **kwargs)
        except AssertionError as e:
            if not isinstance(aa_layer, str):
                raise
            raise AssertionError(f"{e} Known: 'avg', 'blur', 'blurpc', 'softpool'.") from None

    with_softpool.timm_dyacts = True
    return with_softpool
