"""The variants: timm's architectures with our operators, registered with timm under names of their own.

A name is ``<timm architecture>_<operator>[_nobn]``, e.g. ``resnet50_dyrelu_b`` or ``resnet50_brelu_nobn``. The table
in ``families`` says which are registered. A variant inherits the pretrained tags of its base:
``resnet50_dyrelu_b.a1_in1k`` pulls timm's ``resnet50.a1_in1k`` from the Hub and converts it (see ``weights``).
"""
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from typing import Any

import timm
import torch
from huggingface_hub.errors import EntryNotFoundError
from timm.models import (
    DefaultCfg,
    build_model_with_cfg,
    get_arch_name,
    get_arch_pretrained_cfgs,
    is_model,
    model_entrypoint,
    register_model,
)
from torch import nn

from ..convert import ConversionError, convert
from ..operators import OPERATORS, Operator, zoo_operators
from ..suggest import close_names
from ..version import unsupported
from .families import ALIASES, FAMILIES, Family
from .transition import check_source, record_start
from .weights import PretrainedWeightsError, convert_checkpoint, describe_missing_weights

__all__ = ['Variant', 'default_cfgs', 'parse', 'register', 'variants']

NOBN = '_nobn'

default_cfgs: dict[str, DefaultCfg] = {}


@dataclass(frozen=True)
class Variant:
    """What a name of the zoo's grammar stands for.

    Attributes:
        name: The name.
        base: timm's architecture that it is made from.
        operator: Name of the operator.
        nobn: Whether BatchNorm is folded away.
        family: The family of the base, ``None`` for a base that is not in the table.
    """
    name: str
    base: str
    operator: str
    nobn: bool
    family: Family | None

    @property
    def record(self) -> Operator:
        """The record of the operator."""
        return OPERATORS[self.operator]

    @property
    def recipe(self) -> dict[str, Any]:
        """The arguments of ``convert``."""
        record = self.record
        recipe: dict[str, Any] = dict(record.recipe)
        if record.stem_kwargs and self.family is not None and self.family.stem:
            recipe[f'{record.replaces}_kwargs'] = dict(record.stem_kwargs)
        if self.nobn:
            recipe['norm'] = 'none'
        return recipe

    @property
    def options(self) -> frozenset[str]:
        """The options of ``convert`` that ``timm.create_model`` takes for it."""
        return self.record.options | {f'{self.record.replaces}_kwargs', 'transition'}

    @property
    def warm_start(self) -> str | None:
        """``'exact'`` if the variant starts with the function of its base (up to rounding), else ``'approximate'``.

        ``None`` for a base that is not in the table.
        """
        if self.family is None:
            return None
        return 'exact' if self.family.activation in self.record.exact_for else 'approximate'


def parse(name: str) -> Variant:
    """Read a name by the grammar, whether or not the variant is registered.

    Args:
        name: ``<timm architecture>_<operator>[_nobn]`` or an alias, with or without a pretrained tag.

    Returns:
        The variant, without the tag.

    Raises:
        ValueError: The name does not follow the grammar, or timm has no such architecture.
    """
    name = get_arch_name(name)
    full = ALIASES.get(name, name)
    stem = full.removesuffix(NOBN)
    for operator in zoo_operators():
        base = stem.removesuffix(f'_{operator}')
        if base != stem and is_model(base) and base not in default_cfgs:
            family = next((family for family in FAMILIES if base in family.bases.split()), None)
            return Variant(name, base, operator, full != stem, family)
    raise ValueError(
        f'{name!r} is not <timm architecture>_<operator>[{NOBN}] with an operator of {", ".join(zoo_operators())}.'
        f'{close_names(name, default_cfgs)}')


def variants() -> Iterator[Variant]:
    """Give all variants of the table, aliases last."""
    names = {}
    for family in FAMILIES:
        for base, operator, nobn in family.members():
            name = f'{base}_{operator}' + NOBN * nobn
            names[name] = Variant(name, base, operator, nobn, family)
    yield from names.values()
    for alias, name in ALIASES.items():
        yield replace(names[name], name=alias)


def register() -> None:
    """Register the variants of the table with timm. Doing it again adds what is new and changes nothing else.

    Raises:
        ImportError: timm keeps its pretrained configs in another way than is known here.
    """
    _check_timm()
    this = sys.modules[__package__]
    this.default_cfgs = default_cfgs  # where `register_model` looks for them
    for variant in variants():
        if is_model(variant.name) or not is_model(variant.base):  # registered before, or a timm without this base
            continue
        default_cfgs[variant.name] = _inherited_cfgs(variant.base, variant.warm_start)
        entrypoint = _make_entrypoint(variant)
        setattr(this, variant.name, entrypoint)
        register_model(entrypoint)


def _check_timm() -> None:
    known = [field.name for field in fields(DefaultCfg)] == ['tags', 'cfgs', 'is_pretrained']
    cfgs = get_arch_pretrained_cfgs('resnet18')
    if not known or not all(name == f'{cfg.architecture}.{cfg.tag}' for name, cfg in cfgs.items()):
        raise unsupported('timm', timm.__version__, "the registry's pretrained configs by tag")


@cache
def _inherited_cfgs(name: str, warm_start: str) -> DefaultCfg:
    """Give the pretrained configs of a base, for variants with this kind of warm start."""
    cfgs = {}
    for source, cfg in get_arch_pretrained_cfgs(name).items():
        note = f'weights of {cfg.hf_hub_id or source}, converted on load; warm start {warm_start}'
        cfgs[cfg.tag or ''] = replace(
            cfg,
            architecture=None,  # timm fills in the name and the tag of each variant
            tag=None,
            origin_url=cfg.origin_url or (f'https://huggingface.co/{cfg.hf_hub_id}' if cfg.hf_hub_id else None),
            notes=(*(cfg.notes or ()), note),
        )
    return DefaultCfg(tags=deque(cfgs), cfgs=cfgs, is_pretrained=any(cfg.has_weights for cfg in cfgs.values()))


def _make_entrypoint(variant: Variant) -> Callable[..., nn.Module]:
    def entrypoint(pretrained: bool = False, **kwargs) -> nn.Module:
        return _create(variant, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = variant.name
    entrypoint.__module__ = __package__  # timm files models under the last part of it
    entrypoint.__doc__ = f"timm's {variant.base} converted with {variant.recipe}. Warm start: {variant.warm_start}."
    return entrypoint


def _create(variant: Variant, pretrained: bool, **kwargs) -> nn.Module:
    given = {name: kwargs.pop(name) for name in _all_options() if name in kwargs}
    options = {name: value for name, value in given.items() if value is not None}
    recipe = _merge_options(variant, options)
    transition = recipe.get('transition', False)
    if transition is True and pretrained:
        check_source(variant.name, kwargs)
    if kwargs.get('features_only'):
        kwargs.setdefault('out_indices', _out_indices(variant.base))
    built_with: dict[str, Any] = {}

    def build(**model_kwargs) -> nn.Module:
        built_with.update(model_kwargs)
        base = model_entrypoint(variant.base)(**model_kwargs)
        try:
            return convert(base, **recipe, check=False)  # weights that are yet to be loaded are checked when they are
        except ConversionError:
            raise
        except (TypeError, ValueError) as e:
            if not options:
                raise
            listed = ', '.join(f'{name}={value!r}' for name, value in options.items())
            raise ValueError(f'{variant.name} with {listed}: {e}') from e

    try:
        model = build_model_with_cfg(
            build,
            variant.name,
            pretrained,
            pretrained_filter_fn=partial(
                convert_checkpoint, base=variant.base, recipe=recipe, model_kwargs=built_with),
            feature_cfg=dict(feature_cls='getter'),
            **kwargs,
        )
    except (OSError, EntryNotFoundError) as e:
        if not pretrained:
            raise
        raise PretrainedWeightsError(describe_missing_weights(variant.name, variant.base, kwargs, e)) from e
    if transition is True:
        record_start(model, variant.warm_start, takes_start='start' in variant.options)
    return model


def _all_options() -> frozenset[str]:
    """Give the options of ``convert`` that are options of some variant."""
    operators = OPERATORS.values()
    return frozenset({'act_kwargs', 'pool_kwargs', 'transition'}).union(*(operator.options for operator in operators))


def _merge_options(variant: Variant, options: dict[str, Any]) -> dict[str, Any]:
    """Give the recipe of a variant with what the user asks for on top."""
    recipe = variant.recipe
    for name, value in options.items():
        if name not in variant.options:
            raise ValueError(
                f'{variant.name} takes no {name}, got {value!r}: its options are {", ".join(sorted(variant.options))}.')
        recipe[name] = {**recipe.get(name, {}), **value} if isinstance(value, dict) else value
    return recipe


@cache
def _out_indices(name: str) -> tuple[int, ...]:
    """Give the levels that timm's feature extractor of a base has by default."""
    with torch.device('meta'):
        features = model_entrypoint(name)(features_only=True)
    return tuple(getattr(features.feature_info, 'out_indices', range(5)))
