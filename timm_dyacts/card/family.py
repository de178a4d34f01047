"""The cards of the zoo: one for each module of timm that has bases of variants.

What models cost is measured once and kept in ``sizes.json`` beside the cards: measuring all of them takes half an hour.
"""
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, model_entrypoint

from .. import zoo
from ..files import replace_text
from ..operators import Operator, papers, zoo_operators
from .render import TIMM_CITATION, render
from .size import Size, measure_size

__all__ = [
    'SAMPLE',
    'SIZES',
    'describe_exact',
    'describe_warm_start',
    'families',
    'find_problems',
    'measure_by_name',
    'model_names',
    'read_sizes',
    'render_cards',
    'render_family_card',
    'write_sizes',
]

SIZES = 'sizes.json'
# One model of each operator, and of timm's quite different ways to write a model.
SAMPLE = (
    'resnet18', 'resnet18_dyrelu_a', 'resnet18_dyrelu_b', 'resnet18_dyrelu_c_nobn', 'vgg11_softpool',
    'regnetx_002_belu', 'repvgg_a0_brelu', 'mobilenetv3_small_050_softpool', 'convmixer_768_32_dyrelu_b',
)


def families() -> dict[str, list[zoo.Variant]]:
    """Give the variants by the module of timm that holds their base."""
    found = defaultdict(list)
    for variant in zoo.variants():
        if variant.name not in zoo.ALIASES:
            found[model_entrypoint(variant.base).__module__.rpartition('.')[2]].append(variant)
    return dict(sorted(found.items()))


def model_names() -> list[str]:
    """Give the names of all bases and variants."""
    variants = [variant for family in families().values() for variant in family]
    return sorted({variant.base for variant in variants} | {variant.name for variant in variants})


# Sizes


def measure_by_name(name: str) -> Size:
    """Measure one of timm's models, built on the meta device: it takes no memory and computes nothing."""
    with torch.device('meta'):
        return measure_size(timm.create_model(name))


def read_sizes(folder: Path) -> dict[str, Size]:
    """Read what models cost, empty if nothing was measured yet."""
    path = folder / SIZES
    content = json.loads(path.read_text()) if path.is_file() else {}
    return {
        name: Size(params, macs, tuple(input_size)) for name, (params, macs, input_size) in content.items()}


def write_sizes(folder: Path, sizes: Mapping[str, Size]) -> None:
    """Write one line for each model: parameters, multiply-adds, size of the image."""
    lines = [f'{json.dumps(name)}: {json.dumps(astuple(size))}' for name, size in sorted(sizes.items())]
    replace_text(folder / SIZES, '{\n' + ',\n'.join(lines) + '\n}\n')


# Cards


def render_cards(sizes: Mapping[str, Size]) -> dict[str, str]:
    """Render the cards and their table of contents, by file name.

    Args:
        sizes: What each of ``model_names()`` costs.
    """
    by_family = families()
    cards = {f'{family}.md': render_family_card(family, variants, sizes) for family, variants in by_family.items()}
    cards['README.md'] = '\n'.join([
        '# Model cards of the zoo',
        '',
        'One card for each module of timm that has bases of variants, rendered by `timm-dyacts cards`. The card of a '
        'checkpoint is rendered when the checkpoint is published.',
        '',
        '| family | architectures | variants |',
        '| --- | ---: | ---: |',
        *(f'| [{family}]({family}.md) | {len({v.base for v in variants})} | {len(variants)} |'
          for family, variants in by_family.items()),
        '',
    ])
    return cards


def render_family_card(family: str, variants: Sequence[zoo.Variant], sizes: Mapping[str, Size]) -> str:
    """Render the card of a family.

    Args:
        family: The name of timm's module.
        variants: Its variants.
        sizes: What these and their bases cost.
    """
    suffixes = {variant.name: variant.name.removeprefix(f'{variant.base}_') for variant in variants}
    by_base = defaultdict(list)
    for variant in variants:
        by_base[variant.base].append(variant)
    used = {variant.operator for variant in variants}
    operators = [operator for name, operator in zoo_operators().items() if name in used]
    shown_papers = [paper for paper, _ in papers() if any(operator.paper == paper for operator in operators)]
    order = [operator.name + nobn for operator in operators for nobn in ('', '_nobn')]
    example = next((variant for variant in variants if variant.record.in_coverage), variants[0])
    return render(
        'family_card.md',
        family=family,
        num_variants=len(variants),
        columns=[column for column in order if column in suffixes.values()],
        bases=[_describe_base(base, members, suffixes, sizes) for base, members in by_base.items()],
        exact=describe_exact(operators),
        approximate=[operator.name for operator in operators if not operator.exact_for],
        example=dict(
            name=example.name,
            input_size=sizes[example.name].input_size,
            num_classes=get_pretrained_cfg(example.name).num_classes,
        ),
        papers=shown_papers,
        licenses=_licenses(by_base),
        citations=[*(paper.citation for paper in shown_papers), TIMM_CITATION],
    ).lstrip()


def _describe_base(
        base: str,
        variants: Sequence[zoo.Variant],
        suffixes: Mapping[str, str],
        sizes: Mapping[str, Size],
) -> dict[str, Any]:
    return dict(
        name=base,
        pixels=sizes[base].input_size[-1],
        activation=variants[0].family.activation,
        size=str(sizes[base]),
        variants={suffixes[variant.name]: str(sizes[variant.name]) for variant in variants},
        warm_start=describe_warm_start(variants),
    )


def describe_exact(operators: Iterable[Operator]) -> str:
    """Name the operators that can start exactly, those of several modes once: ``'dyrelu, brelu'``."""
    names = (operator.name.partition('_')[0] for operator in operators if operator.exact_for)
    return ', '.join(dict.fromkeys(names))


def describe_warm_start(variants: Iterable[zoo.Variant]) -> str:
    """Say how those variants of a base start that have an operator which can start exactly."""
    operators: dict[str, list[Operator]] = defaultdict(list)
    for variant in variants:
        if variant.record.exact_for:
            operators[variant.warm_start].append(variant.record)
    if len(operators) < 2:
        return next(iter(operators), '')
    return '; '.join(f'{start}: {describe_exact(operators[start])}' for start in sorted(operators, reverse=True))


def _licenses(bases: Iterable[str]) -> dict[str, list[str]]:
    """Give the pretrained tags of bases by the licence that timm has on record."""
    found = defaultdict(list)
    for base in bases:
        for name in timm.list_pretrained(f'{base}.*'):
            found[get_pretrained_cfg(name).license or 'none on record'].append(name)
    return dict(sorted(found.items()))


def find_problems(folder: Path, cards: Mapping[str, str], sizes: Mapping[str, Size]) -> list[str]:
    """Say what is out of date in a folder of cards.

    Args:
        folder: The folder.
        cards: What it should hold.
        sizes: What models cost according to the folder. A sample of them is measured again.
    """
    there = {path.name: path.read_text() for path in folder.glob('*.md')}
    problems = [
        f'{name} is not what would be rendered'
        for name in sorted(there.keys() | cards.keys()) if there.get(name) != cards.get(name)
    ]
    for name in SAMPLE:
        measured = measure_by_name(name)
        if measured != sizes[name]:
            problems.append(f'{SIZES} has {sizes[name]!r} for {name}, measured is {measured!r}')
    return problems
