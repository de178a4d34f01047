"""The training that scripts/train.py and scripts/validate.py drive, assembled from timm's parts."""
from .checkpoint import save_checkpoint, set_pretrained_cfg
from .curves import plot_curves
from .loop import NonFiniteLossError, evaluate, train_one_epoch
from .run import RunResult, train, validate

__all__ = [
    'NonFiniteLossError',
    'RunResult',
    'evaluate',
    'plot_curves',
    'save_checkpoint',
    'set_pretrained_cfg',
    'train',
    'train_one_epoch',
    'validate',
]
