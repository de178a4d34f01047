"""Say which classes images may show, with the names and the preprocessing that the model's checkpoint keeps.

    timm-dyacts predict --model output/train/<run> photo.jpg more_photos/

The model is a run folder, 'local-dir:<folder>', 'hf-hub:<id>' or a name with pretrained weights.

Exit status: 0 done, though some images may not be readable, 1 error, or no image can be read, 2 wrong usage.
"""
import sys
from collections.abc import Sequence

from ..evaluation import PredictConfig, predict
from ..evaluation.predict import write_predictions
from ..messages import one_line
from ..options import add_arguments
from .parser import ArgumentParser, fail, one_line_errors

__all__ = ['create_parser', 'main']

_PROG = 'timm-dyacts predict'


def create_parser(prog: str = _PROG) -> ArgumentParser:
    """Create the parser of the command."""
    parser = ArgumentParser(prog=prog, description=__doc__)
    add_arguments(parser, PredictConfig)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = _PROG) -> None:
    """Run the command.

    Args:
        argv: The command line without the program, that of the process for ``None``.
        prog: Name of the program, for messages.
    """
    given = vars(create_parser(prog).parse_args(argv))
    with one_line_errors(prog):
        config = PredictConfig(**given)
        records = predict(config)
        if not config.results_file:
            write_predictions(records, sys.stdout, config.results_format)
    unreadable = [record['path'] for record in records if 'error' in record]
    if unreadable:
        more = ', ...' if len(unreadable) > 3 else ''
        message = f'{len(unreadable)} of {len(records)} images cannot be read: {", ".join(unreadable[:3])}{more}'
        if len(unreadable) == len(records):
            fail(prog, message)
        print(one_line(message), file=sys.stderr)
