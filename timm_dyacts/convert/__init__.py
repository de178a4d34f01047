"""Swaps operators into a built model and keeps its trained weights."""
from .api import convert
from .report import ConversionError, ConversionReport, Replacement, Skip
from .transition import finish_transition, get_transition, set_transition

__all__ = [
    'ConversionError',
    'ConversionReport',
    'Replacement',
    'Skip',
    'convert',
    'finish_transition',
    'get_transition',
    'set_transition',
]
