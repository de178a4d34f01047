"""What a comparison found: a table, sentences, and two pictures."""
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import replace_text
from ..plotting import BLUE, COLORS, GREY, create_figure, save_figure, style_axes
from .statistics import CONFIDENCE, MIN_SEEDS, Comparison, Summary

__all__ = ['Cost', 'describe', 'describe_frozen', 'draw_comparison', 'draw_curves', 'render_table', 'write_table']


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Attributes:
        params: Number of parameters.
        macs: Multiply-adds of an image.
        step_seconds: Median time of a training step.
        batch_size: Images of a step.
        peak_mib: Peak memory of a training run, None if unknown.
    """
    params: int
    macs: int
    step_seconds: float
    batch_size: int
    peak_mib: float | None = None


def _points(metric: str) -> str:
    return '' if metric == 'loss' else ' points'


def _signed(value: float, metric: str) -> str:
    digits = 3 if metric == 'loss' else 2
    return f'{round(value, digits) + 0.0:+.{digits}f}'  # the sum makes 0 of -0


def _interval(comparison: Comparison, metric: str) -> str:
    if comparison.low is None:
        return ''
    return f'{_signed(comparison.low, metric)} to {_signed(comparison.high, metric)}'


def _p(comparison: Comparison) -> str:
    if comparison.p is None:
        return ''
    return '< 0.001' if comparison.p < 0.001 else f'{comparison.p:.3f}'


def describe(summary: Summary, first: str, metric: str) -> str:
    """Give one sentence on a model that says no more than its runs do.

    Args:
        summary: The model, with its comparison.
        first: Label of the model that it is compared with.
        metric: What was measured, ``'top1'``, ``'top5'`` or ``'loss'``.
    """
    comparison, model = summary.comparison, f'`{summary.model}`'
    if comparison is None:
        return f'{model}: no seed in common with `{first}`, so nothing can be said.'
    count = len(comparison.differences)
    seeds = '1 seed' if count == 1 else f'{count} seeds'
    mean = f'{_signed(comparison.mean, metric)}{_points(metric)}'
    if comparison.is_identical:
        return f'{model}: exactly the {metric} of `{first}` with {"its only seed" if count == 1 else f"all {seeds}"}.'
    if count < MIN_SEEDS:
        return f'{model}: {mean} on average over {seeds}, too few for an interval: this shows nothing yet.'
    if comparison.p is None:
        return f'{model}: {mean} with each of {seeds}; without any spread there is no interval, so add seeds.'
    interval = f'{CONFIDENCE:.0%} interval {_interval(comparison, metric)}'
    corrected = '' if comparison.comparisons == 1 else f', corrected for {comparison.comparisons} comparisons'
    if comparison.is_significant:
        better = comparison.mean < 0 if metric == 'loss' else comparison.mean > 0
        return (
            f'{model}: {"better" if better else "worse"} than `{first}` by {mean.lstrip("+-")} ({interval}, '
            f'p {_p(comparison)}{corrected}, {seeds}).')
    if comparison.low > 0 or comparison.high < 0:
        return (
            f'{model}: not settled: {mean}, {interval}, but p = {_p(comparison)}{corrected}; more than {seeds} could '
            f'tell.')
    return f'{model}: no difference that {seeds} could show: {mean}, {interval}.'


def describe_frozen(summary: Summary, metric: str) -> str:
    """Give one sentence on what freezing the coefficients of a model does.

    Args:
        summary: The model with frozen coefficients, compared with itself.
        metric: What was measured.
    """
    sentence = describe(summary, 'as trained', metric)
    return sentence.replace(f'`{summary.model}`:', f'`{summary.model}` with frozen coefficients:', 1)


def render_table(
        summaries: Sequence[Summary],
        metric: str,
        at: str,
        costs: Mapping[str, Cost],
) -> str:
    """Render the comparison as Markdown.

    Args:
        summaries: The models, the one that the others are compared with first.
        metric: What was measured.
        at: At which epoch, ``'last'`` or ``'best'``.
        costs: By label; a model that is missing has empty cells.
    """
    first = summaries[0].model
    unit = '' if metric == 'loss' else ' (%)'
    base = costs.get(first)
    lines = [
        f'| model | seeds | {metric}{unit}, {at} epoch | std | difference | {CONFIDENCE:.0%} interval | p | step (ms) '
        '| step, relative | per image (ms) | peak memory (MiB) | parameters (M) | GMACs |',
        '| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |',
    ]
    for summary in summaries:
        comparison, cost = summary.comparison, costs.get(summary.model)
        digits = 2 if unit else 4
        cells = [f'`{summary.model}`', str(len(summary.values)), f'{summary.mean:.{digits}f}']
        cells.append('' if len(summary.values) < 2 else f'{summary.std:.{digits}f}')
        cells += ['', '', ''] if comparison is None else [
            _signed(comparison.mean, metric), _interval(comparison, metric), _p(comparison)]
        cells += [''] * 6 if cost is None else [
            f'{1000 * cost.step_seconds:.0f}',
            f'{cost.step_seconds / base.step_seconds:.2f}' if base is not None else '',
            f'{1000 * cost.step_seconds / cost.batch_size:.2f}',
            '' if cost.peak_mib is None else f'{cost.peak_mib:.0f}',
            f'{cost.params / 1e6:.2f}',
            f'{cost.macs / 1e9:.3f}',
        ]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'


def write_table(
        path: Path,
        title: str,
        summaries: Sequence[Summary],
        metric: str,
        at: str,
        costs: Mapping[str, Cost],
        frozen: Sequence[Summary] = (),
) -> None:
    """Write ``compare.md``: the table, a sentence for each model, and what has to be known to read them.

    Args:
        path: Where to write.
        title: Heading.
        summaries: The models, the one that the others are compared with first.
        metric: What was measured.
        at: At which epoch, ``'last'`` or ``'best'``.
        costs: By label.
        frozen: Models with frozen coefficients, each compared with itself as it was trained.
    """
    first = summaries[0].model
    sentences = [f'- {describe(summary, first, metric)}' for summary in summaries[1:]]
    notes = [
        f'Differences are to `{first}`, seed by seed: each seed gives all models the same order of images and the same '
        f"augmentation. The interval is that of Student's t for the mean difference; p is of the paired t test, times "
        f'the number of comparisons.',
    ]
    if frozen:
        notes.append(
            'With the coefficients of Dynamic ReLU frozen, after training, at their mean over the training images, '
            'compared with the same runs as trained:')
        notes.append('\n'.join(f'- {describe_frozen(summary, metric)}' for summary in frozen))
    parts = [f'# {title}\n', render_table(summaries, metric, at, costs), '\n'.join(sentences) + '\n', *(
        f'{note}\n' for note in notes)]
    replace_text(path, '\n'.join(parts))


def draw_comparison(
        path: Path,
        title: str,
        summaries: Sequence[Summary],
        metric: str,
        costs: Mapping[str, Cost],
) -> None:
    """Draw the paired differences with their intervals, and the metric against the time of a training step."""
    others = [summary for summary in summaries[1:] if summary.comparison is not None]
    figure = create_figure(11, 1.8 + 0.5 * max(len(summaries), 4), title)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for row, summary in enumerate(others):
        comparison = summary.comparison
        left.plot(comparison.differences, [row] * len(comparison.differences), 'o', color=GREY, markersize=4, alpha=0.6)
        if comparison.low is not None:
            left.hlines(row, comparison.low, comparison.high, color=BLUE, linewidth=2.5)
        left.plot(comparison.mean, row, 'D', color=BLUE, markersize=6, markeredgecolor='white')
    left.axvline(0, color='black', linewidth=0.8)
    left.set_yticks(range(len(others)), [summary.model for summary in others])
    left.set_ylim(len(others) - 0.5, -0.5)
    left.set_xlabel(
        f'{metric}: difference to {summaries[0].model}{" in points" if _points(metric) else ""}\n'
        f'dots: seeds; diamond and bar: mean and {CONFIDENCE:.0%} interval')
    style_axes(left, 'x')
    measured = [summary for summary in summaries if summary.model in costs]
    times = [1000 * costs[summary.model].step_seconds for summary in measured]
    for i, (summary, x) in enumerate(zip(measured, times, strict=True)):
        error = summary.std if len(summary.values) > 1 else None
        color = COLORS[i % len(COLORS)]
        right.errorbar(x, summary.mean, yerr=error, fmt='o', color=color, markersize=6, capsize=2, linewidth=1)
        side = -1 if x > (min(times) + max(times)) / 2 else 1  # the name lies towards the middle
        right.annotate(
            summary.model, (x, summary.mean), xytext=(6 * side, 4), textcoords='offset points', fontsize=7,
            color=color, ha='left' if side > 0 else 'right')
    right.set_xlabel('time of a training step (ms)')
    right.set_ylabel(f'{metric}: mean and standard deviation')
    right.margins(x=0.25, y=0.15)
    style_axes(right)
    save_figure(figure, path)


def draw_curves(
        path: Path,
        title: str,
        curves: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
        metric: str,
) -> None:
    """Draw the metric over the epochs: the mean of the seeds, and a band of one standard deviation.

    Args:
        path: Where to write the picture.
        title: Heading.
        curves: For each model the rows of ``summary.csv`` of each seed.
        metric: What was measured.
    """
    figure = create_figure(8, 4.4, title)
    ax = figure.subplots()
    for i, (model, runs) in enumerate(curves.items()):
        if not runs:
            continue
        column = f'eval_{metric}'
        shortest = min(runs, key=len)
        epochs = [epoch for epoch, row in enumerate(shortest) if column in row]
        values = [[float(rows[epoch][column]) for rows in runs if column in rows[epoch]] for epoch in epochs]
        means = [statistics.fmean(of_epoch) for of_epoch in values]
        color = COLORS[i % len(COLORS)]
        style = '-' if i < len(COLORS) else '--'
        ax.plot(epochs, means, style, color=color, linewidth=1.6, label=f'{model} ({len(runs)})')
        if len(runs) > 1:
            spread = [statistics.stdev(of_epoch) for of_epoch in values]
            low = [mean - s for mean, s in zip(means, spread, strict=True)]
            high = [mean + s for mean, s in zip(means, spread, strict=True)]
            ax.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)
    ax.set_xlabel('epoch')
    ax.set_ylabel(f'{metric}: mean, and band of one standard deviation')
    ax.legend(frameon=False, fontsize=8, title='model (seeds)', title_fontsize=8)
    style_axes(ax)
    save_figure(figure, path)
