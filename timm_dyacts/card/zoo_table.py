"""The table of the zoo: what bases and variants cost, measured on the models as they are built."""
from collections.abc import Iterator

import timm
import torch

from .. import zoo
from ..operators import zoo_operators
from .family import describe_exact, describe_warm_start, measure_by_name

__all__ = ['zoo_table']


def zoo_table(every_base: bool = False) -> Iterator[list[str]]:
    """Give the cells of the table row by row, its head first.

    Args:
        every_base: Include the bases that do not have every operator.
    """
    operators = zoo_operators().values()
    # An activation without a width has no parameters to speak of: such variants cost what their base does.
    measured = [operator.name for operator in operators if operator.has_width or operator.replaces == 'pool']
    free = [operator.name for operator in operators if operator.name not in measured]
    head = ['base', 'pixels', 'activation', 'base', *(f'`_{name}`' for name in measured), '`_nobn`',
            f'warm start of {describe_exact(operators)}']
    yield head
    yield ['---'] + ['---:'] * (len(head) - 2) + ['---']
    variants = {variant.name: variant for variant in zoo.variants()}
    for family in zoo.FAMILIES:
        if not every_base and family.operators != zoo.ALL:
            continue
        for base in family.bases.split():
            names = [f'{base}_{name}' for name in measured]
            nobn = [f'{base}_{name}_nobn' for name in free if f'{base}_{name}_nobn' in variants]
            yield [
                f'`{base}`',
                str(timm.get_pretrained_cfg(base).input_size[-1]),
                family.activation,
                str(measure_by_name(base)),
                *(str(measure_by_name(name)) if name in variants else '' for name in names),
                f'{_count_parameters(nobn[0]) / 1e6:.2f}' if nobn else '',
                describe_warm_start(variant for variant in variants.values() if variant.base == base),
            ]


def _count_parameters(name: str) -> int:
    with torch.device('meta'):
        return sum(p.numel() for p in timm.create_model(name).parameters())
