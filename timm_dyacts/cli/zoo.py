"""``timm-dyacts zoo``: the table of variants in the guides, and what any name of a variant would give."""
import csv
import json
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import chain, islice

from ..card.zoo_table import zoo_table
from ..operators import zoo_operators
from ..zoo import Preview, preview, select_names
from .parser import ArgumentParser, KeyValues, fail, one_line_errors

__all__ = ['create_parser', 'main']

DESCRIPTION = """\
Print a table of the variants, for the bases that have every operator or, with --all, for all of them. Parameters are in
millions. GMACs are the multiply-adds of convolutions and matrix products for one image of the size of the default
pretrained config. Models are built on the meta device, so this takes a minute, and no memory.

With --find, list what the variants of any of timm's architectures would give, those outside the table too: how many
modules are replaced, how the model starts, the parameters of base and variant in millions, or why there is no such
variant. A start is 'exact' where the model computes what its base does, 'exact by transition' where it does if it is
made with transition=True (train --transition-epochs), 'approximate' where it does not, 'refused' where there is no such
variant; it is the field 'start' in CSV and JSON.
"""
_DEFAULTS = [name for name, operator in zoo_operators().items() if operator.in_coverage]


def create_parser(prog: str = 'timm-dyacts zoo') -> ArgumentParser:
    """Make the parser of the command."""
    parser = ArgumentParser(prog=prog, description=DESCRIPTION)
    group = parser.add_mutually_exclusive_group()
    group.add_argument('--all', action='store_true', help='all bases')
    group.add_argument('--find', nargs='+', metavar='PATTERN',
                       help='architectures of timm, wildcards, parts of names, or names of variants')
    suffixes = [name + nobn for nobn in ('', '_nobn') for name in zoo_operators()]
    parser.add_argument('--operators', nargs='+', choices=suffixes, metavar='NAME',
                        help=f'of what is found, of %(choices)s (default: {" ".join(_DEFAULTS)})')
    parser.add_argument('--model-kwargs', nargs='*', action=KeyValues, metavar='KEY=VALUE',
                        help='options of the variants that are found, e.g. where=late')
    parser.add_argument('--format', choices=_WRITERS, help='of what is found, of %(choices)s (default: table)')
    return parser


def main(argv: Sequence[str] | None = None, prog: str = 'timm-dyacts zoo') -> None:
    """Print the table, or what was found."""
    args = create_parser(prog).parse_args(argv)
    if not args.find:
        for option in ('operators', 'model_kwargs', 'format'):
            if getattr(args, option) is not None:
                fail(prog, f'--{option.replace("_", "-")} is for what --find finds')
        for row in zoo_table(args.all):
            print('| ' + ' | '.join(row) + ' |', flush=True)
        return
    if not all(pattern.strip() for pattern in args.find):
        fail(prog, f'--find must be names or wildcards, such as *, got {args.find!r}')
    with one_line_errors(prog, TypeError):
        names = select_names(args.find, dict.fromkeys(args.operators or _DEFAULTS))
        previews = preview(names, **(args.model_kwargs or {}))
        first = list(islice(previews, 1))  # what is wrong with an option is said before anything is printed
        _WRITERS[args.format or 'table'](chain(first, previews))


def _write_table(previews: Iterable[Preview]) -> None:
    print('| name | starts | replaced | base, M | variant, M |\n| --- | --- | --- | ---: | ---: |', flush=True)
    for found in previews:
        what = textwrap.shorten(found.reason, 120, placeholder=' ...') or _join(found.replaced)
        cells = (f'`{found.name}`', found.start, what, _millions(found.base_params), _millions(found.params))
        print('| ' + ' | '.join(cell.replace('|', '\\|') for cell in cells) + ' |', flush=True)


def _write_csv(previews: Iterable[Preview]) -> None:
    writer = csv.DictWriter(sys.stdout, list(Preview.__dataclass_fields__), lineterminator='\n')
    writer.writeheader()
    for found in previews:
        writer.writerow(asdict(found) | dict(replaced=_join(found.replaced)))
        sys.stdout.flush()


def _write_json(previews: Iterable[Preview]) -> None:
    print(json.dumps([asdict(found) for found in previews], indent=2))


_WRITERS = dict(table=_write_table, csv=_write_csv, json=_write_json)


def _join(replaced: dict[str, int]) -> str:
    return ', '.join(f'{count} {kind}' for kind, count in replaced.items())


def _millions(params: int | None) -> str:
    return '' if params is None else f'{params / 1e6:.2f}'
