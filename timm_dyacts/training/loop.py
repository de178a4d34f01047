"""One epoch of training, and one pass of evaluation."""
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import AverageMeter, NativeScaler, dispatch_clip_grad
from torch import nn
from tqdm import tqdm

__all__ = ['NonFiniteLossError', 'evaluate', 'train_one_epoch']


class NonFiniteLossError(RuntimeError):
    """The training loss became NaN or infinite."""


def train_one_epoch(
        task: TrainingTask,
        loader: Iterable,
        optimizer: torch.optim.Optimizer,
        epoch: int,
        scheduler: Scheduler | None = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        loss_scaler: NativeScaler | None = None,
        clip_grad: float | None = None,
        channels_last: bool = False,
        log_interval: int = 50,
        progress: tqdm | None = None,
) -> OrderedDict:
    """Train for one epoch, in place.

    Args:
        task: Model and loss.
        loader: Batches (N, C, H, W) and their targets on the device, normalised (``timm.data.create_loader``).
        optimizer: Updated after every batch.
        epoch: Number of the epoch, counted from 0.
        scheduler: Learning rate schedule that counts updates.
        autocast: Context of the forward pass, for mixed precision.
        loss_scaler: For float16.
        clip_grad: Largest norm of the gradient.
        channels_last: Give the images to the model in channels_last memory format.
        log_interval: Read the losses every that many updates. Only then does the host wait for the device.
        progress: Bar that moves by one per update.

    Returns:
        The mean training loss as 'loss'.

    Raises:
        NonFiniteLossError: A loss was not finite.
    """
    task.train()
    losses = AverageMeter()
    pending = []  # losses still on the device, with their batch sizes
    num_steps = len(loader)
    for step, (images, targets) in enumerate(loader):
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast():
            loss = task(images, targets)['loss']

        optimizer.zero_grad()
        create_graph = getattr(optimizer, 'is_second_order', False)
        if loss_scaler is not None:
            loss_scaler(
                loss,
                optimizer,
                clip_grad=clip_grad,
                parameters=task.parameters(),
                create_graph=create_graph,
            )
        else:
            loss.backward(create_graph=create_graph)
            if clip_grad is not None:
                dispatch_clip_grad(task.parameters(), value=clip_grad)
            optimizer.step()
        if scheduler is not None:
            scheduler.step_update(num_updates=epoch * num_steps + step + 1)

        pending.append((loss.detach(), len(images)))
        if (step + 1) % log_interval == 0 or step + 1 == num_steps:
            _read_losses(pending, losses, epoch, step)
            if progress is not None:
                progress.set_postfix(epoch=epoch, loss=f'{losses.avg:.3f}', refresh=False)
        if progress is not None:
            progress.update()

    if hasattr(optimizer, 'sync_lookahead'):
        optimizer.sync_lookahead()
    return OrderedDict(loss=losses.avg)


def _read_losses(pending: list[tuple[torch.Tensor, int]], losses: AverageMeter, epoch: int, last_step: int) -> None:
    values = torch.stack([loss for loss, _ in pending]).tolist()
    first_step = last_step + 1 - len(pending)
    for step, (value, (_, batch_size)) in enumerate(zip(values, pending, strict=True), start=first_step):
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f'The training loss is {value} at epoch {epoch}, step {step}. Lower --lr, set --clip-grad, or train '
                f'without --amp; the checkpoints of the epochs before are kept.')
        losses.update(value, batch_size)
    pending.clear()


@torch.inference_mode()
def evaluate(
        model: nn.Module,
        loader: Iterable,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        channels_last: bool = False,
) -> OrderedDict:
    """Loss and accuracy over a data set. Leaves the model in eval mode.

    Args:
        model: Maps images (N, C, H, W) to logits (N, num_classes).
        loader: Batches of images and labels on the device of the model.
        autocast: Context of the forward pass, for mixed precision.
        channels_last: Give the images to the model in channels_last memory format.

    Returns:
        Mean cross entropy as 'loss', accuracies in percent as 'top1' and 'top5'. Samples are counted as integers, so
        the accuracies do not depend on the batch size.
    """
    model.eval()
    num_samples = 0
    losses, correct = [], []  # tensors on the device, read once at the end
    for images, labels in loader:
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast():
            logits = model(images)
        logits = logits.float()
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        num_samples += len(labels)
        losses.append(F.cross_entropy(logits, labels, reduction='sum'))
        correct.append(torch.stack([hits[:, 0].sum(), hits.sum()]))
    if num_samples == 0:
        raise ValueError('loader must hold at least one batch, got none.')
    top1, top5 = torch.stack(correct).sum(0).tolist()
    return OrderedDict(
        loss=sum(torch.stack(losses).tolist()) / num_samples,
        top1=100 * top1 / num_samples,
        top5=100 * top5 / num_samples,
    )
