"""Command line options that the scripts share, under the names that timm's scripts gave them."""
import argparse
import difflib
import os
import re
from collections.abc import Sequence
from typing import Any, NoReturn

import yaml
from timm.utils import ParseKwargs

__all__ = [
    'ArgumentParser',
    'add_device_options',
    'add_input_options',
    'add_loader_options',
    'add_preprocessing_options',
    'parse_train_args',
]

# What suits the digits better than the defaults: small pictures, short training, and no flip, as a flipped digit is
# another shape.
_DIGITS_RECIPE = dict(
    img_size=32,
    crop_pct=1.0,
    epochs=10,
    batch_size=64,
    warmup_epochs=1,
    scale=[0.7, 1.0],
    ratio=[0.85, 1.18],
    hflip=0.0,
    color_jitter=0.0,
    workers=0,
    log_interval=5,
)


class ArgumentParser(argparse.ArgumentParser):
    """A parser that shows its description as written and suggests names for options that it does not know."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r'unrecognized arguments: (--[\w-]+)', message)
        if unknown:
            close = difflib.get_close_matches(unknown[1], self._option_string_actions, n=3)
            message += f'. Close names: {", ".join(close)}.' if close else ''
        super().error(message)


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """Options of the data set and of the preprocessing."""
    group = parser.add_argument_group('Data')
    group.add_argument('--data-dir', metavar='DIR', help='folder of the data set')
    group.add_argument('--dataset', metavar='NAME',
                       help="'digits', a timm data set such as 'torch/cifar10' or 'hfds/<id>', or an image folder "
                            "(default: the image folder --data-dir, or the digits)")
    group.add_argument('--dataset-download', action='store_true', help='download the data set where it supports that')
    group.add_argument('--class-map', metavar='FILE', help='class name to label mapping of an image folder')
    add_preprocessing_options(group)


def add_preprocessing_options(group: argparse._ArgumentGroup) -> None:
    """Options of what a model is given."""
    group.add_argument('--num-classes', type=int, metavar='N', help='number of classes (default: those of the data)')
    group.add_argument('--in-chans', type=int, metavar='N', help='image channels (default: 3)')
    group.add_argument('--img-size', type=int, metavar='N', help='image height and width (default: of the model)')
    group.add_argument('--input-size', nargs=3, type=int, metavar='N',
                       help='channels, height and width, e.g. 3 224 224 (overrides --img-size and --in-chans)')
    group.add_argument('--crop-pct', type=float, metavar='PCT', help='crop for evaluation (default: of the model)')
    group.add_argument('--mean', type=float, nargs='+', metavar='MEAN', help='pixel mean (default: of the model)')
    group.add_argument('--std', type=float, nargs='+', metavar='STD', help='pixel std dev (default: of the model)')
    group.add_argument('--interpolation', metavar='NAME', help='resize interpolation (default: of the model)')


def add_loader_options(parser: argparse.ArgumentParser) -> None:
    """Options of loading data in batches."""
    group = parser.add_argument_group('Loader')
    group.add_argument('-j', '--workers', type=int, default=min(4, os.cpu_count() or 1), metavar='N',
                       help='processes that load data (default: %(default)s)')
    group.add_argument('--on-bad-image', default='skip', choices=('skip', 'error'),
                       help='what to do with an image that cannot be read: leave it out and count it, or stop '
                            '(default: %(default)s)')


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Options of the machine and of numerics."""
    group = parser.add_argument_group('Device')
    group.add_argument('--device', metavar='NAME', help='device (default: cuda if there is one, else cpu)')
    group.add_argument('--amp', action='store_true', help='mixed precision')
    group.add_argument('--amp-dtype', default='float16', choices=('float16', 'bfloat16'),
                       help='lower precision of --amp (default: %(default)s)')
    group.add_argument('--deterministic', action='store_true',
                       help='on a GPU too, the same bits in each run; slower there')
    group.add_argument('--channels-last', action='store_true', help='channels_last memory layout')
    group.add_argument('--torchcompile', nargs='?', const='inductor', metavar='BACKEND',
                       help='compile the model (default backend: inductor)')
    group.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE',
                       help='further arguments of timm.create_model')


def parse_train_args(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options of a training run.

    An option on the command line wins over the YAML file of ``--config``, that over the recipe of the data set, and
    that over the default. With neither ``--dataset`` nor ``--data-dir`` the data set is the digits. A path given to
    ``--resume`` stands for the ``args.yaml`` of that run where there is no ``--config``.

    Args:
        parser: The parser of the script.
        argv: The command line, that of the process for None.
    """
    parser.add_argument('-c', '--config', metavar='FILE',
                        help='YAML file of defaults, such as the args.yaml of an earlier run')
    args = parser.parse_args(argv)
    path = args.config or _args_of_run(args.resume)
    config = _read_config(path, parser) if path else {}
    parser.set_defaults(**config)
    args = parser.parse_args(argv)
    if args.dataset is None:
        args.dataset = 'digits' if args.data_dir is None else ''
    if args.dataset == 'digits':
        parser.set_defaults(**{**_DIGITS_RECIPE, **config, 'dataset': 'digits'})
        args = parser.parse_args(argv)
    del args.config
    return args


def _args_of_run(resume: str | None) -> str | None:
    """The ``args.yaml`` of the run that a path means, if it is one."""
    if resume is None or resume == 'auto':
        return None
    folder = os.path.join(os.path.dirname(resume), os.pardir) if os.path.isfile(resume) else resume
    path = os.path.join(folder, 'args.yaml')
    return path if os.path.isfile(path) else None


def _read_config(path: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    try:
        with open(path) as f:
            config = yaml.safe_load(f) or {}
    except (OSError, yaml.YAMLError) as e:
        parser.error(f'--config must be a readable YAML file: {e}')
    if not isinstance(config, dict):
        parser.error(f'--config must hold one "option: value" per line, got {path}')
    actions = {action.dest: action for action in parser._actions if action.dest not in ('help', 'config')}
    for key, value in config.items():
        if key not in actions:
            close = difflib.get_close_matches(str(key), actions, n=3)
            hint = f' Close names: {", ".join(close)}.' if close else ''
            parser.error(f'{path}: unknown option {key!r}.{hint}')
        choices = actions[key].choices
        if choices and value not in choices:  # argparse checks the command line, not the defaults
            parser.error(f'{path}: {key} must be one of {", ".join(choices)}, got {value!r}')
    return config
