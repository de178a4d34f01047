"""Whether two data sets are the same: told by the names and labels of their images, or by some of the images."""
import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import Dataset, IterableDataset

from .images import open_image
from .subsets import Subset, labels_of

__all__ = ['fingerprint', 'is_same']

# So many files are asked for their size at most, and of one file of each class the beginning is read.
_MAX_SIZES = 10_000
_BEGINNING = 1 << 16


def fingerprint(dataset: Dataset[Any]) -> str | None:
    """Give a hash of the names and labels of all images in their order, ``None`` if the data set tells neither.

    Of files also some sizes, and how the first of each class begins, as the files of two classes may have the same
    names. Where the data lie does not matter: names are relative to their folder.
    """
    dataset = dataset.dataset if isinstance(dataset, Subset) else dataset
    labels, names = _labels(dataset), _names(dataset)
    if labels is None and names is None:
        return None
    digest = hashlib.sha256()
    for index in range(len(dataset)):
        name, label = names[index] if names else '', labels[index] if labels else ''
        digest.update(f'{name}\0{label}\n'.encode(errors='surrogateescape'))
    for content in _contents(dataset):
        digest.update(content)
    return digest.hexdigest()


def is_same(a: Dataset[Any], b: Dataset[Any]) -> bool:
    """Say whether two splits are one, as where an unknown split stands for all there is.

    Of streams, that is what the split is called, or which files it has. Of all others, the labels and three images.
    """
    if isinstance(a, IterableDataset) or isinstance(b, IterableDataset):
        sources = [_source_of_stream(dataset) for dataset in (a, b)]
        return sources[0] is not None and sources[0] == sources[1]
    if len(a) != len(b) or len(a) == 0 or fingerprint(a) != fingerprint(b):
        return False
    return all(_pixels(a, index) == _pixels(b, index) for index in {0, len(a) // 2, len(a) - 1})


def _labels(dataset: Dataset[Any]) -> list[int] | None:
    try:
        return labels_of(dataset, '')
    except ValueError:
        return None


def _contents(dataset: Any) -> Iterator[bytes]:
    """Give something of the files of a data set that has files: sizes, and beginnings."""
    samples = getattr(getattr(dataset, 'reader', dataset), 'samples', None)
    if not isinstance(samples, list) or not samples or not isinstance(samples[0][0], str):
        return
    for path, _ in samples[::-(-len(samples) // _MAX_SIZES)]:
        with suppress(OSError):  # it is missed where it is read
            yield f'{os.path.getsize(path)}\n'.encode()
    first = {label: path for path, label in reversed(samples)}
    for _, path in sorted(first.items()):
        with suppress(OSError), open_image(path) as file:
            yield file.read(_BEGINNING)


def _names(dataset: Any) -> list[str] | None:
    """Give the names of files, where the reader has them at hand."""
    has_names = isinstance(dataset, ImageDataset) and hasattr(dataset.reader, 'samples')
    return dataset.filenames() if has_names else None


def _source_of_stream(dataset: Any) -> Any:
    reader = getattr(dataset, 'reader', None)
    return getattr(reader, 'split_filenames', None) or getattr(reader, 'split', None)


def _pixels(dataset: Any, index: int) -> Any:
    """Give an image before transforms; where it is none, or cannot be read, what equals nothing else."""
    transform, dataset.transform = dataset.transform, None
    try:
        image = dataset[index][0]
    except Exception:  # as in training, which says so
        image = None
    finally:
        dataset.transform = transform
    return (image.mode, image.size, image.tobytes()) if isinstance(image, Image.Image) else object()
