"""Loss and task of a training run, from timm's parts."""
from argparse import Namespace

import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.task import ClassificationTask, LogitDistillationTask, TrainingTask
from torch import nn

from ..loading import resolve_model_name

__all__ = ['build_criterion', 'build_task']


def build_criterion(args: Namespace) -> nn.Module:
    """Create the training loss. With mixup or cutmix the smoothing is already in the targets."""
    if args.mixup > 0 or args.cutmix > 0:
        return SoftTargetCrossEntropy()
    if args.smoothing:
        return LabelSmoothingCrossEntropy(smoothing=args.smoothing)
    return nn.CrossEntropyLoss()


def build_task(args: Namespace, model: nn.Module, device: torch.device) -> TrainingTask:
    """Create the training task: classification, distilled from the model of ``--kd-model`` if there is one."""
    criterion = build_criterion(args)
    if args.kd_model is None:
        return ClassificationTask(model, criterion, device=device, verbose=False)
    teacher = timm.create_model(resolve_model_name(args.kd_model, '--kd-model'), pretrained=True)
    if (teacher.num_classes, teacher.in_chans) != (args.num_classes, args.in_chans):
        raise ValueError(
            f'--kd-model must have the {args.num_classes} classes and {args.in_chans} input channels of the model, got '
            f'{args.kd_model!r} with {teacher.num_classes} and {teacher.in_chans}.')
    return LogitDistillationTask(
        model,
        teacher.to(device).requires_grad_(False),
        criterion,
        distill_loss_weight=args.distill_loss_weight,
        task_loss_weight=args.task_loss_weight,
        temperature=args.kd_temperature,
        device=device,
        verbose=False,
    )
