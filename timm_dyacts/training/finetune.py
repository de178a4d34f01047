"""What fine-tuning a converted model needs beside timm: its operators' new parameters are trained apart from the rest.

The operators' parameters are those that the base model does not have (``operators.operator_parameters``). The
classifier belongs neither to them nor to the backbone.
"""
import inspect
from collections.abc import Iterator
from typing import Any

import timm
import torch
from timm.optim import (
    create_optimizer_v2,
    optimizer_kwargs,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from torch import nn

from ..operators import operator_parameters
from ..version import needs
from .config import TrainConfig

__all__ = ['build_optimizer', 'freeze', 'init_head', 'unfreeze']


def build_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Create the optimizer with timm's parameter groups, the operators' parameters in groups of their own.

    Biases, those of the hyper functions among them, and normalisation parameters have no weight decay.

    Raises:
        ImportError: timm is too old for an option.
        ValueError: ``lr_ops`` is given, and there are no operators with parameters, or ``opt_kwargs`` do not fit.
    """
    kwargs = optimizer_kwargs(config)
    for name in kwargs.keys() & config.opt_kwargs.keys():
        raise ValueError(f'--opt-kwargs must not hold {name}, which an option of its own gives.')
    has_scales = config.layer_decay_min_scale or config.layer_decay_no_opt_scale is not None
    if has_scales and 'layer_decay_min_scale' not in inspect.signature(create_optimizer_v2).parameters:
        raise needs('--layer-decay-min-scale and --layer-decay-no-opt-scale', 'timm', '1.0.17', timm.__version__)
    kwargs.update(config.opt_kwargs)
    try:
        return _create_optimizer(config, model, kwargs)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        if not config.opt_kwargs and not config.opt_betas:
            raise
        if not config.opt_kwargs:
            raise ValueError(f'--opt-betas must be those of --opt {config.opt}, got {list(config.opt_betas)}.') from e
        raise ValueError(
            f'--opt-kwargs must be arguments of --opt {config.opt}, got {dict(config.opt_kwargs)} ({e}).') from e


def _create_optimizer(config: TrainConfig, model: nn.Module, kwargs: dict[str, Any]) -> torch.optim.Optimizer:
    if config.lr_ops == 1:
        return create_optimizer_v2(model, **kwargs)
    operators = {id(parameter) for parameter in operator_parameters(model).values()}
    if not operators:
        raise ValueError(
            f'--lr-ops {config.lr_ops:g} needs a model whose operators have parameters, such as a _dyrelu_b variant.')
    decay = dict(
        weight_decay=kwargs.pop('weight_decay'),
        no_weight_decay_list=getattr(model, 'no_weight_decay', set)(),
    )
    # What create_optimizer_v2 groups the parameters of a model by, under its names and those of the groups
    names = dict(fallback_list='fallback_list', fallback_no_weight_decay='fallback_no_weight_decay',
                 filter_bias_and_bn='weight_decay_exclude_1d')
    decay.update({ours: kwargs.pop(name) for name, ours in names.items() if name in kwargs})
    scales = {name.removeprefix('layer_decay_'): kwargs.pop(name)
              for name in ('layer_decay_min_scale', 'layer_decay_no_opt_scale') if name in kwargs}
    if 'layer_decay' in kwargs:
        groups = param_groups_layer_decay(model, **decay, **scales, layer_decay=kwargs.pop('layer_decay'))
    else:
        groups = param_groups_weight_decay(model, **decay)
    groups = [part for group in groups for part in _split(group, operators, config.lr_ops)]
    return create_optimizer_v2(groups, weight_decay=0.0, **kwargs)


def _split(group: dict, operators: set[int], scale: float) -> Iterator[dict]:
    """Split a parameter group in two: all but the operators, and the operators with their learning rate scaled."""
    rest = [parameter for parameter in group['params'] if id(parameter) not in operators]
    own = [parameter for parameter in group['params'] if id(parameter) in operators]
    if rest:
        yield dict(group, params=rest)
    if own:
        yield dict(group, params=own, lr_scale=group.get('lr_scale', 1.0) * scale)


@torch.no_grad()
def init_head(model: nn.Module, scale: float | None, bias: float | None) -> None:
    """Scale the classifier of a model and set its biases, in place, as timm's train.py does.

    Args:
        model: The model.
        scale: Factor of weights and biases, ``None`` to leave them.
        bias: Value of the biases, ``None`` to leave them.

    Raises:
        ValueError: The classifier is not a single layer with weights and biases.
    """
    if scale is None and bias is None:
        return
    classifier = model.get_classifier() if hasattr(model, 'get_classifier') else None
    if getattr(classifier, 'weight', None) is None or getattr(classifier, 'bias', None) is None:
        raise ValueError(
            f'--head-init-scale and --head-init-bias need a classifier with weights and biases, got '
            f'{type(classifier).__name__}.')
    if scale is not None:
        classifier.weight.mul_(scale)
        classifier.bias.mul_(scale)
    if bias is not None:
        classifier.bias.fill_(bias)


def freeze(model: nn.Module, part: str) -> list[nn.Module]:
    """Keep a part of a model from being trained, in place.

    Args:
        model: The model.
        part: ``'backbone'`` (everything but the operators and the classifier), ``'operators'`` or ``'none'``.

    Returns:
        The normalisations whose statistics must stay as they are, too: to be kept in eval mode.

    Raises:
        ValueError: There is nothing to freeze, or nothing left to train.
    """
    if part == 'none':
        return []
    operators = operator_parameters(model)
    if part == 'operators':
        if not operators:
            raise ValueError("--freeze operators needs operators with parameters, such as a _dyrelu_b variant's.")
        frozen = list(operators.values())
    else:
        classifier = model.get_classifier() if hasattr(model, 'get_classifier') else nn.Identity()
        trained = {id(p) for p in (*operators.values(), *classifier.parameters())}
        frozen = [parameter for parameter in model.parameters() if id(parameter) not in trained]
        if not trained:
            raise ValueError('--freeze backbone leaves nothing to train: no operator parameters, no classifier.')
    for parameter in frozen:
        parameter.requires_grad_(False)
    if part == 'operators':
        return []
    return [module for module in model.modules() if getattr(module, 'track_running_stats', False)]


def unfreeze(model: nn.Module) -> None:
    """Train all of a model again, in place."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
