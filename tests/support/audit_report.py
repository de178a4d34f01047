"""The audit of the Triton kernels as Markdown."""
import contextlib
import io
import math
from collections.abc import Iterable
from typing import Any

from support.audit import PASSES, SHAPES, predict, predict_models
from support.roofline import GPUS
from timm_dyacts.benchmark import list_aims, print_aims
from timm_dyacts.operators import benchmarks

__all__ = ['print_report']

_MODELS = (
    ('resnet50', 'resnet50_softpool', 'resnet50_brelu', 'resnet50_dyrelu_b'),
    ('mobilenetv2_100', 'mobilenetv2_100_dyrelu_b'),
)


def print_report(counted: dict, memory: dict, compiled: dict[int, dict]) -> None:
    """Print all tables.

    Args:
        counted: What ``audit.count_cases`` gives.
        memory: What ``audit.peak_bytes`` gives for each case.
        compiled: What ``audit.compile_cases`` gives for each architecture.
    """
    print('# Audit of the Triton kernels\n')
    print('## Bytes\n\nMoved: different bytes of each launch, between memory and caches. Issued: of all accesses, '
          'between caches and\nregisters. Both in multiples of the bytes that the operator has to move.\n')
    _print_table(('operator', 'layout', 'dtype', 'pass', 'moved', 'issued', 'launches'), _byte_rows(counted))
    print('\n## Compiled code\n\nWidths in bytes of loads and stores, with their number in the code; instructions of '
          'all threads per element of the\ninput, which is 168x64x56x56. Kernels that see no element of it are listed '
          'where they spill.\n')
    columns = ('kernel', 'operator', 'layout', 'dtype', 'loads', 'stores')
    columns += tuple(f'sm_{arch} {what}' for arch in compiled for what in ('registers', 'stack', 'instructions'))
    _print_table(columns, _kernel_rows(counted, compiled))
    print('\n## Prediction\n\nTime, in multiples of that in which the memory moves the bytes that the operator has to '
          'move, and what bounds the\nlaunches that take the most of it.\n')
    rows = {gpu: list(predict(counted, compiled[gpu.arch], memory, gpu)) for gpu in GPUS}
    _print_table(
        ('operator', 'shape', 'layout', 'dtype', 'measured', *(gpu.name for gpu in GPUS)), _prediction_rows(rows))
    print('\n## Aims, as predicted\n\nWhat torch.compile makes is not predicted.\n')
    for gpu in GPUS:
        models = [row for names in _MODELS for row in predict_models(names, counted, compiled[gpu.arch], gpu)]
        with contextlib.redirect_stdout(io.StringIO()) as out:
            print_aims([aim for aim in list_aims('cuda') if aim.variant == 'ours'], [*rows[gpu], *models])
        print(f'{gpu.name}:\n\n```text{out.getvalue()}```\n')


def _print_table(columns: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> None:
    print(f'| {" | ".join(columns)} |\n|{"---|" * len(columns)}')
    for row in rows:
        print(f'| {" | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row)} |')


def _byte_rows(counted: dict) -> Iterable[tuple[Any, ...]]:
    for case, of_case in counted.items():
        benchmark = benchmarks()[case.name]
        item = {'bf16': 2, 'fp32': 4}[case.dtype]
        for key, factor in zip(PASSES, (benchmark.forward_bytes, benchmark.backward_bytes), strict=True):
            bound, launches = factor * item * of_case.elements, of_case.ours[key]
            bytes_of = (sum(getattr(launch, what) for launch in launches) / bound for what in ('moved', 'issued'))
            yield (*case, key, *bytes_of, len(launches))


def _kernel_rows(counted: dict, compiled: dict[int, dict]) -> Iterable[tuple[Any, ...]]:
    seen = set()
    elements = math.prod(SHAPES[0])
    first = next(iter(compiled.values()))
    for case, of_case in counted.items():
        for key in PASSES:
            # What is counted may be too small to be cut: what joins parts is then not launched, and moves little.
            moved = dict(enumerate(
                launch.moved / of_case.elements for launch in of_case.ours[key] if launch.programs))
            for i, (kernel, _) in enumerate(first[case, SHAPES[0]][key]):
                here = [passes[case, SHAPES[0]][key][i] for passes in compiled.values()]
                figures = [
                    figure for of_arch, programs in here for figure in (
                        of_arch.registers, of_arch.stack,
                        round(of_arch.instructions['all'] * of_arch.threads * programs / elements, 1))
                ]
                name = case.name.rstrip('abc').rstrip('_') if kernel.name.startswith('_coef') else case.name
                widths = _widths(kernel.loads), _widths(kernel.stores)
                row = (kernel.name, name, case.layout, case.dtype, *widths, *figures)
                spills = any(of_arch.stack for of_arch, _ in here)
                if (moved.get(i, 0) > 0.5 or spills) and row not in seen:
                    seen.add(row)
                    yield row


def _widths(widths: dict[int, int]) -> str:
    return ' '.join(f'{width}x{count}' for width, count in widths.items())


def _prediction_rows(rows: dict) -> Iterable[tuple[Any, ...]]:
    for of_all in zip(*rows.values(), strict=True):
        row = of_all[0]
        if row['variant'] == 'ours':
            yield (*(row[key] for key in ('name', 'shape', 'layout', 'dtype', 'measured')),
                   *(f'{of_gpu["bytes_ratio"]:.2f} {of_gpu["bounds"]}' for of_gpu in of_all))
