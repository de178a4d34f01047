"""One pass of evaluation."""
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import timm
import torch
from timm.task import ClassificationEvaluator
from torch import nn

from ..data.resumable import without_worker_trace
from ..modes import evaluating
from ..version import unsupported
from ..world import World

__all__ = ['evaluate']

_ONE_PROCESS = World(torch.device('cpu'))

if not {'loss_sum', 'counts'} <= vars(ClassificationEvaluator()).keys():
    raise unsupported('timm', timm.__version__, 'the sums of timm.task.ClassificationEvaluator')


@torch.inference_mode()
def evaluate(
        model: nn.Module,
        loader: Iterable,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        channels_last: bool = False,
        world: World = _ONE_PROCESS,
        after_batch: Callable[[], None] | None = None,
) -> OrderedDict:
    """Compute loss and accuracy over a data set, in eval mode.

    Args:
        model: Maps images (N, C, H, W) to logits (N, num_classes).
        loader: Batches of images and labels on the device of the model, the share of this process.
        autocast: Context of the forward pass, for mixed precision.
        channels_last: Whether to give the images to the model in channels_last memory format.
        world: The processes that evaluate together.
        after_batch: Called after each batch.

    Returns:
        Mean cross entropy as ``'loss'``, accuracies in percent as ``'top1'`` and ``'top5'``, over all processes.
        Samples are counted as integers, so the accuracies do not depend on the batch size.

    Raises:
        ValueError: There is no sample.
    """
    evaluator = None
    with evaluating(model):
        for images, labels in without_worker_trace(loader):
            if len(images) == 0:
                continue
            if evaluator is None:
                evaluator = ClassificationEvaluator(images.device)
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with autocast():
                logits = model(images)
            evaluator.update(logits, labels)
            if after_batch is not None:
                after_batch()
    sums = torch.zeros(4, dtype=torch.float64)
    if evaluator is not None:
        sums = torch.cat([evaluator.loss_sum.double()[None], evaluator.counts.double()]).cpu()
    loss, count, top1, top5 = world.sum(sums).tolist()
    if count == 0:
        raise ValueError('loader must hold at least one batch, got none.')
    return OrderedDict(loss=loss / count, top1=100 * top1 / count, top5=100 * top5 / count)
