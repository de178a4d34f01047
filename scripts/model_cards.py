#!/usr/bin/env python3
"""Render the cards of the zoo, one for each of timm's model families, into model_cards/.

Parameters and multiply-adds come from model_cards/sizes.json. --measure adds the models that it lacks, each built on
the meta device: a second or two for one, half an hour for all. --check changes nothing and fails if a card is not what
would be rendered, or if the sizes of a sample of models are not what is measured.
"""
import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, model_entrypoint
from tqdm import tqdm

from timm_dyacts import zoo
from timm_dyacts.card import OPERATORS, TIMM_CITATION, Size, measure_size, render
from timm_dyacts.files import replace_text

FOLDER = Path(__file__).parents[1] / 'model_cards'
SIZES = FOLDER / 'sizes.json'
# One model of each operator, and of timm's quite different ways to write a model.
SAMPLE = (
    'resnet18', 'resnet18_dyrelu_a', 'resnet18_dyrelu_b', 'resnet18_dyrelu_c_nobn', 'vgg11_softpool',
    'regnetx_002_belu', 'repvgg_a0_brelu', 'mobilenetv3_small_050_softpool', 'convmixer_768_32_dyrelu_b',
)


def families() -> dict[str, list[zoo.Variant]]:
    """The variants by the module of timm that holds their base."""
    names = set(zoo.ALIASES)
    found = defaultdict(list)
    for variant in zoo.variants():
        if variant.name not in names:
            found[model_entrypoint(variant.base).__module__.rpartition('.')[2]].append(variant)
    return dict(sorted(found.items()))


def measure(name: str) -> Size:
    with torch.device('meta'):
        return measure_size(timm.create_model(name))


def read_sizes() -> dict[str, Size]:
    content = json.loads(SIZES.read_text()) if SIZES.is_file() else {}
    return {
        name: Size(params, macs, tuple(input_size)) for name, (params, macs, input_size) in content.items()}


def write_sizes(sizes: dict[str, Size]) -> None:
    """One line for each model: parameters, multiply-adds, size of the image."""
    lines = [f'{json.dumps(name)}: {json.dumps(astuple(size))}' for name, size in sorted(sizes.items())]
    replace_text(SIZES, '{\n' + ',\n'.join(lines) + '\n}\n')


def all_names() -> list[str]:
    """Every base and variant."""
    variants = [variant for family in families().values() for variant in family]
    return sorted({variant.base for variant in variants} | {variant.name for variant in variants})


def render_cards(sizes: dict[str, Size]) -> dict[str, str]:
    """The content of model_cards/ by file name."""
    cards = {f'{family}.md': render_card(family, variants, sizes) for family, variants in families().items()}
    rows = [
        f'| [{family}]({family}.md) | {len({v.base for v in variants})} | {len(variants)} |'
        for family, variants in families().items()
    ]
    cards['README.md'] = '\n'.join([
        '# Model cards of the zoo',
        '',
        'One for each module of timm that has bases of variants, rendered by `python scripts/model_cards.py`. The card '
        'of a published checkpoint is rendered as it is published.',
        '',
        '| family | architectures | variants |',
        '| --- | ---: | ---: |',
        *rows,
        '',
    ])
    return cards


def render_card(family: str, variants: list[zoo.Variant], sizes: dict[str, Size]) -> str:
    suffixes = {variant.name: variant.name.removeprefix(f'{variant.base}_') for variant in variants}
    order = [op + nobn for op in zoo.OPERATORS for nobn in ('', '_nobn')]
    by_base = defaultdict(list)
    for variant in variants:
        by_base[variant.base].append(variant)
    example = next((v for v in variants if v.operator == 'dyrelu_b'), variants[0])
    operators = [
        operator for key, operator in OPERATORS.items()
        if any(key == operator_of(variant) for variant in variants)
    ]
    return render(
        'family_card.md',
        family=family,
        num_variants=len(variants),
        columns=[column for column in order if column in suffixes.values()],
        bases=[describe_base(base, members, suffixes, sizes) for base, members in by_base.items()],
        example=dict(
            name=example.name,
            input_size=sizes[example.name].input_size,
            num_classes=get_pretrained_cfg(example.name).num_classes,
        ),
        operators=operators,
        licenses=licenses(by_base),
        citations=[*(operator.citation for operator in operators), TIMM_CITATION],
    ).lstrip()


def describe_base(
        base: str,
        variants: list[zoo.Variant],
        suffixes: dict[str, str],
        sizes: dict[str, Size],
) -> dict[str, Any]:
    relu_like = [v.warm_start for v in variants if v.operator.startswith(('dyrelu', 'brelu'))]
    return dict(
        name=base,
        pixels=sizes[base].input_size[-1],
        activation=variants[0].family.activation,
        size=str(sizes[base]),
        variants={suffixes[variant.name]: str(sizes[variant.name]) for variant in variants},
        warm_start=relu_like[0] if relu_like else '',
    )


def operator_of(variant: zoo.Variant) -> str:
    """Key of ``OPERATORS``."""
    return 'bipolar' if variant.operator in ('brelu', 'belu') else variant.operator.partition('_')[0]


def licenses(bases: Iterable[str]) -> dict[str, list[str]]:
    """The pretrained tags of the bases by the licence that timm has on record."""
    found = defaultdict(list)
    for base in bases:
        for name in timm.list_pretrained(f'{base}.*'):
            found[get_pretrained_cfg(name).license or 'none on record'].append(name)
    return dict(sorted(found.items()))


def check(cards: dict[str, str], sizes: dict[str, Size]) -> list[str]:
    """What is wrong with model_cards/, if anything."""
    there = {path.name: path.read_text() for path in FOLDER.glob('*.md')}
    problems = [
        f'{name} is not what would be rendered'
        for name in sorted(there.keys() | cards.keys()) if there.get(name) != cards.get(name)
    ]
    for name in SAMPLE:
        measured = measure(name)
        if measured != sizes[name]:
            problems.append(f'{SIZES.name} has {sizes[name]!r} for {name}, measured is {measured!r}')
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_mutually_exclusive_group()
    group.add_argument('--measure', action='store_true', help='first measure the models that are not in sizes.json')
    group.add_argument('--check', action='store_true', help='change nothing, fail if something is out of date')
    args = parser.parse_args()

    sizes = read_sizes()
    missing = [name for name in all_names() if name not in sizes]
    if missing and not args.measure:
        sys.exit(f'model_cards.py: error: {SIZES.name} lacks {", ".join(missing[:5])}; run it with --measure')
    for name in tqdm(missing, unit='model', disable=None):
        sizes[name] = measure(name)
        write_sizes(sizes)  # at once: what was measured is kept if one ends it here
    cards = render_cards(sizes)
    if args.check:
        if problems := check(cards, sizes):
            sys.exit('model_cards.py: error: ' + '; '.join(problems))
        return
    for path in FOLDER.glob('*.md'):
        if path.name not in cards:
            path.unlink()
    for name, card in cards.items():
        replace_text(FOLDER / name, card)
    print(f'{len(cards)} files in {FOLDER.name}/')


if __name__ == '__main__':
    main()
