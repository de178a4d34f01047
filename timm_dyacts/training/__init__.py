"""Training, assembled from timm's parts::

    from timm_dyacts.training import TrainConfig, train

    train(TrainConfig(model='resnet18_dyrelu_b', epochs=2))
"""
from ..world import TrainingInterrupted
from .checkpoint import save_checkpoint, set_pretrained_cfg
from .config import TrainConfig
from .loop import train_one_epoch
from .lr_range import LrRange, find_lr
from .nonfinite import NonFiniteLossError
from .trainer import RunResult, train

__all__ = [
    'LrRange',
    'NonFiniteLossError',
    'RunResult',
    'TrainConfig',
    'TrainingInterrupted',
    'find_lr',
    'save_checkpoint',
    'set_pretrained_cfg',
    'train',
    'train_one_epoch',
]
