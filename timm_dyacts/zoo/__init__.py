"""The variants: timm's architectures with our operators, registered with timm under names of their own."""
from typing import Any

from .families import ALIASES, ALL, FAMILIES, Family
from .preview import Preview, preview, resolve_warm_start, select_names
from .registry import Variant, all_options, bases, find_entry, find_variant, parse, register, suggest, variants
from .weights import PretrainedWeightsError

__all__ = [
    'ALIASES',
    'ALL',
    'FAMILIES',
    'Family',
    'PretrainedWeightsError',
    'Preview',
    'Variant',
    'all_options',
    'bases',
    'find_variant',
    'parse',
    'preview',
    'register',
    'resolve_warm_start',
    'select_names',
    'suggest',
    'variants',
]


def __getattr__(name: str) -> Any:
    """Give the entrypoint of a variant that is not registered, as those that are registered stand here, too."""
    entry = find_entry(name)
    if entry is None:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return entry.entrypoint
