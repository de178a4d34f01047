"""The unknown signs of tensors: one number of an unknown for each element, where most elements share theirs."""
import math

import torch
from torch import Tensor

from .unknowns import ANY, PLUS, Unknowns

__all__ = ['Contradiction', 'TensorSigns', 'narrow', 'reshape']

_STRIDE = 2 ** 31


class Contradiction(Exception):
    """Two signs would have to be equal that are known to be opposite."""


class TensorSigns:
    """The unknowns of the elements of each tensor.

    Attributes:
        unknowns: The unknowns.
        ids: The number of an unknown for each element of a tensor, by the ``id`` of the tensor. It is like the tensor;
            copies that broadcasting made take no memory. A tensor that is not there has +1 everywhere.
    """

    def __init__(self) -> None:
        self.unknowns = Unknowns()
        self.ids: dict[int, Tensor] = {}

    def get(self, tensor: Tensor) -> Tensor:
        """Give the unknowns of a tensor."""
        ids = self.ids.get(id(tensor))
        return torch.tensor(PLUS).expand(tensor.shape) if ids is None else ids

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

    def known(self, tensor: Tensor) -> Tensor | None:
        """Give the signs of a tensor if all of them are settled already."""
        ids = narrow(self.get(tensor))
        unknowns, positions = torch.unique(ids, return_inverse=True)
        found = [(PLUS, 1) if i == ANY else self.unknowns.find(i) for i in unknowns.tolist()]
        if any(root != PLUS for root, _ in found):
            return None
        return torch.tensor([sign for _, sign in found])[positions]

    def tie(self, a: Tensor, b: Tensor, reason: str) -> None:
        """Make the unknowns ``a`` and ``b``, broadcast together, equal.

        Raises:
            Contradiction: With the reason, if two of them are known to be opposite.
        """
        a, b = torch.broadcast_tensors(narrow(a), narrow(b))
        open_ = (a != ANY) & (b != ANY) & (a != b)
        pairs = torch.unique(a[open_] * _STRIDE + b[open_])  # both in one number: sorted much faster than rows
        for pair in pairs.tolist():
            i = (pair + _STRIDE // 2) // _STRIDE
            if not self.unknowns.tie(i, pair - i * _STRIDE):
                raise Contradiction(reason)

    def tie_to_plus(self, tensor: Tensor, reason: str) -> None:
        """Make the signs of a tensor +1, if they are not already."""
        if self.has(tensor):
            self.tie(self.ids[id(tensor)], torch.tensor(PLUS), reason)

    def channels(self, tensor: Tensor, dim: int) -> Tensor:
        """Give one unknown for each index along a dimension, after tying the elements that share it."""
        ids = self.get(tensor).movedim(dim, 0).flatten(1) if tensor.ndim > 1 else self.get(tensor)[:, None]
        distinct = narrow(ids) if tensor.numel() else ids
        first = distinct.abs().argmax(1, keepdim=True)  # not a padded zero
        vector = distinct.gather(1, first)
        self.tie(distinct, vector, 'one channel holds elements of different signs')
        return vector[:, 0].expand(ids.shape[0])

    def set_channels(self, tensor: Tensor, vector: Tensor, dim: int) -> None:
        """Set the unknowns of a tensor to one for each index along a dimension."""
        shape = [1] * tensor.ndim
        shape[dim] = -1
        self.set(tensor, vector.view(shape).expand(tensor.shape))

    def planes(self, tensor: Tensor) -> Tensor:
        """Give one unknown for each plane of an (N, C, *spatial) tensor, after tying the elements of each plane."""
        ids = narrow(self.get(tensor).flatten(2))
        first = ids.gather(2, ids.abs().argmax(2, keepdim=True))
        self.tie(ids, first, 'one plane holds elements of different signs')
        return first.squeeze(2).expand(tensor.shape[:2])

    def set_planes(self, tensor: Tensor, planes: Tensor) -> None:
        """Set the unknowns of a tensor to one for each of its planes."""
        self.set(tensor, planes.view(*planes.shape, *[1] * (tensor.ndim - 2)).expand(tensor.shape))


def reshape(ids: Tensor, shape: torch.Size) -> Tensor:
    """Reshape without writing out what broadcasting repeats along the first dimensions, or after the second."""
    distinct = narrow(ids)
    if ids.ndim and len(shape) > 1 and ids.shape[:2] == shape[:2] \
            and distinct.numel() == distinct.shape[min(1, ids.ndim - 1)]:
        return distinct.view([1, -1] + [1] * (len(shape) - 2)).expand(shape)
    first = next((i for i, size in enumerate(distinct.shape) if size > 1), ids.ndim)
    block = math.prod(ids.shape[first:])  # as many last elements make up all of it
    for i in range(len(shape), -1, -1):
        if math.prod(shape[i:]) == block:
            return ids[(0,) * first].reshape(shape[i:]).expand(shape)
    return ids.reshape(shape)


def narrow(ids: Tensor) -> Tensor:
    """Drop the copies that broadcasting made."""
    for dim, (size, stride) in enumerate(zip(ids.shape, ids.stride(), strict=True)):
        if size > 1 and stride == 0:
            ids = ids.narrow(dim, 0, 1)
    return ids
