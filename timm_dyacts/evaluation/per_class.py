"""How good a model is on each class, from a confusion matrix."""
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..files import format_csv, replace_text
from ..plotting import BLUE, COLORS, create_figure, save_figure, style_axes

__all__ = ['ClassScores', 'plot_classes', 'write_classes']

_MAX_CLASSES = 40
_LONGEST_NAME = 30


@dataclass(frozen=True)
class ClassScores:
    """Scores of each class, from 0 to 1, as in scikit-learn: what divides by 0 is 0.

    Attributes:
        precision: Shape (C,), share of the images taken for the class that are of it.
        recall: Shape (C,), share of the images of the class that were taken for it.
        f1: Shape (C,), harmonic mean of both.
        support: Shape (C,), number of images of the class.
    """
    precision: Tensor
    recall: Tensor
    f1: Tensor
    support: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> 'ClassScores':
        """Compute them from a matrix (C, C) with the number of images of class i that were taken for class j."""
        right, support, taken = matrix.diagonal().double(), matrix.sum(1), matrix.sum(0)
        return cls(
            right / taken.clamp(min=1),
            right / support.clamp(min=1),
            2 * right / (support + taken).clamp(min=1),
            support,
        )

    @property
    def macro_f1(self) -> float:
        """Mean F1 of the classes that have images."""
        return self.f1[self.support > 0].mean().item()


def write_classes(scores: ClassScores, names: Sequence[str], path: str | os.PathLike[str]) -> None:
    """Write a CSV with a row for each class, in the order of the labels."""
    columns = 'class', 'precision', 'recall', 'f1', 'support'
    rounded = [[round(score, 6) for score in part.tolist()] for part in (scores.precision, scores.recall, scores.f1)]
    rows = zip(names, *rounded, scores.support.tolist(), strict=True)
    replace_text(path, format_csv([dict(zip(columns, row, strict=True)) for row in rows], columns))


def plot_classes(scores: ClassScores, names: Sequence[str], path: str | os.PathLike[str], title: str = '') -> None:
    """Draw F1, precision and recall of the classes, the lowest F1 on top; of many classes those with the lowest.

    Args:
        scores: The scores.
        names: Class names.
        path: Where to write the picture; its ending gives the format.
        title: Heading of the figure.
    """
    present = scores.support.nonzero().flatten()
    order = present[scores.f1[present].argsort(stable=True)]
    shown = order[:_MAX_CLASSES].tolist()
    rows = torch.arange(len(shown)).numpy()
    figure = create_figure(7.5, 1.7 + 0.24 * len(shown), title)
    ax = figure.subplots()
    precision, recall, f1 = (part[shown].numpy() for part in (scores.precision, scores.recall, scores.f1))
    ax.barh(rows, f1, height=0.62, color=BLUE, alpha=0.35, label='F1')
    # The second is smaller, so that both are seen where they are equal.
    ax.plot(precision, rows, 'o', color=COLORS[1], markersize=8, markeredgecolor='white', label='precision')
    ax.plot(recall, rows, 'D', color=COLORS[2], markersize=4.5, markeredgecolor='white', label='recall')
    ax.set_yticks(rows, [f'{_short(names[i])}  ({scores.support[i]})' for i in shown], fontsize=8)
    ax.set_ylim(len(shown) - 0.4, -0.6)
    ax.set_xlim(0, 1.015)
    ax.set_xlabel('Score; in brackets, the number of images of the class')
    if len(shown) < len(order):
        ax.set_title(f'the {len(shown)} of {len(order)} classes with the lowest F1', fontsize=9)
    figure.legend(*ax.get_legend_handles_labels(), loc='outside lower center', ncols=3, frameon=False, fontsize=8)
    style_axes(ax, grid='x')
    save_figure(figure, path)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[:_LONGEST_NAME - 1] + '…'
