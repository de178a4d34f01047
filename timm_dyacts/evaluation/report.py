"""What a model does on a data set, gathered in one pass over it and drawn."""
import copy
import heapq
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import DyReLU, SoftPool2d
from ..modes import evaluating
from ..run_folder import RunFolder
from .per_class import ClassScores, plot_classes, write_classes
from .pictures import DyReLUStats, Mistake, plot_confusion, plot_dyrelu, plot_mistakes, plot_softpool

__all__ = ['write_report']

_BINS = 400
_NUM_MISTAKES = 24
_NUM_CHANNELS = 4
_MAX_CLASSES = 1000


@torch.inference_mode()
def write_report(
        model: nn.Module,
        loader: Iterable[Any],
        folder: str | os.PathLike[str],
        data_config: dict[str, Any],
        label_names: Sequence[str] | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Write scores of each class; draw these, the confusion matrix and the worst mistakes, and where there are any,
    Dynamic ReLU's coefficients and a SoftPool.

    Args:
        model: Maps images (N, C, H, W) to logits.
        loader: Batches of images and labels on the device of the model.
        folder: The run folder, which gets the table and the pictures.
        data_config: Preprocessing; its ``mean`` and ``std`` are undone to show images.
        label_names: Class names, in the order of the logits.
        autocast: Context of the forward pass, for mixed precision.
    """
    run = RunFolder(folder)
    names = label_names or [str(label) for label in range(model.num_classes)]
    matrix = torch.zeros(len(names), len(names), dtype=torch.long)
    mistakes = _SurestMistakes(data_config)
    pool_name, pool = next(((n, m) for n, m in model.named_modules() if isinstance(m, SoftPool2d)), ('', None))
    example = None
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        recorders = [
            stack.enter_context(_DyReLURecorder(name, module))
            for name, module in model.named_modules() if isinstance(module, DyReLU)
        ]
        for images, labels in loader:
            if len(images) == 0:
                continue
            if pool is not None and example is None:
                example = _capture_input(pool, model, images[:1], autocast), _restore(images[0], data_config)
            with autocast():
                probabilities = model(images).float().softmax(1)
            confidence, predicted = probabilities.max(1)
            pairs = (labels * len(names) + predicted).cpu()
            matrix += torch.bincount(pairs, minlength=matrix.numel()).view_as(matrix)
            mistakes.add(images, labels, predicted, confidence)

    total, right = int(matrix.sum()), int(matrix.diagonal().sum())
    title = f'{total - right} of {total} validation images classified wrongly'
    scores = ClassScores.of(matrix)
    write_classes(scores, names, run.classes)
    plot_classes(scores, names, run.classes_picture, f'Mean F1 of the classes {scores.macro_f1:.3f}; {title}')
    if len(names) <= _MAX_CLASSES:
        plot_confusion(matrix, names, run.confusion, title)
    if mistakes.kept:
        plot_mistakes(mistakes.surest_first(), names, run.mistakes, f'{title}; the surest mistakes first')
    else:
        run.mistakes.unlink(missing_ok=True)  # of an earlier, worse checkpoint
    if recorders:
        stats = [recorder.stats() for recorder in recorders]
        most = max(len(layer.start) for layer in stats)
        plot_dyrelu(
            [layer for layer in stats if len(layer.start) == most], run.dyrelu,
            f'Slopes and intercepts of Dynamic ReLU over {total} validation images')
    if example is not None:
        features, image = example
        plot_softpool(
            image, _pool_in_three_ways(pool, features), run.softpool,
            f'{pool_name}: those of its {features.shape[1]} channels that vary most')


def _restore(image: Tensor, data_config: dict[str, Any]) -> Tensor:
    """Undo the normalisation of an image (C, H, W)."""
    mean, std = (torch.tensor(data_config[key], dtype=torch.float).view(-1, 1, 1) for key in ('mean', 'std'))
    return (image.float().cpu() * std + mean).clamp(0, 1)


def _capture_input(module: nn.Module, model: nn.Module, images: Tensor, autocast: Callable) -> Tensor:
    """Give the input that a module has when the model computes some images."""
    captured = []
    handle = module.register_forward_pre_hook(lambda _, args: captured.append(args[0].float()))
    try:
        with autocast():
            model(images)
    finally:
        handle.remove()
    return captured[0]


def _pool_in_three_ways(pool: SoftPool2d, x: Tensor) -> dict[str, Tensor]:
    """Give the most varied channels of a feature map (1, C, H, W), as they are and pooled."""
    channels = x[0].flatten(1).std(1).topk(min(_NUM_CHANNELS, x.shape[1])).indices
    maps = {'before pooling': x[0, channels].cpu()}
    # SoftPool is the average for beta = 0 and tends to the maximum for a large beta, with the same windows.
    sharp = 1e4 / x.abs().max().clamp(min=1e-6).item()
    for heading, beta in (('max', sharp), ('average', 0.0), (f'soft (beta {pool.beta:g})', pool.beta)):
        pooling = copy.copy(pool)
        pooling.beta = beta
        maps[heading] = pooling(x)[0, channels].cpu()
    return maps


class _SurestMistakes:
    """Keeps the mistakes that a model was surest of.

    Args:
        data_config: Preprocessing, which is undone for the images.
    """

    def __init__(self, data_config: dict[str, Any]) -> None:
        self.data_config = data_config
        self.kept: list[tuple[float, int, Mistake]] = []  # a heap; the number settles ties
        self._number = count()

    def add(self, images: Tensor, labels: Tensor, predicted: Tensor, confidence: Tensor) -> None:
        """Look at a batch."""
        for i in (predicted != labels).nonzero().flatten().tolist():
            rank = confidence[i].item(), next(self._number)
            if len(self.kept) == _NUM_MISTAKES and rank < self.kept[0][:2]:
                continue
            image = _restore(images[i], self.data_config)
            mistake = Mistake(image, labels[i].item(), predicted[i].item(), confidence[i].item())
            heapq.heappush(self.kept, (*rank, mistake))
            if len(self.kept) > _NUM_MISTAKES:
                heapq.heappop(self.kept)

    def surest_first(self) -> list[Mistake]:
        """Give the mistakes in their order."""
        return [mistake for *_, mistake in sorted(self.kept, key=lambda entry: -entry[0])]


class _DyReLURecorder:
    """Gathers the coefficients that a Dynamic ReLU computes, while it is entered as a context."""

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

    def __enter__(self) -> '_DyReLURecorder':
        self._handle = self.module.register_forward_pre_hook(self._record)
        return self

    def __exit__(self, *exc_info) -> None:
        self._handle.remove()

    def _record(self, module: DyReLU, args: tuple) -> None:
        x = args[0] if module.channel_dim == 1 else args[0].movedim(-1, 1)
        coefficients = module.coefficients(x).double().cpu()
        for i, values in enumerate(coefficients.unbind(2)):
            self.counts[i] += torch.histc(values.float(), _BINS, self.low[i].item(), self.high[i].item())
        difference = coefficients - self.start
        self.images += len(difference)
        self.sum = self.sum + difference.sum(0)
        self.square = self.square + difference.square().sum(0)

    def stats(self) -> DyReLUStats:
        """Give what was gathered."""
        mean = self.sum / self.images
        variance = (self.square / self.images - mean.square()).clamp(min=0)
        return DyReLUStats(self.name, self.start, self.low, self.high, self.counts, variance.mean(0).sqrt())
