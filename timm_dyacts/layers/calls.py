"""Operators for a place in a network that is called several times in one forward pass.

A block that calls its only activation after each convolution gives way to one operator for each call.

Version 0.1 put a single operator in such a place, or none if the calls differ in their numbers of channels. Its state
dicts load (see ``update_entries``).
"""
import copy
import logging
from typing import Any

from torch import Tensor, nn

from ..ops.compat import before_loading
from .dyrelu import DyReLU

__all__ = ['ByWidth', 'InTurn', 'accept_old_entries', 'log_completed', 'places_left_plain', 'update_entries']

_logger = logging.getLogger(__name__)


class InTurn(nn.Sequential):
    """One operator for each call. The caller says which call it is: nothing is remembered from one call to the next.

    Shape:
        - Input: what the operator of the call takes.
        - Output: what it gives.

    Args:
        *operators: The operators in the order of the calls.

    Raises:
        ValueError: On forward, if there is no operator for the call.
    """

    def expand_entries(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Give each operator the entries of a checkpoint from when a single one served all calls, in place.

        Args:
            state_dict: The checkpoint.
            prefix: What the names of its entries for this module begin with.
        """
        for key in [key for key in state_dict if key.startswith(prefix)]:
            name = key.removeprefix(prefix)
            if not name.partition('.')[0].isdigit():
                value = state_dict.pop(key)
                state_dict.update({f'{prefix}{i}.{name}': value for i in range(len(self))})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.expand_entries(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor, turn: int = -1) -> Tensor:
        for i, operator in enumerate(self):
            if i == turn:
                return operator(x)
        raise ValueError(
            f'turn must be the number of a call that there is an operator for, got {turn}: this module is called in '
            'another way, or more often, than when it was put in')


class ByWidth(nn.ModuleDict):
    """One operator for each number of channels.

    Shape:
        - Input: what the operators take, with a number of channels that there is an operator for.
        - Output: what the operator for it gives.

    Args:
        operators: The operators, by the number of channels.
        channel_dim: Dimension of the channels.

    Raises:
        ValueError: On forward, if there is no operator for the number of channels.
    """

    def __init__(self, operators: dict[int, nn.Module], channel_dim: int = 1) -> None:
        super().__init__({str(width): operator for width, operator in operators.items()})
        self.channel_dim = channel_dim

    def forward(self, x: Tensor) -> Tensor:
        for width, operator in self.items():
            if x.shape[self.channel_dim] == int(width):
                return operator(x)
        raise ValueError(f'x must have a number of channels of those seen before, got the shape {x.shape}')

    def extra_repr(self) -> str:
        return f'channel_dim={self.channel_dim}'


# State dicts of version 0.1


def update_entries(model: nn.Module, state_dict: dict[str, Any], prefix: str = '') -> list[str]:
    """Bring a state dict of version 0.1 into the form of today, in place. Any other one stays as it is.

    Each operator of an ``InTurn`` gets the entries of the one that served all calls. Where version 0.1 left the plain
    activation, since the calls differ in their numbers of channels or not all of them are replaced, a Dynamic ReLU gets
    those that it starts with, and is this activation. A state dict that holds some of these entries is not of 0.1: it
    gets none.

    Args:
        model: The model that is to load it.
        state_dict: The state dict.
        prefix: What the names of its entries for this model begin with.

    Returns:
        The places where version 0.1 had no operator and the state dict no entry.
    """
    for name, module in model.named_modules(prefix=prefix.removesuffix('.')):
        if isinstance(module, InTurn):
            module.expand_entries(state_dict, f'{name}.')
    places = places_left_plain(model, prefix)
    inside = tuple(f'{name}.' for name in places)
    if not inside or any(key.startswith(inside) for key in state_dict):
        return []
    for name, place in places.items():
        fresh = copy.deepcopy(place)
        if any(parameter.is_meta for parameter in fresh.parameters()):
            fresh.to_empty(device='cpu')
        for operator in _operators_in(fresh):
            operator.reset_parameters()
        state_dict.update(fresh.state_dict(prefix=f'{name}.'))
    return list(places)


def places_left_plain(model: nn.Module, prefix: str = '') -> dict[str, nn.Module]:
    """Give the places that version 0.1 had no operator in, by name; none if it had none in the whole model."""
    places: dict[str, nn.Module] = {}
    for name, module in model.named_modules(prefix=prefix.removesuffix('.')):
        inner = name.startswith(tuple(f'{place}.' for place in places))
        if isinstance(module, (ByWidth, InTurn)) and not inner and _was_left_plain(module):
            places[name] = module
    covered = {operator for place in places.values() for operator in _operators_in(place)}
    return places if covered < {*_operators_in(model)} else {}


def _was_left_plain(place: nn.Module) -> bool:
    operators = _operators_in(place)
    others = {*place.parameters(), *place.buffers()} - {p for operator in operators for p in operator.parameters()}
    if not operators or others:
        return False
    one_for_all = len(operators) == len(place) and len({operator.channels for operator in operators}) == 1
    return isinstance(place, ByWidth) or not one_for_all


def _operators_in(module: nn.Module) -> list[DyReLU]:
    return [operator for operator in module.modules() if isinstance(operator, DyReLU)]


def accept_old_entries(model: nn.Module) -> None:
    """Make a model load state dicts of version 0.1, also with ``strict=True``."""
    before_loading(model, _update_before_loading)


def _update_before_loading(model: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    updated = dict(state_dict)
    places = update_entries(model, updated, prefix)
    # A state dict that lacks other parameters, too, is one of a part of the model, and leaves the rest as it is.
    if places and all(f'{prefix}{name}' in updated for name, _ in model.named_parameters()):
        state_dict.update(updated)
        log_completed([place.removeprefix(prefix) for place in places])


def log_completed(places: list[str]) -> None:
    """Say in the log what ``update_entries`` added to a state dict that is loaded."""
    _logger.warning(
        'The checkpoint is one of version 0.1, which left the activation of %d places such as %r as it was. The '
        'Dynamic ReLU that is there now starts as that activation.', len(places), places[0])
