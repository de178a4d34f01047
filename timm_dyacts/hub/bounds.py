"""What a config of others may ask for, and how much memory a model of theirs may take before it is refused.

A config names an architecture and its arguments. Nothing in it may say where weights come from, as these are beside it,
and a number in it may not be larger than any real model has. What the numbers come to together is counted while the
model is built, before its parameters are filled.
"""
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules import module as hooks
from torch.nn.parameter import is_lazy

from ..run_folder import CONFIG, WEIGHTS
from .errors import HubError, shown

__all__ = ['are_label_names', 'check_arguments', 'check_header', 'check_size', 'is_count', 'limited_building']

_CONFIG_BYTES = 16 * 2 ** 20
_HEADER_BYTES = 16 * 2 ** 20
_DEPTH = 16
_TEXT = 4096  # characters
_CLASSES = 2 ** 20
_PIXELS = 4096  # height and width
_NUMBER = 2 ** 16  # any other argument of a model
_MODULES = 50_000
_SPARE_ELEMENTS = 64 * 2 ** 20

# Arguments of timm's that say where weights come from, or how they are read, or that belong to the one who loads
_NOT_THEIRS = (
    'pretrained', 'checkpoint', 'cache_dir', 'features_only', 'feature_cfg', 'model_cfg', 'model_cls', 'kwargs_filter',
    'scriptable', 'exportable', 'no_jit', 'device', 'dtype', 'variant')


def check_size(path: Path, name: str) -> None:
    """Refuse a config that is larger than any real one, before it is read."""
    size = path.stat().st_size
    if size > _CONFIG_BYTES:
        raise HubError(f"The {CONFIG} of '{name}' has {size} bytes; at most {_CONFIG_BYTES} are read.")


def is_count(value: Any, most: int) -> bool:
    """Say whether a value is a whole number from 0 to ``most``."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def are_label_names(value: Any) -> bool:
    """Say whether a value names classes: a list of texts, or a mapping to texts where timm leaves gaps."""
    names = list(value.values()) if isinstance(value, Mapping) else value
    return isinstance(names, (list, tuple)) and len(names) <= _CLASSES and all(
        isinstance(name, str) and len(name) <= _TEXT for name in names)


def check_arguments(config: Mapping[str, Any], name: str) -> None:
    """Raise a ``HubError`` for what a config may not ask for."""
    def refuse(where: str, value: Any, accepted: str) -> None:
        raise HubError(
            f"The {CONFIG} of '{name}' has {shown(where)} = {shown(value)}; accepted is {accepted}. Its owner has to "
            f"publish it again.")

    cfg, args = config.get('pretrained_cfg', config), config.get('model_args', {})
    for where, holder in (('num_classes', config), ('pretrained_cfg.num_classes', cfg)):
        value = holder.get('num_classes')
        # Of another type it contradicts the number of the weights, which is said elsewhere.
        if isinstance(value, (int, float)) and not is_count(value, _CLASSES):
            refuse(where, value, f'a whole number from 0 to {_CLASSES}')
    for where, holder in (('label_names', config), ('pretrained_cfg.label_names', cfg)):
        value = holder.get('label_names')
        if value is not None and not are_label_names(value):
            refuse(where, value, f'a list of texts of at most {_TEXT} characters')
    for key in ('input_size', 'test_input_size', 'fixed_input_size', 'min_input_size', 'pool_size', 'test_pool_size'):
        value = cfg.get(key)
        if value is None or isinstance(value, bool) and key == 'fixed_input_size':
            continue
        sizes, numbers = value if isinstance(value, list) else [value], 3 if 'input_size' in key else 2
        if len(sizes) != numbers and key != 'fixed_input_size' or not all(is_count(size, _PIXELS) for size in sizes):
            refuse(f'pretrained_cfg.{key}', value, f'{numbers} whole numbers from 0 to {_PIXELS}')
    for key, kind, accepted in (('crop_pct', (int, float), 'a number'), ('interpolation', str, 'a text')):
        if cfg.get(key) is not None and not isinstance(cfg[key], kind):
            refuse(f'pretrained_cfg.{key}', cfg[key], accepted)
    for key in ('mean', 'std'):
        value = cfg.get(key)
        if value is not None and not (isinstance(value, list) and 0 < len(value) <= _PIXELS and all(
                isinstance(number, (int, float)) and abs(number) <= _NUMBER for number in value)):
            refuse(f'pretrained_cfg.{key}', value, 'a list of numbers')
    for key, value in args.items():
        where = f'model_args.{key}'
        if key.startswith(_NOT_THEIRS):
            refuse(where, value, 'none: it is for the one who loads the model')
        problem = _problem(value, key)
        if problem is not None:
            refuse(where, value, problem)


def _problem(value: Any, key: str, depth: int = 0) -> str | None:
    """Say what would be accepted in place of a value of ``model_args``, None if it is."""
    if depth > _DEPTH:
        return f'a depth of at most {_DEPTH}'
    if key.endswith('_rate'):  # of dropout, which does not look at it before the first forward pass
        fits = value is None or isinstance(value, (int, float)) and 0 <= value <= 1
        return None if fits else 'a number from 0 to 1'
    if isinstance(value, Mapping):
        problems = (_problem(item, inner, depth + 1) for inner, item in value.items())
        return next((problem for problem in problems if problem is not None), None)
    if isinstance(value, list):
        problems = (_problem(item, key, depth + 1) for item in value)
        return f'at most {_PIXELS} values' if len(value) > _PIXELS else \
            next((problem for problem in problems if problem is not None), None)
    if isinstance(value, str):
        return None if len(value) <= _TEXT and '://' not in value else 'a name, no address'
    most = _CLASSES if key == 'num_classes' else _PIXELS if 'size' in key else _NUMBER
    if isinstance(value, (int, float)) and not abs(value) <= most:
        return f'a number of at most {most}'
    return None


def check_header(path: Path, name: str) -> None:
    """Refuse a safetensors file whose header is larger than any real one, before it is read."""
    with open(path, 'rb') as file:
        size = int.from_bytes(file.read(8), 'little')
    if _HEADER_BYTES < size <= path.stat().st_size:
        raise HubError(f"The header of {WEIGHTS} of '{name}' has {size} bytes; at most {_HEADER_BYTES} are read.")


@contextmanager
def limited_building(weights: Path) -> Iterator[None]:
    """Let a model that is built have no more parameters and buffers than there can be weights for.

    Args:
        weights: The file of its weights. It may have as many elements as that has bytes, and some for what the one who
            loads it adds.

    Raises:
        HubError: It has more, or more modules than any real one.
    """
    most = weights.stat().st_size + _SPARE_ELEMENTS
    counted = dict(elements=0, modules=0)
    thread = threading.get_ident()

    def count_elements(module: nn.Module, name: str, tensor: Any) -> None:
        if tensor is not None and not is_lazy(tensor) and threading.get_ident() == thread:
            counted['elements'] += tensor.numel()
            if counted['elements'] > most:
                raise HubError(f'It would have more than {most} parameters, of which the weights hold fewer.')

    def count_modules(module: nn.Module, name: str, submodule: Any) -> None:
        if threading.get_ident() == thread:
            counted['modules'] += 1
            if counted['modules'] > _MODULES:
                raise HubError(f'It would have more than {_MODULES} modules.')

    handles = [
        hooks.register_module_parameter_registration_hook(count_elements),
        hooks.register_module_buffer_registration_hook(count_elements),
        hooks.register_module_module_registration_hook(count_modules),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
