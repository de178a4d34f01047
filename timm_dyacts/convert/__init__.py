"""Swaps operators into a built model and keeps its trained weights."""
from .api import convert
from .report import ConversionError, ConversionReport, Replacement, Skip

__all__ = ['ConversionError', 'ConversionReport', 'Replacement', 'Skip', 'convert']
