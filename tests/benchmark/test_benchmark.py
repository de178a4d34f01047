"""scripts/benchmark.py, at sizes that take no time. What it measures is no matter for a test."""
import csv
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch

SCRIPT = Path(__file__).parents[2] / 'scripts' / 'benchmark.py'


@pytest.fixture(scope='module')
def script():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def run(script, monkeypatch, tmp_path):
    """Runs the script, and returns the rows of its table."""
    def call(*options):
        output = tmp_path / 'results' / 'table.csv'
        monkeypatch.setattr(sys, 'argv', ['benchmark.py', *options, '--device', 'cpu', '--output', str(output)])
        script['main']()
        assert {p.name for p in output.parent.iterdir()} == {'table.csv', 'table.png'}
        assert output.with_suffix('.png').read_bytes().startswith(b'\x89PNG')
        with output.open() as file:
            return list(csv.DictReader(file))
    return call


def test_operators(run, script, capsys):
    rows = run('ops', '--shapes', '2x4x8x6', '--dtypes', 'fp32', 'bf16', '--variants', 'ours', 'literal',
               '--repeats', '1')
    assert {row['name'] for row in rows} == set(script['OPERATORS'])
    # two layouts, two dtypes, two passes, three variants
    assert len(rows) == 24 * len(script['OPERATORS'])
    for row in rows:
        assert float(row['milliseconds']) > 0 and float(row['bytes_ratio']) > 0
        assert row['torch'] == torch.__version__ and row['device'] and row['date']
        assert row['variant'] != 'floor' or float(row['floor_ratio']) == 1
    assert capsys.readouterr().out.count('\n') == len(rows) + 2


def test_compiled(run):
    rows = run('ops', '--ops', 'brelu', '--shapes', '2x4x8x6', '--dtypes', 'fp32', '--layouts', 'contiguous',
               '--variants', 'compiled', '--repeats', '1')
    assert [row['variant'] for row in rows] == ['floor', 'compiled'] * 2


def test_models(run):
    rows = run('models', '--models', 'resnet10t', 'resnet10t_brelu', '-b', '2', '--img-size', '32', '--dtype', 'bf16',
               '--repeats', '1')
    assert [(row['name'], row['measured']) for row in rows] == [
        ('resnet10t', 'training step'), ('resnet10t_brelu', 'training step'),
        ('resnet10t', 'inference'), ('resnet10t_brelu', 'inference'),
    ]
    assert all(float(row['floor_ratio']) == 1 for row in rows[::2])


@pytest.mark.parametrize('name', ['dyrelu_a', 'dyrelu_b', 'dyrelu_c', 'softpool_2x2', 'softpool_3x3', 'brelu', 'belu',
                                  'bipolar_max_pool'])
def test_the_literal_definition_computes_the_same(script, name):
    """It is the rival of the comparison, not a caricature."""
    operator = script['OPERATORS'][name]
    ours = operator.ours(4)
    for param in ours.parameters():
        torch.nn.init.normal_(param)
    x = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(operator.literal(ours, x), ours(x), rtol=1e-4, atol=1e-5)
    assert operator.floor()(x).shape == ours(x).shape


def test_aims(script, capsys):
    aim = script['Aim']
    case = dict(name='brelu', shape='1', layout='contiguous', dtype='fp32', measured='forward')
    rows = [
        case | dict(variant='floor', floor_ratio=1.0, bytes_ratio=1.0, milliseconds=2.0, peak_mib=10.0),
        case | dict(variant='ours', floor_ratio=1.2, bytes_ratio=1.1, milliseconds=2.4, peak_mib=11.0),
        case | dict(variant='literal', floor_ratio=6.0, bytes_ratio=6.0, milliseconds=12.0, peak_mib=30.0),
    ]
    worst = {against: aim('brelu', 'forward', against, 1).worst(rows) for against in (
        'floor', 'bytes', 'memory', 'literal')}
    assert worst == pytest.approx(dict(floor=1.2, bytes=1.1, memory=1.1, literal=0.2))
    script['print_aims']([aim('brelu', 'forward', 'floor', 1.3), aim('brelu', 'forward', 'bytes', 1.05),
                          aim('belu', 'forward', 'floor', 1)], rows)
    assert [line.split()[-1] for line in capsys.readouterr().out.split('\n')[1:4]] == ['met', 'MISSED', 'measured']
    for aims in script['AIMS'].values():
        assert all(aim.name in script['OPERATORS'] or aim.measured == 'training step' for aim in aims)


def test_every_aim_on_cuda_is_measured(script, monkeypatch):
    """Without a GPU, only what would be measured can be looked at."""
    def measure_operator(name, shape, layout, dtype, variants, clock):
        return [dict(name=name, measured=measured, variant=variant)
                for measured in ('forward', 'forward+backward') for variant in variants]

    def measure_models(names, batch_size, img_size, layout, dtype, compiled, clock, measured):
        return [dict(name=name, measured=what, variant='compiled' if compiled else 'ours')
                for name in names for what in measured]

    measure_aims = script['measure_aims']
    monkeypatch.setitem(measure_aims.__globals__, 'measure_operator', measure_operator)
    monkeypatch.setitem(measure_aims.__globals__, 'measure_models', measure_models)
    rows = []
    for part in script['PARTS']:
        report = SimpleNamespace(add=rows.extend)
        measure_aims([part], SimpleNamespace(device=torch.device('cuda')), report)
    measured = {(row['name'], row['measured'], row['variant']) for row in rows}
    assert {(aim.name, aim.measured, aim.variant) for aim in script['AIMS']['cuda']} <= measured
    assert {name for name, *_ in measured} <= set(script['OPERATORS']) | set(timm.list_models())


@pytest.mark.parametrize('options, error', [
    (['ops', '--shapes', '3x3'], '--shapes must be four sizes above 1 such as 32x64x56x56, got 3x3'),
    (['ops', '--repeats', '0'], '--repeats must be at least 1, got 0'),
    (['models', '--batch-size', '0'], '--batch-size must be at least 1, got 0'),
    (['models', '--models', 'no_such_model'], 'no_such_model'),
])
def test_bad_input(run, options, error):
    with pytest.raises(SystemExit, match=error):
        run(*options)
