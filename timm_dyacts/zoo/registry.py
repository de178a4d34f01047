"""The variants: timm's architectures with our operators, registered with timm under names of their own.

A name is ``<timm architecture>_<operator>[_nobn]``, e.g. ``resnet50_dyrelu_b`` or ``resnet50_brelu_nobn``. The two
tables below say which there are; everything else follows from them. A variant inherits the pretrained tags of its
base: ``resnet50_dyrelu_b.a1_in1k`` pulls timm's ``resnet50.a1_in1k`` from the Hub and converts it. Checkpoints of the
variant itself load as they are (``hf-hub:``, ``local-dir:``, ``pretrained_cfg_overlay=dict(file=...)``): the names in a
state dict tell the two apart.
"""
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from huggingface_hub.errors import EntryNotFoundError
from timm.models import (
    build_model_with_cfg,
    get_pretrained_cfg,
    is_model,
    model_entrypoint,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._pretrained import DefaultCfg, PretrainedCfg
from timm.models._registry import _model_default_cfgs
from torch import nn

from ..convert import convert

__all__ = ['PretrainedWeightsError', 'Variant', 'register', 'variants']


OPERATORS = dict(
    dyrelu_a=dict(act='dyrelu_a'),
    dyrelu_b=dict(act='dyrelu_b'),
    dyrelu_c=dict(act='dyrelu_c'),
    softpool=dict(pool='softpool'),
    brelu=dict(act='brelu'),
    belu=dict(act='belu'),
)
ALL = tuple(OPERATORS)
USUAL = ('dyrelu_b', 'softpool', 'brelu', 'belu')
NO_POOL = ('dyrelu_b', 'brelu', 'belu')


@dataclass(frozen=True)
class Family:
    """Architectures that are converted alike.

    Attributes:
        bases: timm's names, separated by spaces.
        operators: The operators for which there is something to replace.
        activation: The backbone's activation. Dynamic ReLU and BReLU start as just that if it is ReLU or ReLU6.
        nobn: The operators that are also there without BatchNorm.
        stem: Whether the max pool 3x3 of the stem becomes SoftPool 2x2, as published.
    """
    bases: str
    operators: tuple[str, ...] = USUAL
    activation: str = 'ReLU'
    nobn: tuple[str, ...] = ()
    stem: bool = False


FAMILIES = (
    Family(
        'resnet18 resnet34 resnet50 resnet101 resnext50_32x4d wide_resnet50_2 seresnet50 seresnext50_32x4d',
        ALL, nobn=ALL, stem=True),
    Family(
        'resnet10t resnet14t resnet26 resnet26t resnet152 resnet18d resnet26d resnet34d resnet50c resnet50d '
        'resnet101d resnet152d resnext50d_32x4d resnext101_32x4d resnext101_32x8d resnext101_64x4d wide_resnet101_2 '
        'seresnet152d seresnext26d_32x4d seresnext26t_32x4d seresnext101_32x4d ecaresnet50d ecaresnet101d',
        nobn=('brelu',), stem=True),
    Family('resnest14d resnest26d resnest50d', stem=True),
    # one activation module serves tensors of several widths there, which a Dynamic ReLU cannot
    Family('res2net50_26w_4s res2net101_26w_4s res2net50d res2next50', ('softpool', 'brelu', 'belu'), stem=True),
    Family('regnetx_002 regnetx_004 regnetx_006 regnetx_008 regnetx_016 regnetx_032 regnetx_064', NO_POOL),
    Family('regnety_002 regnety_004 regnety_006 regnety_008 regnety_016 regnety_032 regnety_064', NO_POOL),
    Family('repvgg_a0 repvgg_a1 repvgg_a2 repvgg_b0 repvgg_b1 repvgg_b2', NO_POOL),
    Family('vgg16_bn', ALL),
    Family('vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg19 vgg19_bn'),
    Family('densenet121', ALL, stem=True),
    Family('densenet161 densenet169 densenet201', stem=True),
    Family('inception_v3', ('dyrelu_b', 'softpool')),  # pools between bipolar activations are function calls there
    Family('inception_v4'),
    Family('hrnet_w18_small hrnet_w18_small_v2 hrnet_w18 hrnet_w32', NO_POOL),
    Family('dla34 dla46_c dla60 dla102 ese_vovnet19b_dw ese_vovnet39b'),
    Family('mobilenetv2_050 mobilenetv2_100 mobilenetv2_140', ALL, activation='ReLU6'),
    Family('mobilenetv1_100 mobilenetv2_110d mobilenetv2_120d', activation='ReLU6'),
    Family('mobilenetv3_small_100 mobilenetv3_large_100', ALL, activation='hard-swish'),
    Family('mobilenetv3_small_050 mobilenetv3_small_075', activation='hard-swish'),
    Family('mobilenetv4_conv_small mobilenetv4_conv_medium mobilenetv4_conv_large'),
    Family('mnasnet_small mnasnet_100 semnasnet_075 semnasnet_100 spnasnet_100'),
    Family('ghostnet_100 ghostnetv2_100 ghostnetv2_130', NO_POOL),
    Family('efficientnet_b0', ALL, activation='SiLU'),
    Family('efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4', activation='SiLU'),
    Family('efficientnet_lite0 tf_efficientnet_lite0 tf_efficientnet_lite1 tf_efficientnet_lite2', activation='ReLU6'),
    Family('efficientnetv2_rw_t efficientnetv2_rw_s tf_efficientnetv2_b0 tf_efficientnetv2_b1', activation='SiLU'),
    Family('convmixer_768_32', NO_POOL),
    Family('convmixer_1024_20_ks9_p14', NO_POOL, activation='GELU'),
)

# The form that Stergiou et al. 2021 put into ResNet and DenseNet. Odd sizes round up as those of the max pool do.
_STEM = dict(kernel_size=2, stride=2, padding=0, ceil_mode=True)

# Names in use elsewhere, each for one variant above.
ALIASES = dict(
    mobilenetv2_softpool='mobilenetv2_100_softpool',
    resnet_brelu_nobn='resnet50_brelu_nobn',
)

_CONVERT_ARGS = ('where', 'layout', 'start', 'act_kwargs', 'pool_kwargs')


class PretrainedWeightsError(OSError):
    """The pretrained weights could not be had."""


@dataclass(frozen=True)
class Variant:
    """One entry of the zoo.

    Attributes:
        name: Name of the variant.
        base: timm's architecture that it is made from.
        operator: Key of ``OPERATORS``.
        nobn: Whether BatchNorm is folded away.
        family: The family of the base.
    """
    name: str
    base: str
    operator: str
    nobn: bool
    family: Family

    @property
    def recipe(self) -> dict[str, Any]:
        """Arguments of ``convert``."""
        recipe = dict(OPERATORS[self.operator])
        if 'pool' in recipe and self.family.stem:
            recipe['pool_kwargs'] = dict(_STEM)
        if self.nobn:
            recipe['norm'] = 'none'
        return recipe

    @property
    def warm_start(self) -> str:
        """``'exact'`` if the variant starts with its base's function (up to rounding), else ``'approximate'``."""
        exact = self.operator.startswith(('dyrelu', 'brelu')) and self.family.activation in ('ReLU', 'ReLU6')
        return 'exact' if exact else 'approximate'


def variants() -> Iterator[Variant]:
    """All variants that the tables give, aliases last."""
    names = {}
    for family in FAMILIES:
        for base in family.bases.split():
            for operator in family.operators:
                for nobn in (False, True) if operator in family.nobn else (False,):
                    name = f'{base}_{operator}' + '_nobn' * nobn
                    names[name] = Variant(name, base, operator, nobn, family)
    yield from names.values()
    for alias, name in ALIASES.items():
        yield replace(names[name], name=alias)


default_cfgs: dict[str, DefaultCfg] = {}


def register() -> None:
    """Register the variants with timm. Doing it again changes nothing."""
    this = sys.modules[__package__]
    this.default_cfgs = default_cfgs
    for variant in variants():
        if is_model(variant.name) or not is_model(variant.base):  # done before, or a timm without this base
            continue
        default_cfgs[variant.name] = _inherited_cfgs(variant.base, variant.warm_start)
        entrypoint = _make_entrypoint(variant)
        setattr(this, variant.name, entrypoint)
        register_model(entrypoint)


@cache
def _inherited_cfgs(name: str, warm_start: str) -> DefaultCfg:
    """The pretrained cfgs of a base, for variants with this kind of warm start. timm fills in their own names."""
    cfgs = {}
    base = _model_default_cfgs[name]
    for tag, cfg in base.cfgs.items():
        source = f'{name}.{tag}' if tag else name
        hub_id = f'timm/{source}' if cfg.hf_hub_id == 'timm/' else cfg.hf_hub_id
        note = f'weights of {hub_id or source}, converted on load; warm start {warm_start}'
        cfgs[tag] = replace(
            cfg,
            hf_hub_id=hub_id,
            origin_url=cfg.origin_url or (f'https://huggingface.co/{hub_id}' if hub_id else None),
            notes=(*(cfg.notes or ()), note),
        )
    return DefaultCfg(tags=deque(base.tags), cfgs=cfgs, is_pretrained=base.is_pretrained)


def _make_entrypoint(variant: Variant) -> Callable[..., nn.Module]:
    def entrypoint(pretrained: bool = False, **kwargs) -> nn.Module:
        return _create(variant, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = variant.name
    entrypoint.__module__ = __package__  # timm files models under the last part of it
    entrypoint.__doc__ = f"timm's {variant.base} converted with {variant.recipe}. Warm start: {variant.warm_start}."
    return entrypoint


def _create(variant: Variant, pretrained: bool, **kwargs) -> nn.Module:
    recipe = variant.recipe
    for name in _CONVERT_ARGS:
        if name in kwargs:
            value = kwargs.pop(name)
            recipe[name] = {**recipe.get(name, {}), **value} if isinstance(value, dict) else value
    if kwargs.get('features_only'):
        kwargs.setdefault('out_indices', _out_indices(variant.base))
    built_with: dict[str, Any] = {}

    def build(**model_kwargs) -> nn.Module:
        built_with.update(model_kwargs)
        # Weights yet to be loaded are checked when they are.
        return convert(model_entrypoint(variant.base)(**model_kwargs), **recipe, check=False)

    def to_variant(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
        new_keys = model.conversion.new_keys
        if not new_keys or any(key in state_dict for key in new_keys):
            return state_dict  # the variant's own weights, or of the same names and meaning
        base = _load_base(variant.base, state_dict, PretrainedCfg(**model.pretrained_cfg), built_with)
        model.conversion = convert(base, **recipe).conversion
        return base.state_dict()

    try:
        return build_model_with_cfg(
            build,
            variant.name,
            pretrained,
            pretrained_filter_fn=to_variant,
            feature_cfg=dict(feature_cls='getter'),
            **kwargs,
        )
    except (OSError, EntryNotFoundError) as e:
        if not pretrained:
            raise
        raise PretrainedWeightsError(_no_weights(variant, kwargs, e)) from e


@cache
def _out_indices(name: str) -> tuple[int, ...]:
    """The levels that timm's feature extractor of a base gives by default."""
    with torch.device('meta'):
        features = model_entrypoint(name)(features_only=True)
    return tuple(getattr(features.feature_info, 'out_indices', range(5)))


def _load_base(
        name: str,
        state_dict: dict[str, torch.Tensor],
        cfg: PretrainedCfg,
        model_kwargs: dict[str, Any],
) -> nn.Module:
    """The base with a checkpoint of its own, as timm loads it. What the target changes is left to the caller."""
    cfg = replace(
        get_pretrained_cfg(name),
        state_dict=state_dict,
        num_classes=cfg.num_classes + (cfg.label_offset or 0),
        label_offset=None,
        input_size=cfg.input_size,
        custom_load=False,
    )
    adapted = ('num_classes', 'in_chans', 'global_pool')
    kwargs = {k: v for k, v in model_kwargs.items() if k not in adapted}
    return model_entrypoint(name)(pretrained=True, pretrained_cfg=cfg.to_dict(), **kwargs)


def _no_weights(variant: Variant, kwargs: dict[str, Any], error: Exception) -> str:
    cfg = resolve_pretrained_cfg(
        variant.name, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    name = f'{variant.name}.{cfg.tag}' if cfg.tag else variant.name
    repo = f"Hugging Face Hub repo '{cfg.hf_hub_id}'" if cfg.hf_hub_id else f"address '{cfg.url}'"
    where = f"file '{cfg.file}'" if cfg.file else repo
    return (
        f"Could not get the pretrained weights of '{name}' from the {where}: "
        f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}\n"
        f"With a copy of the file at hand, of {variant.base} or of {variant.name}:\n"
        f"  timm.create_model('{variant.name}', pretrained=True, "
        f"pretrained_cfg_overlay=dict(file='/path/to/model.safetensors'))\n"
        f"A mirror of the Hub is used if its address stands in the environment variable HF_ENDPOINT."
    )
