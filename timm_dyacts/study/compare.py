"""``compare``: train a base and its variants with the same seeds, and write down what came of it."""
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from tqdm import tqdm

from ..files import format_csv, replace_text
from ..options import declarations
from ..plotting import require_matplotlib
from ..training import TrainConfig
from ..version import __version__
from .config import CompareConfig
from .cost import measure_costs
from .plan import Contender, Run, parse_contenders, plan_runs
from .report import Cost, describe, draw_comparison, draw_curves, write_table
from .runs import Outcome, config_of, execute
from .statistics import Summary, compare_to_first

__all__ = ['COLUMNS', 'ComparisonResult', 'compare']

COLUMNS = (
    'model', 'seed', 'epochs', 'last_top1', 'last_top5', 'last_loss', 'best_epoch', 'best_top1', 'best_top5',
    'best_loss', 'seconds', 'peak_mib', 'params', 'macs', 'step_seconds', 'batch_size', 'timm_dyacts', 'timm', 'torch',
)


@dataclass(frozen=True)
class ComparisonResult:
    """What a comparison found.

    Attributes:
        folder: Where it is: ``compare.csv``, ``compare.md``, ``compare.png``, ``curves.png``, and the run folders.
        summaries: The models, the one that the others are compared with first.
        sentences: One for each of the others.
    """
    folder: Path
    summaries: Sequence[Summary]
    sentences: Sequence[str]


def compare(config: CompareConfig, **train_options: Any) -> ComparisonResult:
    """Train each model with each seed, and compare them with the first, seed by seed.

    Seeds come one after the other and within each the models, so that wherever it is stopped there are about as many
    runs of each. Called again it goes on: finished runs are taken as they are, others resumed.

    Args:
        config: What is compared.
        **train_options: Options of ``TrainConfig`` for all runs.

    Raises:
        ImportError: matplotlib or SciPy is missing.
        RunError: A run failed.
        ValueError: An option is out of range, or cannot be used here.
    """
    require_matplotlib()
    _require_scipy()
    folder = Path(config.output, config.experiment)
    contenders = parse_contenders(config.models, declarations(TrainConfig))
    if len(contenders) < 2:
        raise ValueError(f'models (--models) must be at least two, got {contenders[0].label}.')
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    runs = list(plan_runs(contenders, seeds, folder))
    configs = [config_of(run, train_options) for run in runs]  # a bad option is found before the first run
    outcomes = _run(runs, configs, train_options, config.jobs)
    of_any_seed = {run.contender.label: run_config for run, run_config in zip(runs, configs, strict=True)}
    costs = _measure(contenders, of_any_seed, outcomes, config.repeats)
    return _write(config, folder, contenders, outcomes, costs, configs[0].eval_metric)


def _require_scipy() -> None:
    try:
        import scipy.stats  # noqa: F401
    except ImportError as e:
        raise ImportError("Intervals are computed with SciPy: pip install 'timm-dyacts[demo]'.") from e


def _run(
        runs: Sequence[Run],
        configs: Sequence[TrainConfig],
        train_options: Mapping[str, Any],
        jobs: int,
) -> list[Outcome]:
    """Train what is missing, with a bar that counts epochs."""
    outcomes: list[Outcome] = []
    done = 0
    with tqdm(total=sum(config.epochs for config in configs), unit='epoch', disable=None, smoothing=0.05) as bar:
        for event in execute(runs, train_options, jobs):
            if isinstance(event, Outcome):
                outcomes.append(event)
                done += len(event.rows)
                bar.set_postfix_str(f'{len(outcomes)} of {len(runs)} runs')
                bar.update(done - bar.n)
            elif done + event > bar.n:
                bar.update(done + event - bar.n)
    return outcomes


def _measure(
        contenders: Sequence[Contender],
        configs: Mapping[str, TrainConfig],
        outcomes: Sequence[Outcome],
        repeats: int,
) -> dict[str, Cost]:
    peaks: dict[str, float] = {}
    for outcome in outcomes:
        if outcome.peak_mib is not None:
            label = outcome.run.contender.label
            peaks[label] = max(outcome.peak_mib, peaks.get(label, 0.0))
    model = timm.create_model(f'local-dir:{outcomes[0].run.folder}')
    ordered = {contender.label: configs[contender.label] for contender in contenders}
    return measure_costs(ordered, model.num_classes, peaks, repeats)


def _write(
        config: CompareConfig,
        folder: Path,
        contenders: Sequence[Contender],
        outcomes: Sequence[Outcome],
        costs: Mapping[str, Cost],
        chosen_by: str,
) -> ComparisonResult:
    values: dict[str, dict[int, float]] = {contender.label: {} for contender in contenders}
    for outcome in outcomes:
        values[outcome.run.contender.label][outcome.run.seed] = outcome.value(config.metric, config.at, chosen_by)[1]
    summaries = compare_to_first(values)
    first = summaries[0].model
    sentences = [describe(summary, first, config.metric) for summary in summaries[1:]]
    title = f'{first} and {len(summaries) - 1} others' if len(summaries) > 2 else f'{first} and {summaries[1].model}'
    replace_text(folder / 'compare.csv', format_csv(_table(contenders, outcomes, costs, chosen_by), COLUMNS))
    write_table(folder / 'compare.md', title, summaries, config.metric, config.at, costs)
    draw_comparison(folder / 'compare.png', title, summaries, config.metric, costs)
    curves = {
        contender.label: [outcome.rows for outcome in outcomes if outcome.run.contender is contender]
        for contender in contenders
    }
    draw_curves(folder / 'curves.png', title, curves, config.metric)
    return ComparisonResult(folder, summaries, sentences)


def _table(
        contenders: Sequence[Contender],
        outcomes: Sequence[Outcome],
        costs: Mapping[str, Cost],
        chosen_by: str,
) -> list[dict[str, Any]]:
    order = {contender.label: i for i, contender in enumerate(contenders)}
    rows = []
    for outcome in sorted(outcomes, key=lambda o: (o.run.seed, order[o.run.contender.label])):
        label = outcome.run.contender.label
        cost = costs[label]
        row: dict[str, Any] = dict(model=label, seed=outcome.run.seed, epochs=len(outcome.rows))
        for metric in ('top1', 'top5', 'loss'):
            row[f'last_{metric}'] = outcome.value(metric, 'last', chosen_by)[1]
            row['best_epoch'], row[f'best_{metric}'] = outcome.value(metric, 'best', chosen_by)
        peak = '' if outcome.peak_mib is None or math.isnan(outcome.peak_mib) else round(outcome.peak_mib)
        rows.append(row | dict(
            seconds=round(outcome.seconds, 1),
            peak_mib=peak,
            params=cost.params,
            macs=cost.macs,
            step_seconds=round(cost.step_seconds, 5),
            batch_size=cost.batch_size,
            timm_dyacts=__version__,
            timm=timm.__version__,
            torch=str(torch.__version__),
        ))
    return rows
