"""Data sets by name: timm's factory, plus the embedded digits."""
import itertools
import os
from functools import partial
from typing import IO, Any

import timm.data
from timm.data.readers import reader_image_in_tar
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import Dataset

from ..messages import one_line
from ..ops.checks import check_choice
from .class_map import read_class_map
from .digits import DigitsDataset
from .images import UnreadableImageError, open_image, read_image
from .label_file import SPLIT_SYNONYMS, ReaderLabelFile, same_splits
from .streams import ImageStream

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
# Of these streams timm's readers hand out images in the mode of their files, if asked for none.
_RAW_STREAMS = ('hfids', 'wds')
# What the data sets of each prefix are read with
_PACKAGES = dict(
    torch='torchvision', hfds='datasets', hfids='datasets', tfds='tensorflow-datasets tensorflow', wds='webdataset')
# Folders that are splits and no classes
_SPLITS = {'test', *itertools.chain(*SPLIT_SYNONYMS)}
# What the options for some of timm's data sets are, and the prefixes of these
_SPECIAL = dict(
    input_key=('hfds', 'hfids', 'tfds', 'wds'),
    target_key=('hfds', 'hfids', 'tfds', 'wds'),
    num_samples=('hfids', 'tfds', 'wds'),
)


class ImageFiles(timm.data.ImageDataset):
    """timm's image folder, except that an image that cannot be read raises ``UnreadableImageError``.

    timm's own takes the next image in its place, so that an evaluation counts that one twice. Images are upright.
    """

    def __getitem__(self, index: int) -> tuple[Any, int]:
        file, label = self._open(index)
        with file:
            image = read_image(file, self.input_img_mode)
        return image if self.transform is None else self.transform(image), label

    def _open(self, index: int) -> tuple[IO[bytes], int]:
        if isinstance(self.reader, (ReaderImageFolder, ReaderLabelFile)):
            path, label = self.reader.samples[index]
            return open_image(path), label
        try:
            file, label = self.reader[index]
        except Exception as e:  # such as those of tarfile
            raise UnreadableImageError(one_line(e) or type(e).__name__) from e
        if file is None:
            raise UnreadableImageError('not a regular file')  # but a link, in a tar file
        return file, label


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
        if kwargs.get('class_map'):
            raise ValueError(
                f"class_map (--class-map) must be left out for the digits, got {kwargs['class_map']!r}.")
        return DigitsDataset(_DIGITS_SPLITS[split], input_img_mode=kwargs.get('input_img_mode', 'RGB'))

    if kwargs.get('class_map'):
        kwargs['class_map'] = read_class_map(kwargs['class_map'], root)
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
    if not name:
        _check_split(root, split)
        _check_no_pickle(root)
    if not name or prefix == 'torch':
        _check_no_loops(root)
    dataset = _open_timm(name, root, split, kwargs)
    if type(dataset) is timm.data.ImageDataset:
        return ImageFiles(root, reader=dataset.reader, input_img_mode=dataset.input_img_mode)
    if type(dataset) is timm.data.IterableImageDataset:
        if prefix in _RAW_STREAMS:
            dataset.reader.input_img_mode = ''  # what converts images is their transform
        return ImageStream(root, reader=dataset.reader)
    if hasattr(dataset, 'loader'):  # torchvision's image folder, and what is made like it
        dataset.loader = partial(read_image, mode=kwargs.get('input_img_mode', 'RGB'))
    return dataset


def _open_timm(name: str, root: str | None, split: str, kwargs: dict[str, Any]) -> Dataset[Any]:
    """Let timm create a data set, whose errors are of many kinds."""
    try:
        return timm.data.create_dataset(name, root=root, split=split, **kwargs)
    except FileNotFoundError as e:
        if name:
            raise FileNotFoundError(f'Data set {name!r} (--dataset) cannot be opened in {root!r}: {one_line(e)}') from e
        raise
    except Exception as e:
        reason = one_line(e).replace('use download=True', 'set --dataset-download') or type(e).__name__
        if 'Found 0 images' in reason or "Couldn't find any class folder" in reason:
            raise ValueError(
                f'root (--data-dir) must hold images in one folder per class, got {root!r}. {reason}') from None
        missing = isinstance(e, ImportError) or 'lease install' in reason
        hint = '; it needs a package: pip install ' + _PACKAGES[name.split('/')[0].lower()] if missing and name else ''
        kind = ImportError if missing else ValueError
        what = f'Data set {name!r} (--dataset)' if name else f'root (--data-dir) {root!r}'
        raise kind(f'{what} cannot be opened: {reason.rstrip(".")}{hint}.') from e


def _check_split(root: str, split: str) -> None:
    """Raise ``ValueError`` for a split that is not there, where timm would take the folder with all splits in it."""
    if os.pardir in split.split('/') or os.path.isabs(split):
        raise ValueError(f'split must be the name of a split in root (--data-dir), got {split!r}.')
    if not os.path.isdir(root):
        return
    accepted = set(same_splits(split.split('[')[0]))
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith('.'))
    if folders and _SPLITS.issuperset(folders) and accepted.isdisjoint(folders):
        raise ValueError(f'split must be one of {", ".join(folders)}, the folders of {root!r}, got {split!r}.')


def _check_no_pickle(tar: str) -> None:
    """Raise ``ValueError`` for a tar file with a pickled index beside it that this timm would read without care."""
    folder, name = os.path.split(tar)
    path = os.path.join(folder, f'_{os.path.splitext(name)[0]}{reader_image_in_tar.CACHE_FILENAME_SUFFIX}')
    if os.path.exists(path) and not hasattr(reader_image_in_tar, '_TarInfoUnpickler'):
        raise ValueError(
            f'root (--data-dir) must have no pickle beside it, which timm {timm.__version__} would read and which may '
            f'run code, got {path!r}: remove it, or update timm.')


def _check_no_loops(root: str) -> None:
    """Raise ``ValueError`` if a folder holds a link to one above, for timm follows links, without end."""
    for folder, subfolders, _ in os.walk(root, followlinks=True):
        for name in subfolders:
            path = os.path.join(folder, name)
            if os.path.islink(path) and os.path.realpath(path) in _folders_above(folder, root):
                raise ValueError(f'root (--data-dir) must not hold a link to a folder above, got {path!r}.')


def _folders_above(folder: str, root: str) -> set[str]:
    above = {os.path.realpath(folder)}
    while folder not in (root, os.path.dirname(folder)):
        folder = os.path.dirname(folder)
        above.add(os.path.realpath(folder))
    return above


def class_names(dataset: Dataset[Any]) -> list[str] | None:
    """Give the class names of a data set in the order of their labels, ``None`` where it does not say."""
    class_to_idx = getattr(dataset, 'class_to_idx', None) or getattr(
        getattr(dataset, 'reader', None), 'class_to_idx', None)
    if not class_to_idx or sorted(class_to_idx.values()) != list(range(len(class_to_idx))):
        return None
    return [str(name) for name in sorted(class_to_idx, key=class_to_idx.get)]
