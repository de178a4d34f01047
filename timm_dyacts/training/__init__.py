"""The training that scripts/train.py and its companions drive, assembled from timm's parts."""
from ..world import TrainingInterrupted
from .checkpoint import save_checkpoint, set_pretrained_cfg
from .loop import train_one_epoch
from .nonfinite import NonFiniteLossError
from .run import RunResult, train

__all__ = [
    'NonFiniteLossError',
    'RunResult',
    'TrainingInterrupted',
    'save_checkpoint',
    'set_pretrained_cfg',
    'train',
    'train_one_epoch',
]
