"""A model by what a user types: a name, a repo of the Hub, or a folder."""
import math
import os
import reprlib
import textwrap
from collections.abc import Mapping
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.data import resolve_data_config, str_to_interp_mode
from timm.models import get_pretrained_cfg, is_model, parse_model_name
from torch import nn
from torch.nn.parameter import is_lazy

from . import hub
from .hub.bounds import are_label_names
from .layers.calls import update_entries
from .messages import one_line
from .modes import evaluating
from .weights_file import check_fit, load_numpy, read_weights
from .zoo import PretrainedWeightsError, find_variant, suggest

__all__ = [
    'build_from_file',
    'build_model',
    'count_parameters',
    'create_model',
    'label_names_of',
    'resolve_input',
    'resolve_model_name',
]


def resolve_model_name(name: str, option: str = '--model') -> str:
    """Give the name under which ``create_model`` knows a model.

    Args:
        name: A model name, ``'hf-hub:<id>'``, ``'local-dir:<folder>'``, or just the path of a run or checkpoint folder.
        option: The option that gave it, for the message.

    Raises:
        ValueError: An unknown model; the error lists names that look alike.
    """
    if ':' in name:
        source, place = parse_model_name(name)  # timm has other spellings, too, such as 'HF-HUB:'
        return f'hf-hub:{place}' if source == 'hf-hub' else name
    if os.path.isfile(os.path.join(name, 'config.json')):  # what timm looks for in a 'local-dir:'
        return f'local-dir:{name}'
    architecture = name.split('.')[0]
    if not is_model(architecture):
        raise ValueError(
            f'{option} {name!r} is neither a name from timm.list_models() nor a folder with a config.json.'
            f'{suggest(architecture, count=5)}')
    return name


def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create a model as ``timm.create_model`` does, but that of a repo with the checks of ``hub.load``.

    Args:
        name: As ``resolve_model_name`` gives it.
        pretrained: Whether to load the weights.
        **kwargs: Further arguments of ``timm.create_model``.
    """
    if name.startswith('hf-hub:'):
        return hub.load(name, pretrained=pretrained, **kwargs)
    return timm.create_model(name, pretrained=pretrained, **kwargs)


def build_model(
        name: str,
        preprocessing: Mapping[str, Any],
        pretrained: bool,
        model_kwargs: Mapping[str, Any],
        **kwargs: Any,
) -> nn.Module:
    """Create a model with the input that the options ask for.

    Args:
        name: As ``resolve_model_name`` takes it.
        preprocessing: As ``resolve_input`` takes it.
        pretrained: Whether to load the weights.
        model_kwargs: Arguments of ``timm.create_model`` that come from a user, and win over what follows from the rest.
        **kwargs: Further arguments of ``timm.create_model``.
    """
    name = resolve_model_name(name)
    given, model_kwargs = model_kwargs, dict(model_kwargs)
    for key in given.keys() & {*kwargs, 'in_chans', 'pretrained', 'model_name'}:
        raise ValueError(f'--model-kwargs must not hold {key}, which an option of its own gives.')
    input_size = preprocessing.get('input_size')
    img_size = tuple(input_size[1:]) if input_size else preprocessing.get('img_size')
    if img_size is not None and ':' not in name and get_pretrained_cfg(name).fixed_input_size:
        model_kwargs.setdefault('img_size', img_size)  # position embeddings are built for one size
    try:
        model = create_model(
            name, pretrained=pretrained, in_chans=preprocessing.get('in_chans'), **kwargs, **model_kwargs)
    except (RuntimeError, SafetensorError) as e:  # for weights of another shape PyTorch's has a line for each
        if not pretrained:
            raise
        reason = textwrap.shorten(one_line(e), 400, placeholder=' ...')
        raise ValueError(f'The weights of {name} cannot be loaded: {reason}') from e
    except (ArithmeticError, AttributeError, LookupError, TypeError) as e:
        if not given:
            raise
        # A constructor checks none of its arguments: it runs into something, somewhere.
        raise ValueError(
            f'--model-kwargs must be arguments of {name}, got {dict(given)} ({type(e).__name__}: {e}).') from e
    except ValueError as e:
        if not given:
            raise
        raise ValueError(f'{name} cannot be made with --model-kwargs {dict(given)}: {e}') from e
    if any(is_lazy(p) for p in model.parameters()):
        # Activations that learn their number of channels from the first input have no parameters to train before it.
        with torch.no_grad(), evaluating(model):
            model(torch.zeros(1, *resolve_input(model, preprocessing)['input_size']))
    return model


def build_from_file(
        name: str,
        path: str,
        option: str,
        preprocessing: Mapping[str, Any],
        model_kwargs: Mapping[str, Any],
        **kwargs: Any,
) -> nn.Module:
    """Create a model with all of its weights from a file, those of a variant also from one of its base.

    Args:
        name: As ``resolve_model_name`` takes it.
        path: The file, as ``weights_file.read_weights`` takes it, or a NumPy file of a model that timm reads from one.
        option: The option that named it, for messages.
        preprocessing: As ``resolve_input`` takes it.
        model_kwargs: As ``build_model`` takes them.
        **kwargs: Further arguments of ``timm.create_model``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no checkpoint, or one of another model.
    """
    name = resolve_model_name(name)
    model = build_model(name, preprocessing, False, model_kwargs, **kwargs)
    if os.path.splitext(path)[1].lower() in ('.npz', '.npy'):
        load_numpy(model, path, option)
        return model
    given = read_weights(path, option)
    own = dict(given)
    update_entries(model, own)
    try:
        check_fit(own, model, option, path)
    except ValueError:
        if ':' in name or find_variant(name) is None:
            raise
        overlay = dict(state_dict=given, num_classes=model.num_classes)
        try:
            return build_model(
                name, preprocessing, True, model_kwargs, pretrained_cfg_overlay=overlay, **kwargs)
        except (PretrainedWeightsError, ValueError) as e:
            reason = one_line(e.__cause__ or e)
            raise ValueError(f'{option} must fit the model, got {path!r}. {reason}') from None
    model.load_state_dict(own)
    return model


def label_names_of(model: nn.Module) -> list[str] | None:
    """Give the names that a checkpoint has for its classes, in the order of the logits, ``None`` without.

    Raises:
        ValueError: They are no names.
    """
    names = model.pretrained_cfg.get('label_names')
    if not names:
        return None
    if not are_label_names(names):
        raise ValueError(
            f'label_names of the config of a model must be a list of texts, got {one_line(reprlib.repr(names))}.')
    if isinstance(names, Mapping):  # by label, which JSON makes a text
        return [names.get(str(label), names.get(label, str(label))) for label in range(model.num_classes)]
    return list(names) if len(names) == model.num_classes else None


def count_parameters(model: nn.Module) -> float:
    """Count the parameters, in millions."""
    return sum(p.numel() for p in model.parameters()) / 1e6


def resolve_input(model: nn.Module, preprocessing: Mapping[str, Any], use_test_size: bool = False) -> dict[str, Any]:
    """Give the preprocessing as ``timm.data.resolve_data_config`` has it, with the channels of the model.

    Args:
        model: A timm model.
        preprocessing: ``img_size``, ``input_size``, ``in_chans``, ``mean``, ``std``, ``crop_pct`` and
            ``interpolation``. Where they are missing or ``None``, the model's own configuration speaks.
        use_test_size: Whether to prefer the size that the model's authors recommend for evaluation.

    Raises:
        ValueError: ``mean`` or ``std`` has another number of values than the input has channels, or the model's own
            configuration is none that images could be prepared by.
    """
    in_chans = preprocessing.get('in_chans') or getattr(model, 'in_chans', model.pretrained_cfg['input_size'][0])
    for option in ('mean', 'std'):
        value = preprocessing.get(option)
        if value is not None and len(value) not in (1, in_chans):
            raise ValueError(f'--{option} takes 1 or {in_chans} numbers, one per input channel, got {list(value)}.')
    config = resolve_data_config(dict(preprocessing, in_chans=in_chans), model=model, use_test_size=use_test_size)
    _check_preprocessing(config)
    config['input_size'] = (in_chans, *config['input_size'][1:])
    for key in ('mean', 'std'):
        if len(config[key]) != in_chans:
            config[key] = (sum(config[key]) / len(config[key]),) * in_chans
    return config


def _check_preprocessing(config: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for what the configuration of a model has wrong. Options are checked before."""
    size, interpolation, crop_pct = config['input_size'], config['interpolation'], config['crop_pct']
    for key, fits, accepted in (
        ('input_size', _are_numbers(size, 1) and len(size) == 3 and all(isinstance(side, int) for side in size),
         'channels, height and width'),
        ('interpolation', _is_interpolation(interpolation), "a name such as 'bicubic'"),
        ('mean', _are_numbers(config['mean'], -math.inf), 'a list of numbers'),
        ('std', _are_numbers(config['std'], 1e-12), 'a list of numbers above 0'),
        ('crop_pct', _are_numbers([crop_pct], 0.01) and crop_pct <= 100, 'a number from 0.01 to 100'),
    ):
        if not fits:
            raise ValueError(
                f'The config of the model has {key} = {one_line(reprlib.repr(config[key]))}; accepted is {accepted}. '
                f'--{key.replace("_", "-")} replaces it.')


def _are_numbers(values: Any, least: float) -> bool:
    return isinstance(values, (list, tuple)) and len(values) > 0 and all(
        isinstance(value, (int, float)) and math.isfinite(value) and value >= least for value in values)


def _is_interpolation(value: Any) -> bool:
    try:
        return value == 'random' or bool(str_to_interp_mode(value))
    except (KeyError, TypeError):
        return False
