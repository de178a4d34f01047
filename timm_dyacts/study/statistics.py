"""What paired runs can say, and what they cannot.

Each seed gives one run of every model, with the same order of images and the same augmentation. So the difference of
two models is taken seed by seed, and its uncertainty comes from how much it varies over the seeds. The interval is that
of Student's t for the mean difference, the p value that of the paired t test, times the number of comparisons
(Bonferroni), since among many comparisons one will look like a find by chance. Both are computed by SciPy.
"""
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ['CONFIDENCE', 'MIN_SEEDS', 'Comparison', 'Summary', 'compare_frozen', 'compare_to_first']

CONFIDENCE = 0.95
# With fewer, the spread of the differences is hardly known.
MIN_SEEDS = 3


@dataclass(frozen=True)
class Comparison:
    """A model against the first one.

    Attributes:
        differences: One for each seed that both have, in percentage points or, for a loss, as it is.
        mean: Their mean.
        low: Lower end of its interval, None with fewer than ``MIN_SEEDS`` seeds or without any spread.
        high: Upper end.
        p: The corrected p value, at most 1.
        comparisons: The number of comparisons that it is corrected for.
    """
    differences: tuple[float, ...]
    mean: float
    low: float | None
    high: float | None
    p: float | None
    comparisons: int

    @property
    def is_significant(self) -> bool:
        """Whether the corrected p value is small enough to speak of a difference."""
        return self.p is not None and self.p < 1 - CONFIDENCE

    @property
    def is_identical(self) -> bool:
        """Whether no seed gave any difference."""
        return not any(self.differences)


@dataclass(frozen=True)
class Summary:
    """The runs of a model.

    Attributes:
        model: Its label.
        values: The metric by seed.
        comparison: Against the first model; None for that one, and where no seed is common.
    """
    model: str
    values: Mapping[int, float]
    comparison: Comparison | None = None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values.values())

    @property
    def std(self) -> float:
        """Standard deviation over the seeds, NaN for a single one."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else math.nan


def compare_to_first(runs: Mapping[str, Mapping[int, float]]) -> list[Summary]:
    """Compare models with the first of them.

    Args:
        runs: For each model, in order, the metric by seed.

    Returns:
        A summary for each model that has a run.
    """
    present = {model: values for model, values in runs.items() if values}
    first = next(iter(runs.values()), {})
    others = max(len(present) - 1, 1)
    summaries = []
    for model, values in present.items():
        comparison = None
        common = sorted(values.keys() & first.keys())
        if values is not first and common:
            comparison = _compare([values[seed] - first[seed] for seed in common], others)
        summaries.append(Summary(model, values, comparison))
    return summaries


def compare_frozen(
        runs: Mapping[str, Mapping[int, float]],
        frozen: Mapping[str, Mapping[int, float]],
) -> list[Summary]:
    """Compare models with themselves before something in them was frozen.

    Args:
        runs: For each model, the metric by seed.
        frozen: The same for those that were frozen.

    Returns:
        A summary for each of the latter.
    """
    return [
        Summary(model, values, _compare([values[seed] - runs[model][seed] for seed in sorted(values)], len(frozen)))
        for model, values in frozen.items()
    ]


def _compare(differences: Sequence[float], comparisons: int) -> Comparison:
    mean = statistics.fmean(differences)
    # Without a spread there is nothing to test against: few seeds, or the same difference for each of them, as of a
    # model that is the first one in disguise.
    if len(differences) < MIN_SEEDS or len(set(differences)) == 1:
        return Comparison(tuple(differences), mean, None, None, None, comparisons)
    from scipy.stats import ttest_1samp

    test = ttest_1samp(differences, 0.0)
    interval = test.confidence_interval(CONFIDENCE)
    return Comparison(
        tuple(differences),
        mean,
        float(interval.low),
        float(interval.high),
        min(float(test.pvalue) * comparisons, 1.0),
        comparisons,
    )
