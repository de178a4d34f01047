"""Evaluate models and print their records as JSON, the ones that timm's own script prints.

A model is a run folder, 'local-dir:<folder>', 'hf-hub:<id>' or a name with pretrained weights. A run folder is
evaluated on the data set that it was trained on, unless told otherwise; any other model on the digits.
"""
import json
import sys
from collections.abc import Sequence

from .. import hub
from ..evaluation import ValidateConfig, validate_models
from ..evaluation.verify import verify_results
from ..hub.pull import has_checksum
from ..loading import resolve_model_name
from ..options import add_arguments
from .parser import ArgumentParser, fail, one_line_errors

__all__ = ['create_parser', 'main']

_PROG = 'timm-dyacts validate'


def create_parser(prog: str = _PROG) -> ArgumentParser:
    """Create the parser of the command."""
    parser = ArgumentParser(prog=prog, description=__doc__)
    add_arguments(parser, ValidateConfig)
    parser.add_argument(
        '--verify', action='store_true',
        help="first compare the weights with the SHA-256 that was published with them ('hf-hub:<id>' or a published "
             'folder); of a run, repeat the measurement of results.json: to the last digit on the same stack, within '
             'rounding elsewhere')
    return parser


def _verify(config: ValidateConfig, name: str) -> str | None:
    """Compare what is on record of a model: results of a run, else the checksum of what was published."""
    name = resolve_model_name(name)
    found = None if name.startswith('hf-hub:') else verify_results(config, name)
    if found is None or has_checksum(name):
        hub.verify(name)
    return found


def main(argv: Sequence[str] | None = None, prog: str = _PROG) -> None:
    """Run the command.

    Args:
        argv: The command line without the program, that of the process for ``None``.
        prog: Name of the program, for messages.
    """
    given = vars(create_parser(prog).parse_args(argv))
    verify = given.pop('verify')
    with one_line_errors(prog):
        config = ValidateConfig(**given)
        found = [_verify(config, name) for name in config.model] if verify else []
        records, errors = validate_models(config)
    for sentence in filter(None, found):
        print(sentence, file=sys.stderr)
    print(f'--result\n{json.dumps(records if len(config.model) > 1 else records[0], indent=4)}')
    if errors:
        fail(prog, f'{len(errors)} of {len(config.model)} models failed: {", ".join(errors)}')
