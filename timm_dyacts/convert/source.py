"""Methods as source code: read, compiled again, and given the same surroundings."""
import ast
import linecache
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType, FunctionType

__all__ = ['GENERATED', 'compile_method', 'find_method', 'method_tree']

# How the names of files that are none begin: of methods that were written here
GENERATED = '<timm_dyacts: '

_FUTURE_FLAGS = 0x1FF0000  # of ``from __future__ import ...``, in the flags of a code object


def find_method(cls: type, name: str) -> FunctionType | None:
    """Give the function that a class has as a method, ``None`` if that is not a plain function."""
    function = next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)
    return function if isinstance(function, FunctionType) else None


def method_tree(code: CodeType) -> ast.FunctionDef | str:
    """Give the source of a method as a tree with the positions of its file, or say why there is none."""
    return _method_tree(code.co_filename, code)


@lru_cache(maxsize=1024)
def _method_tree(filename: str, code: CodeType) -> ast.FunctionDef | str:
    text = ''.join(linecache.getlines(filename))
    tree, compiled = _read_file(filename, text) if text else (None, None)
    if tree is None:
        return 'its source code is not there'
    # A file may have changed since it was imported, and what runs may have been changed on the way.
    if not filename.startswith(GENERATED) and not any(_is_same(found, code) for found in _codes_in(compiled)):
        return 'its source code is not what runs'
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
            if min([node.lineno, *(d.lineno for d in node.decorator_list)]) == code.co_firstlineno:
                return node
    return 'its source code is not there'


@lru_cache(maxsize=64)
def _read_file(filename: str, text: str) -> tuple[ast.Module, CodeType] | tuple[None, None]:
    try:
        return ast.parse(text, filename), compile(text, filename, 'exec', dont_inherit=True)
    except SyntaxError:
        return None, None


def compile_method(node: ast.FunctionDef, code: CodeType, filename: str) -> CodeType:
    """Compile a method in surroundings like those of another one: the same free variables and private names.

    Args:
        node: The method.
        code: What it takes the place of.
        filename: Where it is said to come from.
    """
    *_, class_name, _ = ['', *getattr(code, 'co_qualname', code.co_name).split('.')][-2:]
    bare = ast.FunctionDef(**{field: getattr(node, field, None) for field in node._fields})
    bare.decorator_list = []
    bare.returns = None
    ast.copy_location(bare, node)
    arguments = [ast.arg(name) for name in code.co_freevars if name != '__class__']
    cls = ast.ClassDef(class_name or 'Module', [], [], [bare], [])
    outer = ast.FunctionDef(
        '_surroundings_', ast.arguments([], arguments, None, [], [], None, []), [cls], [])
    if 'type_params' in cls._fields:  # Python 3.12
        cls.type_params, outer.type_params = [], []
    module = ast.fix_missing_locations(ast.Module([outer], []))
    flags = code.co_flags & _FUTURE_FLAGS
    compiled = compile(module, filename, 'exec', flags, dont_inherit=True)
    return next(found for found in _codes_in(compiled) if found.co_name == node.name)


def _codes_in(code: CodeType) -> Iterator[CodeType]:
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield const
            yield from _codes_in(const)


def _is_same(a: CodeType, b: CodeType) -> bool:
    names = ('co_name', 'co_firstlineno', 'co_code', 'co_names', 'co_varnames', 'co_freevars')
    if any(getattr(a, name) != getattr(b, name) for name in names) or len(a.co_consts) != len(b.co_consts):
        return False
    pairs = zip(a.co_consts, b.co_consts, strict=True)
    return all(_is_same(x, y) if isinstance(y, CodeType) else type(x) is type(y) and x == y for x, y in pairs)
