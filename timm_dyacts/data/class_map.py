"""Class maps: the labels of the classes of an image folder, by name."""
import os
import pickle
from typing import Any

from timm.data.readers.class_map import load_class_map

from ..messages import one_line

__all__ = ['read_class_map']


def read_class_map(class_map: str | dict[str, int], root: str | None) -> dict[str, int]:
    """Read a class map as timm does, but for the objects that a pickle may hold, which older releases of it made.

    Args:
        class_map: The file, as it is or below ``root``, or the mapping itself.
        root: Folder of the data set.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds something else.
    """
    if isinstance(class_map, dict):
        return class_map
    flag = 'class_map (--class-map)'
    path = next(filter(os.path.isfile, (class_map, os.path.join(root or '', class_map))), None)
    if path is None:
        raise FileNotFoundError(f'{flag} must be a .txt or .pkl file, as it is or in --data-dir, got {class_map!r}.')
    try:
        loaded = _unpickle(path) if os.path.splitext(path)[1].lower() == '.pkl' else load_class_map(path)
        if not isinstance(loaded, dict) or not loaded or not all(map(_is_label, loaded.values())):
            raise ValueError('it gives no labels from 0 on')
        return loaded
    except Exception as e:
        raise ValueError(
            f'{flag} must be a .txt file with a class in each line, or a .pkl file of a dictionary, got {class_map!r}: '
            f'{(one_line(e) or type(e).__name__).rstrip(".")}.') from e


def _is_label(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


def _unpickle(path: str) -> Any:
    with open(path, 'rb') as file:
        return _PlainUnpickler(file).load()


class _PlainUnpickler(pickle.Unpickler):
    """Reads dictionaries, texts and numbers, and makes no object of any class."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f'it holds objects ({module}.{name}), which may run code')
