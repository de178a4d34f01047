"""Data sets by name: timm's factory, plus the embedded digits."""
import os
from typing import Any

import timm.data
from torch.utils.data import Dataset

from ..ops.checks import check_choice
from .digits import DigitsDataset
from .images import read_image
from .label_file import ReaderLabelFile

__all__ = ['ImageFiles', 'class_names', 'create_dataset']

# timm asks for the 'validation' split by default; the digits, like most torchvision sets, call theirs 'test'.
_DIGITS_SPLITS = {
    'train': 'train',
    'training': 'train',
    'test': 'test',
    'val': 'test',
    'valid': 'test',
    'validation': 'test',
    'eval': 'test',
    'evaluation': 'test',
}
# The prefixes that timm.data.create_dataset knows, and those whose files lie below ``root``; an image folder has none.
_TIMM_PREFIXES = ('torch', 'hfds', 'hfids', 'tfds', 'wds')
_LOCAL_PREFIXES = ('', 'torch', 'wds')
# What the options for some of timm's data sets are, and the prefixes of these
_SPECIAL = dict(
    input_key=('hfds', 'hfids', 'tfds', 'wds'),
    target_key=('hfds', 'hfids', 'tfds', 'wds'),
    num_samples=('hfids', 'tfds', 'wds'),
)


class ImageFiles(timm.data.ImageDataset):
    """timm's image folder, except that images are upright, and that one that cannot be read raises OSError.

    timm's own takes the next image in its place, so that an evaluation counts that one twice.
    """

    def __getitem__(self, index: int) -> tuple[Any, int]:
        file, label = self.reader[index]
        with file:
            image = read_image(file, self.input_img_mode)
        return image if self.transform is None else self.transform(image), label


def create_dataset(
        name: str = '',
        root: str | None = None,
        split: str = 'validation',
        labels: str | None = None,
        **kwargs: Any,
) -> Dataset[Any]:
    """Create a data set by name, as ``timm.data.create_dataset`` does, or the digits.

    Args:
        name: ``'digits'``, a name with one of timm's prefixes (``'torch/cifar10'``, ``'hfds/<Hub id>'``,
            ``'wds/...'``), the path of an image folder, or empty for the image folder (or tar file) at ``root``.
        root: Folder of the data. The digits need none.
        split: Name of the split. All of timm's names for a validation split mean the ``'test'`` split of the digits.
        labels: CSV or Parquet file with the labels of the images in ``root``, in place of a folder for each class.
        **kwargs: Further arguments of ``timm.data.create_dataset``.

    Returns:
        A data set of (image, label) pairs with a ``transform`` that ``timm.data.create_loader`` sets.

    Raises:
        FileNotFoundError: The image folder, or what ``labels`` names, does not exist.
        ImportError: ``labels`` is a Parquet file, and there is nothing to read it with.
        ValueError: An unknown name or split, a data set that needs a ``root``, a folder without images, or an argument
            that the data set does not know.
    """
    prefix = name.split('/')[0].lower() if '/' in name else ''
    for argument, prefixes in _SPECIAL.items():
        if kwargs.get(argument) is not None and prefix not in prefixes:
            raise ValueError(
                f"{argument} must be left out but for a data set {', '.join(f'{p}/...' for p in prefixes)}, got "
                f"{kwargs[argument]!r} for {name or root!r}.")
    if name == 'digits':
        check_choice('split', split, sorted(_DIGITS_SPLITS))
        if root is not None:
            raise ValueError(f'root (--data-dir) must be None for the digits, part of scikit-learn, got {root!r}.')
        return DigitsDataset(_DIGITS_SPLITS[split], input_img_mode=kwargs.get('input_img_mode', 'RGB'))

    if labels is not None:
        if name or root is None:
            raise ValueError(f'labels (--labels) needs root (--data-dir) and no data set, got {root!r} and {name!r}.')
        reader = ReaderLabelFile(labels, root, split, kwargs.get('class_map'))
        return ImageFiles(root, reader=reader, input_img_mode=kwargs.get('input_img_mode', 'RGB'))
    if root is None and os.path.exists(name):
        name, root, prefix = '', name, ''
    if name and prefix not in _TIMM_PREFIXES:
        raise ValueError(
            f"Unknown data set {name!r}: neither 'digits', nor a name with one of timm's prefixes (such as "
            f"'torch/cifar10' or 'hfds/cifar10'), nor an existing image folder.")
    if root is None and prefix in _LOCAL_PREFIXES:
        raise ValueError(f'root (--data-dir) must be the folder of the data for data set {name!r}, got None.')
    if not name and not os.path.exists(root):
        raise FileNotFoundError(f'root (--data-dir) must be an existing image folder or tar file, got {root!r}.')
    try:
        dataset = timm.data.create_dataset(name, root=root, split=split, **kwargs)
    except AssertionError as e:  # what timm raises for a name or a class map that is not there
        raise ValueError(f'data set {name or root!r} (--dataset, --data-dir, --class-map): {e}.') from None
    except ModuleNotFoundError as e:
        raise ImportError(f'--dataset {name} needs the package {e.name}: pip install {e.name}') from e
    except RuntimeError as e:
        if 'Please install' in str(e):  # timm's words for a reader without its package
            raise ImportError(f'--dataset {name}: {e}') from e
        if 'Found 0 images' not in str(e):
            raise
        raise ValueError(f'root (--data-dir) must hold images in one folder per class, got {root!r}. {e}') from None
    if type(dataset) is timm.data.ImageDataset:
        return ImageFiles(root, reader=dataset.reader, input_img_mode=dataset.input_img_mode)
    return dataset


def class_names(dataset: Dataset[Any]) -> list[str] | None:
    """Give the class names of a data set in the order of their labels, ``None`` where it does not say."""
    class_to_idx = getattr(dataset, 'class_to_idx', None) or getattr(
        getattr(dataset, 'reader', None), 'class_to_idx', None)
    if not class_to_idx or sorted(class_to_idx.values()) != list(range(len(class_to_idx))):
        return None
    return [str(name) for name in sorted(class_to_idx, key=class_to_idx.get)]
