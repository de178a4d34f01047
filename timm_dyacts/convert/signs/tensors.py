"""The unknown signs of tensors: one number of an unknown for each element, where most elements share theirs."""
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from .unknowns import ANY, PLUS, Unknowns

__all__ = ['Contradiction', 'TensorSigns', 'compact', 'extent', 'narrow', 'reshape']

_STRIDE = 2 ** 31
_MANY = 2 ** 14  # elements, from which on it pays to sort out those that are the same


class Contradiction(Exception):
    """Two signs would have to be equal that are known to be opposite."""


class TensorSigns:
    """The unknowns of the elements of each tensor.

    Attributes:
        unknowns: The unknowns.
        ids: The number of an unknown for each element of a tensor, by the ``id`` of the tensor, in the shape of its
            ``extent``. Copies that broadcasting made take no memory. A tensor that is not there has +1 everywhere.
        bases: The ``id`` of the tensor that a view is a view of, by the ``id`` of the view.
        dependent: The ``id`` of each tensor whose elements depend on the network's input; of a view that of its base.
        computed: The ``id`` of each tensor that the network is given, holds or computes. Another one, which an operator
            just reads, is a number in its code.
    """

    def __init__(self) -> None:
        self.unknowns: Unknowns = Unknowns()
        self.ids: dict[int, Tensor] = {}
        self.bases: dict[int, int] = {}
        self.dependent: set[int] = set()
        self.computed: set[int] = set()

    def get(self, tensor: Tensor) -> Tensor:
        """Give the unknowns of a tensor."""
        ids = self.ids.get(id(tensor))
        return torch.tensor(PLUS).expand(extent(tensor)) if ids is None else ids

    def set(self, tensor: Tensor, ids: Tensor) -> None:
        """Set the unknowns of a tensor."""
        self.ids[id(tensor)] = ids

    def forget(self, *tensors: Tensor) -> None:
        """Note that tensors are the same whatever the signs of what they were made from."""
        for tensor in tensors:
            self.ids.pop(id(tensor), None)

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor has unknowns: whether its signs may change."""
        return id(tensor) in self.ids

    def base(self, tensor: Tensor) -> int:
        """Give the ``id`` of the tensor that another one is a view of, its own if it is none."""
        return self.bases.get(id(tensor), id(tensor))

    def depends_on_input(self, *tensors: Tensor) -> bool:
        """Whether tensors may hold other numbers for another input of the network."""
        return any(t.is_meta or self.base(t) in self.dependent for t in tensors)

    def is_zero(self, tensor: Tensor) -> bool:
        """Whether a tensor is the number 0 in the code of the network."""
        return tensor.ndim == 0 and not tensor.is_meta and id(tensor) not in self.computed and tensor.item() == 0

    def known(self, tensor: Tensor) -> Tensor | None:
        """Give the signs of a tensor if all of them are settled already, broadcastable."""
        ids = narrow(self.get(tensor))
        roots = torch.where(ids == ANY, PLUS, self.unknowns.find(ids))
        return compact(roots) if bool((roots.abs() == PLUS).all()) else None

    def tie(self, a: Tensor, b: Tensor, reason: str) -> None:
        """Make the unknowns ``a`` and ``b``, broadcast together, equal.

        Raises:
            Contradiction: With the reason, if two of them are known to be opposite.
        """
        a, b = (narrow(ids) for ids in torch.broadcast_tensors(a, b))
        only_in_a, only_in_b = _dims_only_in(a, b), _dims_only_in(b, a)
        if only_in_a and only_in_b:  # each element of one meets each of the other: one of either stands for all
            self.tie(a, _smallest(b, *only_in_b), reason)
            a = _smallest(a, *only_in_a)
        is_with_one = b.numel() == 1
        a, b = torch.broadcast_tensors(a, b)
        open_ = (a != ANY) & (b != ANY) & (a != b)
        a, b = a[open_], b[open_]
        if a.numel() > _MANY and is_with_one:
            a = self.unknowns.distinct(a)
            b = b[:1].expand_as(a)
        elif a.numel() > _MANY:
            pairs = torch.unique(a * _STRIDE + b)  # both in one number: sorted much faster than rows
            a = (pairs + _STRIDE // 2).div(_STRIDE, rounding_mode='floor')
            b = pairs - a * _STRIDE
        if not self.unknowns.tie(a, b):
            raise Contradiction(reason)

    def tie_along(self, tensor: Tensor, dims: Collection[int], reason: str) -> Tensor:
        """Tie the elements that differ in nothing but their places along some dimensions.

        Returns:
            The unknowns that they share, with a size of 1 along these dimensions.

        Raises:
            Contradiction: With the reason, if two of them are known to be opposite.
        """
        ids = self.get(tensor)
        for dim in dims:
            ids = _narrow_along(ids, dim)
            if ids.shape[dim] > 1:
                first = _smallest(ids, dim)
                self.tie(ids, first, reason)
                ids = first
        return ids

    def tie_to_plus(self, tensor: Tensor, reason: str) -> None:
        """Make the signs of a tensor +1, if they are not already."""
        if self.has(tensor):
            self.tie(self.ids[id(tensor)], torch.tensor(PLUS), reason)

    def channels(self, tensor: Tensor, dim: int) -> Tensor:
        """Give one unknown for each index along a dimension, after tying the elements that share it."""
        ids = narrow(self.get(tensor)).movedim(dim, 0).flatten(1) if tensor.ndim > 1 else self.get(tensor)[:, None]
        vector = _smallest(ids, 1)
        self.tie(ids, vector, 'one channel holds elements of different signs')
        return vector[:, 0].expand(extent(tensor)[dim])

    def set_channels(self, tensor: Tensor, vector: Tensor, dim: int) -> None:
        """Set the unknowns of a tensor to one for each index along a dimension."""
        shape = [1] * tensor.ndim
        shape[dim] = -1
        self.set(tensor, vector.view(shape).expand(extent(tensor)))


def _smallest(ids: Tensor, *dims: int) -> Tensor:
    """Give the smallest unknown along dimensions, which all others can be tied to at once, and no padded zero."""
    for dim in dims:
        sizes = ids.abs()
        ids = ids.gather(dim, sizes.masked_fill_(sizes == ANY, _STRIDE).argmin(dim, keepdim=True))
    return ids


def _dims_only_in(ids: Tensor, others: Tensor) -> list[int]:
    """Give the dimensions along which the first has several unknowns, and the second, of as many dimensions, one."""
    return [dim for dim in range(ids.ndim) if ids.shape[dim] > others.shape[dim]]


def extent(tensor: Tensor) -> tuple[int, ...]:
    """Give the shape of the unknowns of a tensor: its own, where it is not empty.

    The channels of an empty tensor have signs too: what is made of no boxes today is made of some tomorrow. It counts
    as if it had one element along each dimension in which it is empty.
    """
    return tuple(max(size, 1) for size in tensor.shape)


def reshape(ids: Tensor, shape: Sequence[int]) -> Tensor:
    """Reshape without writing out what broadcasting repeats, as far as it goes.

    Args:
        ids: Unknowns.
        shape: The new sizes, as many elements.
    """
    narrowed: list[int] = []  # the sizes to take of the unknowns, and then of the result
    result: list[int] = []
    for old, new in _matching_dims(ids.shape, shape):
        if all(ids.shape[dim] == 1 or ids.stride(dim) == 0 for dim in old):
            narrowed += [1] * len(old)
            result += [1] * len(new)
        else:
            narrowed += [ids.shape[dim] for dim in old]
            result += [shape[dim] for dim in new]
    for dim, size in enumerate(narrowed):
        ids = ids.narrow(dim, 0, size)
    return ids.reshape(result).expand(shape)


def _matching_dims(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Group the dimensions of two shapes, in order, into the smallest groups that hold as many elements in either."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        mine, theirs = [], []
        size = other = 1
        while True:
            if size <= other and i < len(old):
                size *= old[i]
                mine.append(i)
                i += 1
            elif j < len(new):
                other *= new[j]
                theirs.append(j)
                j += 1
            else:
                break
            if size == other and mine and theirs:
                break
        groups.append((mine, theirs))
    return groups


def narrow(ids: Tensor) -> Tensor:
    """Drop the copies that broadcasting made."""
    for dim in range(ids.ndim):
        ids = _narrow_along(ids, dim)
    return ids


def _narrow_along(ids: Tensor, dim: int) -> Tensor:
    return ids.narrow(dim, 0, 1) if ids.shape[dim] > 1 and ids.stride(dim) == 0 else ids


def compact(ids: Tensor) -> Tensor:
    """Drop the copies that are written out along whole dimensions, and those that broadcasting made."""
    ids = narrow(ids)
    for dim in range(ids.ndim):
        if ids.shape[dim] > 1:
            first = ids.narrow(dim, 0, 1)
            # Most of what differs differs already in the second element.
            if torch.equal(first, ids.narrow(dim, 1, 1)) and bool((ids == first).all()):
                ids = first
    return ids
