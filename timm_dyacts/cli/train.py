"""Train or fine-tune a timm model, the variants of timm_dyacts among them.

Without arguments: a small variant on the handwritten digits that come with scikit-learn, in about a minute on 2 cores.
Options are named as in timm's own script; the run folder is itself a checkpoint for 'local-dir:<folder>' and the Hub.
With --resume auto a run that was killed goes on to the end that it would have had. More processes: torchrun.

Exit status: 0 done, 1 error, 2 wrong usage, 130 stopped by Ctrl-C, 143 by SIGTERM, 129 by SIGHUP and 138 by SIGUSR1,
which Slurm sends with --signal=USR1@60; these say what was saved.
"""
import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..options import add_arguments, read_yaml
from ..run_folder import RunFolder
from ..training import LrRange, NonFiniteLossError, TrainConfig, TrainingInterrupted, find_lr, train
from .parser import ArgumentParser, one_line_errors, over_file

__all__ = ['create_parser', 'main', 'parse_config']

_PROG = 'timm-dyacts train'


def create_parser(prog: str = _PROG) -> ArgumentParser:
    """Create the parser of the command."""
    parser = ArgumentParser(prog=prog, description=__doc__)
    add_arguments(parser, TrainConfig)
    parser.add_argument(
        '-c', '--config', default=argparse.SUPPRESS, metavar='FILE',
        help="YAML file of defaults, such as the args.yaml of an earlier run, also of timm's train.py")
    parser.add_argument(
        '--find-lr', action='store_true', default=argparse.SUPPRESS,
        help='train nothing but a hundred updates, with learning rates from 1e-6 to 10, and suggest one: a table and a '
             'picture in a folder of their own in --output')
    return parser


def parse_config(argv: Sequence[str] | None = None, prog: str = _PROG) -> TrainConfig:
    """Read the options of a run.

    An option on the command line wins over the YAML file of ``--config``, that over the recipe of the data set, and
    that over the default. A path given to ``--resume`` stands for the options of that run where there is no
    ``--config``.

    Args:
        argv: The command line without the program, that of the process for ``None``.
        prog: Name of the program, for messages.

    Raises:
        SystemExit: The command line, or the file, is not understood.
        ValueError: A value is out of range, or does not fit another one.
    """
    parser = create_parser(prog)
    return _config_of(parser, vars(parser.parse_args(argv)))


def _config_of(parser: ArgumentParser, given: dict[str, Any]) -> TrainConfig:
    """Give the options of a run from those that the command line has, and from the file that it names."""
    path = given.pop('config', None) or _options_of_run(given.get('resume'))
    if path is None:
        return TrainConfig(**given)
    try:
        from_file = read_yaml(path, TrainConfig)
    except ValueError as e:
        parser.error(str(e))
    return TrainConfig(**over_file(from_file, given))


def _options_of_run(resume: str | None) -> Path | None:
    """Find the options of the run that a path means, if it is one."""
    if resume is None or resume == 'auto':
        return None
    run = RunFolder.of_state(resume) if os.path.isfile(resume) else RunFolder(resume)
    return run.options if run.options.is_file() else None


def main(argv: Sequence[str] | None = None, prog: str = _PROG) -> None:
    """Run the command.

    Args:
        argv: The command line without the program, that of the process for ``None``.
        prog: Name of the program, for messages.
    """
    parser = create_parser(prog)
    given = vars(parser.parse_args(argv))
    only_find_lr = given.pop('find_lr', False)
    with one_line_errors(prog, NonFiniteLossError):
        try:
            config = _config_of(parser, given)
            if only_find_lr:
                _print_lr(find_lr(config))
                return
            result = train(config)
        except TrainingInterrupted as e:
            if e.is_primary:
                print(f'{prog}: {e}', file=sys.stderr)
            sys.exit(128 + e.signum)
        except KeyboardInterrupt:
            sys.exit(130)  # the second Ctrl-C: whoever presses it wants no words
    if result.is_primary:
        print(
            f'Best top1 {result.best["top1"]:.2f} % (epoch {result.best_epoch}) in {result.folder}; '
            f'check it with: timm-dyacts validate --model {result.folder}')


def _print_lr(found: LrRange) -> None:
    """Print what a range test of the learning rate found."""
    if found.is_primary:
        suggestion = 'No --lr can be suggested: the loss did not fall'
        if found.suggestion is not None:
            suggestion = f'Suggested: --lr {found.suggestion:.1e}, a tenth of where the loss is least'
        print(f'{suggestion}. lr.csv and lr.png are in {found.folder}')
