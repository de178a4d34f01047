#!/usr/bin/env python3
"""Converts every timm architecture with every operation and writes down what came of it, one CSV row per case.

Models up to --max-params million parameters are built, given a state such as training leaves (a fresh one hides errors:
its biases are 0 and its BatchNorm statistics 0 and 1) and compared with an unconverted copy on a probe batch. Larger
ones are converted on the meta device, without a comparison. A case runs in a process of its own, which is killed when
its time is up and replaced when it dies. Started again, the script goes on where it was stopped.
"""
import argparse
import copy
import csv
import functools
import io
import math
import multiprocessing
import os
import signal
import statistics
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from timm_dyacts import ConversionError, convert
from timm_dyacts.files import format_csv, replace_text

OPERATIONS = dict(
    dyrelu_b=dict(act='dyrelu_b'),
    brelu=dict(act='brelu'),
    softpool=dict(pool='softpool'),
    nobn=dict(norm='none'),
    # Only when asked for: what the other start of Dynamic ReLU gains where it cannot be the activation replaced
    dyrelu_b_fit=dict(act='dyrelu_b', start='fit'),
    dyrelu_b_fit_k3=dict(act='dyrelu_b', start='fit', act_kwargs=dict(k=3)),
)
DEFAULT_OPERATIONS = ('dyrelu_b', 'brelu', 'softpool', 'nobn')

# What the forward pass has to call for an architecture to contain what an operation replaces. These are names of
# torch's functions, seen from outside: `convert`, which finds its candidates in another way, is what is measured.
RELUS = frozenset({'relu', 'relu_', 'relu6'})
ACTIVATIONS = RELUS | {
    'celu', 'elu', 'gelu', 'hardswish', 'hardtanh', 'leaky_relu', 'mish', 'prelu', 'rrelu', 'selu', 'silu', 'softplus',
}
REPLACED = dict.fromkeys(OPERATIONS, ACTIVATIONS) | dict(
    softpool={'max_pool2d', 'max_pool2d_with_indices'}, nobn={'batch_norm'})
GATES = frozenset({'HardSigmoid', 'HardSigmoidMe', 'Sigmoid', 'Tanh'})
ATTENTION = frozenset({'__matmul__', 'bmm', 'einsum', 'matmul', 'scaled_dot_product_attention'})

COLUMNS = (
    'architecture', 'operation', 'contains', 'relu_cnn', 'result', 'replaced', 'skipped', 'remaining', 'difference',
    'reason')
RESULTS = ('exact', 'approximate', 'refused', 'absent', 'error', 'timeout')
TOLERANCE = 1e-4  # of the largest output; rounding in single precision stays below it

Row = dict[str, Any]


# One case


class Survey(TorchFunctionMode):
    """Counts torch's functions, and timm's activation modules, that run while it is active."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.calls = Counter()
        self.handles = [
            module.register_forward_hook(lambda m, *_: self.calls.update(['timm activation']))
            for module in model.modules()
            if type(module).__module__.startswith('timm.layers.activations') and type(module).__name__ not in GATES
        ]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, '__name__', '')
        if name == 'hardtanh' and args[1:3] == (0, 6):  # torch's ReLU6 is one
            name = 'relu6'
        elif name == 'batch_norm' and args[1] is None:  # without statistics: timm standardises weights with it
            name = 'standardisation'
        self.calls[name] += 1
        return func(*args, **(kwargs or {}))

    def __exit__(self, *exception):
        for handle in self.handles:
            handle.remove()
        return super().__exit__(*exception)

    def count(self, functions: Iterable[str]) -> int:
        return sum(self.calls[name] for name in functions)

    def contains(self, operation: str) -> bool:
        found = self.count(REPLACED[operation])
        return found > 0 or REPLACED[operation] is ACTIVATIONS and self.calls['timm activation'] > 0

    def is_relu_cnn(self) -> bool:
        """Whether ReLU and ReLU6 are the only activations, and convolutions most of the rest."""
        others = self.count(ACTIVATIONS - RELUS) + self.calls['timm activation']
        products = self.calls['linear'] + self.count(ATTENTION)
        return self.count(RELUS) > 0 and not others and self.calls['conv2d'] > products


@torch.no_grad()
def trained_like_(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Give a model parameters and statistics such as training leaves, in place. ``x`` settles the statistics.

    They are those of the batch: with statistics, or with scales above 1, drawn at will a deep network becomes chaotic.
    It amplifies the rounding of a single operation to the size of its outputs, and no comparison tells anything.
    """
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            continue
        if name.endswith('weight'):
            signs = 1 - 2 * (torch.rand(p.shape, generator=generator) < 0.1).float()
            p.copy_(signs * (0.1 + 0.5 * torch.rand(p.shape, generator=generator)))
        else:
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average
    if norms:
        model.train()
        model(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def input_sizes(model: nn.Module, full_size: bool) -> list[tuple[int, int, int]]:
    """The sizes to try for the probe batch, the smallest first."""
    cfg = model.pretrained_cfg
    channels, height, width = cfg['input_size']
    full = (channels, height, width)
    small = (channels, min(height, 96), min(width, 96))
    return [full] if full_size or cfg.get('fixed_input_size') or small == full else [small, full]


@functools.lru_cache(maxsize=1)
def reference(name: str, max_params: float, full_size: bool) -> tuple[nn.Module, torch.Tensor, Any, Survey]:
    """The architecture as if trained (on the meta device where it is too large), a probe batch, its output, a survey.

    The operations on one architecture come one after the other and share this.
    """
    with torch.device('meta'):
        model = timm.create_model(name).eval()
    is_large = sum(p.numel() for p in model.parameters()) > max_params * 1e6
    if not is_large:
        torch.manual_seed(0)
        model = timm.create_model(name)
    *smaller, full = input_sizes(model, full_size)
    for size in (*smaller, full):
        x = torch.randn(4, *size, generator=torch.Generator().manual_seed(1))
        try:
            if is_large:
                x = x[:2].to('meta')
            else:
                trained_like_(model, x)
                x = x[:2].flip(-1)  # not what settled the statistics
            with torch.no_grad(), Survey(model) as survey:
                return model, x, model(x), survey
        except (AssertionError, RuntimeError, ValueError):  # too small for this architecture
            if size == full:
                raise
    raise AssertionError('unreachable')


def measure(name: str, operation: str, max_params: float, full_size: bool) -> Row:
    """The row of one case."""
    row = dict.fromkeys(COLUMNS, '') | dict(architecture=name, operation=operation)
    try:
        base, x, expected, survey = reference(name, max_params, full_size)
        contains = survey.contains(operation)
        row |= dict(contains=int(contains), relu_cnn=int(survey.is_relu_cnn()))
        model = convert(copy.deepcopy(base), **OPERATIONS[operation])
        report = model.conversion
        row |= dict(result=report.function, replaced=len(report.replaced), skipped=len(report.skipped))
        with torch.no_grad(), Survey(model) as after:
            output = model(x)
        if operation == 'nobn':  # the others' new modules call functions such as they replace
            row['remaining'] = after.count(REPLACED[operation])
        if not x.is_meta:
            if report.flipped_output:
                row['reason'], output, expected = '; '.join(report.notes), output.abs(), expected.abs()
            moved = difference(output, expected)
            if report.function == 'exact' and not moved <= TOLERANCE:
                row['reason'] = f'in double precision, since rounding is amplified; {moved:.2g} in single'
                moved = difference_in_double(base, x, operation)
                if not moved <= TOLERANCE:
                    row |= dict(result='error', reason='reported as exact, but the outputs differ')
            row['difference'] = f'{moved:.2g}'
    except ConversionError as e:
        is_absent = row['contains'] == 0 and str(e).startswith('Nothing in this model can be replaced')
        row |= dict(result='absent') if is_absent else dict(result='refused', reason=str(e))
    except Exception as e:  # whatever a model or its conversion may raise is a finding
        frame = traceback.extract_tb(e.__traceback__)[-1]
        where = f'{Path(frame.filename).name}:{frame.lineno}'
        row |= dict(result='error', reason=f'{type(e).__name__} at {where}: {e}')
    row['reason'] = ' '.join(row['reason'].split())[:500]
    return row


def difference(output: Any, expected: Any) -> float:
    """Largest absolute difference, relative to the largest absolute element expected."""
    pairs = list(zip(tree_leaves(output), tree_leaves(expected), strict=True))
    scale = max(b.abs().max().item() for _, b in pairs)
    return max((a - b).abs().max().item() for a, b in pairs) / scale


def difference_in_double(base: nn.Module, x: torch.Tensor, operation: str) -> float:
    model, x = copy.deepcopy(base).double(), x.double()
    with torch.no_grad():
        expected = model(x)
        return difference(convert(model, **OPERATIONS[operation])(x), expected)


# Processes


def serve(connection: Connection, max_params: float, full_size: bool, threads: int | None) -> None:
    """What a worker does: receive cases, send rows."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    with suppress(OSError):  # where memory gets short, Linux is to choose a worker, not the parent
        Path('/proc/self/oom_score_adj').write_text('1000')
    if threads:
        torch.set_num_threads(threads)
    connection.send('ready')
    with suppress(EOFError, BrokenPipeError):  # the parent is gone
        while True:
            connection.send(measure(*connection.recv(), max_params, full_size))


class Worker:
    """A process for one case at a time, and the cases of the architecture that it is at."""

    def __init__(self, timeout: float, *settings: Any):
        self.timeout = timeout
        self.settings = settings
        self.cases: deque[tuple[str, str]] = deque()
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context('spawn')
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, *self.settings), daemon=True)
        self.process.start()
        theirs.close()
        if self.receive() != 'ready':
            raise RuntimeError(f'A worker could not start (exit code {self.process.exitcode}).')
        self.deadline = float('inf')

    def assign(self, cases: Iterable[tuple[str, str]]) -> None:
        self.cases.extend(cases)
        self.next()

    def next(self) -> None:
        if self.cases:
            with suppress(BrokenPipeError):  # a death that `collect` will see
                self.connection.send(self.cases[0])
            self.deadline = time.monotonic() + self.timeout

    def receive(self) -> Any:
        """What the process sent, ``None`` if it died."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            return None

    def collect(self) -> Row | None:
        """The row of the current case if there is one now. On to the next case then."""
        if self.connection.poll():
            row = self.receive() or self.failure('error', f'the process died (exit code {self.process.exitcode})')
        elif time.monotonic() >= self.deadline:
            row = self.failure('timeout', f'more than {self.timeout:g} s')
        else:
            return None
        self.cases.popleft()
        if not self.process.is_alive():
            self.start()
        self.next()
        return row

    def failure(self, result: str, reason: str) -> Row:
        self.stop()
        name, operation = self.cases[0]
        return dict.fromkeys(COLUMNS, '') | dict(
            architecture=name, operation=operation, result=result, reason=reason)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def run(cases: list[tuple[str, str]], workers: int, timeout: float, *settings: Any) -> Iterator[Row]:
    """The rows of the cases, as they are done."""
    architectures: dict[str, list[tuple[str, str]]] = {}
    for case in cases:
        architectures.setdefault(case[0], []).append(case)
    todo = deque(architectures.values())
    team = [Worker(timeout, *settings) for _ in range(min(workers, len(todo)))]
    try:
        while True:
            for worker in team:
                if not worker.cases and todo:
                    worker.assign(todo.popleft())
            busy = [worker for worker in team if worker.cases]
            if not busy:
                return
            soonest = min(worker.deadline for worker in busy)
            wait([worker.connection for worker in busy], max(0, soonest - time.monotonic()))
            for worker in busy:
                row = worker.collect()
                if row:
                    yield row
    finally:
        for worker in team:
            worker.stop()


# The table


def read_rows(path: Path) -> list[Row]:
    """The rows of a table, less a last one that was cut off in the middle."""
    if not path.exists():
        return []
    text = path.read_text()
    return list(csv.DictReader(io.StringIO(text[:text.rfind('\n') + 1])))


def write_rows(path: Path, rows: list[Row]) -> None:
    replace_text(path, format_csv(rows, COLUMNS))


def summary(rows: list[Row]) -> str:
    """A Markdown table: of the architectures that contain what an operation replaces, how many convert."""
    def share(part: list[Row], whole: list[Row], text: str = '{}') -> str:
        return text.format(len(part), len(whole)) + (f' ({len(part) / len(whole):.1%})' if whole else '')

    lines = [
        '| operation | architectures that contain it | convert | exactly | of the ReLU/ReLU6 CNNs exactly '
        '| median difference of the others | refused | error or timeout |',
        '| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |',
    ]
    for operation in OPERATIONS:
        if not any(row['operation'] == operation for row in rows):
            continue
        contain = [row for row in rows if row['operation'] == operation and row['contains'] != '0']
        relu = [row for row in contain if row['relu_cnn'] == '1']
        moved = [float(row['difference'] or 'nan') for row in contain if row['result'] == 'approximate']
        moved = [value for value in moved if math.isfinite(value)]  # chaotic networks overflow
        having = {result: [row for row in contain if row['result'] == result] for result in RESULTS}
        lines.append('| ' + ' | '.join((
            f'`{operation}`',
            str(len(contain)),
            share(having['exact'] + having['approximate'], contain),
            share(having['exact'], contain),
            share([row for row in having['exact'] if row in relu], relu, '{} of {}'),
            f'{statistics.median(moved):.2g}' if moved else '',
            str(len(having['refused'])),
            str(len(having['error']) + len(having['timeout'])),
        )) + ' |')
    return '\n'.join(lines)


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--output', type=Path, default=Path('coverage.csv'), metavar='FILE',
                        help='the table, continued if it exists (default: %(default)s)')
    parser.add_argument('--filter', nargs='+', default=['*'], metavar='PATTERN',
                        help='architectures, by name or wildcard (default: all)')
    parser.add_argument('--operations', nargs='+', choices=OPERATIONS, default=list(DEFAULT_OPERATIONS),
                        metavar='NAME', help=f'of %(choices)s (default: {" ".join(DEFAULT_OPERATIONS)})')
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


def main() -> None:
    args = create_parser().parse_args()
    if args.workers < 1:
        sys.exit(f'coverage.py: error: --workers must be at least 1, got {args.workers}')
    if args.summary:
        if not args.output.exists():
            sys.exit(f'coverage.py: error: --output must be an existing table, got {str(args.output)!r}')
        print(summary(read_rows(args.output)))
        return

    ours = set(timm.list_models(module='zoo'))
    names = [name for name in timm.list_models(args.filter) if name not in ours]
    if not names:
        sys.exit(f'coverage.py: error: --filter must match an architecture of timm, got {" ".join(args.filter)}')
    cases = [(name, operation) for name in names for operation in args.operations]
    rows = read_rows(args.output)
    kept = [row for row in rows
            if row['result'] not in args.retry or (row['architecture'], row['operation']) not in set(cases)]
    done = {(row['architecture'], row['operation']) for row in kept}
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


if __name__ == '__main__':
    main()
