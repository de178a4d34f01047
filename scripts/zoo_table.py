#!/usr/bin/env python3
"""Prints the README's table of variants, measured on the models as they are built.

Parameters are counted; GMACs are the multiply-adds of convolutions and matrix products for one image at the size of the
default pretrained config, counted by torch's ``FlopCounterMode``. Models are built on the meta device, so this takes
seconds and no memory.
"""
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import timm_dyacts  # noqa: F401  registers the variants
from timm_dyacts import zoo

DYNAMIC = ('dyrelu_a', 'dyrelu_b', 'dyrelu_c')


def measure(name: str) -> tuple[float, float]:
    """Millions of parameters and GMACs of a model."""
    with torch.device('meta'):
        model = timm.create_model(name).eval()
        x = torch.empty(1, *model.pretrained_cfg['input_size'])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x)
    return sum(p.numel() for p in model.parameters()) / 1e6, counter.get_total_flops() / 2e9


def rows() -> list[list[str]]:
    table = [
        ['base', 'pixels', 'activation', 'base', *(f'`_{op}`' for op in DYNAMIC), '`_softpool`', '`_nobn`',
         'warm start of dyrelu, brelu'],
    ]
    table.append(['---'] + ['---:'] * (len(table[0]) - 2) + ['---'])
    variants = {v.name: v for v in zoo.variants()}
    for family in zoo.FAMILIES:
        for base in family.bases:
            cells = [f'{m:.2f} / {g:.2f}' for m, g in map(measure, [base] + [f'{base}_{op}' for op in DYNAMIC])]
            softpool, nobn = measure(f'{base}_softpool'), f'{base}_brelu_nobn'
            table.append([
                f'`{base}`',
                str(timm.get_pretrained_cfg(base).input_size[-1]),
                family.activation,
                *cells,
                f'{softpool[0]:.2f} / {softpool[1]:.2f}',
                f'{measure(nobn)[0]:.2f}' if nobn in variants else '',
                variants[f'{base}_dyrelu_b'].warm_start,
            ])
    return table


def main() -> None:
    for row in rows():
        print('| ' + ' | '.join(row) + ' |')


if __name__ == '__main__':
    main()
