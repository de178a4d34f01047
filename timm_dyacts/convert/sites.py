"""Where in the code of a model something is called: in which method, of which module, by which call expression."""
import ast
import dis
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import CodeType, FrameType
from typing import Any

from torch import Tensor, nn

from .source import find_method, method_tree

__all__ = ['Site', 'find_site']

_COMPREHENSIONS = ('<listcomp>', '<setcomp>', '<dictcomp>', '<genexpr>')

_LOOPS = (
    ast.For, ast.AsyncFor, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda,
    ast.FunctionDef, ast.AsyncFunctionDef)

# What is compiled to code of its own
_OTHER_CODE = (
    ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda, ast.FunctionDef, ast.AsyncFunctionDef,
    ast.ClassDef)


@dataclass(eq=False)
class Site:
    """A call in the code of a model. What it says is worked out when it is asked for.

    Attributes:
        owner: The module whose method calls, ``None`` if it is no method of one.
        method: The code of the method.
        code: The code that calls: that of the method, or of a comprehension in it.
        variables: The global variables of the method.
        at: Index of the instruction that calls.
        line: Its line.
        run: The call of the owner, where the method is its ``forward``, ``None`` where it is another one,
            of whose runs there may be several in one call.
    """
    owner: nn.Module | None
    method: CodeType
    code: CodeType
    variables: dict[str, Any]
    at: int
    line: int
    run: Any

    @property
    def key(self) -> tuple[int, int, int]:
        """What all calls from this place in the code of this module have in common."""
        return id(self.owner), id(self.code), self.at

    @cached_property
    def reason(self) -> str | None:
        """Why the method cannot be rewritten, ``None`` if it can."""
        method = None if self.owner is None else find_method(type(self.owner), self.method.co_name)
        if method is None:
            return 'it is not in a method of a module'
        if method.__code__ is not self.method:
            return f'{self.method.co_name} is decorated, or that of a base class'
        tree = method_tree(self.method)
        if isinstance(tree, str):
            return f'{self.method.co_name} cannot be rewritten: {tree}'
        return 'its line holds several calls that cannot be told apart' if self.call is None else None

    @cached_property
    def call(self) -> ast.Call | None:
        """The call expression, ``None`` if it cannot be told."""
        return _find_call(method_tree(self.method), self.code, self.at, self.line)

    @cached_property
    def is_in_loop(self) -> bool:
        """Whether one run of the method may call more than once from here."""
        method = method_tree(self.method)
        loops = (node for node in ast.walk(method) if isinstance(node, _LOOPS) and node is not method)
        return any(node is self.call for loop in loops for node in ast.walk(loop))

    @property
    def end(self) -> tuple[int, int]:
        """Line and column where the call expression ends: no other one of the method ends there."""
        return self.call.end_lineno, self.call.end_col_offset

    @cached_property
    def callee(self) -> Any:
        """What is called, e.g. what ``self.act`` or ``F.relu`` stands for.

        ``None`` for other expressions, and for variables, which may stand for something else the next time.
        """
        first, *rest = _chain(self.call.func)
        if first == self.method.co_varnames[0]:
            value = self.owner
        else:
            is_variable = first in (*self.code.co_varnames, *self.code.co_cellvars, *self.code.co_freevars)
            value = None if is_variable else self.variables.get(first)
        for name in rest:
            value = getattr(value, name, None)
        return value

    @property
    def tensor_method(self) -> str | None:
        """The name of the method of a tensor that is called without arguments, as in ``x.relu()``."""
        function = self.call.func
        is_one = isinstance(function, ast.Attribute) and not self.call.args and not self.call.keywords \
            and (self.callee is None or isinstance(getattr(self.callee, '__self__', None), Tensor))
        return function.attr if is_one else None


def find_site(running: nn.Module | None, run: Any) -> Site:
    """Find the call in a model's code that has led to the caller of this function.

    No frame is kept, since the tensors in its variables could not be freed.

    Args:
        running: The innermost module that is called.
        run: Its call, which is told from others by its identity.
    """
    inner = sys._getframe(1)
    while inner.f_back is not None and _is_between(inner.f_globals.get('__name__', '')):
        inner = inner.f_back
    frame = inner
    while frame.f_back is not None and frame.f_code.co_name in _COMPREHENSIONS:
        frame = frame.f_back
    owner, method = _owner_of(frame), frame.f_code
    is_run = owner is running and method.co_name == 'forward'
    return Site(owner, method, inner.f_code, inner.f_globals, inner.f_lasti, inner.f_lineno, run if is_run else None)


def _owner_of(frame: FrameType) -> nn.Module | None:
    """Give the module that a frame runs a method of."""
    method = frame.f_code
    variables = frame.f_locals
    owner = variables.get(method.co_varnames[0]) if method.co_argcount else None
    if method.co_flags & inspect.CO_OPTIMIZED and isinstance(variables, dict):
        variables.clear()  # before Python 3.13 a copy, which the frame would keep
    return owner if isinstance(owner, nn.Module) else None


def _is_between(name: str) -> bool:
    """Whether the frames of a Python module lie between a call in a model's code and what is called."""
    is_layer = name.startswith('torch.nn.modules.') and name != 'torch.nn.modules.module'
    return name.startswith('torch.') and not is_layer or name == f'{__package__}.trace'


def _find_call(tree: ast.FunctionDef, code: CodeType, at: int, line: int) -> ast.Call | None:
    """Find the call expression of an instruction."""
    ends = _ends(code)
    end = ends[at // 2] if ends else (None, None)
    if None in end:  # Python 3.10, or one that was started without positions: the line has to do
        return _find_call_by_line(tree, code, at, line)
    calls = [
        node for node in ast.walk(tree)
        if isinstance(node, ast.Call) and (node.end_lineno, node.end_col_offset) == end]
    return calls[0] if len(calls) == 1 else None


def _find_call_by_line(tree: ast.FunctionDef, code: CodeType, at: int, line: int) -> ast.Call | None:
    """Find the call expression of an instruction by its line and, if that has several, by their order."""
    over = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.lineno <= line <= node.end_lineno]
    if len(over) == 1:
        return over[0]
    # Calls and instructions come in the same order, unless something is compiled twice or calls without saying so: a
    # context manager, a comprehension. There are then more instructions than calls.
    calls = [call for call in _in_order(tree) if call.lineno == line]
    places = _calls_on(code, line)
    nested = any(isinstance(node, _OTHER_CODE) and node.lineno <= line <= node.end_lineno
                 for node in ast.walk(tree) if node is not tree)
    if nested or code.co_name != tree.name or len(calls) != len(places) or at not in places:
        return None
    return calls[places.index(at)]


def _in_order(node: ast.AST) -> Iterator[ast.Call]:
    """Give the call expressions of a method in the order in which they are compiled."""
    first = [node.value] if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)) and node.value else []
    for child in [*first, *(child for child in ast.iter_child_nodes(node) if child not in first)]:
        yield from _in_order(child)
    if isinstance(node, ast.Call):
        yield node


@lru_cache(maxsize=1024)
def _calls_on(code: CodeType, line: int) -> list[int]:
    """Give the indices of the instructions on a line that call something."""
    found, current = [], None
    for instruction in dis.get_instructions(code):
        current = instruction.starts_line or current
        if current == line and instruction.opname.startswith('CALL_'):
            found.append(instruction.offset)
    return found


@lru_cache(maxsize=1024)
def _ends(code: CodeType) -> list[tuple[int | None, int | None]]:
    positions = code.co_positions() if hasattr(code, 'co_positions') else ()
    return [(end_line, end_column) for _, end_line, _, end_column in positions]


def _chain(node: ast.expr) -> Iterator[str | None]:
    """Give the names of ``a.b.c`` in turn, ``None`` for what is no name."""
    if isinstance(node, ast.Attribute):
        yield from _chain(node.value)
        yield node.attr
    else:
        yield node.id if isinstance(node, ast.Name) else None
