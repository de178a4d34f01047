"""Signs that are not known yet, and what is known of two of them: that they are equal, or opposite."""
import torch
from torch import Tensor

__all__ = ['ANY', 'PLUS', 'Unknowns']

PLUS = 1  # the unknown that is known to be +1
ANY = 0  # the sign of a zero, which has every sign

_MAX_HOPS = 4  # of a search, before all paths are shortened


class Unknowns:
    """Signs as a union-find with parity, for many unknowns at a time. Unknown ``-i`` is the opposite of unknown ``i``.

    The smallest of the unknowns that are tied together represents them: which one that is does not depend on the order
    of the ties, and ``PLUS`` is the smallest of all.
    """

    def __init__(self) -> None:
        self._parent = torch.tensor([ANY, PLUS])  # an unknown that each one equals, negative where it is the opposite
        self._count = 2

    def new(self, count: int) -> Tensor:
        """Add unknowns.

        Args:
            count: How many.

        Returns:
            Their numbers, int64 of shape (count,).
        """
        first, self._count = self._count, self._count + count
        if self._count > len(self._parent):
            parent = torch.arange(2 * self._count)
            parent[:first] = self._parent[:first]
            self._parent = parent
        return torch.arange(first, self._count)

    def distinct(self, ids: Tensor) -> Tensor:
        """Give each of some unknowns once, without sorting them all."""
        seen = torch.zeros(2 * self._count + 1, dtype=torch.bool)
        seen[ids + self._count] = True
        return seen.nonzero().flatten() - self._count

    def find(self, ids: Tensor | int) -> Tensor:
        """Give the representatives of unknowns, ``PLUS`` or ``-PLUS`` where the sign is known.

        Args:
            ids: Numbers of unknowns.

        Returns:
            For each one its representative, or minus that where it is the opposite. int64 like ``ids``.
        """
        ids = torch.as_tensor(ids)
        roots = ids
        for _ in range(_MAX_HOPS):
            before, roots = roots, self._follow(roots)
            if torch.equal(before, roots):
                break
        else:
            self._shorten_paths()
            roots = self._follow(roots)
        self._parent[ids.abs()] = roots * ids.sign()
        return roots

    def tie(self, a: Tensor | int, b: Tensor | int, skip_opposites: bool = False) -> bool:
        """Make ``a = b``.

        Args:
            a: Numbers of unknowns, of any shape. None is ``ANY``.
            b: As many.
            skip_opposites: Tie what can be tied, and leave pairs alone that are known to be opposite.

        Returns:
            Whether no pair was known to be opposite, or was so because of the others. What has been tied stays tied.
        """
        a, b = torch.as_tensor(a).flatten(), torch.as_tensor(b).flatten()
        fits = True
        while True:
            a, b = self.find(a), self.find(b)
            if bool((a == -b).any()):
                fits = False
                if not skip_opposites:
                    return False
            is_open = a.abs() != b.abs()
            if not bool(is_open.any()):
                return fits
            a, b = a[is_open], b[is_open]
            larger, smaller = torch.where(a.abs() > b.abs(), a, b), torch.where(a.abs() > b.abs(), b, a)
            # Where one is to get several parents, it gets one of them; the others are for the next round.
            self._parent[larger.abs()] = smaller * larger.sign()

    def signs(self, ids: Tensor) -> Tensor:
        """Give the solved signs, int8 like ``ids``. An unknown that nothing fixes is +1."""
        return torch.where(ids == ANY, 1, self.find(ids).sign()).to(torch.int8)

    def _follow(self, ids: Tensor) -> Tensor:
        return self._parent[ids.abs()] * ids.sign()

    def _shorten_paths(self) -> None:
        while True:
            shorter = self._follow(self._parent)
            if torch.equal(shorter, self._parent):
                return
            self._parent = shorter
