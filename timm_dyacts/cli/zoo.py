"""``timm-dyacts zoo``: the README's table of variants."""
from collections.abc import Sequence

from ..card.zoo_table import zoo_table
from .parser import ArgumentParser

__all__ = ['create_parser', 'main']

DESCRIPTION = """\
Print the README's table of variants: the bases that have every operator or, with --all, all of them. Parameters are in
millions. GMACs are the multiply-adds of convolutions and matrix products for one image of the size of the default
pretrained config. Models are built on the meta device, so this takes a minute, and no memory.
"""


def create_parser(prog: str = 'timm-dyacts zoo') -> ArgumentParser:
    """Make the parser of the command."""
    parser = ArgumentParser(prog=prog, description=DESCRIPTION)
    parser.add_argument('--all', action='store_true', help='all bases')
    return parser


def main(argv: Sequence[str] | None = None, prog: str = 'timm-dyacts zoo') -> None:
    """Print the table."""
    args = create_parser(prog).parse_args(argv)
    for row in zoo_table(args.all):
        print('| ' + ' | '.join(row) + ' |', flush=True)
