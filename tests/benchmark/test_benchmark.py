"""The benchmark, at sizes that take no time. The times that it measures are no matter for a test."""
import csv
import dataclasses
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

from timm_dyacts import operators
from timm_dyacts.benchmark import (
    PARTS,
    Aim,
    Clock,
    Report,
    aims,
    list_aims,
    measure_aims,
    measure_models,
    measure_operator,
    print_aims,
)
from timm_dyacts.cli.benchmark import create_parser, main
from timm_dyacts.operators import benchmarks


@pytest.fixture
def run(tmp_path):
    """Run the command, and return the rows of its table."""
    def call(*options):
        output = tmp_path / 'results' / 'table.csv'
        main([*options, '--device', 'cpu', '--output', str(output)], prog='benchmark.py')
        assert {p.name for p in output.parent.iterdir()} == {'table.csv', 'table.png'}
        assert output.with_suffix('.png').read_bytes().startswith(b'\x89PNG')
        with output.open() as file:
            return list(csv.DictReader(file))
    return call


def test_operators(run, capsys):
    rows = run('ops', '--shapes', '2x4x8x6', '--dtypes', 'fp32', 'bf16', '--variants', 'ours', 'literal',
               '--repeats', '1')
    assert {row['name'] for row in rows} == set(benchmarks())
    # two layouts, two dtypes, two passes, three variants
    assert len(rows) == 24 * len(benchmarks())
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


def test_onnx(run, capsys):
    pytest.importorskip('onnxruntime'), pytest.importorskip('onnxscript')
    rows = run('onnx', '--models', 'test_resnet', 'test_resnet_dyrelu_a', '-b', '1', '3', '--img-size', '32',
               '--repeats', '1')
    assert [(row['name'], row['shape']) for row in rows] == [
        (name, f'{n}x3x32x32') for n in (1, 3) for name in ('test_resnet', 'test_resnet_dyrelu_a')]
    assert {(row['measured'], row['variant']) for row in rows} == {('inference', 'onnx')}
    assert all(float(row['floor_ratio']) == 1 for row in rows[::2])
    assert all(float(row['difference']) < 1e-5 for row in rows)
    assert 20 < int(rows[0]['nodes']) < int(rows[1]['nodes'])
    assert capsys.readouterr().out.split('\n')[0].split()[-2:] == ['nodes', 'diff']


def test_onnx_without_onnxruntime(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(SystemExit, match=r"ONNX graphs need onnx.*: pip install 'timm-dyacts\[onnx\]'"):
        run('onnx', '--models', 'test_resnet')
    # The aims that need none of it are measured all the same.
    measure_aims(['onnx'], Clock(torch.device('cpu'), 1), Report(torch.device('cpu')))
    assert "pip install 'timm-dyacts[onnx]'" in capsys.readouterr().out


@pytest.mark.parametrize('name', ['dyrelu_a', 'dyrelu_b', 'dyrelu_c', 'softpool_2x2', 'softpool_3x3', 'brelu', 'belu',
                                  'bipolar_max_pool', 'global_softpool'])
def test_the_literal_definition_computes_the_same(name):
    """It is the rival of the comparison, not a caricature."""
    benchmark = benchmarks()[name]
    ours = benchmark.ours(4)
    for param in ours.parameters():
        torch.nn.init.normal_(param)
    x = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(benchmark.literal(ours, x), ours(x), rtol=1e-4, atol=1e-5)
    assert benchmark.plain()(x).shape == ours(x).shape


def test_every_operator_with_a_benchmark_record_is_offered(monkeypatch):
    """A new operator is measured, and has the aim in bytes, from its record alone."""
    record = operators.Benchmark('halve', lambda channels: nn.Identity(), nn.ReLU, lambda module, x: x, 2, 2)
    halve = dataclasses.replace(operators.OPERATORS['brelu'], name='halve', benchmarks=(record,))
    monkeypatch.setitem(operators.OPERATORS, 'halve', halve)
    assert create_parser().parse_args(['ops', '--ops', 'halve']).ops == ['halve']
    assert [aim.against for aim in list_aims('cuda') if aim.name == 'halve'] == ['bytes', 'bytes']
    rows = measure_operator('halve', (2, 4, 2, 2), 'contiguous', 'fp32', ['floor'], Clock(torch.device('cpu'), 1))
    assert {row['name'] for row in rows} == {'halve'}


def test_a_clock_takes_the_median_of_as_many_calls_as_it_is_told():
    calls = {'first': 0, 'second': 0}

    def count(name):
        calls[name] += 1

    clock = Clock(torch.device('cpu'), repeats=3)
    medians = clock.medians({name: lambda name=name: count(name) for name in calls})
    assert calls == {'first': 5, 'second': 5}, 'two of them to warm up'
    assert set(medians) == set(calls) and min(medians.values()) > 0


@pytest.mark.skipif(sys.platform != 'linux', reason='Linux counts what is resident')
def test_peak_memory_on_cpus():
    clock = Clock(torch.device('cpu'), 1)
    # Of 64 MiB and 32 MiB, both there at once; what is gone again before counts as well
    peak = clock.peak_mib(lambda: (torch.ones(2 ** 24) + 1).sum() + torch.ones(2 ** 23).sum())
    assert 120 < peak < 140


def test_a_report_prints_and_keeps_what_it_is_given(capsys):
    clock = Clock(torch.device('cpu'), 1)
    report = Report(clock.device)
    report.add(measure_models(['test_resnet'], 2, 32, 'contiguous', 'fp32', False, clock, ['inference']))
    [row] = report.rows
    assert (row['measured'], row['variant'], row['shape']) == ('inference', 'ours', '2x3x32x32')
    assert row['bytes_ratio'] is None and row['floor_ratio'] == 1
    assert ' '.join(capsys.readouterr().out.split()).count('fp32 inference ours') == 1


def test_aims(capsys):
    case = dict(name='brelu', shape='1', layout='contiguous', dtype='fp32', measured='forward')
    rows = [
        case | dict(variant='floor', floor_ratio=1.0, bytes_ratio=1.0, milliseconds=2.0, peak_mib=10.0),
        case | dict(variant='ours', floor_ratio=1.2, bytes_ratio=1.1, milliseconds=2.4, peak_mib=11.0),
        case | dict(variant='literal', floor_ratio=6.0, bytes_ratio=6.0, milliseconds=12.0, peak_mib=30.0),
    ]
    worst = {against: Aim('brelu', 'forward', against, 1).worst(rows) for against in (
        'floor', 'bytes', 'memory', 'literal')}
    assert worst == pytest.approx(dict(floor=1.2, bytes=1.1, memory=1.1, literal=0.2))
    print_aims([Aim('brelu', 'forward', 'floor', 1.3), Aim('brelu', 'forward', 'bytes', 1.05),
                Aim('belu', 'forward', 'floor', 1)], rows)
    assert [line.split()[-1] for line in capsys.readouterr().out.split('\n')[1:4]] == ['met', 'MISSED', 'measured']
    for device_type in ('cpu', 'cuda'):
        assert list_aims(device_type)
        assert all(aim.name in benchmarks() or aim.measured in ('training step', 'inference')
                   for aim in list_aims(device_type))


def measured_for_aims(monkeypatch, device, parts):
    """The (name, measured, variant) that would be measured, and nothing measured."""
    def fake_operator(name, shape, layout, dtype, variants, clock):
        return [dict(name=name, measured=measured, variant=variant)
                for measured in ('forward', 'forward+backward') for variant in variants]

    def fake_models(
            names, batch_size, img_size, layout, dtype, compiled, clock, measured=('training step', 'inference')):
        return [dict(name=name, measured=what, variant='compiled' if compiled else 'ours')
                for name in names for what in measured]

    def fake_onnx(names, batch_sizes, img_size, clock):
        return [dict(name=name, measured='inference', variant='onnx') for name in names for _ in batch_sizes]

    monkeypatch.setattr(aims, 'measure_onnx', fake_onnx)
    monkeypatch.setattr(aims, 'require_onnxruntime', lambda: None)
    monkeypatch.setattr(aims, 'measure_operator', fake_operator)
    monkeypatch.setattr(aims, 'measure_models', fake_models)
    rows = []
    for part in parts:
        measure_aims([part], SimpleNamespace(device=torch.device(device)), SimpleNamespace(add=rows.extend))
    return {(row['name'], row['measured'], row['variant']) for row in rows}


def test_every_aim_on_cuda_is_measured(monkeypatch):
    """Without a GPU, only what would be measured can be looked at."""
    measured = measured_for_aims(monkeypatch, 'cuda', PARTS)
    assert {(aim.name, aim.measured, aim.variant) for aim in list_aims('cuda')} <= measured
    assert {name for name, *_ in measured} <= set(benchmarks()) | set(timm.list_models())


def test_every_aim_on_the_cpu_is_measured(monkeypatch):
    measured = measured_for_aims(monkeypatch, 'cpu', PARTS)
    assert {(aim.name, aim.measured, aim.variant) for aim in list_aims('cpu')} <= measured
    assert not {'compiled'} & {variant for name, _, variant in measured if name not in benchmarks()}


@pytest.mark.parametrize('options, error', [
    (['ops', '--shapes', '3x3'], '--shapes must be four sizes above 1 such as 32x64x56x56, got 3x3'),
    (['ops', '--shapes', '3x3x1x3'], '--shapes must be four sizes above 1 such as 32x64x56x56, got 3x3x1x3'),
    (['ops', '--repeats', '0'], '--repeats must be at least 1, got 0'),
    (['onnx', '--batch-sizes', '1', '0'], '--batch-sizes must be at least 1, got 0'),
    (['models', '--batch-size', '0'], '--batch-size must be at least 1, got 0'),
    (['models', '--img-size', '-1'], '--img-size must be at least 1, got -1'),
    (['models', '--models', 'no_such_model'], 'no_such_model'),
    (['models', '--models', 'resnet50_brellu'], "--models 'resnet50_brellu'.*Close names: .*resnet50_brelu"),
])
def test_bad_input(run, options, error):
    with pytest.raises(SystemExit, match=error) as exit_info:
        run(*options)
    assert exit_info.value.code.startswith('benchmark.py: error: ')


def test_the_chart_does_not_replace_the_table(tmp_path):
    with pytest.raises(SystemExit, match='--output must not end in .png'):
        main(['ops', '--output', str(tmp_path / 'table.png')])
