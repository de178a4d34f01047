"""The pictures of a finished run: mistakes, and what the operators do."""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..plotting import COLORS, create_figure, save_figure, style_axes

__all__ = ['DyReLUStats', 'Mistake', 'plot_confusion', 'plot_dyrelu', 'plot_mistakes', 'plot_softpool']

_MAX_TICKS = 40
_MAX_NUMBERS = 20


@dataclass(frozen=True)
class Mistake:
    """An image that was classified wrongly.

    Attributes:
        image: Shape (3 or 1, H, W), values from 0 to 1.
        label: Its class.
        predicted: The class that it was taken for.
        confidence: The probability that the model gave that class.
    """
    image: Tensor
    label: int
    predicted: int
    confidence: float


@dataclass
class DyReLUStats:
    """Histograms of the coefficients of a Dynamic ReLU.

    Attributes:
        name: Path of the module.
        start: Shape (2K,), where each coefficient started: K slopes, K intercepts.
        low: Shape (2K,), lower ends of the histograms.
        high: Shape (2K,), upper ends.
        counts: Shape (2K, bins), over all channels and images.
        over_images: Shape (2K,), standard deviation over the images, root mean square of the channels.
    """
    name: str
    start: Tensor
    low: Tensor
    high: Tensor
    counts: Tensor
    over_images: Tensor

    def quantiles(self, levels: Sequence[float]) -> Tensor:
        """Give quantiles of the coefficients, shape (2K, len(levels)), to the width of a bin."""
        shares = self.counts.double().cumsum(1) / self.counts.double().sum(1, keepdim=True)
        levels = torch.tensor(levels, dtype=torch.double).expand(len(shares), -1).contiguous()
        bins = torch.searchsorted(shares.contiguous(), levels).clamp(max=self.counts.shape[1] - 1)
        width = (self.high - self.low)[:, None] / self.counts.shape[1]
        return self.low[:, None] + (bins + 0.5) * width


def plot_confusion(matrix: Tensor, names: Sequence[str], path: str, title: str = '') -> None:
    """Draw a confusion matrix, in percent of the images of each class.

    Args:
        matrix: Shape (C, C), number of images of class i that were taken for class j.
        names: Class names.
        path: Where to write the picture; its ending gives the format.
        title: Heading of the figure.
    """
    count = len(matrix)
    percent = 100 * matrix.double() / matrix.sum(1, keepdim=True).clamp(min=1)
    size = 2.8 + min(0.42 * count, 13)
    figure = create_figure(size + 1.2, size, title)
    ax = figure.subplots()
    image = ax.imshow(percent.numpy(), cmap='Blues', vmin=0, vmax=100, interpolation='nearest')
    ax.set_xlabel('Predicted class')
    ax.set_ylabel('True class')
    if count <= _MAX_TICKS:
        long = max(map(len, names)) > 3
        ax.set_xticks(range(count), names, fontsize=8, rotation=90 if long else 0)
        ax.set_yticks(range(count), names, fontsize=8)
    if count <= _MAX_NUMBERS:
        for (i, j), number in zip(torch.cartesian_prod(*[torch.arange(count)] * 2).tolist(), matrix.flatten().tolist(),
                                  strict=True):
            if number:
                color = 'white' if percent[i, j] > 60 else '#333333'
                ax.text(j, i, str(number), ha='center', va='center', fontsize=7, color=color)
    figure.colorbar(image, ax=ax, label='% of the true class', shrink=0.8)
    save_figure(figure, path)


def plot_mistakes(mistakes: Sequence[Mistake], names: Sequence[str], path: str, title: str = '') -> None:
    """Draw images that were classified wrongly, as the model saw them, in the order given.

    Args:
        mistakes: At least one.
        names: Class names.
        path: Where to write the picture; its ending gives the format.
        title: Heading of the figure.
    """
    columns = min(6, len(mistakes))
    rows = -(-len(mistakes) // columns)
    figure = create_figure(max(1.7 * columns, 4), 2.15 * rows + 0.4, title)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes:
        ax.axis('off')
    for ax, mistake in zip(axes, mistakes, strict=False):
        _show(ax, mistake.image)
        ax.set_title(
            f'{_short(names[mistake.label])}, taken for\n{_short(names[mistake.predicted])} '
            f'({100 * mistake.confidence:.0f} %)', fontsize=8)
    save_figure(figure, path)


def plot_dyrelu(layers: Sequence[DyReLUStats], path: str, title: str = '') -> None:
    """Draw which slopes and intercepts the Dynamic ReLUs of a net use, and how much they depend on the image.

    Args:
        layers: In the order of the net, all with the same number of pieces.
        path: Where to write the picture; its ending gives the format.
        title: Heading of the figure.
    """
    from matplotlib.ticker import MaxNLocator

    k = len(layers[0].start) // 2
    x = torch.arange(len(layers)).double().numpy()
    figure = create_figure(max(7.5, 2.5 + 0.36 * len(layers)), 8.2, title)
    axes = figure.subplots(3, 1, sharex=True)
    quantiles = torch.stack([layer.quantiles((0.05, 0.25, 0.5, 0.75, 0.95)) for layer in layers]).numpy()
    start = torch.stack([layer.start for layer in layers]).numpy()
    for ax, offset, name in ((axes[0], 0, 'slope a'), (axes[1], k, 'intercept b')):
        for piece in range(k):
            low, lower, middle, upper, high = quantiles[:, offset + piece].T
            at = x + (piece - (k - 1) / 2) * 0.24
            style = dict(color=COLORS[piece % len(COLORS)])
            ax.vlines(at, low, high, linewidth=1.2, **style)
            ax.vlines(at, lower, upper, linewidth=4.5, **style)
            ax.plot(at, middle, 'o', markersize=4.5, markeredgecolor='white', label=f'piece {piece + 1}', **style)
            ax.hlines(start[:, offset + piece], at - 0.12, at + 0.12, color='black', linewidth=1)
        ax.set_ylabel(f'{name}: 5 to 95 %')
    axes[0].plot([], [], color='black', linewidth=1, label='start (static)')
    axes[0].legend(frameon=False, fontsize=8, ncols=k + 1, loc='lower right', bbox_to_anchor=(1, 1))
    spread = torch.stack([layer.over_images for layer in layers])
    for offset, name, marker in ((0, 'slopes', 'o'), (k, 'intercepts', 's')):
        values = spread[:, offset:offset + k].square().mean(1).sqrt().numpy()
        axes[2].plot(x, values, marker=marker, markersize=4.5, linewidth=1.2, label=name)
    axes[2].set_ylabel('varies over images (std)')
    axes[2].set_ylim(bottom=0)
    axes[2].legend(frameon=False, fontsize=8)
    axes[2].set_xticks(range(len(layers)), [layer.name for layer in layers], rotation=90, fontsize=8)
    for ax in axes:
        ax.yaxis.set_major_locator(MaxNLocator(6))
        style_axes(ax, grid='y')
    save_figure(figure, path)


def plot_softpool(image: Tensor, maps: dict[str, Tensor], path: str, title: str = '') -> None:
    """Draw an image, and feature maps before and after pooling side by side.

    Args:
        image: Shape (3 or 1, H, W), values from 0 to 1.
        maps: Heading -> feature maps (channels, H, W) of the same channels: before pooling, then each kind of pooling.
        path: Where to write the picture; its ending gives the format.
        title: Heading of the figure.
    """
    channels = len(next(iter(maps.values())))
    figure = create_figure(1.9 * (len(maps) + 1), 1.9 * channels + 0.7, title)
    axes = figure.subplots(channels, len(maps) + 1, squeeze=False)
    for ax in axes.flat:
        ax.axis('off')
    _show(axes[0, 0], image)
    axes[0, 0].set_title('image', fontsize=9)
    for column, (heading, values) in enumerate(maps.items(), start=1):
        axes[0, column].set_title(heading, fontsize=9)
        for row in range(channels):
            # One scale per channel, so that the columns can be compared.
            low = min(m[row].min().item() for m in maps.values())
            high = max(m[row].max().item() for m in maps.values())
            axes[row, column].imshow(values[row].numpy(), cmap='viridis', vmin=low, vmax=high, interpolation='nearest')
    save_figure(figure, path)


def _show(ax: Any, image: Tensor) -> None:
    """Draw an image (3 or 1, H, W)."""
    pixels = image.movedim(0, -1).numpy()
    ax.imshow(pixels if len(image) == 3 else pixels[..., 0], cmap='gray', vmin=0, vmax=1)


def _short(name: str) -> str:
    return name if len(name) <= 18 else name[:17] + '…'
