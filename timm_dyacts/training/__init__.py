"""The training that scripts/train.py and its companions drive, assembled from timm's parts."""
from .checkpoint import save_checkpoint, set_pretrained_cfg
from .curves import plot_curves
from .loop import evaluate, train_one_epoch
from .nonfinite import NonFiniteLossError
from .run import RunResult, train
from .validation import validate
from .world import TrainingInterrupted

__all__ = [
    'NonFiniteLossError',
    'RunResult',
    'TrainingInterrupted',
    'evaluate',
    'plot_curves',
    'save_checkpoint',
    'set_pretrained_cfg',
    'train',
    'train_one_epoch',
    'validate',
]
