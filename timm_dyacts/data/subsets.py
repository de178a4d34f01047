"""Parts of a data set: a few images of each class, and images that are held out of the training."""
import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

from timm.data import ImageDataset
from torch.utils.data import Dataset

from .factory import class_names

__all__ = ['Subset', 'hold_out', 'labels_of', 'pick_per_class']


class Subset(Dataset):
    """Some of the samples of a data set, with a transform of its own.

    Unlike ``torch.utils.data.Subset`` it can be given to ``timm.data.create_loader``, which sets the transform, and
    leaves that of other subsets of the same data set alone.

    Args:
        dataset: Data set of (image, label) pairs with a ``transform``.
        indices: Which samples.
    """

    def __init__(self, dataset: Dataset[Any], indices: Sequence[int]) -> None:
        if isinstance(dataset, Subset):
            dataset, indices = dataset.dataset, [dataset.indices[index] for index in indices]
        self.dataset: Any = copy.copy(dataset)
        self.indices: list[int] = list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.dataset[self.indices[index]]

    @property
    def class_to_idx(self) -> dict[str, int] | None:
        """The label of each class name, ``None`` if the data set does not say."""
        names = class_names(self.dataset)
        return None if names is None else {name: label for label, name in enumerate(names)}

    @property
    def transform(self) -> Callable | None:
        """What each image goes through."""
        return self.dataset.transform

    @transform.setter
    def transform(self, value: Callable | None) -> None:
        self.dataset.transform = value

    def filename(self, index: int, **kwargs: Any) -> str:
        """Give the file of a sample, as timm's data sets do, or what else it can be told by."""
        if isinstance(self.dataset, ImageDataset):
            return self.dataset.filename(self.indices[index], **kwargs)
        return f'sample {self.indices[index]}'


def pick_per_class(dataset: Dataset[Any], count: int, seed: int) -> Subset:
    """Draw as many samples of each class.

    Args:
        dataset: Data set that can tell its labels without reading images.
        count: Number of samples of each class.
        seed: Of the choice. The same data set, count and seed give the same samples.

    Raises:
        ValueError: A class has fewer samples, or the labels cannot be told.
    """
    chosen: list[int] = []
    for label, indices in _shuffled_by_class(dataset, seed, '--images-per-class').items():
        if len(indices) < count:
            raise ValueError(
                f'--images-per-class must be at most the number of training images of each class, got {count}, and '
                f'class {_class_name(dataset, label)} has {len(indices)}.')
        chosen += indices[:count]
    return Subset(dataset, sorted(chosen))


def hold_out(dataset: Dataset[Any], fraction: float, seed: int) -> tuple[Subset, Subset]:
    """Divide a data set in two, with the same share of each class, at least one sample of each in both.

    Args:
        dataset: Data set that can tell its labels without reading images.
        fraction: Share of the samples that are held out, between 0 and 1.
        seed: Of the choice.

    Returns:
        The samples that are left, and those that are held out.

    Raises:
        ValueError: A class has a single sample, or the labels cannot be told.
    """
    held: list[int] = []
    for label, indices in _shuffled_by_class(dataset, seed, '--val-fraction').items():
        if len(indices) < 2:
            raise ValueError(
                f'--val-fraction needs two training images of each class at least, and class '
                f'{_class_name(dataset, label)} has {len(indices)}.')
        held += indices[:min(max(round(fraction * len(indices)), 1), len(indices) - 1)]
    left = sorted(set(range(len(dataset))) - set(held))
    return Subset(dataset, left), Subset(dataset, sorted(held))


def _shuffled_by_class(dataset: Dataset[Any], seed: int, option: str) -> dict[int, list[int]]:
    """Give the indices of each class in a random order that does not depend on the other classes."""
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels_of(dataset, option)):
        by_class.setdefault(label, []).append(index)
    for label, indices in by_class.items():
        random.Random(f'{seed} {label}').shuffle(indices)
    return dict(sorted(by_class.items()))


def labels_of(dataset: Dataset[Any], option: str) -> list[int]:
    """Give the label of each sample, without reading images.

    Args:
        dataset: The data set.
        option: What needs them, for the message.

    Raises:
        ValueError: They cannot be told.
    """
    if isinstance(dataset, Subset):
        labels = labels_of(dataset.dataset, option)
        return [labels[index] for index in dataset.indices]
    reader = getattr(dataset, 'reader', None)
    labels = getattr(dataset, 'targets', getattr(reader, 'targets', None))
    if labels is None and hasattr(reader, 'samples'):
        labels = [label for _, label in reader.samples]
    if labels is None or len(labels) != len(dataset):
        raise ValueError(
            f'{option} needs a data set that tells its labels without reading the images: an image folder, the digits, '
            f'or one of torchvision with targets; got {type(dataset).__name__}.')
    return [int(label) for label in labels]


def _class_name(dataset: Dataset[Any], label: int) -> str:
    names = class_names(dataset)
    return repr(names[label]) if names else str(label)
