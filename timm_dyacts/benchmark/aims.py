"""What the project has set itself: bounds on what is measured."""
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..operators import benchmarks
from .measure import LAYOUTS, VARIANTS, Clock, Row, measure_models, measure_operator
from .onnx_models import measure_onnx, require_onnxruntime
from .report import Report

__all__ = ['PARTS', 'RESNETS', 'Aim', 'list_aims', 'measure_aims', 'print_aims']

# What is measured for the aims: compiled models on CUDA only, ONNX graphs on CPUs only
PARTS = ('operators', 'models', 'compiled-models', 'onnx')
# A base and a variant of each kind
RESNETS = ('resnet50', 'resnet50_softpool', 'resnet50_brelu', 'resnet50_dyrelu_b')

_BOTH = 'forward+backward'
# Networks of which Dynamic ReLU is a large part
_LIGHT = ('tf_efficientnet_lite0', 'mobilenetv2_100', 'mobilenetv3_large_100')


@dataclass(frozen=True)
class Aim:
    """An upper bound of a ratio.

    Attributes:
        name: Operator or model.
        measured: What is bounded: ``'forward'``, ``'forward+backward'``, ``'training step'`` or ``'inference'``.
        against: What the ratio is taken to: ``'floor'`` (the time of the plain operator or base model), ``'bytes'``
            (the time that the machine needs to move the operator's bytes), ``'memory'`` (that of the floor) or
            ``'literal'`` (the time of the literal definition).
        bound: Largest ratio that meets the aim.
        variant: Variant that it is about.
    """
    name: str
    measured: str
    against: str
    bound: float
    variant: str = 'ours'

    def worst(self, rows: Iterable[Row]) -> float | None:
        """Give the largest ratio measured, ``None`` if there is none."""
        rows = list(rows)
        own = [row for row in rows if (row['name'], row['measured'], row['variant']) == (
            self.name, self.measured, self.variant)]
        ratios = (self._ratio(row, rows) for row in own)
        return max((ratio for ratio in ratios if ratio is not None), default=None)

    def _ratio(self, row: Row, rows: Sequence[Row]) -> float | None:
        if self.against in ('floor', 'bytes'):
            return row[f'{self.against}_ratio']
        same = [r for r in rows if all(r[key] == row[key] for key in ('shape', 'layout', 'dtype', 'measured'))]
        if self.against == 'literal':
            partner = next(r for r in same if (r['name'], r['variant']) == (row['name'], 'literal'))
            return row['milliseconds'] / partner['milliseconds']
        # The plain operator has the name of the operator, a base the first part of the variant's.
        partner = next(r for r in same if r['floor_ratio'] == 1 and row['name'].startswith(r['name']))
        # There are machines that do not count it, and models that are too small for it.
        return row['peak_mib'] / partner['peak_mib'] if partner['peak_mib'] else None


def list_aims(device_type: str) -> list[Aim]:
    """Give the aims for ``'cuda'`` or ``'cpu'``."""
    if device_type == 'cpu':
        return [
            *(Aim(name, measured, 'floor', bound, variant)
              for name, variant, *bounds in (
                  ('dyrelu_b', 'ours', 1.2, 1.25), ('dyrelu_b', 'compiled', 1.1, 1.3),
                  ('softpool_2x2', 'ours', 0.15, 0.5), ('softpool_2x2', 'compiled', 0.15, 0.5),
                  ('softpool_3x3', 'ours', 0.3, 0.7), ('brelu', 'ours', 1.05, 1.05))
              for measured, bound in zip(('forward', _BOTH), bounds, strict=True)),
            *(Aim(name, measured, 'floor', bound)
              for name, *bounds in (
                  ('resnet50_softpool', 1.0, 1.0), ('resnet50_brelu', 1.02, 1.02), ('resnet50_dyrelu_b', 1.08, 1.05),
                  *((f'{base}_dyrelu_b', 1.2, 1.35) for base in _LIGHT))
              for measured, bound in zip(('training step', 'inference'), bounds, strict=True)),
            *(Aim(name, 'training step', 'memory', 1.05)
              for name in (*RESNETS[1:], *(f'{base}_dyrelu_b' for base in _LIGHT))),
            *(Aim(name, 'inference', 'floor', bound, 'onnx') for name, bound in (
                ('resnet50_dyrelu_b', 1.1), ('resnet50_softpool', 1.05), ('mobilenetv2_100_dyrelu_b', 1.25))),
        ]
    return [
        *(Aim(name, measured, 'bytes', 1.15) for name in benchmarks() for measured in ('forward', _BOTH)),
        Aim('brelu', _BOTH, 'floor', 1.05),
        Aim('dyrelu_b', _BOTH, 'floor', 1.8),
        Aim('softpool_2x2', _BOTH, 'floor', 1.0),
        *(Aim(name, _BOTH, 'memory', 1.05) for name in ('brelu', 'dyrelu_b', 'softpool_2x2')),
        Aim('dyrelu_b', _BOTH, 'literal', 1 / 5),
        Aim('softpool_2x2', _BOTH, 'literal', 1 / 3),
        *(Aim(name, 'training step', 'floor', bound, variant)
          for name, bound in (('resnet50_softpool', 1.03), ('resnet50_brelu', 1.03), ('resnet50_dyrelu_b', 1.15),
                              ('mobilenetv2_100_dyrelu_b', 1.25))
          for variant in ('ours', 'compiled')),
    ]


def measure_aims(parts: Sequence[str], clock: Clock, report: Report) -> None:
    """Measure what there are aims for on the device of the clock.

    Args:
        parts: Which of ``PARTS``. On CPUs there are no aims for compiled models, and those for ONNX graphs need
            onnxruntime; on CUDA there are none for ONNX graphs.
        clock: What measures.
        report: What takes the rows.
    """
    if clock.device.type == 'cpu':
        if 'operators' in parts:
            for name in ('dyrelu_b', 'softpool_2x2', 'softpool_3x3', 'brelu'):
                report.add(measure_operator(name, (32, 64, 112, 112), 'contiguous', 'fp32', VARIANTS, clock))
        if 'models' in parts:
            groups = (*((base, f'{base}_dyrelu_b') for base in _LIGHT), RESNETS)
            for size, layout, dtype, models in itertools.product((96, 224), LAYOUTS, ('fp32', 'bf16'), groups):
                report.add(measure_models(models, 32, size, layout, dtype, False, clock))
        if 'onnx' in parts:
            _measure_onnx_aims(clock, report)
        return
    if 'operators' in parts:
        # 64 MiB in bf16, and more
        for shape in ((168, 64, 56, 56), (64, 256, 112, 112)):
            for layout in LAYOUTS:
                for dtype in ('bf16', 'fp32'):
                    for name in benchmarks():
                        report.add(measure_operator(name, shape, layout, dtype, ('floor', 'ours', 'literal'), clock))
    for part in ('models', 'compiled-models'):
        if part in parts:
            for models in (RESNETS, ('mobilenetv2_100', 'mobilenetv2_100_dyrelu_b')):
                report.add(measure_models(
                    models, 256, 224, 'channels_last', 'bf16', part == 'compiled-models', clock, ('training step',)))


def _measure_onnx_aims(clock: Clock, report: Report) -> None:
    try:
        require_onnxruntime()
    except ImportError as e:
        print(e)
        return
    for models in (('resnet50', 'resnet50_softpool', 'resnet50_dyrelu_b'),
                   ('mobilenetv2_100', 'mobilenetv2_100_dyrelu_b')):
        report.add(measure_onnx(models, (1, 8), 224, clock))


def print_aims(aims: Iterable[Aim], rows: Sequence[Row]) -> None:
    """Print a line for each aim: the bound, what was measured, whether that is within the bound."""
    print()
    for aim in aims:
        worst = aim.worst(rows)
        verdict = 'not measured' if worst is None else 'met' if worst <= aim.bound else 'MISSED'
        ratio = '' if worst is None else f'{worst:.2f}'
        print(f'{aim.name:26}{aim.measured:18}{aim.variant:10}{aim.against:8}<= {aim.bound:<6.3g}{ratio:>7}  {verdict}')
