"""What a nested value holds: tensors and numbers in tuples, lists, dictionaries, data classes and the like."""
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ['leaves_in', 'map_tensors', 'numbers_in', 'tensors_in']


def leaves_in(tree: Any) -> list[Any]:
    """Give the leaves of a value in the order in which it holds them.

    Containers are sequences, mappings (the outputs of transformers are some), data classes, and what
    ``torch.utils._pytree`` knows besides.
    """
    found: list[Any] = []
    _collect(tree, found)
    return found


def _collect(tree: Any, found: list[Any]) -> None:
    if isinstance(tree, (Tensor, int, float, str)) or tree is None:
        found.append(tree)
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            _collect(item, found)
    elif isinstance(tree, Mapping):
        for item in tree.values():
            _collect(item, found)
    elif is_dataclass(tree) and not isinstance(tree, type):
        for field in fields(tree):
            _collect(getattr(tree, field.name), found)
    else:  # a leaf, or a container that somebody has registered
        found += tree_leaves(tree)


def tensors_in(tree: Any) -> list[Tensor]:
    """Give the tensors in a nested value."""
    return [leaf for leaf in leaves_in(tree) if isinstance(leaf, Tensor)]


def numbers_in(tree: Any) -> list[float]:
    """Give the numbers in a nested value, truth values as 0 and 1."""
    return [leaf for leaf in leaves_in(tree) if isinstance(leaf, (int, float))]


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply a function to each tensor in nested tuples, lists and dictionaries."""
    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)
