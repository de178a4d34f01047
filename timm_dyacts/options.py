"""Options, declared once: Python, the command line and YAML read the same frozen dataclass.

A class of options is a frozen dataclass that derives from ``Options``, and each field of it is made by ``option``::

    @dataclass(frozen=True, kw_only=True)
    class Config(Options):
        lr: float = option(1e-3, above=0, group='Optimizer', metavar='LR', help='learning rate')

The annotation says what a value may be (``int``, ``float``, ``str``, ``bool``, a tuple of them, a mapping, ``None``),
``option`` the range and what the help says. The name on the command line is that of the field with dashes.
"""
import argparse
import functools
import math
import numbers
import os
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import yaml
from timm.utils import ParseKwargs

from .privacy import reduced
from .suggest import close_names

__all__ = [
    'Declaration',
    'KeyValues',
    'Option',
    'Options',
    'add_arguments',
    'declarations',
    'option',
    'plain',
    'published',
    'read_yaml',
    'to_dict',
]

# What an integer is at most that has no range of its own: more is no count of anything, and does not fit a tensor
_LARGEST = 2 ** 31 - 1
_NOUNS = {
    bool: ('True or False', 'values that are True or False'),
    int: ('an integer', 'integers'),
    float: ('a finite number', 'finite numbers'),
    str: ('text', 'texts'),
}


@dataclass(frozen=True)
class Option:
    """What an option accepts beyond its type, and what its help says.

    Attributes:
        help: What it does.
        group: Heading in the help.
        metavar: What stands for the value in the help.
        unset: What happens where the default is ``None``, for the help.
        choices: The accepted values, all if empty.
        aliases: Other spellings of accepted values.
        minimum: Smallest accepted number.
        above: A number that is too small by a hair.
        maximum: Largest accepted number.
        below: A number that is too large by a hair.
        ascending: Several numbers must not decrease.
        flags: Further spellings on the command line.
        const: The value of the option given without one, where that is possible.
        positional: It has no name on the command line.
        private: It means nothing elsewhere, such as a folder to write to, and is not published.
    """
    help: str = ''
    group: str = ''
    metavar: str | None = None
    unset: str = ''
    choices: Sequence[str] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None
    ascending: bool = False
    flags: Sequence[str] = ()
    const: str | None = None
    positional: bool = False
    private: bool = False

    def accepts_number(self, value: float) -> bool:
        """Say whether a number is finite and in the range."""
        return (
            (value <= _LARGEST or self.has_upper_end if isinstance(value, int) else math.isfinite(value))
            and (self.minimum is None or value >= self.minimum)
            and (self.above is None or value > self.above)
            and (self.maximum is None or value <= self.maximum)
            and (self.below is None or value < self.below)
        )

    @property
    def has_upper_end(self) -> bool:
        """Whether the range says how large a number may be."""
        return self.maximum is not None or self.below is not None

    @property
    def range(self) -> str:
        """The range in words, such as ``'of at least 0 and below 1'``; empty if there is none."""
        if self.minimum is not None and self.maximum is not None:
            return f'from {self.minimum} to {self.maximum}'
        bounds = (
            ('of at least', self.minimum), ('above', self.above), ('of at most', self.maximum), ('below', self.below))
        return ' and '.join(f'{words} {bound}' for words, bound in bounds if bound is not None)


def option(default: Any = MISSING, **metadata: Any) -> Any:
    """Make a dataclass field for an option.

    Args:
        default: Its default. An option without one must be given.
        **metadata: The attributes of ``Option``.
    """
    kwargs = dict(default_factory=dict) if isinstance(default, dict) else dict(default=default)
    return field(**kwargs, metadata=dict(option=Option(**metadata)))


@dataclass(frozen=True)
class Declaration:
    """An option with its name and its type.

    Attributes:
        name: Name of the field.
        option: What was declared.
        types: The types of a value, or of each of several values.
        count: Number of values: ``None`` for one value that is no tuple, ``...`` for any number.
        optional: Whether ``None`` is accepted.
        default: The default, ``dataclasses.MISSING`` if there is none.
    """
    name: str
    option: Option
    types: tuple[type, ...]
    count: Any
    optional: bool
    default: Any

    @property
    def flag(self) -> str:
        """The spelling on the command line."""
        return self.name if self.option.positional else f'--{self.name.replace("_", "-")}'

    @property
    def title(self) -> str:
        """Both spellings, for messages."""
        return self.name if self.option.positional else f'{self.name} ({self.flag})'

    @property
    def accepted(self) -> str:
        """What is accepted, for messages."""
        one, several = _NOUNS.get(self.types[0], ('a mapping of names to values',) * 2)
        noun = one if self.count is None else several if self.count is ... else f'{self.count} {several}'
        if self.option.choices:
            noun = f'one of {", ".join(self.option.choices)}'
        text = ' '.join(filter(None, (noun, self.option.range)))
        text += ', in ascending order' if self.option.ascending else ''
        return f'{text}, or None' if self.optional else text

    def check(self, value: Any) -> Any:
        """Check a value, and convert it to the type that was declared.

        Integers are taken for numbers, sequences for tuples, one value for several, and paths for text.

        Raises:
            ValueError: The type, the number of values, the range or the choice is not what was declared.
        """
        if value is None and self.optional:
            return None
        try:
            return self._check_one(value) if self.count is None else self._check_several(value)
        except ValueError:
            got = list(value) if isinstance(value, tuple) else value
            hint = close_names(value, self.option.choices) if self.option.choices else ''
            accepted = self.accepted
            if int in self.types and not self.option.has_upper_end and _is_large(value):
                accepted = f'{accepted}, and of at most {_LARGEST}'
            raise ValueError(f'{self.title} must be {accepted}, got {_quote(got)}.{hint}') from None

    def _check_several(self, value: Any) -> tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            value = (value,)
        values = tuple(map(self._check_one, value))
        if self.count not in (..., len(values)) or self.option.ascending and list(values) != sorted(values):
            raise ValueError
        return values

    def _check_one(self, value: Any) -> Any:
        if isinstance(value, str):
            value = self.option.aliases.get(value, value)
        converted = next((c for t in self.types if (c := _convert(value, t)) is not None), None)
        if converted is None:
            raise ValueError
        if isinstance(converted, (int, float)) and not self.option.accepts_number(converted):
            raise ValueError
        if self.option.choices and converted not in self.option.choices:
            raise ValueError
        return converted

    def parse(self, value: Any) -> Any:
        """Check a value from YAML, which leaves ``1e-3`` a text and makes a name like ``2024`` a number."""
        if isinstance(value, list):
            value = [self._parse_one(item) for item in value]
        return self.check(self._parse_one(value))

    def _parse_one(self, value: Any) -> Any:
        if isinstance(value, str) and str not in self.types:
            for number in (int, float):
                if number in self.types:
                    try:
                        return number(value)
                    except ValueError:
                        break
        if self.types == (str,) and isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return value


def _is_large(value: Any) -> bool:
    values = value if isinstance(value, (list, tuple)) else (value,)
    return any(isinstance(item, int) and item > _LARGEST for item in values)


def _quote(value: Any) -> str:
    """Write a value as a message has it, also an integer of more digits than Python writes."""
    try:
        return repr(value)
    except ValueError:
        return 'an integer of thousands of digits'


def _convert(value: Any, wanted: type) -> Any:
    """Give a value as a type, ``None`` if it is of another one."""
    if wanted is bool or isinstance(value, bool):
        return value if wanted is bool and isinstance(value, bool) else None
    if wanted is int:
        return int(value) if isinstance(value, numbers.Integral) else None
    if wanted is float:
        try:
            return float(value) if isinstance(value, numbers.Real) else None
        except OverflowError:
            return math.inf
    if wanted is str:
        return os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    return dict(value) if isinstance(value, Mapping) else None


@functools.cache
def declarations(cls: type) -> dict[str, Declaration]:
    """Give the options of a class by name, in the order of their declaration."""
    annotations = typing.get_type_hints(cls)
    result = {}
    for f in fields(cls):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        types_, count, optional = _read_annotation(annotations[f.name])
        result[f.name] = Declaration(f.name, f.metadata['option'], types_, count, optional, default)
    return result


def _read_annotation(annotation: Any) -> tuple[tuple[type, ...], Any, bool]:
    """Take an annotation apart: the types of a value, the number of values, and whether ``None`` is accepted."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    members = typing.get_args(annotation) if union else (annotation,)
    kinds = tuple(member for member in members if member is not type(None))
    optional = len(kinds) < len(members)
    if typing.get_origin(kinds[0]) is not tuple:
        return tuple(typing.get_origin(kind) or kind for kind in kinds), None, optional
    items = typing.get_args(kinds[0])
    return items[:1], ... if items[-1] is ... else len(items), optional


class Options:
    """Base of the classes of options: each value is checked as the object is made, also by ``dataclasses.replace``."""

    _given: frozenset[str]

    def __new__(cls, **kwargs: Any) -> 'Options':
        unknown = next((name for name in kwargs if name not in declarations(cls)), None)
        if unknown is not None:
            raise TypeError(f'unknown option {unknown!r}.{close_names(unknown, declarations(cls))}')
        self = super().__new__(cls)
        object.__setattr__(self, '_given', frozenset(kwargs))  # and all others may be filled in
        return self

    def __post_init__(self) -> None:
        declared = declarations(type(self))
        self._set({name: declared[name].check(getattr(self, name)) for name in declared})
        self._set({name: declared[name].check(value) for name, value in self.implied().items()})
        self.check()

    def _set(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def is_given(self, name: str) -> bool:
        """Say whether a value was given, be it the default."""
        return name in self._given

    def implied(self) -> dict[str, Any]:
        """Give the values that follow from others. A subclass adds to those of its bases."""
        return {}

    @classmethod
    def translate(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Give the options of a file in the words of this class; a subclass may know other words."""
        return dict(values)

    def check(self) -> None:
        """Raise ``ValueError`` for values that do not fit each other. A subclass adds to what its bases check."""


def to_dict(options: Options) -> dict[str, Any]:
    """Give the options as values that YAML and JSON have: a list for a tuple."""
    return {name: plain(getattr(options, name)) for name in declarations(type(options))}


def plain(value: Any) -> Any:
    """Give a value as YAML and JSON have it, with lists for tuples."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def published(values: Mapping[str, Any], cls: type[Options]) -> dict[str, Any]:
    """Give the options that others may see: neither private nor unknown, and without the folders of this machine."""
    declared = declarations(cls)
    return {
        name: reduced(value) for name, value in values.items()
        if name in declared and not declared[name].option.private}


def read_yaml(path: str | os.PathLike[str], cls: type[Options]) -> dict[str, Any]:
    """Read options from a YAML file, one ``option: value`` per line.

    Raises:
        ValueError: The file cannot be read, or an option in it is unknown or out of range. The message names the file.
    """
    try:
        with open(path, encoding='utf-8') as file:
            values = yaml.safe_load(file) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise ValueError(f'--config must be a readable YAML file: {e}') from e
    if not isinstance(values, dict):
        raise ValueError(f'--config must hold one "option: value" per line, got {os.fspath(path)}')
    declared = declarations(cls)
    parsed = {}
    try:
        for name, value in cls.translate(values).items():
            if name not in declared:
                raise ValueError(f'unknown option {name!r}.{close_names(name, declared)}')
            parsed[name] = declared[name].parse(value)
    except ValueError as e:
        raise ValueError(f'{os.fspath(path)}: {e}') from None
    return parsed


def add_arguments(parser: argparse.ArgumentParser, cls: type[Options], exclude: Collection[str] = ()) -> None:
    """Add the options of a class to a parser, which then gives those, and only those, that the command line has.

    Args:
        parser: The parser.
        cls: The class.
        exclude: Names of options that are left out.
    """
    groups: dict[str, Any] = {'': parser}
    for declaration in declarations(cls).values():
        if declaration.name in exclude:
            continue
        group = declaration.option.group
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        _add_argument(groups[group], declaration)


class KeyValues(ParseKwargs):
    """timm's ``ParseKwargs``, with an error of the parser where an equals sign or the key is missing."""

    def __call__(
            self,
            parser: argparse.ArgumentParser,
            namespace: argparse.Namespace,
            values: Any,
            option_string: str | None = None,
    ) -> None:
        try:
            wrong = next((value for value in values if not re.match('[^=]+=', value)), None)
            if wrong is None:
                return super().__call__(parser, namespace, values, option_string)
        except (MemoryError, RecursionError, ValueError):  # a value that Python's own parser gives up on
            wrong = ' '.join(values)
        parser.error(f'argument {option_string}: must be KEY=VALUE, got {wrong!r}')


def _add_argument(group: Any, declaration: Declaration) -> None:
    declared = declaration.option
    kwargs: dict[str, Any] = dict(help=_help(declaration))
    if declaration.types == (bool,):
        kwargs['action'] = 'store_true'
    else:
        kwargs['metavar'] = declared.metavar
        kwargs['choices'] = declared.choices or None
        if issubclass(declaration.types[0], Mapping):
            kwargs.update(nargs='*', action=KeyValues)
        else:
            kwargs['type'] = str if str in declaration.types else declaration.types[0]
        if declared.aliases:
            kwargs['type'] = lambda text: declared.aliases.get(text, text)
        if declaration.count is not None:
            kwargs['nargs'] = '+' if declaration.count is ... else declaration.count
        elif declared.const is not None:
            kwargs.update(nargs='?', const=declared.const)
    if declared.positional:
        group.add_argument(declaration.name, **kwargs)
        return
    flags = sorted((declaration.flag, *declared.flags), key=lambda flag: flag.startswith('--'))  # the short ones first
    group.add_argument(
        *flags,
        dest=declaration.name,
        default=argparse.SUPPRESS,
        required=declaration.default is MISSING,
        **kwargs,
    )


def _help(declaration: Declaration) -> str:
    """Give the help of an option, with its default."""
    default, declared = declaration.default, declaration.option
    if default is MISSING or default is False or not default and not isinstance(default, (int, float)):
        value = declared.unset
    else:
        value = ' '.join(f'{v:.3g}' for v in default) if isinstance(default, tuple) else f'{default}'
    if not value:
        text = declared.help
    else:
        text = f'{declared.help} (default: {value})' if declared.help else f'default: {value}'
    return text.replace('%', '%%')
