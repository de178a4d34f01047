"""How good a model is, and what it says: validation, prediction, and the pictures of a run."""
from .config import PredictConfig, ValidateConfig
from .curves import plot_curves
from .loop import evaluate
from .predict import predict
from .validate import validate, validate_models

__all__ = [
    'PredictConfig',
    'ValidateConfig',
    'evaluate',
    'plot_curves',
    'predict',
    'validate',
    'validate_models',
]
