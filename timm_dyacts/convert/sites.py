"""Where in the code of a model something is called: in which method, of which module, by which call expression."""
import ast
import sys
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any, NamedTuple

from torch import Tensor, nn

from .source import find_method, method_tree

__all__ = ['Site', 'Sites']

_COMPREHENSIONS = ('<listcomp>', '<setcomp>', '<dictcomp>', '<genexpr>')


class Site(NamedTuple):
    """A call in the code of a model.

    Attributes:
        owner: The module whose method calls, ``None`` if it is no method of one.
        method: Name of the method.
        call: The call expression.
        callee: What is called, ``None`` if that cannot be told without running code.
        invocation: Number of the call of the method among those that were seen.
        reason: Why the method cannot be rewritten, ``None`` if it can.
    """
    owner: nn.Module | None = None
    method: str = ''
    call: ast.Call | None = None
    callee: Any = None
    invocation: int = -1
    reason: str | None = None

    @property
    def end(self) -> tuple[int, int]:
        """Line and column where the call expression ends: no other one of the method ends there."""
        return self.call.end_lineno, self.call.end_col_offset

    @property
    def key(self) -> tuple[nn.Module | None, str, tuple[int, int]]:
        """What all calls from this place in the code have in common."""
        return self.owner, self.method, self.end

    @property
    def tensor_method(self) -> str | None:
        """The name of the method of a tensor that is called without arguments, as in ``x.relu()``."""
        function = self.call.func
        is_one = isinstance(function, ast.Attribute) and not self.call.args and not self.call.keywords \
            and (self.callee is None or isinstance(getattr(self.callee, '__self__', None), Tensor))
        return function.attr if is_one else None


class Sites:
    """Finds the sites of one forward pass.

    It keeps the frames of methods: as long as they are there, each has an ``id`` of its own.
    """

    def __init__(self) -> None:
        self._invocations: dict[int, tuple[int, FrameType]] = {}

    def find(self) -> Site:
        """Find the call in a model's code that has led to the caller of this function."""
        inner = sys._getframe(1)
        while inner is not None and _is_between(inner.f_globals.get('__name__', '')):
            inner = inner.f_back
        frame = inner
        while frame is not None and frame.f_code.co_name in _COMPREHENSIONS:
            frame = frame.f_back
        if frame is None:
            return Site(reason='it is not in a method of a module')
        code = frame.f_code
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        method = find_method(type(owner), code.co_name) if isinstance(owner, nn.Module) else None
        if method is None:
            return Site(reason='it is not in a method of a module')
        if method.__code__ is not code:
            return Site(reason=f'{code.co_name} is decorated, or that of a base class')
        tree = method_tree(code)
        if isinstance(tree, str):
            return Site(reason=f'{code.co_name} cannot be rewritten: {tree}')
        call = _find_call(tree, inner)
        if call is None:
            return Site(reason='its line holds several calls that cannot be told apart')
        number, _ = self._invocations.setdefault(id(frame), (len(self._invocations), frame))
        return Site(owner, code.co_name, call, _resolve(call.func, inner, code.co_varnames[0]), number)


def _is_between(name: str) -> bool:
    """Whether the frames of a Python module lie between a call in a model's code and what is called."""
    is_layer = name.startswith('torch.nn.modules.') and name != 'torch.nn.modules.module'
    return name.startswith('torch.') and not is_layer or name == f'{__package__}.trace'


def _find_call(tree: ast.FunctionDef, frame: FrameType) -> ast.Call | None:
    """Find the call expression that a frame is at."""
    ends = _ends(frame.f_code)
    end = ends[frame.f_lasti // 2] if ends else (None, None)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    if None in end:  # Python 3.10, or one that was started without positions: the line has to do
        calls = [call for call in calls if call.lineno <= frame.f_lineno <= call.end_lineno]
    else:
        calls = [call for call in calls if (call.end_lineno, call.end_col_offset) == end]
    return calls[0] if len(calls) == 1 else None


@lru_cache(maxsize=1024)
def _ends(code: CodeType) -> list[tuple[int | None, int | None]]:
    positions = code.co_positions() if hasattr(code, 'co_positions') else ()
    return [(end_line, end_column) for _, end_line, _, end_column in positions]


def _resolve(node: ast.expr, frame: FrameType, self_name: str) -> Any:
    """Give what an expression like ``self.act`` or ``F.relu`` stands for.

    Nothing is known of other expressions, and of variables, which may stand for something else the next time.
    """
    names = list(_chain(node))
    variables = (*frame.f_code.co_varnames, *frame.f_code.co_cellvars)
    if None in names or names[0] != self_name and names[0] in variables:
        return None
    scopes = (frame.f_locals, frame.f_globals)
    value = next((scope[names[0]] for scope in scopes if names[0] in scope), None)
    for name in names[1:]:
        value = getattr(value, name, None)
    return value


def _chain(node: ast.expr) -> Iterator[str | None]:
    """Give the names of ``a.b.c`` in turn, ``None`` for what is no name."""
    if isinstance(node, ast.Attribute):
        yield from _chain(node.value)
        yield node.attr
    else:
        yield node.id if isinstance(node, ast.Name) else None
