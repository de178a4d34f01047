"""The sign flip that turns a network of plain activations into a network of bipolar ones, and back."""
from .solver import SignConflict, SignFlip, solve_signs

__all__ = ['SignConflict', 'SignFlip', 'solve_signs']
