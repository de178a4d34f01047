"""Images whose labels are in a CSV or Parquet file, not in the names of folders."""
import csv
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from timm.data.readers.reader import Reader
from timm.utils.misc import natural_key

__all__ = ['SPLIT_SYNONYMS', 'ReaderLabelFile', 'same_splits']

_FLAG = 'labels (--labels)'
_COLUMNS = 'file', 'label'
_PARQUET = ('.parquet', '.pq')
# Names of a split that mean the same, those of timm for the folders of an image folder
SPLIT_SYNONYMS = (('train', 'training'), ('val', 'valid', 'validation', 'eval', 'evaluation'))


class ReaderLabelFile(Reader):
    """timm's reader of an image folder, with the images and labels that a file lists.

    Classes are those of all splits, in the order that timm gives to the folders of an image folder.

    Args:
        path: The file, as it is or below ``root``, with the columns ``file`` (relative to ``root``), ``label`` and, if
            there are several splits, ``split``.
        root: Folder of the images.
        split: Name of the split. Without a column of that name it is all images.
        class_map: Class name to label mapping, as timm has it: the classes, and their order.

    Raises:
        FileNotFoundError: The file, or one of the images, does not exist.
        ImportError: The file is Parquet, and there is nothing to read it with.
        ValueError: The file holds something else, nothing of the split, or an image twice.
    """

    def __init__(self, path: str, root: str, split: str, class_map: dict[str, int] | None = None) -> None:
        super().__init__()
        self.root = root
        self.path: str = path if os.path.isfile(path) else os.path.join(root, path)
        path = self.path
        columns = _read(path)
        missing = [name for name in _COLUMNS if name not in columns]
        if missing:
            raise ValueError(
                f'{_FLAG} must have the columns file, label and, if need be, split; {path} has no '
                f'{" and no ".join(missing)} among {", ".join(map(str, columns)) or "none"}.')
        files, labels = ([str(value) for value in columns[name]] for name in _COLUMNS)
        self.class_to_idx: dict[str, int] = class_map or _number(labels)
        self.has_splits = 'split' in columns
        rows = zip(files, labels, strict=True)
        if self.has_splits:
            rows = _rows_of_split(list(rows), [str(value) for value in columns['split']], split, path)
        self.samples: list[tuple[str, int]] = [
            (os.path.normpath(os.path.join(root, file)), self.class_to_idx[label])
            for file, label in rows if label in self.class_to_idx
        ]
        if not self.samples:
            raise ValueError(f'{_FLAG} must list at least one image of the classes, got {path}.')
        self._check_files()

    def _check_files(self) -> None:
        seen: set[str] = set()
        for file, _ in self.samples:
            if file in seen:
                raise ValueError(f'{_FLAG} must list each image of a split once, and {self.path} has {file} twice.')
            seen.add(file)
        absent = [file for file, _ in self.samples if not os.path.isfile(file)]
        if absent:
            more = f' and {len(absent) - 1} other images' if len(absent) > 1 else ''
            raise FileNotFoundError(
                f'{_FLAG} {self.path} lists {absent[0]}{more}, not to be found; files are relative to --data-dir.')

    def __getitem__(self, index: int) -> tuple[IO[bytes], int]:
        file, label = self.samples[index]
        return open(file, 'rb'), label

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        file = self.samples[index][0]
        return os.path.basename(file) if basename else file if absolute else os.path.relpath(file, self.root)


def _read(path: str) -> dict[str, Sequence[Any]]:
    """Read the columns of a file."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{_FLAG} must be a CSV or Parquet file, got {path!r}.')
    if Path(path).suffix.lower() in _PARQUET:
        return _read_parquet(path)
    try:
        with open(path, newline='', encoding='utf-8-sig') as file:
            rows = list(csv.reader(file, strict=True))
    except (UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f'{_FLAG} must be a CSV file in UTF-8, or end with .parquet, got {path}: {e}') from None
    header, *body = [row for row in rows if row] or [[]]
    for number, row in enumerate(body, start=2):
        if len(row) != len(header):
            raise ValueError(f'{_FLAG} {path}: row {number} has {len(row)} cells under {len(header)} columns.')
    return {name.strip(): [row[i].strip() for row in body] for i, name in enumerate(header)}


def _read_parquet(path: str) -> dict[str, Sequence[Any]]:
    try:
        parquet = import_module('pyarrow.parquet')
    except ImportError:
        raise ImportError(
            f'{_FLAG} {path} is read with pyarrow: pip install pyarrow, or give a CSV file.') from None
    try:
        schema = parquet.read_schema(path)
        wanted = [name for name in (*_COLUMNS, 'split') if name in schema.names]
        if not set(_COLUMNS) <= set(wanted):
            return dict.fromkeys(schema.names, ())
        return parquet.read_table(path, columns=wanted).to_pydict()
    except (OSError, ValueError) as e:  # pyarrow's own errors are both
        raise ValueError(f'{_FLAG} {path} cannot be read: {e}') from None


def same_splits(split: str) -> tuple[str, ...]:
    """Give the names of a split that mean the same, its own among them."""
    return next((names for names in SPLIT_SYNONYMS if split in names), (split,))


def _number(labels: Sequence[str]) -> dict[str, int]:
    return {name: label for label, name in enumerate(sorted(set(labels), key=natural_key))}


def _rows_of_split(
        rows: Sequence[tuple[str, str]],
        splits: Sequence[str],
        split: str,
        path: str,
) -> list[tuple[str, str]]:
    """Give the rows of a split, under its own name or else one that means the same."""
    there = set(splits)
    name = next((name for name in (split, *same_splits(split)) if name in there), None)
    if name is None:
        raise ValueError(
            f'split must be one of those of {path}, {", ".join(sorted(there)) or "which has none"}, got {split!r}.')
    return [row for row, its in zip(rows, splits, strict=True) if its == name]
