"""The variants: timm's architectures with our operators, registered with timm under names of their own."""
from .families import ALIASES, ALL, FAMILIES, Family
from .registry import Variant, parse, register, variants
from .weights import PretrainedWeightsError

__all__ = [
    'ALIASES',
    'ALL',
    'FAMILIES',
    'Family',
    'PretrainedWeightsError',
    'Variant',
    'parse',
    'register',
    'variants',
]
