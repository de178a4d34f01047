"""Loss and task of a training run, from timm's parts."""
import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.task import ClassificationTask, LogitDistillationTask, TrainingTask
from torch import nn

from ..loading import resolve_model_name
from ..version import unsupported
from .config import TrainConfig

__all__ = ['build_criterion', 'build_task']

# Tasks are young in timm: what a run asks of them
_METHODS = (
    'compile',
    'get_clip_parameters',
    'get_eval_model',
    'get_trainable_module',
    'no_sync',
    'prepare_distributed',
    'setup_ema',
    'update_ema',
)
for _name in _METHODS:
    if not hasattr(TrainingTask, _name):
        raise unsupported('timm', timm.__version__, f'timm.task.TrainingTask.{_name}')


def build_criterion(config: TrainConfig) -> nn.Module:
    """Create the training loss. Where images are mixed, the smoothing is already in the targets."""
    if config.mixes:
        return SoftTargetCrossEntropy()
    if config.smoothing:
        return LabelSmoothingCrossEntropy(smoothing=config.smoothing)
    return nn.CrossEntropyLoss()


def build_task(config: TrainConfig, model: nn.Module, device: torch.device) -> TrainingTask:
    """Create the training task: classification, or distillation where there is a teacher.

    Args:
        config: The options, with ``num_classes`` and ``in_chans`` filled in.
        model: The model, on its device.
        device: That device.

    Raises:
        ValueError: The teacher does not fit the model, or there is no such one.
    """
    criterion = build_criterion(config)
    if config.kd_model is None:
        return ClassificationTask(model, criterion, device=device, verbose=False)
    teacher = timm.create_model(resolve_model_name(config.kd_model, '--kd-model'), pretrained=True)
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
