"""The variants: timm's architectures with our operators, registered with timm under names of their own.

A name is ``<timm architecture>_<operator>[_nobn]``, e.g. ``resnet50_dyrelu_b`` or ``resnet50_brelu_nobn``. The table
in ``families`` says which are registered; any other name of this form is found when it is asked for (see ``lookup``),
and fails when it is created if ``convert`` has nothing to replace there. A variant inherits the pretrained tags of its
base: ``resnet50_dyrelu_b.a1_in1k`` pulls timm's ``resnet50.a1_in1k`` from the Hub and converts it (see ``weights``).
"""
import difflib
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
    list_models,
    model_entrypoint,
    register_model,
)
from torch import nn

from ..convert import ConversionError, convert
from ..operators import OPERATORS, Operator, zoo_operators
from ..suggest import close_names
from ..version import unsupported
from . import local_dir, lookup
from .families import ALIASES, FAMILIES, Family
from .transition import check_start, record_start
from .weights import PretrainedWeightsError, check_source, convert_checkpoint, describe_missing_weights

__all__ = [
    'Variant',
    'all_options',
    'bases',
    'default_cfgs',
    'find_entry',
    'find_variant',
    'parse',
    'register',
    'suggest',
    'variants',
]

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

        ``None`` if the table does not list the operator for the base. The ``conversion`` of the model then tells, and
        so does ``preview``, which makes it on the meta device.
        """
        if self.family is None or not self.family.lists(self.operator):
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
    variant = find_variant(name)
    if variant is None:
        name = get_arch_name(name)
        raise ValueError(
            f'{name!r} is not <timm architecture>_<operator>[{NOBN}] with an operator of {", ".join(zoo_operators())}.'
            f'{suggest(name)}')
    return variant


def find_variant(name: str) -> Variant | None:
    """Read a name as ``parse`` does, ``None`` where that would raise: nothing is looked for to suggest."""
    name = get_arch_name(name)
    for base, operator, nobn in _readings(ALIASES.get(name, name)):
        if lookup.is_registered(base) and base not in default_cfgs and lookup.current_name(base) == base:
            family = next((family for family in FAMILIES if base in family.bases.split()), None)
            return Variant(name, base, operator, nobn, family)
    return None


def _readings(name: str) -> Iterator[tuple[str, str, bool]]:
    """Give what may be the architecture, the operator and whether without BatchNorm."""
    stem = name.removesuffix(NOBN)
    for operator in zoo_operators():
        base = stem.removesuffix(f'_{operator}')
        if base != stem:
            yield base, operator, stem != name


def suggest(name: str, count: int = 3) -> str:
    """Give the end of an error message about an unknown name: what was probably meant, empty if nothing is close.

    Args:
        name: What was asked for. Names of timm's are suggested, too.
        count: Most names to give.
    """
    name = get_arch_name(name)
    for base, operator, nobn in _readings(name):
        if lookup.is_registered(base) and (current := lookup.current_name(base)) != base:
            meant = f'{current.replace(".", f"_{operator}{NOBN * nobn}.")} for {current}' if current else 'gone'
            return f" timm's {base} is deprecated, {'use ' * (current is not None)}{meant}."
    parts = name.split('_')
    close = dict.fromkeys(
        base for end in range(1, len(parts) + 1)
        for base in difflib.get_close_matches('_'.join(parts[:end]), bases()))
    derived = (f'{base}_{operator}{nobn}' for base in close for operator in zoo_operators() for nobn in ('', NOBN))
    return close_names(name, dict.fromkeys((*list_models(), *derived)), count)


def bases() -> list[str]:
    """Give timm's own architectures, in timm's order, and others that were registered with it."""
    return [name for name in list_models() if name not in default_cfgs]


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
    """Register the variants of the table with timm, and let it find others when it is asked for them.

    Doing it again adds what is new and changes nothing else.

    Raises:
        ImportError: timm keeps its models or their pretrained configs in another way than is known here.
    """
    _check_timm()
    this = sys.modules[__package__]
    this.default_cfgs = default_cfgs  # where `register_model` looks for them
    with lookup.registered_only():
        for variant in variants():
            if lookup.is_registered(variant.name) or not lookup.is_registered(variant.base):
                continue  # registered before, or a timm without this base
            default_cfgs[variant.name] = _inherited_cfgs(variant.base, f'warm start {variant.warm_start}')
            entrypoint = _make_entrypoint(variant)
            setattr(this, variant.name, entrypoint)
            register_model(entrypoint)
    local_dir.install()
    lookup.install(find_entry, example=next(
        f'{base}_{operator}' for family in FAMILIES for base in family.bases.split() for operator in zoo_operators()
        if lookup.is_registered(base) and not lookup.is_registered(f'{base}_{operator}')))
    lookup.suggest_names(suggest)


def find_entry(name: str) -> lookup.Entry | None:
    """Give what timm's registry would have of a variant that is not registered.

    Args:
        name: A name, with or without a pretrained tag.

    Returns:
        The entry, ``None`` if the name is registered or does not follow the grammar.
    """
    if lookup.is_registered(get_arch_name(name)) or (variant := find_variant(name)) is None:
        return None
    start = f'warm start {variant.warm_start}' if variant.warm_start else \
        'whether the warm start is exact, the conversion of the model tells'
    return lookup.Entry(variant.name, _make_entrypoint(variant), _inherited_cfgs(variant.base, start))


def _check_timm() -> None:
    known = [field.name for field in fields(DefaultCfg)] == ['tags', 'cfgs', 'is_pretrained']
    cfgs = get_arch_pretrained_cfgs('resnet18')
    if not known or not all(name == f'{cfg.architecture}.{cfg.tag}' for name, cfg in cfgs.items()):
        raise unsupported('timm', timm.__version__, "the registry's pretrained configs by tag")


@cache
def _inherited_cfgs(name: str, start: str) -> DefaultCfg:
    """Give the pretrained configs of a base, for variants of which the notes are to say how they start."""
    cfgs = {}
    for source, cfg in get_arch_pretrained_cfgs(name).items():
        note = f'weights of {cfg.hf_hub_id or source}, converted on load; {start}'
        cfgs[cfg.tag or ''] = replace(
            cfg,
            architecture=None,  # timm fills in the name and the tag of each variant
            tag=None,
            origin_url=cfg.origin_url or (f'https://huggingface.co/{cfg.hf_hub_id}' if cfg.hf_hub_id else None),
            notes=(*(cfg.notes or ()), note),
        )
    return DefaultCfg(tags=deque(cfgs), cfgs=cfgs, is_pretrained=any(cfg.has_weights for cfg in cfgs.values()))


@cache
def _make_entrypoint(variant: Variant) -> Callable[..., nn.Module]:
    def entrypoint(pretrained: bool = False, **kwargs) -> nn.Module:
        return _create(variant, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = variant.name
    entrypoint.__module__ = __package__  # timm files models under the last part of it
    entrypoint.__doc__ = f"timm's {variant.base} converted with {variant.recipe}."
    if variant.warm_start:
        entrypoint.__doc__ += f' Warm start: {variant.warm_start}.'
    return entrypoint


def _create(variant: Variant, pretrained: bool, **kwargs) -> nn.Module:
    given = {name: kwargs.pop(name) for name in all_options() if name in kwargs}
    options = {name: value for name, value in given.items() if value is not None}
    recipe = _merge_options(variant, options)
    transition = recipe.get('transition', False)
    if pretrained:
        check_source(variant.name, variant.base, kwargs)
    if pretrained and transition is True:
        check_start(variant.name, kwargs)
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


def all_options() -> frozenset[str]:
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
