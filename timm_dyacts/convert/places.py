"""The places of activations and pools: a module for each, so that each can be replaced by itself.

What ``convert`` replaces is what is called at a place, a module's attribute or a line of its code. Where places and
modules are not the same, the model is first put into a form in which they are:

* A module that several places share becomes one for each, a copy with the same parameters.
* A place that is called several times in one pass of a method, as the only ReLU of a residual block is, gets a module
  for each call (``InTurn``), where the new operator has parameters. The method says which call it is.
* A function that a method calls becomes a module.

The last two rewrite the method (see ``rewrite``). What no operator has taken the place of in the end is undone, down to
the class of the module and the one instance for several places.
"""
import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from timm.layers import create_act_layer
from torch import nn

from ..layers import BipolarMaxPool2d
from ..layers.calls import InTurn
from ..operators import activation_types
from .arguments import Request
from .edits import Edits
from .functions import as_module, reason_to_keep
from .report import ConversionReport, Skip
from .rewrite import Rewrite, can_count, other_calls, rewritten_class
from .sites import Site
from .trace import SITED, Op, Trace, trace_forward

__all__ = ['MAX_POOLS', 'Places']

MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, BipolarMaxPool2d)


@dataclass
class _Stand:
    """Modules that stand at a place until an operator takes the place of them.

    Attributes:
        parent: The module that has the place.
        name: Name of the place.
        modules: The modules, one for each call where there are several.
        original: The module that was there; ``None`` where there was a function call.
        rewrites: The calls that are rewritten for it.
        function: Name of the function that was called.
    """
    parent: nn.Module
    name: str
    modules: list[nn.Module]
    original: nn.Module | None = None
    rewrites: list[Rewrite] = field(default_factory=list)
    function: str = ''

    def replaced(self) -> list[bool]:
        """Tell of each module whether it has been replaced."""
        now = self.parent._modules.get(self.name)
        return [child is not module for child, module in zip(self._inside(now), self.modules, strict=True)]

    def _inside(self, module: nn.Module) -> list[nn.Module]:
        return list(module) if isinstance(module, InTurn) and len(self.modules) > 1 else [module]


class Places:
    """The places of a model, prepared for what is asked of ``convert``.

    Args:
        edits: How the model is changed.
        trace: Record of a forward pass of the model.
        request: What is asked for.

    Attributes:
        trace: Record of a forward pass of the model as it is when the places are prepared.
    """

    def __init__(self, edits: Edits, trace: Trace, request: Request) -> None:
        self.trace = trace
        self._edits = edits
        self._request = request
        self._classes: dict[nn.Module, type[nn.Module]] = {}
        with_pools = request.pool is not None or request.has_signs
        self._types = (activation_types() if request.act else ()) + (MAX_POOLS if with_pools else ())
        self._functions = {
            name for name in SITED if (with_pools if name.startswith('max_pool') else request.act is not None)}
        shared = self._split()
        if shared:
            self.trace = trace_forward(edits.model, trace.given)
        turns, functions = self._find_calls_in_turn(), self._find_functions()
        self._stands = shared
        if turns or functions:
            self._put_in([*turns, *functions])
            self.trace = trace_forward(edits.model, trace.given)

    def tidy(self, report: ConversionReport) -> None:
        """Take back what no operator has taken the place of, and write the report in terms of the model as it was.

        Args:
            report: The report of what was replaced.
        """
        names = {module: name for name, module in self._edits.model.named_modules()}
        rewrites: list[Rewrite] = []
        several = 0
        for stand in reversed(self._stands):
            path = '.'.join(filter(None, (names[stand.parent], stand.name)))
            if any(stand.replaced()):
                rewrites += stand.rewrites
                several += len(stand.modules) > 1
                if stand.function:
                    _rename(report, path, path, f'{stand.function}()')
                continue
            if stand.original is None:
                self._edits.delete_child(stand.parent, stand.name)
                _rename(report, path, names[stand.parent], stand.function)
            else:
                self._edits.set_attribute(stand.parent, stand.name, stand.original)
                _rename(report, path, path)
        for owner, cls in self._classes.items():
            own = [rewrite for rewrite in rewrites if rewrite.site.owner is owner]
            self._edits.set_class(owner, rewritten_class(cls, own) if own else cls)
        if several:
            report.notes.append(
                f'called several times in one pass of their block, so that each call has got an operator: {several}')

    # Shared modules

    def _split(self) -> list[_Stand]:
        """Give each place of a shared module a copy of its own."""
        places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
        inside: set[nn.Module] = set()
        for parent in self._edits.model.modules():
            if isinstance(parent, self._types):
                inside.update(parent.modules())
            for name, child in parent._modules.items():
                if isinstance(child, self._types) and parent not in inside:
                    places.setdefault(child, []).append((parent, name))
        stands = [
            _Stand(parent, name, [_copy(module)], module)
            for module, found in places.items() if len(found) > 1 for parent, name in found
        ]
        for stand in stands:
            self._edits.set_attribute(stand.parent, stand.name, stand.modules[0])
        return stands

    # Places that are called several times

    def _find_calls_in_turn(self) -> list[_Stand]:
        parents = {
            child: (parent, name) for parent in self._edits.model.modules() for name, child in parent._modules.items()}
        callees: dict[tuple, set[nn.Module]] = {}
        for call in self.trace.calls:
            callees.setdefault(call.site.key, set()).add(call.module)
        stands = []
        for module, calls in self.trace.calls_by_module.items():
            if len(calls) < 2 or not isinstance(module, self._types) or not self._has_parameters(module) \
                    or module not in parents or isinstance(parents[module][0], self._types):
                continue
            sites = [call.site for call in calls]
            if any(
                    site.owner not in self.trace.names or site.reason or site.callee is not module
                    or len(callees[site.key]) > 1 for site in sites):
                continue
            rewrites, n = _number([sites], None)
            if rewrites is None or n < 2:
                continue
            # Calls that only training makes get what is there now.
            idle = [site for first in rewrites for site in other_calls(first.site, [r.site for r in rewrites])]
            rewrites += [Rewrite(site, None, n) for site in {(site.method, site.end): site for site in idle}.values()]
            copies = [_copy(module) for _ in range(n + bool(idle))]
            stands.append(_Stand(*parents[module], copies, module, rewrites))
        return stands

    def _has_parameters(self, module: nn.Module | None) -> bool:
        """Whether what takes the place of an activation has parameters."""
        if self._request.act is None or isinstance(module, MAX_POOLS):
            return False
        if self._request.has_width:
            return True
        if self._request.act == 'bipolar':
            return next(module.parameters(), None) is not None
        return next(create_act_layer(self._request.act).parameters(), None) is not None

    # Functions

    def _find_functions(self) -> list[_Stand]:
        trace = self.trace
        inside = {
            index for module, calls in trace.calls_by_module.items() if isinstance(module, self._types)
            for call in calls for index in call.span}
        groups: dict[tuple, list[Op]] = {}
        wanted = set()
        for index, op in enumerate(trace.ops):
            if op.name in self._functions and index not in inside and op.site.owner in trace.names \
                    and reason_to_keep(op) is None:
                groups.setdefault(op.site.key, []).append(op)
                if index in trace.main_path:
                    wanted.add(op.site.key)
        stands: list[_Stand] = []
        # In the order of the code, for names that do not depend on what ran
        for ops in sorted((groups[key] for key in wanted), key=lambda ops: (
                ops[0].site.method.co_name, ops[0].site.end)):
            module = as_module(ops[0])
            if any(repr(as_module(op)) != repr(module) for op in ops):
                continue
            rewrites, n = _number([[op.site for op in ops]], '')
            if rewrites is None or not self._has_parameters(module):
                rewrites, n = [Rewrite(ops[0].site, '')], 1
            function = 'max_pool1d' if isinstance(module, nn.MaxPool1d) else ops[0].name.removesuffix('_with_indices')
            modules = [copy.copy(module) if i else module for i in range(n)]
            stands.append(_Stand(ops[0].site.owner, '', modules, None, rewrites, function))
        _give_names(stands)
        return stands

    def _put_in(self, stands: Sequence[_Stand]) -> None:
        for stand in stands:
            for module in stand.modules:
                module.train(stand.parent.training if stand.original is None else stand.original.training)
            new = stand.modules[0] if len(stand.modules) == 1 else InTurn(*stand.modules)
            new.training = stand.modules[0].training
            self._edits.set_attribute(stand.parent, stand.name, new)
            for rewrite in stand.rewrites:
                self._classes.setdefault(rewrite.site.owner, type(rewrite.site.owner))
        self._stands = [*self._stands, *stands]
        rewrites = [rewrite for stand in stands for rewrite in stand.rewrites]
        for owner, cls in self._classes.items():
            own = [rewrite for rewrite in rewrites if rewrite.site.owner is owner]
            self._edits.set_class(owner, rewritten_class(cls, own))


def _number(groups: Iterable[Sequence[Site]], child: str | None) -> tuple[list[Rewrite] | None, int]:
    """Number the calls of a place. Give the rewrites and how many calls there are, ``None`` if that is not fixed."""
    rewrites: list[Rewrite] = []
    n = 0
    for sites in groups:
        by_key: dict[tuple, list[Site]] = {}
        for site in sites:
            by_key.setdefault(site.key, []).append(site)
        for same in by_key.values():
            counts = {1}
            if same[0].is_in_loop:
                counts = set(Counter(site.run for site in same).values())
                if len(counts) > 1 or any(site.run is None for site in same) or not can_count(same[0]):
                    return None, 0
            rewrites.append(Rewrite(same[0], child, n, counts != {1}))
            n += counts.pop()
    if n == 1:
        rewrites = [rewrite._replace(turn=None, counts=False) for rewrite in rewrites]
    return rewrites, n


def _give_names(stands: Sequence[_Stand]) -> None:
    """Name the modules that stand for functions: ``relu``, or ``relu_1`` and so on where there are several."""
    def kind(stand: _Stand) -> tuple[nn.Module, str]:
        return stand.parent, stand.function

    number = Counter(kind(stand) for stand in stands)
    taken: set[tuple[nn.Module, str]] = set()
    for stand in stands:
        names = [stand.function] if number[kind(stand)] == 1 else []
        names += [f'{stand.function}_{i}' for i in range(1, len(stands) + 100)]
        stand.name = next(
            name for name in names if (stand.parent, name) not in taken and not hasattr(stand.parent, name))
        taken.add((stand.parent, stand.name))
        stand.rewrites = [rewrite._replace(child=stand.name) for rewrite in stand.rewrites]


def _copy(module: nn.Module) -> nn.Module:
    """Copy a module, but not its parameters, buffers and children."""
    new = copy.copy(module)
    for name, value in vars(new).items():
        if isinstance(value, dict):  # parameters, buffers, children, hooks: tables of its own
            vars(new)[name] = copy.copy(value)
    return new


def _rename(report: ConversionReport, path: str, name: str, kind: str | None = None) -> None:
    """Let what is said of a module, or of those for each of its calls, be said of something else."""
    def is_it(found: str) -> bool:
        return found == path or found.rpartition('.')[0] == path and found.rpartition('.')[2].isdecimal()

    report.replaced[:] = [replace(r, old=kind) if kind and is_it(r.name) else r for r in report.replaced]
    skipped = (
        Skip(name, kind or s.kind, s.reason) if is_it(s.name) and (name != path or not kind) else s
        for s in report.skipped)
    report.skipped[:] = dict.fromkeys(skipped)
