"""What a nested value holds: tensors and numbers in tuples, lists, dictionaries, data classes and the like."""
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ['leaves_in', 'map_tensors', 'numbers_in', 'tensors_in']


def leaves_in(tree: Any) -> list[Any]:
    """Give the leaves of a value in the order in which it holds them.

    Containers are those that ``torch.utils._pytree`` knows, other mappings (the outputs of transformers are some), and
    data classes.
    """
    found: list[Any] = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, (Tensor, int, float, str)) or leaf is None:
            found.append(leaf)
        elif isinstance(leaf, Mapping):
            found += leaves_in(list(leaf.values()))
        elif isinstance(leaf, (list, tuple)):  # a subclass, such as a named tuple that pytree does not know
            found += leaves_in(list(leaf))
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found += leaves_in([getattr(leaf, field.name) for field in fields(leaf)])
        else:
            found.append(leaf)
    return found


def tensors_in(tree: Any) -> list[Tensor]:
    """Give the tensors in a nested value."""
    return [leaf for leaf in leaves_in(tree) if isinstance(leaf, Tensor)]


def numbers_in(tree: Any) -> list[float]:
    """Give the numbers in a nested value, truth values as 0 and 1."""
    return [leaf for leaf in leaves_in(tree) if isinstance(leaf, (int, float))]


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply a function to each tensor in nested tuples, lists and dictionaries."""
    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)
