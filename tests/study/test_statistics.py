"""Paired differences, their intervals, and the sentences that are made of them."""
import math
import random

import pytest
from scipy.stats import t

from timm_dyacts.study.report import Cost, describe, render_table
from timm_dyacts.study.statistics import compare_to_first


def draw(seeds, mean, spread, generator, base=None):
    return {seed: (base[seed] if base else 0) + generator.gauss(mean, spread) for seed in range(seeds)}


def test_the_interval_is_that_of_students_t():
    base = {0: 60.0, 1: 61.0, 2: 62.5, 3: 59.0}
    other = {0: 61.0, 1: 61.5, 2: 65.0, 3: 60.5}
    comparison = compare_to_first(dict(a=base, b=other))[1].comparison
    differences = [1.0, 0.5, 2.5, 1.5]
    mean = sum(differences) / 4
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / 3 / 4)
    assert comparison.mean == pytest.approx(mean)
    assert comparison.low == pytest.approx(mean - t.ppf(0.975, 3) * error)
    assert comparison.high == pytest.approx(mean + t.ppf(0.975, 3) * error)
    assert comparison.p == pytest.approx(2 * t.sf(mean / error, 3))


def test_p_is_corrected_for_the_number_of_comparisons():
    generator = random.Random(0)
    base = draw(6, 60, 1, generator)
    other = draw(6, 1, 1, generator, base)
    alone = compare_to_first(dict(a=base, b=other))[1].comparison
    among = compare_to_first(dict(a=base, b=other, c=draw(6, 0, 1, generator, base), d=other))[1].comparison
    assert among.p == pytest.approx(min(3 * alone.p, 1)) and among.comparisons == 3
    assert (among.low, among.high) == (alone.low, alone.high)


def test_a_model_against_itself_is_no_difference_in_19_of_20_cases():
    generator = random.Random(1)
    found = 0
    for _ in range(2000):
        base = draw(5, 60, 1, generator)
        found += compare_to_first(dict(a=base, b=draw(5, 60, 1, generator)))[1].comparison.is_significant
    assert 70 <= found <= 130  # 100 expected, standard deviation 10


def test_only_common_seeds_count():
    summaries = compare_to_first(dict(a={0: 1.0, 1: 2.0, 2: 4.0}, b={1: 3.0, 2: 6.0, 3: 9.0, 4: 9.0}, c={7: 1.0}, d={}))
    assert [summary.model for summary in summaries] == ['a', 'b', 'c']
    assert summaries[1].comparison.differences == (1.0, 2.0) and summaries[1].mean == 6.75
    assert summaries[2].comparison is None


class TestSentences:
    def sentence(self, values, base=(60.0, 61.0, 62.0), metric='top1', **others):
        runs = dict(base=dict(enumerate(base)), model=dict(enumerate(values)), **others)
        return describe(compare_to_first(runs)[1], 'base', metric)

    def test_too_few_seeds(self):
        assert 'too few for an interval' in self.sentence((63.0, 64.5), base=(60.0, 61.0))
        assert '+3.00 points on average over 1 seed,' in self.sentence((63.0,), base=(60.0,))

    def test_identical(self):
        assert self.sentence((60.0, 61.0, 62.0)) == '`model`: exactly the top1 of `base` with all 3 seeds.'

    def test_no_spread(self):
        assert 'without any spread there is no interval' in self.sentence((61.0, 62.0, 63.0))

    def test_better_and_worse(self):
        better = self.sentence((65.0, 66.1, 66.9))
        assert better.startswith('`model`: better than `base` by 5.00 points (95% interval +4')
        assert self.sentence((55.0, 56.1, 56.9)).startswith('`model`: worse than `base` by 5.00 points')
        # Of losses, the smaller one is better.
        assert 'better than `base` by 0.500 (' in self.sentence((0.5, 0.61, 0.69), (1.0, 1.1, 1.2), 'loss')

    def test_no_difference(self):
        sentence = self.sentence((60.5, 60.5, 62.4))
        assert 'no difference that 3 seeds could show: +0.13 points, 95% interval -' in sentence

    def test_not_settled(self):
        """An interval without zero, which many comparisons make unremarkable."""
        others = {f'other{i}': {0: 60.0, 1: 61.5, 2: 61.0} for i in range(9)}
        assert 'not settled' in self.sentence((61.0, 62.4, 62.9), **others)


def test_the_table():
    runs = dict(base={0: 60.0, 1: 61.0, 2: 62.0}, model={0: 65.0, 1: 66.1, 2: 66.9})
    costs = dict(base=Cost(4_000_000, 300_000_000, 0.5, 32, 700.4), model=Cost(5_000_000, 310_000_000, 0.6, 32))
    head, _, base, model = render_table(compare_to_first(runs), 'top1', 'last', costs).splitlines()
    assert base == '| `base` | 3 | 61.00 | 1.00 |  |  |  | 500 | 1.00 | 15.62 | 700 | 4.00 | 0.300 |'
    assert model.startswith('| `model` | 3 | 66.00 | 0.95 | +5.00 | +4') and model.endswith(
        '| 600 | 1.20 | 18.75 |  | 5.00 | 0.310 |')
    assert head.count('|') == base.count('|') == model.count('|')
