"""How good a model is, and what it says: validation, prediction, and the pictures of a run."""
from .curves import plot_curves
from .loop import evaluate
from .validate import validate

__all__ = ['evaluate', 'plot_curves', 'validate']
