"""Training, assembled from timm's parts::

    from timm_dyacts.training import TrainConfig, train

    train(TrainConfig(model='resnet18_dyrelu_b', epochs=2))
"""
from ..world import TrainingInterrupted
from .checkpoint import save_checkpoint, set_pretrained_cfg
from .config import TrainConfig
from .loop import train_one_epoch
from .nonfinite import NonFiniteLossError
from .trainer import RunResult, train

__all__ = [
    'NonFiniteLossError',
    'RunResult',
    'TrainConfig',
    'TrainingInterrupted',
    'save_checkpoint',
    'set_pretrained_cfg',
    'train',
    'train_one_epoch',
]
