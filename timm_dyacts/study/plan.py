"""Which runs a comparison consists of.

A model is written as on the command line, ``[label=]model[:option=value,...]``::

    resnet18
    resnet18_dyrelu_b:act_kwargs.reduction=32
    slow=resnet18_dyrelu_b:lr=0.0003,epochs=20

or in a YAML file, one entry per label::

    resnet18: {}
    slow: {model: resnet18_dyrelu_b, lr: 0.0003, act_kwargs: {reduction: 32}}

An option of ``train`` changes the training; any other one goes to ``timm.create_model``.
"""
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

__all__ = ['Contender', 'Run', 'parse_contenders', 'plan_runs']

_SPEC = re.compile(
    r'(?:(?P<label>[\w.+-]+)=)?(?P<model>(?:(?:hf-hub|local-dir):)?[^:=]+)(?::(?P<overrides>[^:]+=.*))?')
# What a comparison itself decides
_OWN = frozenset({'model', 'seed', 'output', 'experiment', 'resume', 'config'})


@dataclass(frozen=True)
class Contender:
    """A model that takes part, and what it is trained with instead of what the others are.

    Attributes:
        label: Its name in tables, unique.
        model: The model.
        options: Options of ``train``.
        model_kwargs: Further arguments of ``timm.create_model``.
    """
    label: str
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        contender: What is trained.
        seed: The seed.
        folder: Its run folder.
    """
    contender: Contender
    seed: int
    folder: Path


def parse_contenders(specs: Sequence[str], train_options: Collection[str]) -> list[Contender]:
    """Read what ``--models`` gives: models as above, or YAML files of them.

    Args:
        specs: At least one.
        train_options: Names of the options of ``train``.

    Raises:
        ValueError: A model that cannot be read, a label that stands twice, or an option that a comparison sets itself.
        OSError: A file cannot be read.
    """
    contenders = []
    for spec in specs:
        if spec.endswith(('.yaml', '.yml')):
            contenders += _read_file(Path(spec), train_options)
        else:
            contenders.append(_parse(spec, train_options))
    labels = [contender.label for contender in contenders]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(
            f'models (--models) must have different labels, got {", ".join(twice)} more than once; give one with '
            f'label=model.')
    return contenders


def _read_file(path: Path, train_options: Collection[str]) -> list[Contender]:
    try:
        entries = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (ValueError, yaml.YAMLError) as e:
        raise ValueError(f'models (--models) {path} is not YAML: {e}') from None
    if not isinstance(entries, dict) or not all(isinstance(entry, (dict, type(None))) for entry in entries.values()):
        raise ValueError(f'models (--models) {path} must hold one entry per label, with options as its value.')
    contenders = []
    for label, entry in entries.items():
        entry = dict(entry or {})
        contenders.append(_contender(str(label), str(entry.pop('model', label)), entry, train_options))
    return contenders


def _parse(spec: str, train_options: Collection[str]) -> Contender:
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise ValueError(f'models (--models) must be [label=]model[:option=value,...] or YAML files, got {spec!r}.')
    overrides: dict[str, Any] = {}
    for part in _split(match['overrides'] or ''):
        key, equals, value = part.partition('=')
        if not equals or not key:
            raise ValueError(f'models (--models) {spec!r}: an override must be option=value, got {part!r}.')
        _set_nested(overrides, key.strip().split('.'), yaml.safe_load(value), spec)
    label = match['label'] or (spec if match['overrides'] else match['model'])
    return _contender(label, match['model'], overrides, train_options)


def _split(text: str) -> list[str]:
    """Split at the commas that are not inside brackets."""
    return [part for part in re.split(r',(?![^\[{]*[\]}])', text) if part.strip()]


def _set_nested(target: dict[str, Any], keys: Sequence[str], value: Any, spec: str) -> None:
    for key in keys[:-1]:
        target = target.setdefault(key, {})
        if not isinstance(target, dict):
            raise ValueError(f'models (--models) {spec!r}: {key} cannot be both a value and a group of values.')
    target[keys[-1]] = value


def _contender(label: str, model: str, overrides: Mapping[str, Any], train_options: Collection[str]) -> Contender:
    own = sorted(_OWN & overrides.keys())
    if own:
        raise ValueError(f'models (--models) {label!r}: a comparison sets {", ".join(own)} itself.')
    return Contender(
        label,
        model,
        {key: value for key, value in overrides.items() if key in train_options},
        {key: value for key, value in overrides.items() if key not in train_options},
    )


def plan_runs(contenders: Sequence[Contender], seeds: Sequence[int], folder: Path) -> Iterator[Run]:
    """Give the runs seed by seed, so that wherever one stops, all models have about as many."""
    for seed in seeds:
        for contender in contenders:
            name = re.sub(r'[^\w.+=-]+', '_', contender.label)
            yield Run(contender, seed, folder / 'runs' / name / f'seed-{seed}')
