"""One pass of evaluation."""
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.resumable import without_worker_trace
from ..device import is_out_of_memory
from ..messages import one_line
from ..modes import evaluating
from ..world import World

__all__ = ['compute_logits', 'evaluate']

_ONE_PROCESS = World(torch.device('cpu'))


class _Sums:
    """Sums over samples, kept on a device: loss, number of samples, and of those whose label is among the top 1 and 5.

    Samples are counted as integers, the loss is summed in double precision where the device has it.
    """

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), dtype=torch.float32 if device.type == 'mps' else torch.float64, device=device)
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        if logits.dim() != 2 or labels.shape != logits.shape[:1]:
            raise ValueError(
                f'model and loader must give logits (N, num_classes) and labels (N,), got the shapes '
                f'{tuple(logits.shape)} and {tuple(labels.shape)}.')
        logits = logits.float()
        self.loss += F.cross_entropy(logits, labels).to(self.loss.dtype) * len(logits)
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        self.counts[0] += len(logits)
        self.counts[1] += hits[:, 0].sum()
        self.counts[2] += hits.any(1).sum()

    def tensor(self) -> Tensor:
        """Give all of them, on the CPU."""
        return torch.cat([self.loss.cpu().double()[None], self.counts.cpu().double()])


def compute_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Apply a model to images (N, C, H, W).

    Raises:
        ValueError: The model cannot compute them: an option or a config asked for a size that it has none for.
    """
    try:
        return model(images)
    except (AssertionError, RuntimeError) as e:
        if is_out_of_memory(e):
            raise
        raise ValueError(
            f'the model cannot compute images of {" x ".join(map(str, images.shape[1:]))}: {one_line(e)}') from e


@torch.inference_mode()
def evaluate(
        model: nn.Module,
        loader: Iterable[Any],
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        channels_last: bool = False,
        world: World = _ONE_PROCESS,
        after_batch: Callable[[], None] | None = None,
) -> OrderedDict[str, Any]:
    """Compute loss and accuracy over a data set, in eval mode.

    Args:
        model: Maps images (N, C, H, W) to logits (N, num_classes).
        loader: Batches of images and labels on the device of the model, the share of this process. Images with
            ``None`` in place of labels are computed and do not count.
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
    sums = None
    with evaluating(model):
        for images, labels in without_worker_trace(loader):
            if len(images) == 0:
                continue
            if sums is None:
                sums = _Sums(images.device)
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with autocast():
                logits = compute_logits(model, images)
            if labels is None:  # computed for other processes, which share the model
                continue
            sums.update(logits, labels)
            if after_batch is not None:
                after_batch()
    local = torch.zeros(4, dtype=torch.float64) if sums is None else sums.tensor()
    loss, count, top1, top5 = world.sum(local).tolist()
    if count == 0:
        raise ValueError('loader must hold at least one batch, got none.')
    return OrderedDict(loss=loss / count, top1=100 * top1 / count, top5=100 * top5 / count)
