"""Signs that are not known yet, and what is known of two of them: that they are equal, or opposite."""
import torch
from torch import Tensor

__all__ = ['ANY', 'PLUS', 'Unknowns']

PLUS = 1  # the unknown that is known to be +1
ANY = 0  # the sign of a zero, which has every sign


class Unknowns:
    """Signs as a union-find with parity. Unknown ``-i`` is the opposite of unknown ``i``."""

    def __init__(self) -> None:
        self._parent = [ANY, PLUS]
        self._parity = [1, 1]

    def new(self, count: int) -> Tensor:
        """Add unknowns.

        Args:
            count: How many.

        Returns:
            Their numbers, int64 of shape (count,).
        """
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        self._parity.extend([1] * count)
        return torch.arange(first, first + count)

    def find(self, i: int) -> tuple[int, int]:
        """Give the representative of all unknowns that ``i`` is tied to, and the sign of ``i`` relative to it.

        The representative is ``PLUS`` where the sign is known.
        """
        sign, i, path = (1 if i > 0 else -1), abs(i), []
        while self._parent[i] != i:
            path.append(i)
            i = self._parent[i]
        parity = 1
        for node in reversed(path):  # compress
            parity *= self._parity[node]
            self._parent[node], self._parity[node] = i, parity
        return i, sign * parity

    def tie(self, a: int, b: int) -> bool:
        """Make ``a = b``. Return False if they are already known to be opposite."""
        (a, sign_a), (b, sign_b) = self.find(a), self.find(b)
        if a == b:
            return sign_a == sign_b
        if b == PLUS:  # keep the known sign at the root
            a, b = b, a
        self._parent[b], self._parity[b] = a, sign_a * sign_b
        return True

    def signs(self, ids: Tensor) -> Tensor:
        """Give the solved signs, int8 like ``ids``. An unknown that nothing fixes is +1."""
        flat = [1 if i == ANY else self.find(i)[1] for i in ids.flatten().tolist()]
        return torch.tensor(flat, dtype=torch.int8).view(ids.shape)
