#!/usr/bin/env python3
"""Prints the README's table of variants, measured on the models as they are built: the bases that have every operator.
With --all, all of them.

Parameters are counted; GMACs are the multiply-adds of convolutions and matrix products for one image at the size of the
default pretrained config, counted by torch's ``FlopCounterMode``. Models are built on the meta device, so this takes
seconds and no memory.
"""
import argparse
from collections.abc import Iterator

import timm
import torch

from timm_dyacts import zoo
from timm_dyacts.card import Size, measure_size

MEASURED = ('dyrelu_a', 'dyrelu_b', 'dyrelu_c', 'softpool')


def measure(name: str) -> Size:
    with torch.device('meta'):
        return measure_size(timm.create_model(name))


def rows(every_base: bool) -> Iterator[list[str]]:
    """The cells of the table, its head first."""
    head = ['base', 'pixels', 'activation', 'base', *(f'`_{op}`' for op in MEASURED), '`_nobn`',
            'warm start of dyrelu, brelu']
    yield head
    yield ['---'] + ['---:'] * (len(head) - 2) + ['---']
    variants = {v.name: v for v in zoo.variants()}
    for family in zoo.FAMILIES:
        if not every_base and set(family.operators) != set(zoo.OPERATORS):
            continue
        for base in family.bases.split():
            names = [base] + [f'{base}_{op}' for op in MEASURED]
            nobn = f'{base}_brelu_nobn'
            yield [
                f'`{base}`',
                str(timm.get_pretrained_cfg(base).input_size[-1]),
                family.activation,
                *(str(measure(n)) if n == base or n in variants else '' for n in names),
                f'{measure(nobn).params / 1e6:.2f}' if nobn in variants else '',
                variants.get(f'{base}_dyrelu_b', variants.get(f'{base}_brelu')).warm_start,
            ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--all', action='store_true', help='all bases')
    for row in rows(parser.parse_args().all):
        print('| ' + ' | '.join(row) + ' |')


if __name__ == '__main__':
    main()
