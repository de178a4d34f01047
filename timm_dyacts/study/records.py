"""What a finished run came to, and where that is kept.

A run leaves its rows in a small file beside its folder, so that the folder may be removed, and in the CSV files of the
comparison, so that these alone are enough to go on with it elsewhere: what they hold is not trained again.
"""
import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch

from ..files import format_csv, replace_text
from ..options import declarations, plain, to_dict
from ..training import TrainConfig
from ..training.log import best_row
from ..training.resume import FREE_OPTIONS
from ..version import __version__
from .plan import Run

__all__ = [
    'METRICS',
    'VERSIONS',
    'Outcome',
    'Record',
    'read_kept',
    'read_values',
    'recipe_of',
    'write_epochs',
    'write_runs',
]

METRICS = ('top1', 'top5', 'loss')
VERSIONS = dict(timm_dyacts=__version__, timm=timm.__version__, torch=str(torch.__version__))

# What sets the runs of a comparison apart, or does not change what they come to
_NO_RECIPE = (FREE_OPTIONS - {'on_bad_image'}) | {'seed'}


def recipe_of(config: TrainConfig) -> str:
    """Give eight letters that stand for the options of a run, without its seed and its paths."""
    declared = declarations(TrainConfig)
    options = {
        name: value for name, value in to_dict(config).items()
        if name not in _NO_RECIPE and value != plain(declared[name].default)
    }
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Record:
    """What is kept of a run.

    Attributes:
        finished: Whether it came to its end.
        seconds: Time by the clock that its processes took so far.
        peak_mib: The most memory that its last process had (resident), None if unknown.
        recipe: See ``recipe_of``.
        rows: Of its ``summary.csv``, one per epoch.
        frozen: What it came to with frozen coefficients: for ``'last'`` or ``'best'``, ``'top1'``, ``'top5'`` and
            ``'loss'``.
        versions: Of the packages that it was trained with, by name.
    """
    finished: bool
    seconds: float
    peak_mib: float | None
    recipe: str
    rows: Sequence[Mapping[str, float]] = ()
    frozen: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=lambda: dict(VERSIONS))

    @classmethod
    def read(cls, run: Run) -> 'Record | None':
        """Read what ``write`` has written, None if there is nothing."""
        path = _record_path(run)
        return cls(**json.loads(path.read_text(encoding='utf-8'))) if path.is_file() else None

    def write(self, run: Run) -> None:
        """Write it, in one piece, beside the folder of the run."""
        replace_text(_record_path(run), json.dumps(asdict(self), indent=1) + '\n')


def _record_path(run: Run) -> Path:
    return run.folder.with_name(f'{run.folder.name}.json')


@dataclass(frozen=True)
class Outcome:
    """What a finished run came to.

    Attributes:
        run: The run.
        record: What is kept of it.
    """
    run: Run
    record: Record

    @property
    def rows(self) -> Sequence[Mapping[str, float]]:
        """One per epoch."""
        return self.record.rows

    def value(self, metric: str, at: str, best_by: str) -> tuple[int, float]:
        """Give an epoch and the metric there.

        Args:
            metric: ``'top1'``, ``'top5'`` or ``'loss'``.
            at: ``'last'`` or ``'best'``.
            best_by: The column that tells which epoch is the best.
        """
        row = self.rows[-1] if at == 'last' else best_row(list(self.rows), best_by)
        return int(row['epoch']), row[f'eval_{metric}']


def write_runs(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write rows, each with a ``model`` and a ``seed``, as CSV. Rows of other runs that are in the file stay in it."""
    keys = {(row['model'], str(row['seed'])) for row in rows}
    others = _read_csv(path) if path.is_file() else []
    others = [row for row in others if (row['model'], row['seed']) not in keys]
    columns = list(dict.fromkeys((*columns, *(name for row in others for name in row))))
    replace_text(path, format_csv([*rows, *others], columns))


def write_epochs(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Write ``epochs.csv``: a row for each epoch of each run."""
    rows = [
        dict(row, model=outcome.run.contender.label, seed=outcome.run.seed, epoch=int(row['epoch']))
        for outcome in outcomes for row in outcome.rows
    ]
    columns = dict.fromkeys(('model', 'seed', 'epoch', *(name for row in rows for name in row)))
    write_runs(path, rows, list(columns))


def read_kept(folder: Path) -> dict[tuple[str, int], Record]:
    """Read the runs in ``compare.csv`` and ``epochs.csv``, by label and seed; none where a file is missing.

    Raises:
        ValueError: A file holds something else.
    """
    if not (folder / 'compare.csv').is_file() or not (folder / 'epochs.csv').is_file():
        return {}
    try:
        epochs: dict[tuple[str, int], list[dict[str, float]]] = {}
        for row in _read_csv(folder / 'epochs.csv'):
            key = row.pop('model'), int(row.pop('seed'))
            epochs.setdefault(key, []).append({name: float(value) for name, value in row.items() if value != ''})
        kept = {}
        for row in _read_csv(folder / 'compare.csv'):
            key = row['model'], int(row['seed'])
            if key in epochs:
                peak = float(row['peak_mib']) if row['peak_mib'] else None
                frozen = {}
                if row['frozen_at']:
                    frozen[row['frozen_at']] = {name: float(row[f'frozen_{name}']) for name in METRICS}
                versions = {name: row[name] for name in VERSIONS}
                kept[key] = Record(
                    True, float(row['seconds']), peak, row['recipe'], epochs[key], frozen, versions)
        return kept
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(
            f'compare.csv and epochs.csv in {folder} must be as compare writes them ({type(e).__name__}: {e}).') from e


def read_values(path: Path, metric: str, at: str) -> dict[str, dict[int, float]]:
    """Read a metric from a ``compare.csv``: for each model, in order, the value of each seed.

    Args:
        path: The file.
        metric: ``'top1'``, ``'top5'`` or ``'loss'``.
        at: ``'last'``, ``'best'`` or ``'frozen'``. Of a model without frozen coefficients there is nothing.
    """
    values: dict[str, dict[int, float]] = {}
    for row in _read_csv(path):
        if row[f'{at}_{metric}']:
            values.setdefault(row['model'], {})[int(row['seed'])] = float(row[f'{at}_{metric}'])
    return values


def _read_csv(path: Path) -> list[dict[str, Any]]:
    with open(path, newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))
