"""A BatchNorm for each part of a batch, while a model is trained: timm's ``SplitBatchNorm2d``.

Only the first of them, that of the least augmented images, is evaluated and saved: what is left is the plain model.
"""
import timm
import torch
from timm.layers import BatchNormAct2d, convert_splitbn_model
from timm.layers.split_batchnorm import SplitBatchNorm2d
from torch import nn

from ..version import needs

__all__ = ['drop_split_bn', 'split_bn']


def split_bn(model: nn.Module, num_splits: int) -> nn.Module:
    """Give each of so many parts of a batch BatchNorms of its own.

    Raises:
        ImportError: timm is too old for those of the model.
        ValueError: The model has none.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        raise ValueError('--split-bn needs a model with BatchNorm, and it has none.')
    if any(isinstance(norm, BatchNormAct2d) for norm in norms) and not _keeps_activations():
        raise needs('--split-bn with this model', 'timm', '1.0.31', timm.__version__)
    return convert_splitbn_model(model, num_splits)


def _keeps_activations() -> bool:
    """Say whether timm keeps the activation of a BatchNorm that has one."""
    split = convert_splitbn_model(BatchNormAct2d(1), 2).eval()
    with torch.no_grad():
        return bool(split(-torch.ones(1, 1, 1, 1)) == 0)


def drop_split_bn(model: nn.Module) -> None:
    """Leave the first BatchNorm of each, in place: the keys of the state dict are then those of the plain model."""
    for module in model.modules():
        if isinstance(module, SplitBatchNorm2d) and hasattr(module, 'aux_bn'):
            del module.aux_bn
