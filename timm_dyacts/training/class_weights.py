"""Weights of the classes in the training loss."""
import csv
import math
import os
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..data.subsets import labels_of

__all__ = ['WeightedCrossEntropy', 'resolve_class_weights']

_FLAG = '--class-weights'


class WeightedCrossEntropy(nn.Module):
    """Cross entropy in which each class has a weight: the mean over the samples of weight times loss.

    Unlike ``nn.CrossEntropyLoss`` it does not divide by the weights of the labels that happen to be in a batch, so the
    gradients of several batches, or several processes, add up to those of one batch of all of them.

    Args:
        weights: Shape (num_classes,).
        smoothing: Label smoothing, for targets that are labels.
    """

    def __init__(self, weights: Tensor, smoothing: float = 0.0) -> None:
        super().__init__()
        self.register_buffer('weights', weights)
        self.smoothing = smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss of logits (N, num_classes) and labels (N,) or distributions (N, num_classes)."""
        smoothing = 0.0 if targets.dim() == 2 else self.smoothing
        total = F.cross_entropy(
            logits.float(), targets, weight=self.weights, reduction='sum', label_smoothing=smoothing)
        return total / len(logits)


def resolve_class_weights(text: str, dataset: Dataset, names: Sequence[str] | None, num_classes: int) -> list[float]:
    """Give the weight of each class.

    Args:
        text: ``'balanced'`` (for each class the number of images, divided by the number of classes that have some and
            by the number of images of the class), numbers with commas between them, or a CSV file with the columns
            ``class`` and ``weight``.
        dataset: The training images.
        names: Class names in the order of the labels, if they are known.
        num_classes: Number of classes of the model.

    Raises:
        ValueError: It is none of these, does not fit the classes, or the data set does not tell its labels.
        OSError: The file cannot be read.
    """
    if text == 'balanced':
        counts = torch.bincount(torch.tensor(labels_of(dataset, f'{_FLAG} balanced')), minlength=num_classes).double()
        balanced = len(dataset) / (counts.count_nonzero() * counts)
        return torch.where(counts > 0, balanced, 1.0).tolist()  # a class without images has no say in it
    if os.path.isfile(text):
        weights = _from_file(text, names, num_classes)
    else:
        weights = [_number(part, text) for part in text.split(',')]
        if len(weights) != num_classes:
            raise ValueError(
                f'{_FLAG} must have a number for each of the {num_classes} classes, got {len(weights)} in {text!r}.')
    if min(weights) < 0 or max(weights) == 0:
        raise ValueError(f'{_FLAG} must be numbers of at least 0, not all 0, got {text!r}.')
    return weights


def _number(text: str | None, source: str) -> float:
    try:
        number = float(text)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"{_FLAG} must be 'balanced', a finite number for each class with commas between them, or a CSV file with "
            f'the columns class and weight, got {source!r}{"" if text == source else f" with {text!r}"}.')
    return number


def _from_file(path: str, names: Sequence[str] | None, num_classes: int) -> list[float]:
    with open(path, newline='', encoding='utf-8-sig') as file:
        rows = list(csv.DictReader(file))
    if not rows or not {'class', 'weight'} <= rows[0].keys():
        raise ValueError(f'{_FLAG} {path} must have the columns class and weight, and a row for each class.')
    labels = list(names) if names else [str(label) for label in range(num_classes)]
    weights: Mapping[str, float] = {row['class']: _number(row['weight'], path) for row in rows}
    missing = [name for name in labels if name not in weights]
    unknown = [name for name in weights if name not in labels]
    if missing or unknown or len(rows) != len(labels) or len(labels) != num_classes:
        what = f'lacks {", ".join(missing[:3])}' if missing else (
            f'has {", ".join(unknown[:3])}, of which the data know nothing' if unknown else
            f'has {len(rows)} rows for {num_classes} classes')
        raise ValueError(f'{_FLAG} {path} must have one row for each class: it {what}.')
    return [weights[name] for name in labels]
