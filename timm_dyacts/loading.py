"""A model by what a user types: a name, a repo of the Hub, or a folder."""
import difflib
import os
from argparse import Namespace
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg, is_model, list_models
from torch import nn
from torch.nn.parameter import is_lazy

__all__ = ['build_model', 'count_parameters', 'resolve_input', 'resolve_model_name']


def resolve_model_name(name: str, option: str = '--model') -> str:
    """The name under which ``timm.create_model`` knows a model.

    Args:
        name: A model name, 'hf-hub:<id>', 'local-dir:<folder>', or just the path of a run or checkpoint folder.
        option: The option that gave it, for the message.

    Raises:
        ValueError: An unknown model; the error lists names that look alike.
    """
    if ':' in name:
        return name
    if os.path.isfile(os.path.join(name, 'config.json')):
        return f'local-dir:{name}'
    architecture = name.split('.')[0]
    if not is_model(architecture):
        close = difflib.get_close_matches(architecture, list_models(), n=5)
        hint = f' Close names: {", ".join(close)}.' if close else ''
        raise ValueError(
            f'{option} {name!r} is neither a name from timm.list_models() nor a folder with a config.json.{hint}')
    return name


def build_model(args: Namespace, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Create the model of ``--model`` with the classes and the input that the options ask for.

    Args:
        args: Options ``model``, ``num_classes``, ``in_chans``, ``img_size``, ``input_size`` and ``model_kwargs``.
        pretrained: Load its weights.
        **kwargs: Further arguments of ``timm.create_model``.
    """
    name = resolve_model_name(args.model)
    model_kwargs = dict(args.model_kwargs)
    img_size = tuple(args.input_size[1:]) if args.input_size else args.img_size
    if img_size is not None and ':' not in name and get_pretrained_cfg(name).fixed_input_size:
        model_kwargs.setdefault('img_size', img_size)  # position embeddings are built for one size
    model = timm.create_model(
        name,
        pretrained=pretrained,
        num_classes=args.num_classes,
        in_chans=args.in_chans,
        **kwargs,
        **model_kwargs,
    )
    if any(is_lazy(p) for p in model.parameters()):
        # Activations that learn their number of channels from the first input have no parameters to train before it.
        with torch.no_grad():
            model.eval()(torch.zeros(1, *resolve_input(args, model)['input_size']))
    return model


def count_parameters(model: nn.Module) -> float:
    """Number of parameters, in millions."""
    return sum(p.numel() for p in model.parameters()) / 1e6


def resolve_input(args: Namespace, model: nn.Module, use_test_size: bool = False) -> dict[str, Any]:
    """Preprocessing as ``timm.data.resolve_data_config`` has it, with the channels of the model.

    Args:
        args: Options ``img_size``, ``input_size``, ``in_chans``, ``mean``, ``std``, ``crop_pct`` and ``interpolation``.
            Where they are None, the model's own configuration speaks.
        model: A timm model.
        use_test_size: Prefer the size that the model's authors recommend for evaluation.
    """
    in_chans = args.in_chans or getattr(model, 'in_chans', model.pretrained_cfg['input_size'][0])
    for option in ('mean', 'std'):
        value = getattr(args, option)
        if value is not None and len(value) not in (1, in_chans):
            raise ValueError(f'--{option} takes 1 or {in_chans} numbers, one per input channel, got {value}.')
    config = resolve_data_config(dict(vars(args), in_chans=in_chans), model=model, use_test_size=use_test_size)
    config['input_size'] = (in_chans, *config['input_size'][1:])
    for key in ('mean', 'std'):
        if len(config[key]) != in_chans:
            config[key] = (sum(config[key]) / len(config[key]),) * in_chans
    return config
