"""Changes of a model that can be taken back: whatever ``convert`` does to a model, it does through ``Edits``."""
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ['Edits', 'Snapshot', 'has_own']


class Edits:
    """Changes a model and keeps an undo log.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._log: list[Callable[[], Any]] = []

    def replace(self, names: Iterable[str], new: nn.Module) -> None:
        """Put a module in the place of another one.

        Args:
            names: The paths of the place, several for a shared module.
            new: The module to put there.
        """
        for name in names:
            parent, _, child = name.rpartition('.')
            self.set_attribute(self.model.get_submodule(parent), child, new)

    def set_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute of a module: a parameter, a child, or any other.

        A method of the class that is hidden in this way comes back when the change is taken back.
        """
        if has_own(module, name):
            self._log.append(_setter(module, name, getattr(module, name)))
        else:
            self._log.append(lambda: delattr(module, name))
        setattr(module, name, value)

    def set_class(self, module: nn.Module, cls: type[nn.Module]) -> None:
        """Give a module another class, one with the same attributes."""
        before = type(module)
        self._log.append(lambda: setattr(module, '__class__', before))
        module.__class__ = cls

    def delete_child(self, module: nn.Module, name: str) -> None:
        """Delete a child of a module."""
        self._log.append(_restorer(module._modules))  # the others keep their order
        del module._modules[name]

    def delete_attribute(self, module: nn.Module, name: str) -> None:
        """Delete an attribute that the module itself has, not only its class."""
        self._log.append(_setter(module, name, vars(module)[name]))
        delattr(module, name)

    def register_buffer(self, name: str, value: Tensor) -> None:
        """Register a buffer with the model itself."""
        self._log.append(lambda: delattr(self.model, name))
        self.model.register_buffer(name, value)

    def delete_buffer(self, name: str) -> None:
        """Delete a buffer of the model itself."""
        self._log.append(_restorer(self.model._buffers))  # the others keep their order
        del self.model._buffers[name]

    @torch.no_grad()
    def multiply(self, factors: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Multiply tensors in place, each with a factor of +-1: taken back, they are the same to the last bit."""
        for tensor, factor in factors:
            factor = factor.to(tensor.device)  # and left as small integers: the log keeps it
            self._log.append(lambda tensor=tensor, factor=factor: _multiply(tensor, factor))
            _multiply(tensor, factor)

    def mark(self) -> int:
        """Give a point to which ``undo`` can go back."""
        return len(self._log)

    def undo(self, mark: int = 0) -> None:
        """Take back the changes made since a mark, the last one first. Default: all of them."""
        while len(self._log) > mark:
            self._log.pop()()


class Snapshot:
    """What a forward pass may leave in a model: attributes, what lists and dictionaries hold, values of buffers.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._attributes = [(module, dict(vars(module))) for module in model.modules()]
        self._contents = [
            (value, copy.copy(value)) for _, attributes in self._attributes for value in attributes.values()
            if type(value) in (list, dict, set, OrderedDict)]
        self._buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back, and touch nothing that is as it was."""
        for module, attributes in self._attributes:
            now = vars(module)
            if now.keys() != attributes.keys() or any(now[name] is not value for name, value in attributes.items()):
                now.clear()
                now.update(attributes)
        for value, content in self._contents:
            if isinstance(value, list):
                value[:] = content
            else:
                value.clear()
                value.update(content)
        for buffer, before in self._buffers:
            if not torch.equal(buffer, before):
                buffer.copy_(before)


def has_own(module: nn.Module, name: str) -> bool:
    """Tell whether a module itself, not only its class, has something under a name."""
    return any(name in place for place in (vars(module), module._parameters, module._buffers, module._modules))


def _setter(module: nn.Module, name: str, value: Any) -> Callable[[], None]:
    return lambda: setattr(module, name, value)


def _restorer(table: dict[str, Any]) -> Callable[[], None]:
    before = dict(table)

    def restore() -> None:
        table.clear()
        table.update(before)

    return restore


@torch.no_grad()
def _multiply(tensor: Tensor, factor: Tensor) -> None:
    tensor.mul_(factor)
