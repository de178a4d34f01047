"""The arguments of ``convert``: what each accepts, what it needs beside it, and its default."""
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from timm.layers import get_act_layer

from ..operators import OPERATORS
from ..ops.checks import check_choice
from .inputs import as_inputs

__all__ = ['PLACES', 'Request', 'accepted_arguments']

# Arguments of modules that follow from the place that the module takes, or from another argument of ``convert``
_DECIDED = frozenset({'channel_dim', 'channels', 'device', 'dtype', 'f', 'layout', 'mode', 'self'})

# What ``where`` may be besides a wildcard
PLACES = ('inner', 'all', 'late')


@dataclass(frozen=True)
class Request:
    """What is asked of ``convert``; the attributes are its arguments.

    Raises:
        ValueError: If one of them is not accepted, or cannot have an effect.
    """
    act: str | None = None
    pool: str | None = None
    norm: str | None = None
    where: str | None = None
    layout: str | None = None
    start: str | None = None
    act_kwargs: Mapping[str, Any] | None = None
    pool_kwargs: Mapping[str, Any] | None = None
    input_size: Sequence[int] | None = None
    transition: bool = False
    example_inputs: Any = None

    # What holds where nothing was asked for
    DEFAULTS = dict(where='inner', layout='interleaved', start='relu')

    def __post_init__(self) -> None:
        pools = [name for name, operator in OPERATORS.items() if operator.replaces == 'pool']
        check_choice('pool', self.pool, (None, *pools))
        check_choice('norm', self.norm, (None, 'none'))
        for name, choices in (('layout', ('interleaved', 'halves')), ('start', ('relu', 'fit'))):
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name), choices)
        _check_where(self.where)
        if self.act is None and self.pool is None and self.norm is None:
            raise ValueError('Nothing to do: act, pool and norm are all None.')
        if not isinstance(self.transition, bool):
            raise ValueError(f'transition must be True or False, got {self.transition!r}.')
        if self.transition and self.act is None and self.pool is None:
            raise ValueError('transition must be left out without act and pool, where it has no effect, got True.')
        if self.act is not None and not isinstance(self.act, str):
            raise ValueError(
                f'act must be the name of an activation, e.g. one of {", ".join(OPERATORS)}, got {self.act!r}.')
        if self.example_inputs is not None:
            if self.input_size is not None:
                raise ValueError(
                    f'input_size must be left out where example_inputs are given, got {self.input_size!r}.')
            as_inputs(self.example_inputs)
        module = None if self.act is None else _activation_class(self.act)
        self._check_options()
        _check_kwargs('act', self.act, self.act_kwargs, module)
        _check_kwargs('pool', self.pool, self.pool_kwargs, OPERATORS[self.pool].module if self.pool else None)

    @property
    def has_width(self) -> bool:
        """Whether the activation asked for is made for a number of channels."""
        return self.act in OPERATORS and OPERATORS[self.act].has_width

    @property
    def has_signs(self) -> bool:
        """Whether the activation asked for has a sign for each channel."""
        return self.act in OPERATORS and 'layout' in OPERATORS[self.act].options

    def option(self, name: str) -> str:
        """Give ``where``, ``layout`` or ``start``, or its default."""
        value = getattr(self, name)
        if value is None and name == 'start' and self.transition:
            return 'fit'  # no jump to avoid, and the shorter way
        return self.DEFAULTS[name] if value is None else value

    def _check_options(self) -> None:
        asked = OPERATORS.get(self.act)
        for name in self.DEFAULTS:
            value = getattr(self, name)
            if value is not None and (asked is None or name not in asked.options):
                meant_for = ', '.join(repr(o.name) for o in OPERATORS.values() if name in o.options)
                raise ValueError(
                    f'{name} must be left out for act={self.act!r}, where it has no effect, got {value!r}. '
                    f'It is for act={meant_for}.')


def _check_where(where: str | None) -> None:
    if where is not None and where not in PLACES and not (isinstance(where, str) and set(where) & set('*?[.')):
        raise ValueError(
            f'where must be one of {", ".join(map(repr, PLACES))}, or a wildcard for paths of activations such as '
            f"'layer4.*', got {where!r}")


def accepted_arguments(module: Callable[..., Any]) -> list[str]:
    """Give the arguments that ``act_kwargs`` or ``pool_kwargs`` may hold for a module.

    Args:
        module: A class, or a function that makes modules. What a class passes on as ``**kwargs`` is followed along its
            bases.
    """
    makers = [cls.__init__ for cls in module.__mro__] if isinstance(module, type) else [module]
    names: list[str] = []
    for maker in makers:
        parameters = inspect.signature(maker).parameters.values()
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        names += [p.name for p in parameters if p.kind in named and p.name not in (*_DECIDED, *names)]
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            break
    return names


def _activation_class(act: str) -> Callable[..., Any]:
    try:
        return get_act_layer(act)
    except KeyError as e:
        raise ValueError(f'act: {e}') from None


def _check_kwargs(
        name: str,
        value: str | None,
        kwargs: Mapping[str, Any] | None,
        module: Callable[..., Any] | None,
) -> None:
    if not kwargs:
        return
    if module is None:
        raise ValueError(f'{name}_kwargs must be left out without {name}, got {dict(kwargs)!r}.')
    accepted = accepted_arguments(module)
    unknown = [key for key in kwargs if key not in accepted]
    if unknown:
        known = f'its arguments are {", ".join(accepted)}' if accepted else 'it has no arguments'
        raise ValueError(
            f'{name}_kwargs must hold arguments of {name}={value!r}, got {", ".join(map(repr, unknown))}; {known}.')
