"""The variants: timm's architectures with our operators, registered with timm under names of their own."""
from .registry import (
    ALIASES,
    FAMILIES,
    OPERATORS,
    Family,
    PretrainedWeightsError,
    Variant,
    register,
    variants,
)

__all__ = [
    'ALIASES',
    'FAMILIES',
    'OPERATORS',
    'Family',
    'PretrainedWeightsError',
    'Variant',
    'register',
    'variants',
]
