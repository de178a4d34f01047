"""What ``convert`` says of its work, and how it gives up."""
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ['ConversionError', 'ConversionReport', 'OutputsDiffer', 'Replacement', 'Skip']


class ConversionError(ValueError):
    """The model cannot be converted as asked. It is as it was."""


@dataclass(frozen=True)
class Replacement:
    """One module that was replaced.

    Attributes:
        name: Its path in the model.
        old: Class name before.
        new: Class name now.
        exact: Whether the new module, as it starts, computes what the old one did.
        transition: Whether that is because a ``Transition`` leads from the old module to the new one.
    """
    name: str
    old: str
    new: str
    exact: bool
    transition: bool = False

    @property
    def kind(self) -> str:
        """What became what, e.g. ``'ReLU -> BReLU'`` or ``'SiLU -> DyReLUB (transition)'``."""
        return f'{self.old} -> {self.new}' + ' (transition)' * self.transition


@dataclass(frozen=True)
class Skip:
    """Something that looked like a candidate and was left alone.

    Attributes:
        name: Path of the module (of the caller, for a functional call).
        kind: Class or function name.
        reason: Why.
    """
    name: str
    kind: str
    reason: str


@dataclass
class ConversionReport:
    """What ``convert`` did.

    Attributes:
        replaced: The modules that were replaced.
        skipped: The candidates that were left alone, with the reason.
        function: ``'exact'`` if the network computes what it did before, up to rounding; ``'approximate'`` if not;
            ``'unchecked'`` if it should, but the output holds nothing that could be compared, or takes too long to
            compute. (No error: each step is exact by construction, and whether that suffices is for the caller to say.)
        max_diff: Largest absolute difference of an output element on the probe batch, of several output tensors in the
            one that moved most for its size. ``None`` if nothing was compared.
        scale: Largest absolute element of that tensor, to judge ``max_diff`` by.
        flipped_output: Whether channels of the output changed their sign, as where it ends in an activation: those
            of features, never logits.
        notes: Further remarks.
        new_keys: Entries of the state dict that the model did not have before.
    """
    replaced: list[Replacement] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    function: str = 'exact'
    max_diff: float | None = None
    scale: float | None = None
    flipped_output: bool = False
    notes: list[str] = field(default_factory=list)
    new_keys: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """How many modules of each kind were replaced, e.g. ``{'ReLU -> BReLU': 17}``."""
        return dict(Counter(r.kind for r in self.replaced))

    @property
    def transition_note(self) -> str:
        """The remark on what was asked for with ``transition=True``: how much of it starts in one."""
        count = sum(r.transition for r in self.replaced)
        if not count:
            return 'transition=True changes nothing: the start is exact without one'
        return (
            f'exact by transition: {count} of {len(self.replaced)}, at t = 0; set_transition(model, t) leads on to the '
            f'new operators, finish_transition(model) leaves them alone')

    def add(self, other: 'ConversionReport') -> None:
        """Take in the report of a step that followed; the comparison of outputs is left to the caller."""
        self.replaced += other.replaced
        self.skipped += other.skipped
        self.notes += [note for note in other.notes if note not in self.notes]
        self.flipped_output |= other.flipped_output
        if other.function != 'exact':
            self.function = other.function

    def leave_unchecked(self, reason: str) -> None:
        """Note why the outputs were not compared."""
        self.notes.append(reason)
        if self.function == 'exact':
            self.function = 'unchecked'

    def to_dict(self) -> dict[str, Any]:
        """Everything in JSON types."""
        return dict(asdict(self), counts=self.counts, new_keys=list(self.new_keys))

    def __str__(self) -> str:
        lines = [f'{count} x {kind}' for kind, count in self.counts.items()] or ['nothing replaced']
        function = f'function: {self.function}'
        if self.max_diff is not None:
            function += f' (largest difference {self.max_diff:.3g} at outputs up to {self.scale:.3g}, probe batch)'
        lines.append(function)
        lines += self.notes
        lines += [f'left alone: {s.name} ({s.kind}): {s.reason}' for s in self.skipped]
        return '\n'.join(lines)


class OutputsDiffer(ConversionError):
    """What should be exact by construction gave other outputs: an error in it, or amplified rounding.

    Args:
        max_diff: The largest difference.
        scale: The largest element of the output.
        counts: How many modules of each kind were replaced.
    """

    def __init__(self, max_diff: float, scale: float, counts: dict[str, int]) -> None:
        super().__init__(
            f'The converted model gives outputs that differ by {max_diff:.3g} from the original '
            f'(largest output {scale:.3g}), though every step should be exact. Nothing was changed. Steps: {counts}')
