"""``timm-dyacts cards``: the model cards of the zoo."""
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from ..card.family import (
    SIZES,
    find_problems,
    measure_by_name,
    model_names,
    read_sizes,
    render_cards,
    write_sizes,
)
from ..files import replace_text
from .parser import ArgumentParser, fail, one_line_errors

__all__ = ['create_parser', 'main']

DESCRIPTION = f"""\
Render the cards of the zoo, one for each of timm's model families. Parameters and multiply-adds come from {SIZES} in
the same folder. --measure adds the models that it lacks, each built on the meta device: a second or two for one, half
an hour for all. --check changes nothing and fails if a card is not what would be rendered, or if the sizes of a sample
of models are not what is measured.
"""


def create_parser(prog: str = 'timm-dyacts cards') -> ArgumentParser:
    """Make the parser of the command."""
    parser = ArgumentParser(prog=prog, description=DESCRIPTION)
    parser.add_argument('--folder', type=Path, default=Path('model_cards'), metavar='FOLDER',
                        help='where the cards are (default: %(default)s)')
    group = parser.add_mutually_exclusive_group()
    group.add_argument('--measure', action='store_true', help=f'first measure the models that are not in {SIZES}')
    group.add_argument('--check', action='store_true', help='change nothing, fail if something is out of date')
    return parser


def main(argv: Sequence[str] | None = None, prog: str = 'timm-dyacts cards') -> None:
    """Render the cards, or check them."""
    args = create_parser(prog).parse_args(argv)
    with one_line_errors(prog):
        _run(args, prog)


def _run(args: Namespace, prog: str) -> None:
    folder = args.folder
    if not folder.is_dir():
        fail(prog, f'--folder must be a folder, got {str(folder)!r}')
    if not (folder / SIZES).exists() and any(folder.glob('*.md')):  # which would be taken for old cards, and removed
        fail(prog, f'--folder must be a folder of cards, or have no *.md, got {str(folder)!r} without {SIZES}')
    sizes = read_sizes(folder)
    missing = [name for name in model_names() if name not in sizes]
    if missing and not args.measure:
        fail(prog, f'{SIZES} lacks {", ".join(missing[:5])}; run it with --measure')
    for name in tqdm(missing, unit='model', disable=None):
        sizes[name] = measure_by_name(name)
        write_sizes(folder, sizes)  # at once: what was measured is kept if the program ends early
    cards = render_cards(sizes)
    if args.check:
        if problems := find_problems(folder, cards, sizes):
            fail(prog, '; '.join(problems))
        return
    for path in folder.glob('*.md'):
        if path.name not in cards:
            path.unlink()
    for name, card in cards.items():
        replace_text(folder / name, card)
    print(f'{len(cards)} files in {folder.name}/')
