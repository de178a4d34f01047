"""``timm-dyacts coverage``: what ``convert`` makes of the networks of timm and other libraries."""
import csv
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from tqdm import tqdm

from ..coverage import (
    COLUMNS,
    LIBRARIES,
    RESULTS,
    default_operations,
    operations,
    read_rows,
    run,
    summarise,
    write_rows,
)
from ..ops.checks import check_finite, check_int, check_positive
from .parser import ArgumentParser, fail, one_line_errors

__all__ = ['create_parser', 'main']

DESCRIPTION = """\
Convert every architecture of a library with every operation and write down what came of it, one CSV row per case.

Models up to --max-params million parameters are built, given a state such as training leaves (a fresh one hides errors:
its biases are 0 and its BatchNorm statistics 0 and 1) and compared with an unconverted copy on a probe batch. Larger
ones are converted on the meta device, without a comparison. A case runs in a process of its own, which is killed when
its time is up and replaced when it dies. Started again, the program goes on where it was stopped.
"""


def create_parser(prog: str = 'timm-dyacts coverage') -> ArgumentParser:
    """Make the parser of the command."""
    parser = ArgumentParser(prog=prog, description=DESCRIPTION)
    parser.add_argument('--output', type=Path, default=Path('coverage.csv'), metavar='FILE',
                        help='the table, continued if it exists (default: %(default)s)')
    parser.add_argument('--library', nargs='+', choices=LIBRARIES, default=['timm'], metavar='NAME',
                        help='of %(choices)s (default: timm)')
    parser.add_argument('--filter', nargs='+', default=['*'], metavar='PATTERN',
                        help='architectures, by name or wildcard (default: all)')
    parser.add_argument('--operations', nargs='+', choices=operations(), default=default_operations(), metavar='NAME',
                        help=f'of %(choices)s (default: {" ".join(default_operations())})')
    parser.add_argument('--max-params', type=float, default=60, metavar='MILLIONS',
                        help='larger architectures are not run, only converted (default: %(default)s)')
    parser.add_argument('--full-size', action='store_true',
                        help="probe at the size of the architecture's default config, not at a small one")
    parser.add_argument('--timeout', type=float, default=300, metavar='SECONDS',
                        help='limit for one case (default: %(default)s)')
    parser.add_argument('--workers', type=int, default=1, metavar='N', help='processes (default: %(default)s)')
    parser.add_argument('--retry', nargs='+', choices=RESULTS, default=[], metavar='RESULT',
                        help='do cases with these results again, of %(choices)s')
    parser.add_argument('--summary', action='store_true', help='print the summary of the table as Markdown, do no more')
    return parser


def main(argv: Sequence[str] | None = None, prog: str = 'timm-dyacts coverage') -> None:
    """Make or continue the table, or print its summary."""
    args = create_parser(prog).parse_args(argv)
    with one_line_errors(prog):
        try:
            _continue_table(args, prog)
        except OSError as e:
            fail(prog, f'--output {str(args.output)!r} cannot be read or written: {e}')


def _continue_table(args: Namespace, prog: str) -> None:
    check_int('--workers', args.workers, 1, 1024)
    check_positive('--timeout', args.timeout)
    if check_finite('--max-params', args.max_params) < 0:  # 0 builds none
        fail(prog, f'--max-params must be at least 0, got {args.max_params}')
    if args.summary:
        if not args.output.exists():
            fail(prog, f'--output must be an existing table, got {str(args.output)!r}')
        print(summarise(read_rows(args.output)))
        return

    networks = []
    for name in args.library:
        library = LIBRARIES[name]
        if not library.is_installed:
            fail(prog, f"--library {name} needs the package {library.package}: pip install 'timm-dyacts[downstream]'")
        found = [arch for arch in library.names() if any(fnmatchcase(arch, pattern) for pattern in args.filter)]
        if not found:
            fail(prog, f'--filter must match an architecture of {name}, got {" ".join(args.filter)}')
        networks += [(name, arch) for arch in found]
    cases = [(*network, operation) for network in networks for operation in args.operations]
    rows, wanted = read_rows(args.output), set(cases)
    kept = [row for row in rows if row['result'] not in args.retry or _case_of(row) not in wanted]
    done = {_case_of(row) for row in kept}
    write_rows(args.output, kept)

    todo = [case for case in cases if case not in done]
    threads = max(1, (os.cpu_count() or 1) // args.workers) if args.workers > 1 else None
    with (
        open(args.output, 'a', newline='') as f,
        tqdm(total=len(cases), initial=len(cases) - len(todo), unit='case', smoothing=0.05, disable=None) as bar,
    ):
        writer = csv.DictWriter(f, COLUMNS, lineterminator='\n')
        for row in run(todo, args.workers, args.timeout, args.max_params, args.full_size, threads):
            writer.writerow(row)
            f.flush()
            bar.set_postfix_str(row['architecture'])
            bar.update()


def _case_of(row: Mapping[str, str]) -> tuple[str, str, str]:
    return row['library'], row['architecture'], row['operation']
