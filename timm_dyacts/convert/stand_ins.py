"""Tensors without elements in the place of those that a forward pass computes.

A record of the pass has to tell tensors apart, and knows their shapes. It reads no element of what depends on the
weights, and if it held all of them, a large network would not fit into memory.
"""
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from .leaves import map_tensors, tensors_in

__all__ = ['SpreadMeta', 'StandIns']


class SpreadMeta(TorchDispatchMode):
    """Compute without values whatever reads a meta tensor: a model with weights can be given one, and computes nothing.
    """

    def __torch_dispatch__(
            self,
            func: Callable[..., Any],
            types: Sequence[type],
            args: tuple[Any, ...] = (),
            kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if any(t.is_meta for t in tensors_in((args, kwargs))):
            args, kwargs = map_tensors(_without_values, (args, kwargs))
        return func(*args, **kwargs)


class StandIns:
    """Meta tensors, one for each tensor of floating-point numbers that was computed, for as long as that one lives.

    Whole numbers and truth values, which may be indices, stand for themselves, and so does all that was not computed.
    """

    def __init__(self) -> None:
        self._known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def of(self, tree: Any) -> Any:
        """Put stand-ins into nested tuples, lists and dictionaries of tensors."""
        return tree_map_only(Tensor, lambda t: self._known.get(t, t), tree)

    def add(self, computed: Iterable[Tensor], inputs: Iterable[Tensor]) -> None:
        """Make stand-ins for the results of an operator.

        Args:
            computed: The results. What has a stand-in keeps it, unless its shape has changed in place.
            inputs: What the operator was given: a result that is one of these was changed in place.
        """
        given = {id(tensor) for tensor in inputs}
        for tensor in computed:
            known = self._known.get(tensor)
            is_new = known.shape != tensor.shape if known is not None else id(tensor) not in given
            has_elements = tensor.is_floating_point() or tensor.is_complex()
            if is_new and has_elements and type(tensor) is Tensor and tensor.layout == torch.strided \
                    and not tensor.is_meta:
                self._known[tensor] = _without_values(tensor)

    def back(self, tensors: Iterable[Tensor]) -> dict[int, Tensor]:
        """Give those tensors that have a stand-in, by the ``id`` of that."""
        return {id(self._known[t]): t for t in tensors if t in self._known}


def _without_values(t: Tensor) -> Tensor:
    return t if t.is_meta else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device='meta')
