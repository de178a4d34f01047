"""What a model does on a data set, gathered in one pass over it and drawn."""
import copy
import heapq
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import DyReLU, SoftPool2d
from .pictures import DyReLUStats, Mistake, plot_confusion, plot_dyrelu, plot_mistakes, plot_softpool

__all__ = ['write_report']

_BINS = 400
_NUM_MISTAKES = 24
_NUM_CHANNELS = 4
_MAX_CLASSES = 1000


@torch.inference_mode()
def write_report(
        model: nn.Module,
        loader: Iterable,
        folder: str,
        data_config: dict[str, Any],
        label_names: list[str] | None = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> None:
    """Write ``confusion.png``, ``mistakes.png``, ``dyrelu.png`` and ``softpool.png`` to a folder, where they apply.

    Args:
        model: Maps images (N, C, H, W) to logits. Left in eval mode.
        loader: Batches of images and labels on the device of the model.
        folder: Where to write.
        data_config: Preprocessing; its ``mean`` and ``std`` are undone to show images.
        label_names: Class names, in the order of the logits.
        autocast: Context of the forward pass, for mixed precision.
    """
    model.eval()
    names = label_names or [str(label) for label in range(model.num_classes)]
    num_classes = len(names)
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.long)
    mistakes: list[tuple[float, int, Mistake]] = []
    tiebreak = count()
    recorders = [_DyReLURecorder(name, m) for name, m in model.named_modules() if isinstance(m, DyReLU)]
    pool_name, pool = next(((n, m) for n, m in model.named_modules() if isinstance(m, SoftPool2d)), ('', None))
    example = None
    for images, labels in loader:
        if len(images) == 0:
            continue
        if pool is not None and example is None:
            example = _capture_input(pool, model, images[:1], autocast), _restore(images[0], data_config)
        with autocast():
            probabilities = model(images).float().softmax(1)
        confidence, predicted = probabilities.max(1)
        matrix += torch.bincount(
            (labels * num_classes + predicted).cpu(), minlength=num_classes ** 2).view(num_classes, num_classes)
        for i in (predicted != labels).nonzero().flatten().tolist():
            entry = confidence[i].item(), next(tiebreak), None
            if len(mistakes) == _NUM_MISTAKES and entry < mistakes[0]:
                continue
            mistake = Mistake(
                _restore(images[i], data_config), labels[i].item(), predicted[i].item(), confidence[i].item())
            heapq.heappush(mistakes, (*entry[:2], mistake))
            if len(mistakes) > _NUM_MISTAKES:
                heapq.heappop(mistakes)

    total, right = int(matrix.sum()), int(matrix.diagonal().sum())
    title = f'{total - right} of {total} validation images classified wrongly'
    if num_classes <= _MAX_CLASSES:
        plot_confusion(matrix, names, os.path.join(folder, 'confusion.png'), title)
    path = os.path.join(folder, 'mistakes.png')
    if mistakes:
        worst = [mistake for *_, mistake in sorted(mistakes, key=lambda entry: -entry[0])]
        plot_mistakes(worst, names, path, f'{title}; the surest mistakes first')
    elif os.path.exists(path):
        os.remove(path)  # of an earlier, worse checkpoint
    if recorders:
        stats = [recorder.finish() for recorder in recorders]
        most = max(len(layer.start) for layer in stats)
        plot_dyrelu(
            [layer for layer in stats if len(layer.start) == most],
            os.path.join(folder, 'dyrelu.png'),
            f'Slopes and intercepts of Dynamic ReLU over {total} validation images')
    if example is not None:
        features, image = example
        plot_softpool(
            image, _pool_in_three_ways(pool, features), os.path.join(folder, 'softpool.png'),
            f'{pool_name}: those of its {features.shape[1]} channels that vary most')


def _restore(image: Tensor, data_config: dict[str, Any]) -> Tensor:
    """Undo the normalisation of an image (C, H, W)."""
    mean, std = (torch.tensor(data_config[key], dtype=torch.float).view(-1, 1, 1) for key in ('mean', 'std'))
    return (image.float().cpu() * std + mean).clamp(0, 1)


def _capture_input(module: nn.Module, model: nn.Module, images: Tensor, autocast: Callable) -> Tensor:
    captured = []
    handle = module.register_forward_pre_hook(lambda _, args: captured.append(args[0].float()))
    try:
        with autocast():
            model(images)
    finally:
        handle.remove()
    return captured[0]


def _pool_in_three_ways(pool: SoftPool2d, x: Tensor) -> dict[str, Tensor]:
    """The most varied channels of a feature map (1, C, H, W), as they are and pooled."""
    channels = x[0].flatten(1).std(1).topk(min(_NUM_CHANNELS, x.shape[1])).indices
    maps = {'before pooling': x[0, channels].cpu()}
    # SoftPool is the average for beta = 0 and tends to the maximum for a large beta, with the same windows.
    sharp = 1e4 / x.abs().max().clamp(min=1e-6).item()
    for heading, beta in (('max', sharp), ('average', 0.0), (f'soft (beta {pool.beta:g})', pool.beta)):
        pooling = copy.copy(pool)
        pooling.beta = beta
        maps[heading] = pooling(x)[0, channels].cpu()
    return maps


class _DyReLURecorder:
    """Gathers the coefficients that a Dynamic ReLU computes, while the model runs."""

    def __init__(self, name: str, module: DyReLU) -> None:
        self.name = name
        self.module = module
        self.start = torch.tensor(module.alpha + module.beta, dtype=torch.double)
        reach = torch.tensor([module.lambda_a] * module.k + [module.lambda_b] * module.k, dtype=torch.double)
        reach = reach.abs().clamp(min=1e-6)
        self.low, self.high = self.start - reach, self.start + reach
        self.counts = torch.zeros(2 * module.k, _BINS)
        self.images = 0
        self.sum = self.square = 0.0  # of the differences from the start, shape (C or 1, 2K)
        self.handle = module.register_forward_pre_hook(self._record)

    def _record(self, module: DyReLU, args: tuple) -> None:
        x = args[0] if module.channel_dim == 1 else args[0].movedim(-1, 1)
        coefficients = module.coefficients(x).double().cpu()
        for i, values in enumerate(coefficients.unbind(2)):
            self.counts[i] += torch.histc(values.float(), _BINS, self.low[i].item(), self.high[i].item())
        difference = coefficients - self.start
        self.images += len(difference)
        self.sum = self.sum + difference.sum(0)
        self.square = self.square + difference.square().sum(0)

    def finish(self) -> DyReLUStats:
        """Stop, and give what was gathered."""
        self.handle.remove()
        mean = self.sum / self.images
        variance = (self.square / self.images - mean.square()).clamp(min=0)
        return DyReLUStats(self.name, self.start, self.low, self.high, self.counts, variance.mean(0).sqrt())
