"""``compare``: train a base and its variants with the same seeds, and write down what came of it."""
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..options import declarations
from ..plotting import require_matplotlib
from ..training import TrainConfig
from ..training.setup import build_datasets
from ..world import World
from .config import CompareConfig
from .cost import measure_costs
from .frozen import can_be_frozen, measure_frozen
from .plan import Contender, Run, parse_contenders, plan_runs
from .records import METRICS, VERSIONS, Outcome, Record, read_kept, write_epochs, write_runs
from .report import Cost, describe, describe_frozen, draw_comparison, draw_curves, write_table
from .runs import config_of, execute
from .statistics import Summary, compare_frozen, compare_to_first

__all__ = ['COLUMNS', 'ComparisonResult', 'compare']

COLUMNS = (
    'model', 'seed', 'epochs', 'last_top1', 'last_top5', 'last_loss', 'best_epoch', 'best_top1', 'best_top5',
    'best_loss', 'frozen_at', 'frozen_top1', 'frozen_top5', 'frozen_loss', 'seconds', 'peak_mib', 'params', 'macs',
    'step_seconds', 'batch_size', 'recipe', *VERSIONS,
)


@dataclass(frozen=True)
class ComparisonResult:
    """What a comparison found.

    Attributes:
        folder: Where it is: ``compare.csv``, ``epochs.csv``, ``compare.md``, ``compare.png``, ``curves.png``, and the
            run folders.
        summaries: The models, the one that the others are compared with first.
        sentences: One for each of the others, and one for each model with frozen coefficients.
    """
    folder: Path
    summaries: Sequence[Summary]
    sentences: Sequence[str]


def compare(config: CompareConfig, **train_options: Any) -> ComparisonResult:
    """Train each model with each seed, and compare them with the first, seed by seed.

    Seeds come one after the other and within each the models, so that wherever it is stopped there are about as many
    runs of each. Called again it goes on: finished runs are taken as they are, be it from their folders or from
    ``compare.csv`` and ``epochs.csv``, others resumed.

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
    labels = [contender.label for contender in contenders]
    if config.against is not None and config.against not in labels:
        raise ValueError(
            f'against (--against) must be the label of a model, one of {", ".join(labels)}, got {config.against!r}.')
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    runs = list(plan_runs(contenders, seeds, folder))
    configs = [config_of(run, train_options) for run in runs]  # a bad option is found before the first run
    by_label = {run.contender.label: run_config for run, run_config in zip(runs, configs, strict=True)}
    outcomes = _run(runs, configs, train_options, read_kept(folder), config.jobs)
    if config.freeze_coefficients:
        labels = {label for label, run_config in by_label.items() if can_be_frozen(run_config)}
        outcomes = [
            _with_frozen(outcome, config_of(outcome.run, train_options), config.at)
            if outcome.run.contender.label in labels else outcome for outcome in outcomes
        ]
    costs = _measure(by_label, outcomes, config.repeats)
    return _write(config, folder, contenders, outcomes, costs, by_label)


def _require_scipy() -> None:
    try:
        import scipy.stats  # noqa: F401
    except ImportError as e:
        raise ImportError("Intervals are computed with SciPy: pip install 'timm-dyacts[demo]'.") from e


def _run(
        runs: Sequence[Run],
        configs: Sequence[TrainConfig],
        train_options: Mapping[str, Any],
        kept: Mapping[tuple[str, int], Record],
        jobs: int,
) -> list[Outcome]:
    """Train what is missing, with a bar that counts epochs."""
    outcomes: list[Outcome] = []
    done = 0
    with tqdm(total=sum(config.epochs for config in configs), unit='epoch', disable=None, smoothing=0.05) as bar:
        for event in execute(runs, train_options, kept, jobs):
            if isinstance(event, Outcome):
                outcomes.append(event)
                done += len(event.rows)
                bar.set_postfix_str(f'{len(outcomes)} of {len(runs)} runs')
                bar.update(done - bar.n)
            elif done + event > bar.n:
                bar.update(done + event - bar.n)
    return outcomes


def _with_frozen(outcome: Outcome, config: TrainConfig, at: str) -> Outcome:
    """Add what a run comes to with frozen coefficients."""
    if at in outcome.record.frozen:
        return outcome
    metrics = measure_frozen(outcome.run, config, at)
    record = replace(outcome.record, frozen={**outcome.record.frozen, at: metrics})
    record.write(outcome.run)
    return replace(outcome, record=record)


def _measure(configs: Mapping[str, TrainConfig], outcomes: Sequence[Outcome], repeats: int) -> dict[str, Cost]:
    peaks: dict[str, float] = {}
    for outcome in outcomes:
        if outcome.record.peak_mib is not None:
            label = outcome.run.contender.label
            peaks[label] = max(outcome.record.peak_mib, peaks.get(label, 0.0))
    _, config = build_datasets(next(iter(configs.values())), World(torch.device('cpu')))
    return measure_costs(configs, config.num_classes, peaks, repeats)


def _write(
        config: CompareConfig,
        folder: Path,
        contenders: Sequence[Contender],
        outcomes: Sequence[Outcome],
        costs: Mapping[str, Cost],
        configs: Mapping[str, TrainConfig],
) -> ComparisonResult:
    order = {contender.label: i for i, contender in enumerate(contenders)}
    outcomes = sorted(outcomes, key=lambda o: (o.run.seed, order[o.run.contender.label]))
    first = config.against or contenders[0].label
    values: dict[str, dict[int, float]] = {label: {} for label in dict.fromkeys((first, *order))}
    frozen: dict[str, dict[int, float]] = {}
    for outcome in outcomes:
        label, seed = outcome.run.contender.label, outcome.run.seed
        values[label][seed] = outcome.value(config.metric, config.at, configs[label].best_column())[1]
        if config.freeze_coefficients and config.at in outcome.record.frozen:
            frozen.setdefault(label, {})[seed] = outcome.record.frozen[config.at][config.metric]
    summaries = compare_to_first(values)
    frozen_summaries = compare_frozen(values, frozen)
    sentences = [describe(summary, first, config.metric) for summary in summaries[1:]]
    sentences += [describe_frozen(summary, config.metric) for summary in frozen_summaries]
    title = f'{first} and {len(summaries) - 1} others' if len(summaries) > 2 else f'{first} and {summaries[1].model}'
    table = [_row(outcome, costs[outcome.run.contender.label], configs, config.at) for outcome in outcomes]
    write_runs(folder / 'compare.csv', table, COLUMNS)
    write_epochs(folder / 'epochs.csv', outcomes)
    write_table(folder / 'compare.md', title, summaries, config.metric, config.at, costs, frozen_summaries)
    draw_comparison(folder / 'compare.png', title, summaries, config.metric, costs)
    curves = {label: [o.rows for o in outcomes if o.run.contender.label == label] for label in order}
    draw_curves(folder / 'curves.png', title, curves, config.metric)
    return ComparisonResult(folder, summaries, sentences)


def _row(outcome: Outcome, cost: Cost, configs: Mapping[str, TrainConfig], at: str) -> dict[str, Any]:
    """Give the row of a run in ``compare.csv``."""
    label, record = outcome.run.contender.label, outcome.record
    best_by = configs[label].best_column()
    row: dict[str, Any] = dict(model=label, seed=outcome.run.seed, epochs=len(outcome.rows))
    for metric in METRICS:
        row[f'last_{metric}'] = outcome.value(metric, 'last', best_by)[1]
        row['best_epoch'], row[f'best_{metric}'] = outcome.value(metric, 'best', best_by)
    frozen = record.frozen.get(at)
    row['frozen_at'] = '' if frozen is None else at
    row.update({f'frozen_{metric}': '' if frozen is None else frozen[metric] for metric in METRICS})
    return row | dict(
        seconds=round(record.seconds, 1),
        peak_mib='' if record.peak_mib is None or math.isnan(record.peak_mib) else round(record.peak_mib),
        params=cost.params,
        macs=cost.macs,
        step_seconds=cost.step_seconds,
        batch_size=cost.batch_size,
        recipe=record.recipe,
        **record.versions,
    )
