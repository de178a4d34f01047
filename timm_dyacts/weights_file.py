"""Weights in a file that a user names: read without running anything in it, and refused in a line that says why."""
import logging
import os
import warnings
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import timm.models
import torch
from torch import Tensor, nn

from .messages import one_line
from .zoo.weights import COUNTER

__all__ = [
    'Loaded',
    'check_fit',
    'check_start',
    'classifier_entries',
    'load_numpy',
    'read_weights',
    'wrong_kinds',
]

_logger = logging.getLogger(__name__)

_ACCEPTED = 'Accepted are safetensors files, and state dicts as torch.save writes them.'
# Weights of fewer bits belong to the program that made them. Integers may be indices or counters.
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_ZIP, _PICKLE = b'PK\x03\x04', b'\x80'


class Loaded(NamedTuple):
    """How many entries of a state dict, without those of the classifier, came from a file, and how many there are."""
    entries: int
    of: int


def read_weights(path: str | os.PathLike[str], option: str) -> dict[str, Tensor]:
    """Read a checkpoint: a state dict, or what has one in it as timm's and other training scripts save it.

    Args:
        path: A safetensors file, or one of ``torch.save``, of which only tensors and plain values are read.
        option: The option that named it, for the message.

    Returns:
        The tensors by name, without the prefixes of DDP and ``torch.compile``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no checkpoint, or has values that are not finite.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{option} must be a checkpoint file, got {path!r}, which is no file.')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # PyTorch's, about files of old formats
            state_dict = timm.models.load_state_dict(path, weights_only=True)  # not the default of older releases
    except Exception as e:  # a file of another kind makes the readers raise almost anything
        raise ValueError(
            f'{option} must be a checkpoint file, got {path!r}: {_describe(path, e)}. {_ACCEPTED}') from None
    tensors = {key: value for key, value in state_dict.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(
            f'{option} must be a checkpoint file, got {path!r}: it holds no tensors by name. {_ACCEPTED}')
    for key, value in tensors.items():
        problem = _problem(key, value)
        if problem:
            raise ValueError(f'{option} must hold {problem[0]} weights, got {path!r}: {key!r} {problem[1]}.')
    return tensors


def _problem(key: str, value: Tensor) -> tuple[str, str] | None:
    """Say what weights should be that these are not, and what they are."""
    if value.is_meta or value.layout != torch.strided:
        return 'dense', f'is {"without values" if value.is_meta else value.layout}'
    if value.is_complex() or value.is_quantized or value.is_floating_point() and value.dtype not in _DTYPES:
        return 'floating-point', f'is {value.dtype}'
    if value.is_floating_point() and not value.isfinite().all():
        return 'finite', 'has NaN or infinity in it'
    return None


def _describe(path: str, error: Exception) -> str:
    """Say what a file looks like that cannot be read."""
    with open(path, 'rb') as file:
        start = file.read(512)
    if not start:
        return 'it is empty'
    if start.startswith(b'version https://git-lfs'):
        return "it is a pointer of Git LFS, not the file: run 'git lfs pull'"
    if start.lstrip()[:1] == b'<':
        return 'it looks like a web page'
    if path.endswith('.safetensors'):
        return f'it is a safetensors file that is cut off or damaged ({one_line(error)})'
    if start.startswith((_ZIP, _PICKLE)):
        if 'weights_only' in str(error) or 'Unsupported' in str(error) or 'GLOBAL' in str(error):
            return 'it holds Python objects beside tensors, which may run code: load it where you trust it, and save ' \
                   'its state dict'
        return f'it is cut off, damaged, or no file of torch.save ({type(error).__name__})'
    return 'it is none'


def check_fit(state_dict: Mapping[str, Any], model: nn.Module, option: str, path: str | os.PathLike[str]) -> None:
    """Raise ``ValueError`` if a model does not take a state dict whole.

    Args:
        state_dict: The state dict.
        model: The model.
        option: The option that named the file, for the message.
        path: The file, for the message.
    """
    ours = model.state_dict()
    missing, extra = ours.keys() - state_dict.keys(), state_dict.keys() - ours.keys()
    shapes = {key for key in ours.keys() & state_dict.keys() if ours[key].shape != state_dict[key].shape}
    kinds = wrong_kinds(state_dict, model) - shapes
    missing = {key for key in missing if not key.endswith(COUNTER)}
    problems = [
        f'{what} {_list(keys)}' for what, keys in
        (('lacks', missing), ('has besides', extra), ('has in another shape', shapes), ('has as integers', kinds))
        if keys]
    if not problems:
        return
    head = set(classifier_entries(model))
    hint = ''
    if shapes and not missing and not extra and shapes <= head and state_dict[min(shapes)].ndim:
        classes = len(state_dict[min(shapes)])
        hint = f' It has {classes} classes, the model {len(ours[min(shapes)])}: set --num-classes {classes}.'
    raise ValueError(
        f'{option} must fit the model, got {os.fspath(path)!r}: of the {len(ours)} entries of the model, '
        f'{len(ours.keys() & state_dict.keys()) - len(shapes)} are in it with their shape; it {", ".join(problems)}.'
        f'{hint}')


def wrong_kinds(state_dict: Mapping[str, Tensor], model: nn.Module) -> set[str]:
    """Name the entries that are integers where the model has floating-point numbers, or the reverse."""
    return {
        key for key, value in model.state_dict().items()
        if key in state_dict and value.is_floating_point() != state_dict[key].is_floating_point()}


def load_numpy(model: nn.Module, path: str, option: str) -> None:
    """Load a NumPy file into a model that timm reads from one.

    Raises:
        ValueError: It cannot be read, or the model reads none.
    """
    try:
        timm.models.load_checkpoint(model, path)
    except Exception as e:
        raise ValueError(f'{option} must be a NumPy file that the model reads, got {path!r}: {one_line(e)}') from None


def check_start(model: nn.Module, absent: Collection[str], option: str, path: str) -> Loaded:
    """Say what a model got from a file that it was started from, and refuse a file of another architecture.

    What has another shape, or is not there, starts anew: that is right for a part of a network, such as the position
    embeddings or the last norm, and how timm has it. A file that gives less than half of all entries is no start.

    Args:
        model: The model.
        absent: The entries that the file did not give.
        option: The option that named the file, for messages.
        path: The file, for messages.

    Raises:
        ValueError: It gives less than half of the entries.
    """
    head = classifier_entries(model)
    wanted = [key for key in model.state_dict() if key not in head and not key.endswith(COUNTER)]
    lacking = {key for key in wanted if key in absent}
    loaded = Loaded(len(wanted) - len(lacking), len(wanted))
    if loaded.entries < len(wanted) / 2:
        raise ValueError(
            f'{option} must hold weights of the architecture, got {path!r}, which has {loaded.entries} of its '
            f'{len(wanted)} entries; it lacks {_list(lacking)}.')
    if lacking:
        _logger.warning(
            '%s %s: %d of %d entries are not in it and start anew: %s.', option, path, len(lacking), len(wanted),
            _list(lacking))
    return loaded


def classifier_entries(model: nn.Module) -> list[str]:
    """Give the names of the entries of the classifier."""
    names = getattr(model, 'pretrained_cfg', {}).get('classifier') or ()
    names = (names,) if isinstance(names, str) else names
    return [f'{name}.{kind}' for name in names for kind in ('weight', 'bias')]


def _list(keys: set[str], count: int = 3) -> str:
    """Quote the first few keys, and say how many more there are."""
    first = [key if key.isprintable() else repr(key) for key in sorted(map(str, keys))[:count]]
    more = f' and {len(keys) - count} more' if len(keys) > count else ''
    return ', '.join(first) + more
