"""Measure operators, or whole models, side by side with what they replace.

Everything that is compared is measured in one process, in turns, so that what disturbs the machine disturbs all of it
alike, and printed as ratios of medians:

  floor           the plain operator of PyTorch, such as nn.ReLU or nn.MaxPool2d
  floor_compiled  the same under torch.compile
  ours            the operator of this package in eager mode
  compiled        the same under torch.compile
  literal         its definition, written down in PyTorch operations as one finds it in research code

"bytes" relates the time to that in which the machine copies the bytes that the operator has to move: 1 is the memory
limit. "aims" measures what this project has set itself for the device and says which aims are met.
"""
import re
from argparse import Namespace
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from ..benchmark import (
    DTYPES,
    LAYOUTS,
    PARTS,
    RESNETS,
    VARIANTS,
    Clock,
    Report,
    list_aims,
    measure_aims,
    measure_models,
    measure_onnx,
    measure_operator,
    print_aims,
    require_onnxruntime,
)
from ..device import resolve_device
from ..evaluation.config import LARGEST_SIDE
from ..files import check_output
from ..loading import resolve_model_name
from ..operators import benchmarks
from ..ops.checks import check_int
from ..plotting import require_matplotlib
from .parser import ArgumentParser, one_line_errors

__all__ = ['create_parser', 'main']


def create_parser(prog: str = 'timm-dyacts benchmark') -> ArgumentParser:
    """Create the parser of the command, with a subcommand for each kind of benchmark."""
    parser = ArgumentParser(prog=prog, description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True)
    ops = commands.add_parser('ops', help='measure operators')
    models = commands.add_parser('models', help='measure models beside their base')
    onnx = commands.add_parser('onnx', help='measure models beside their base as ONNX graphs, in onnxruntime')
    aims = commands.add_parser('aims', help='measure what has an aim, and tell whether it is met')
    ops.add_argument('--ops', nargs='+', choices=benchmarks(), default=list(benchmarks()), help='default: all')
    ops.add_argument('--shapes', nargs='+', metavar='NxCxHxW',
                     default=['32x64x56x56', '32x64x112x112', '32x256x112x112'],
                     help='shapes of the input (default: %(default)s)')
    ops.add_argument('--layouts', nargs='+', choices=LAYOUTS, default=list(LAYOUTS), help='default: all')
    ops.add_argument('--dtypes', nargs='+', choices=DTYPES, default=list(DTYPES), help='default: all')
    ops.add_argument('--variants', nargs='+', choices=VARIANTS, default=list(VARIANTS),
                     help='what to measure beside the floor (default: all)')
    models.add_argument('--models', nargs='+', metavar='NAME',
                        default=list(RESNETS),
                        help='a base and its variants (default: %(default)s)')
    models.add_argument('-b', '--batch-size', type=int, default=256, metavar='N', help='default: %(default)s')
    models.add_argument('--img-size', type=int, default=224, metavar='N', help='default: %(default)s')
    models.add_argument('--layout', choices=LAYOUTS, default='channels_last', help='default: %(default)s')
    models.add_argument('--dtype', choices=DTYPES, default='bf16', help='of autocast (default: %(default)s)')
    models.add_argument('--compile', action='store_true', help='under torch.compile')
    onnx.add_argument('--models', nargs='+', metavar='NAME',
                      default=list(RESNETS),
                      help='a base and its variants (default: %(default)s)')
    onnx.add_argument('-b', '--batch-sizes', type=int, nargs='+', default=[1, 8], metavar='N',
                      help='default: %(default)s')
    onnx.add_argument('--img-size', type=int, default=224, metavar='N', help='default: %(default)s')
    aims.add_argument('--parts', nargs='+', choices=PARTS, default=list(PARTS),
                      help='of what is measured: on CUDA all but onnx, of which compiling the models takes longest; on '
                           'CPUs operators, models and, if onnxruntime is installed, onnx (default: all)')
    for command in (ops, models, onnx, aims):
        command.add_argument('--repeats', type=int, default=20, metavar='N',
                             help='of each measurement (default: %(default)s)')
        command.add_argument('--device', metavar='NAME', help='device (default: cuda if there is one, else cpu)')
        command.add_argument('--output', type=Path, metavar='FILE', help='CSV (default: benchmark-<command>.csv); '
                             'the chart is written beside it, as PNG')
    onnx.set_defaults(device='cpu')
    return parser


def main(argv: Sequence[str] | None = None, prog: str = 'timm-dyacts benchmark') -> None:
    """Run the command.

    Args:
        argv: Its command line, that of the process for ``None``.
        prog: Name of the program, for messages.
    """
    args = create_parser(prog).parse_args(argv)
    with one_line_errors(prog, AssertionError, RuntimeError):
        require_matplotlib()
        _run(args)


def _run(args: Namespace) -> None:
    for option, maximum in (('repeats', 10 ** 6), ('batch_size', 10 ** 9), ('img_size', LARGEST_SIDE)):
        if option in args:
            check_int(f'--{option.replace("_", "-")}', getattr(args, option), 1, maximum)
    for size in getattr(args, 'batch_sizes', ()):
        check_int('--batch-sizes', size, 1)
    output = args.output or Path(f'benchmark-{args.command}.csv')
    if output.suffix == '.png':
        raise ValueError(f'--output must not end in .png, which the chart beside it does, got {output}')
    shapes = [_parse_shape(text) for text in getattr(args, 'shapes', ())]
    names = [resolve_model_name(name, '--models') for name in getattr(args, 'models', ())]
    if args.command == 'onnx':
        require_onnxruntime()
        if args.device != 'cpu':
            raise ValueError(f'--device must be cpu for ONNX graphs, got {args.device}')
    clock = Clock(resolve_device(args.device), args.repeats)
    output.parent.mkdir(parents=True, exist_ok=True)
    check_output(output, '--output')  # or it would fail after all that work
    report = Report(clock.device)
    if args.command == 'ops':
        variants = ('floor', *args.variants)
        for name, shape, layout, dtype in product(args.ops, shapes, args.layouts, args.dtypes):
            report.add(measure_operator(name, shape, layout, dtype, variants, clock))
    elif args.command == 'models':
        report.add(measure_models(
            names, args.batch_size, args.img_size, args.layout, args.dtype, args.compile, clock))
    elif args.command == 'onnx':
        report.add(measure_onnx(names, args.batch_sizes, args.img_size, clock))
    else:
        measure_aims(args.parts, clock, report)
    report.save(output)
    if args.command == 'aims':
        print_aims(list_aims(clock.device.type), report.rows)


def _parse_shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r'\d+x\d+x\d+x\d+', text, re.ASCII) or min(map(int, text.split('x'))) < 2:
        raise ValueError(f'--shapes must be four sizes above 1 such as 32x64x56x56, got {text}')
    return tuple(map(int, text.split('x')))
