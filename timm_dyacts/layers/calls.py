"""Operators for a place in a network that is called several times in one forward pass.

A block that calls its only activation after each convolution gives way to one operator for each call.
"""
from typing import Any

from torch import Tensor, nn

__all__ = ['ByWidth', 'InTurn']


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
