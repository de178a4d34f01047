"""Swaps operators into a built model and keeps its trained weights."""
from .api import ConversionError, ConversionReport, Replacement, Skip, convert

__all__ = ['ConversionError', 'ConversionReport', 'Replacement', 'Skip', 'convert']
