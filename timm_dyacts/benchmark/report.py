"""The results of a benchmark: a table on the screen, a CSV, a chart."""
import datetime
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch

from ..files import format_csv, write_output
from ..plotting import BLUE, GREY, create_figure, save_figure, style_axes
from ..version import __version__
from .measure import Row

__all__ = ['COLUMNS', 'Report', 'describe_environment']

COLUMNS = ('name', 'shape', 'layout', 'dtype', 'measured', 'variant', 'milliseconds', 'floor_ratio', 'bytes_ratio',
           'peak_mib', 'nodes', 'difference', 'device', 'torch', 'timm', 'timm_dyacts', 'date')
# The bars of the chart, in their order; the floor is the line at 1.
_BAR_COLORS = {'ours': BLUE, 'compiled': '#8fbfe0', 'onnx': '#1b4f72', 'floor_compiled': '#d9d9d9', 'literal': GREY}
# Columns of the printed table: (key, heading, width) and, of numbers, their format
_TEXTS = (('name', '', 26), ('shape', 'shape', 20), ('layout', 'layout', 15), ('dtype', 'dtype', 6),
          ('measured', 'measured', 18), ('variant', 'variant', 16))
_NUMBERS = (('milliseconds', 'ms', 9, '.2f'), ('floor_ratio', 'floor', 8, '.2f'), ('bytes_ratio', 'bytes', 8, '.2f'),
            ('peak_mib', 'MiB', 8, '.2f'))
# Further ones, for what is a graph
_GRAPH_NUMBERS = (('nodes', 'nodes', 8, 'd'), ('difference', 'diff', 9, '.0e'))


def describe_environment(device: torch.device) -> dict[str, str]:
    """Give the columns that say where and when a row was measured."""
    return dict(
        device=_describe_device(device),
        torch=torch.__version__,
        timm=timm.__version__,
        timm_dyacts=__version__,
        date=datetime.datetime.now(datetime.timezone.utc).strftime('%Y-%m-%d'),
    )


def _describe_device(device: torch.device) -> str:
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    if device.type != 'cpu':
        return device.type
    name = f'CPU {platform.machine()}'
    cpuinfo = Path('/proc/cpuinfo')
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next((line.split(': ')[1] for line in lines if 'model name' in line), name)
    return f'{name}, {torch.get_num_threads()} thread(s)'


@dataclass
class Report:
    """Collects rows as they are measured: prints each at once, saves and draws all of them at the end.

    Attributes:
        device: Where they are measured.
        rows: All that came so far.
    """
    device: torch.device
    rows: list[Row] = field(default_factory=list)

    def add(self, rows: Iterable[Row]) -> None:
        """Take rows one by one and print each."""
        for row in rows:
            columns = _NUMBERS + (_GRAPH_NUMBERS if 'nodes' in row else ())
            row = dict(nodes=None, difference=None) | row
            self.rows.append(row | describe_environment(self.device))
            if len(self.rows) == 1:
                print(''.join(f'{heading:{width}}' for _, heading, width in _TEXTS)
                      + ''.join(f'{heading:>{width}}' for _, heading, width, _ in columns))
            texts = ''.join(f'{row[key]:{width}}' for key, _, width in _TEXTS)
            numbers = ''.join(
                ' ' * width if row[key] is None else f'{row[key]:{width}{form}}' for key, _, width, form in columns)
            print(texts + numbers, flush=True)

    def save(self, path: Path) -> None:
        """Write the rows as CSV and, beside it, the chart as PNG."""
        write_output(path, format_csv(self.rows, COLUMNS))
        self.draw(path.with_suffix('.png'))
        print(f'{path} and {path.with_suffix(".png").name} written')

    def draw(self, path: Path) -> None:
        """Draw the times relative to the floor, the median over shapes, layouts and dtypes."""
        measured = list(dict.fromkeys(row['measured'] for row in self.rows))
        names = list(dict.fromkeys(row['name'] for row in self.rows))
        first = self.rows[0]
        figure = create_figure(
            11, 1.4 + 0.45 * len(names),
            f'Time relative to the plain operator or base model\n{first["device"]}, torch {first["torch"]}, '
            f'{first["date"]}',
            dpi=150,
        )
        for ax, what in zip(figure.subplots(1, len(measured), sharey=True, squeeze=False)[0], measured, strict=True):
            _draw_ratios(ax, [row for row in self.rows if row['measured'] == what], names)
            ax.set_title(what, fontsize=9)
        ax.legend(frameon=False, loc='best')
        save_figure(figure, path)


def _draw_ratios(ax: Any, rows: Sequence[Row], names: Sequence[str]) -> None:
    variants = [variant for variant in _BAR_COLORS if any(row['variant'] == variant for row in rows)]
    height = 0.8 / max(len(variants), 1)
    for i, variant in enumerate(variants):
        ratios = [[r['floor_ratio'] for r in rows if (r['name'], r['variant']) == (name, variant)] for name in names]
        places = [n + (i - (len(variants) - 1) / 2) * height for n in range(len(names))]
        medians = [statistics.median(values) if values else 0 for values in ratios]
        bars = ax.barh(places, medians, height, color=_BAR_COLORS[variant], label=variant)
        ax.bar_label(bars, [f'{median:.2f}' if median else '' for median in medians], fontsize=7, padding=2)
    ax.axvline(1, color='black', linewidth=0.8)
    ax.set_yticks(range(len(names)), names)
    ax.set_xlabel('ratio (1: the plain one)')
    ax.margins(x=0.12)
    if not ax.yaxis_inverted():
        ax.invert_yaxis()
    style_axes(ax, grid='x')
