"""Methods of single modules, rewritten: a call expression in them calls another module than before.

A module whose method is rewritten gets a subclass of its own class, with nothing in it but the new method, which is
ordinary Python code. Everything else of the method runs as before: its branches on ``self.training`` or on data, its
loops, what it reads of the module. That is why the source is rewritten and not a graph that ``torch.fx`` has traced:
a graph holds what one input has led to, once and for all. A ``TorchFunctionMode`` around ``forward`` would
count calls of a function without knowing which is which, and slow down each operator inside.

``isinstance``, state dicts, hooks, copies, pickles (the class is made anew from the source that they carry),
``torch.compile``, export, TorchScript and replicas for several devices work as for any module: there is no state that
one call leaves for the next.
"""
import ast
import copy
import linecache
import zlib
from collections.abc import Iterable
from functools import cache
from types import CellType, FunctionType
from typing import Any, NamedTuple

from torch import nn

from .sites import Site
from .source import GENERATED, compile_method, find_method, method_tree

__all__ = ['Rewrite', 'can_count', 'has_result', 'other_calls', 'rewritten_class']

_Sources = tuple[tuple[str, str], ...]


class Rewrite(NamedTuple):
    """A call expression, and what it is to be.

    Attributes:
        site: The call.
        child: Name of the child of the owner that is called instead of a function, ``None`` to call what is called now.
        turn: Number of the call, which is passed on as a second argument, ``None`` to pass on nothing.
        counts: Whether the number goes up by one with each call while the method runs, for a call in a loop.
    """
    site: Site
    child: str | None
    turn: int | None = None
    counts: bool = False


def rewritten_class(cls: type[nn.Module], rewrites: Iterable[Rewrite]) -> type[nn.Module]:
    """Give the class that a module gets.

    Args:
        cls: Its class now, which may be one that was given before.
        rewrites: What changes in its methods.
    """
    base, sources = getattr(cls, '_rewritten', (cls, ()))
    sources = dict(sources)
    by_method: dict[str, list[Rewrite]] = {}
    for rewrite in rewrites:
        by_method.setdefault(rewrite.site.method.co_name, []).append(rewrite)
    for name, edits in by_method.items():
        sources[name] = _rewrite(copy.deepcopy(_tree(edits[0].site)), edits)
    return _subclass(base, tuple(sorted(sources.items())))


def can_count(site: Site) -> bool:
    """Tell whether the calls of a site can be counted: each run of its statement is one call."""
    return _statement_of(_tree(site), site.end) is not None


def has_result(site: Site) -> bool:
    """Tell whether anything is done with what a call gives."""
    return not any(isinstance(node, ast.Expr) and node.value is site.call for node in ast.walk(_tree(site)))


def other_calls(site: Site, sites: Iterable[Site]) -> list[Site]:
    """Give the calls in the same method that read like the call of a site, and are not among the sites."""
    function, seen = ast.dump(site.call.func), {s.end for s in sites if s.method is site.method}
    found = []
    for node in ast.walk(_tree(site)):
        if isinstance(node, ast.Call) and ast.dump(node.func) == function:
            if (node.end_lineno, node.end_col_offset) not in seen:
                other = copy.copy(site)
                other.call = node
                found.append(other)
    return found


# The source


def _tree(site: Site) -> ast.FunctionDef:
    return method_tree(site.method)


class _Rewriter(ast.NodeTransformer):
    def __init__(self, rewrites: dict[tuple[int, int], Rewrite], counters: dict[tuple[int, int], str]) -> None:
        self.rewrites = rewrites
        self.counters = counters

    def visit_Call(self, node: ast.Call) -> ast.Call:
        end = node.end_lineno, node.end_col_offset
        self.generic_visit(node)
        rewrite = self.rewrites.get(end)
        if rewrite is None:
            return node
        arguments, keywords = node.args, node.keywords
        if rewrite.child is not None:
            node.func, arguments, keywords = _module_call(node, rewrite)
        if rewrite.turn is not None:
            turn = ast.Name(self.counters[end], ast.Load()) if end in self.counters else ast.Constant(rewrite.turn)
            keywords = [*keywords, ast.keyword('turn', turn)]
        return ast.Call(node.func, arguments, keywords)


def _module_call(node: ast.Call, rewrite: Rewrite) -> tuple[ast.expr, list[ast.expr], list[ast.keyword]]:
    """Give a function call's parts as those of a call of a child: only the input of the function stays."""
    if rewrite.site.tensor_method:
        argument = node.func.value
    else:
        argument = node.args[0] if node.args else next(k.value for k in node.keywords if k.arg == 'input')
    func = ast.Attribute(ast.Name(rewrite.site.method.co_varnames[0], ast.Load()), rewrite.child, ast.Load())
    return func, [argument], []


def _rewrite(tree: ast.FunctionDef, rewrites: Iterable[Rewrite]) -> str:
    by_end = {rewrite.site.end: rewrite for rewrite in rewrites}
    counted = sorted(end for end, rewrite in by_end.items() if rewrite.counts)
    counters = {end: f'turn_{i}_' for i, end in enumerate(counted)}
    places = {end: _statement_of(tree, end) for end in counted}
    tree = _Rewriter(by_end, counters).visit(tree)
    for end, (body, statement) in places.items():
        body.insert(body.index(statement), _assign(counters[end], '{} + 1'))
    first = 1 if ast.get_docstring(tree, clean=False) is not None else 0
    tree.body[first:first] = [_assign(name, str(by_end[end].turn - 1)) for end, name in counters.items()]
    tree.decorator_list = []
    return ast.unparse(ast.fix_missing_locations(tree)) + '\n'


def _assign(name: str, value: str) -> ast.stmt:
    return ast.parse(f'{name} = {value.format(name)}').body[0]


def _statement_of(tree: ast.FunctionDef, end: tuple[int, int]) -> tuple[list[ast.stmt], ast.stmt] | None:
    """Find the statement that makes a call exactly once when it runs, and the list of statements that holds it."""
    for node in ast.walk(tree):
        if node is not tree and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        for field in ('body', 'orelse', 'finalbody'):
            body = getattr(node, field, None)
            for statement in body if isinstance(body, list) else ():
                if isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Return)) \
                        and _calls_once(statement, end):
                    return body, statement
    return None


def _calls_once(node: ast.AST, end: tuple[int, int]) -> bool:
    if isinstance(node, ast.Call) and (node.end_lineno, node.end_col_offset) == end:
        return True
    conditional = (
        ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.IfExp, ast.BoolOp, ast.Compare)
    if isinstance(node, conditional):
        return False
    return any(_calls_once(child, end) for child in ast.iter_child_nodes(node))


# The class


@cache
def _subclass(base: type[nn.Module], sources: _Sources) -> type[nn.Module]:
    """Make the subclass with other methods, once for all modules of a class that are rewritten alike."""
    methods = {name: _method(base, name, text) for name, text in sources}
    return type(base)(base.__name__, (base,), methods | dict(
        __module__=base.__module__,
        __qualname__=base.__qualname__,
        __doc__=base.__doc__,
        __reduce_ex__=_reduce,
        _rewritten=(base, sources),
    ))


def _method(base: type[nn.Module], name: str, text: str) -> FunctionType:
    old = find_method(base, name)
    filename = f'{GENERATED}{old.__module__}.{old.__qualname__} {zlib.crc32(text.encode()):08x}>'
    # As for the code that ``torch.fx`` generates: tracebacks and TorchScript read it from here.
    linecache.cache[filename] = (len(text), None, text.splitlines(True), filename)
    code = compile_method(ast.parse(text).body[0], old.__code__, filename)
    cells: dict[str, CellType] = dict(zip(old.__code__.co_freevars, old.__closure__ or (), strict=True))
    closure = tuple(cells[free] for free in code.co_freevars)
    new = FunctionType(code, old.__globals__, name, old.__defaults__, closure)
    new.__kwdefaults__ = old.__kwdefaults__
    for attribute in ('__module__', '__qualname__', '__doc__', '__annotations__'):
        setattr(new, attribute, getattr(old, attribute))
    vars(new).update({key: value for key, value in vars(old).items() if key != '__wrapped__'})
    return new


def _reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    state = self.__getstate__() if hasattr(self, '__getstate__') else vars(self)
    return _restore, type(self)._rewritten, state


def _restore(base: type[nn.Module], sources: _Sources) -> nn.Module:
    cls = _subclass(base, sources)
    return cls.__new__(cls)
