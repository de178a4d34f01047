"""The studies in model_cards/ say what their CSV files hold, and the README and the guides say no more."""
import csv
import itertools
import re

import pytest
from support.readme import README, ROOT, guide, section

from timm_dyacts.study.records import METRICS, read_values
from timm_dyacts.study.report import Cost, describe, describe_frozen, render_table
from timm_dyacts.study.statistics import compare_frozen, compare_to_first

pytest.importorskip('scipy')
STUDIES = sorted((ROOT / 'model_cards' / 'studies').glob('*/compare.csv'))


def rows(path):
    with open(path, newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def values_of(path, at='last'):
    """The models and as many seeds of each as the table beside the file has."""
    text = path.with_name('compare.md').read_text(encoding='utf-8')
    counts = {label: int(count) for label, count in re.findall(r'^\| `(.*?)` \| (\d+) \|', text, re.MULTILINE)}
    values = read_values(path, 'top1', at)
    return {
        label: dict(sorted(values[label].items())[:count]) for label, count in counts.items() if label in values}


def read_costs(path):
    costs, table = {}, rows(path)
    for row in table:
        peak = max(float(r['peak_mib']) for r in table if r['model'] == row['model'])
        costs[row['model']] = Cost(
            int(row['params']), int(row['macs']), float(row['step_seconds']), int(row['batch_size']), peak)
    return costs


def sentences(path):
    """What may be said of a study: all models against one, one against another, one against itself when frozen."""
    values = values_of(path)
    said = {describe(summary, next(iter(values)), 'top1') for summary in compare_to_first(values)[1:]}
    for first, second in itertools.permutations(values, 2):
        _, summary = compare_to_first({first: values[first], second: values[second]})
        said.add(describe(summary, first, 'top1'))
    for summary in compare_frozen(values, values_of(path, 'frozen')):
        said.add(describe_frozen(summary, 'top1'))
    return said


def test_there_are_studies():
    assert len(STUDIES) >= 5


@pytest.mark.parametrize('path', STUDIES, ids=lambda path: path.parent.name)
def test_the_table_is_that_of_the_rows(path):
    text = path.with_name('compare.md').read_text(encoding='utf-8')
    expected = render_table(compare_to_first(values_of(path)), 'top1', 'last', read_costs(path))
    assert expected in text
    said = re.findall(r'^- (.*)$', text, re.MULTILINE)
    assert len(said) >= 2 and set(said) <= sentences(path)


@pytest.mark.parametrize('path', STUDIES, ids=lambda path: path.parent.name)
def test_the_rows_are_those_of_the_epochs(path):
    epochs = {}
    for row in rows(path.with_name('epochs.csv')):
        epochs.setdefault((row['model'], row['seed']), []).append(row)
    table = rows(path)
    assert {(row['model'], row['seed']) for row in table} == epochs.keys()
    assert all(sorted(seeds) == list(range(len(seeds))) for seeds in values_of(path).values()), 'a run is missing'
    for row in table:
        last = epochs[row['model'], row['seed']][-1]
        assert int(row['epochs']) == len(epochs[row['model'], row['seed']])
        assert all(row[f'last_{metric}'] == last[f'eval_{metric}'] for metric in METRICS)


@pytest.mark.parametrize('text, at_least', [
    (section('Does it help?', README), 4),
    (section('What the studies say', guide('choosing-an-operator')), 9),
], ids=['README', 'guide'])
def test_pages_say_what_the_studies_say(text, at_least):
    said = {' '.join(item.split()) for item in re.findall(r'^- ((?:.|\n  )*)', text, re.MULTILINE)}
    assert len(said) >= at_least
    allowed = {sentence for path in STUDIES for sentence in sentences(path)}
    assert said <= allowed
