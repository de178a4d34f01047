"""Find out whether a variant helps on your data: train a base and its variants with many seeds, and compare them.

    timm-dyacts compare --models resnet18 resnet18_dyrelu_b resnet18_softpool --seeds 10 --data-dir photos --pretrained

The same seed gives every model the same order of images, the same augmentation and, to variants of one base, the same
initial weights. Differences are taken seed by seed. Beside the options below it takes those of train. Started again it
goes on where it was stopped; finished runs are not repeated.

Exit status: 0 done, 1 error, 2 wrong usage, 130 stopped by Ctrl-C and 143 by SIGTERM, with the runs' states saved.
"""
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from ..options import add_arguments, declarations, read_yaml
from ..study import CompareConfig, RunError, compare
from ..training import TrainConfig
from .parser import ArgumentParser, one_line_errors, over_file

__all__ = ['create_parser', 'main']

_PROG = 'timm-dyacts compare'
# What a comparison decides for each run
_OWN = frozenset({'model', 'seed', 'resume', 'output', 'experiment'})


def create_parser(prog: str = _PROG) -> ArgumentParser:
    """Create the parser of the command."""
    parser = ArgumentParser(prog=prog, description=__doc__)
    add_arguments(parser, CompareConfig)
    add_arguments(parser, TrainConfig, exclude=_OWN)
    parser.add_argument('-c', '--config', metavar='FILE', help='YAML file of options of train')
    return parser


def main(argv: Sequence[str] | None = None, prog: str = _PROG) -> None:
    """Run the command.

    Args:
        argv: The command line without the program, that of the process for ``None``.
        prog: Name of the program, for messages.
    """
    given = vars(create_parser(prog).parse_args(argv))
    path = given.pop('config')
    own = {name: given.pop(name) for name in list(given) if name in declarations(CompareConfig)}
    signal.signal(signal.SIGTERM, _end)
    try:
        with one_line_errors(prog, RunError, TypeError):
            from_file = read_yaml(path, TrainConfig) if path else {}
            config = CompareConfig(**own)
            from_file = {name: value for name, value in from_file.items() if name not in _OWN}
            result = compare(config, **over_file(from_file, given))
    except KeyboardInterrupt:
        sys.exit(130)
    print((result.folder / 'compare.md').read_text(encoding='utf-8'))
    print(f'{result.folder}: compare.csv, epochs.csv, compare.md, compare.png, curves.png')


def _end(signum: int, frame: FrameType | None) -> None:
    sys.exit(128 + signum)
