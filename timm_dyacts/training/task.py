"""Loss and task of a training run, from timm's parts."""
from collections.abc import Sequence
from typing import TypeAlias

import timm
import torch
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from ..loading import create_model, resolve_model_name
from ..version import needs
from .class_weights import WeightedCrossEntropy
from .config import TrainConfig
from .plain_task import PlainTask

__all__ = ['Task', 'build_criterion', 'build_task', 'classification_task']

# Tasks are young in timm: what a run asks of them
_METHODS = (
    'compile',
    'get_clip_parameters',
    'get_trainable_module',
    'no_sync',
    'prepare_distributed',
    'setup_ema',
    'update_ema',
)
try:
    from timm.task import ClassificationTask, LogitDistillationTask, TrainingTask
except ImportError:
    _TIMM_HAS_TASKS = False
else:
    _TIMM_HAS_TASKS = all(hasattr(TrainingTask, name) for name in _METHODS)  # since timm 1.0.27

Task: TypeAlias = 'TrainingTask | PlainTask'


def build_criterion(config: TrainConfig, class_weights: Sequence[float] | None = None) -> nn.Module:
    """Create the training loss. Where images are mixed, the smoothing is already in the targets."""
    if config.jsd_loss:
        return JsdCrossEntropy(num_splits=config.aug_splits, smoothing=config.smoothing)
    if config.bce_loss:
        return BinaryCrossEntropy(
            smoothing=0.0 if config.mixes else config.smoothing,
            target_threshold=config.bce_target_thresh,
            sum_classes=config.bce_sum,
            pos_weight=config.bce_pos_weight,
        )
    if class_weights is not None:
        return WeightedCrossEntropy(torch.tensor(class_weights), config.smoothing)
    if config.mixes:
        return SoftTargetCrossEntropy()
    if config.smoothing:
        return LabelSmoothingCrossEntropy(smoothing=config.smoothing)
    return nn.CrossEntropyLoss()


def classification_task(model: nn.Module, criterion: nn.Module, device: torch.device | None = None) -> Task:
    """Create the task of a model, on its device, with a loss: timm's where timm has one."""
    if _TIMM_HAS_TASKS:
        return ClassificationTask(model, criterion, device=device, verbose=False)
    return PlainTask(model, criterion.to(device))


def build_task(
        config: TrainConfig,
        model: nn.Module,
        device: torch.device,
        class_weights: Sequence[float] | None = None,
) -> Task:
    """Create the training task: classification, or distillation where there is a teacher.

    Args:
        config: The options, with ``num_classes`` and ``in_chans`` filled in.
        model: The model, on its device.
        device: That device.
        class_weights: Weight of each class in the loss.

    Raises:
        ValueError: The teacher does not fit the model, or there is no such one.
        ImportError: There is to be a teacher, and timm is too old for it.
    """
    criterion = build_criterion(config, class_weights)
    if config.kd_model is None:
        return classification_task(model, criterion, device)
    if not _TIMM_HAS_TASKS:
        raise needs('--kd-model', 'timm', '1.0.27', timm.__version__)
    teacher = create_model(resolve_model_name(config.kd_model, '--kd-model'), pretrained=True)
    if (teacher.num_classes, teacher.in_chans) != (config.num_classes, config.in_chans):
        raise ValueError(
            f'--kd-model must have the {config.num_classes} classes and {config.in_chans} input channels of the model, '
            f'got {config.kd_model!r} with {teacher.num_classes} and {teacher.in_chans}.')
    return LogitDistillationTask(
        model,
        teacher.to(device).requires_grad_(False),
        criterion,
        distill_loss_weight=config.distill_loss_weight,
        task_loss_weight=config.task_loss_weight,
        temperature=config.kd_temperature,
        device=device,
        verbose=False,
    )
