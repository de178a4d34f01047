"""Teaches timm's own layer factories our names.

timm has no public call to register an activation or an anti-aliasing layer, so this file, and no other, adds to timm's
tables. It checks first that they are the tables it knows.

After ``register()`` these work everywhere in timm::

    timm.create_model('resnet50', act_layer='brelu')
    timm.layers.create_act_layer('dyrelu_b', channels=64)
    timm.layers.create_aa('softpool', stride=2)
"""
import difflib
import functools
import inspect

import timm
from timm.layers import blur_pool, create_act

from .bipolar import BELU, BSELU, Bipolar, BLeakyReLU, BPReLU, BReLU, belu, bleaky_relu, brelu, bselu
from .dyrelu import DyReLUA, DyReLUB, DyReLUC
from .softpool import SoftPool2d

__all__ = ['ACT_LAYERS', 'register']

SUPPORTED_TIMM = '>=1.0.31,<2'

ACT_LAYERS = dict(
    dyrelu_a=DyReLUA,
    dyrelu_b=DyReLUB,
    dyrelu_c=DyReLUC,
    bipolar=Bipolar,
    brelu=BReLU,
    belu=BELU,
    bselu=BSELU,
    bleaky_relu=BLeakyReLU,
    bprelu=BPReLU,
)
_ACT_FNS = dict(brelu=brelu, belu=belu, bselu=bselu, bleaky_relu=bleaky_relu)


class UnknownActivation(KeyError):
    """No activation of this name. A ``KeyError``, as timm raises, that says which names there are."""

    def __str__(self) -> str:
        return self.args[0]


class _ActTable(dict):
    """timm's name -> activation table, with an error that helps whoever misspelt a name."""

    def __missing__(self, name: str):
        near = difflib.get_close_matches(str(name), self, n=3)
        hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ''
        raise UnknownActivation(f"Unknown activation {name!r}.{hint} Known: {', '.join(sorted(self))}.")


def register() -> None:
    """Add the activations and ``softpool`` to timm's factories. Doing it again changes nothing.

    Raises:
        ImportError: If timm's factories are not the ones known here. Names the supported versions.
    """
    _check_timm()
    create_act._ACT_LAYER_DEFAULT = _extended(create_act._ACT_LAYER_DEFAULT, ACT_LAYERS)
    create_act._ACT_FN_DEFAULT = _extended(create_act._ACT_FN_DEFAULT, _ACT_FNS)
    if not hasattr(blur_pool._normalize_aa_layer, 'timm_dyacts'):
        blur_pool._normalize_aa_layer = _with_softpool(blur_pool._normalize_aa_layer)


def _check_timm() -> None:
    tables = [getattr(create_act, name, None) for name in ('_ACT_LAYER_DEFAULT', '_ACT_FN_DEFAULT')]
    known = all(isinstance(table, dict) and 'relu' in table for table in tables)
    normalize = getattr(blur_pool, '_normalize_aa_layer', None)
    if not known or not callable(normalize) or len(inspect.signature(normalize).parameters) != 1:
        raise ImportError(
            f'timm {timm.__version__} builds its layers in a way that this release of timm_dyacts does not know; '
            f'it supports timm{SUPPORTED_TIMM}.')


def _extended(table: dict, names: dict) -> dict:
    if hasattr(type(table), '__missing__'):
        return table
    return _ActTable(table, **names)


def _with_softpool(normalize):
    @functools.wraps(normalize)
    def normalize_aa_layer(aa_layer):
        if isinstance(aa_layer, str):
            if aa_layer.lower().replace('_', '') in ('softpool', 'softpool2d'):
                # As many outputs as the strided convolution that it stands in for has, for odd sizes too.
                return functools.partial(SoftPool2d, ceil_mode=True)
            try:
                return normalize(aa_layer)
            except AssertionError as e:
                raise AssertionError(f"{e} Known: 'avg', 'blur', 'blurpc', 'softpool'.") from None
        return normalize(aa_layer)

    normalize_aa_layer.timm_dyacts = True
    return normalize_aa_layer
