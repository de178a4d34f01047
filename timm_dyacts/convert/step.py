"""One step of a conversion: a model as it is, what it was seen to do, and what is done to it."""
import inspect
from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import Transition
from .edits import Edits, has_own
from .functions import reason_to_keep
from .report import ConversionError, ConversionReport, Replacement, Skip
from .trace import Trace

__all__ = ['Step']


class Step:
    """What the parts of one step share.

    Args:
        trace: Record of a forward pass of the model as it is.
        edits: How the model is changed.

    Attributes:
        report: What was done.
        already: Whether what is asked for is there already, so that a step that replaces nothing is not an error.
        output_signs: The +-1 tensor that each tensor of the output is now multiplied by, ``None`` for no change.
    """

    def __init__(self, trace: Trace, edits: Edits) -> None:
        self.trace = trace
        self.edits = edits
        self.model: nn.Module = edits.model
        self.report: ConversionReport = ConversionReport()
        self.already = False
        self.output_signs: list[Tensor | None] | None = None

    @property
    def like(self) -> Tensor:
        """A tensor with the device and dtype of the model."""
        return next((p for p in self.model.parameters() if p.is_floating_point()), torch.empty(0))

    def find(
            self,
            is_candidate: Callable[[nn.Module], bool],
            functions: Container[str] = (),
    ) -> list[nn.Module]:
        """Find modules that run and are not part of another one; what cannot be replaced goes into the report.

        Args:
            is_candidate: Tells whether a module is looked for.
            functions: Names of the operators that the modules call. Elsewhere, they are function calls in a model's own
                code.
        """
        found: list[nn.Module] = []
        covered: set[nn.Module] = set()
        for module in self.model.modules():
            if module in covered or not is_candidate(module):
                continue
            covered.update(module.modules())
            if module is self.model:
                continue
            if self.trace.calls_of(module):
                found.append(module)
            else:
                self.skip(module, 'not called in a forward pass in eval mode')
        inside = {index for module in found for call in self.trace.calls_of(module) for index in call.span}
        for index in sorted(self.trace.main_path - inside):
            op = self.trace.ops[index]
            if op.name in functions:
                if op.site.owner is not None and op.site.owner not in self.trace.names:
                    reason = 'called by a module that is not part of the model'
                else:
                    reason = reason_to_keep(op) or 'a function call, not a module: its arguments differ between calls'
                self.report.skipped.append(Skip(op.module, op.name, reason))
        return found

    def replace(self, old: nn.Module, new: nn.Module, exact: bool, old_kind: str | None = None) -> None:
        """Put a module in the place of another one.

        Args:
            old: What is there.
            new: What takes its place; a ``Transition`` is exact, and the report names what it leads to.
            exact: Whether ``new``, as it starts, computes what ``old`` does.
            old_kind: What the report calls ``old``. Default: its class.
        """
        names = self.trace.names[old]
        notes = _notes_on(old)
        for module in (new, new.new) if isinstance(new, Transition) else (new,):
            for name, value in notes.items():
                in_class = getattr(type(module), name, None) is not getattr(type(old), name, None)
                if in_class or has_own(module, name):
                    raise ConversionError(
                        f"'{names[0]}' cannot become a {type(module).__name__}, which has a {name!r} of its own: on "
                        f'the {type(old).__name__} that is there, the model has noted {name} = {value!r}.')
                setattr(module, name, value)
        self.edits.replace(names, new.train(old.training))
        transition = isinstance(new, Transition) and not exact
        exact = exact or transition
        kind = type(new.new if isinstance(new, Transition) else new).__name__
        self.report.replaced.append(Replacement(names[0], old_kind or type(old).__name__, kind, exact, transition))
        if not exact:
            self.report.function = 'approximate'

    def skip(self, module: nn.Module, reason: str) -> None:
        """Note that a module is left alone."""
        self.report.skipped.append(Skip(self.trace.name(module), type(module).__name__, reason))


def _notes_on(module: nn.Module) -> dict[str, Any]:
    """Give the attributes of a module that no method of its class names: what a network has noted on it.

    Those of ultralytics note on each layer where its input comes from.
    """
    own = {'training'}
    for cls in type(module).__mro__[:type(module).__mro__.index(nn.Module)]:
        for function in map(inspect.unwrap, filter(inspect.isroutine, vars(cls).values())):
            own.update(getattr(getattr(function, '__code__', None), 'co_names', ()))
    return {name: value for name, value in vars(module).items() if name not in own and not name.startswith('_')}
