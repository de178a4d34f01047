"""The coverage of timm, as a user measures it: killed and resumed, out of time, bereft of a worker."""
import csv
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from support.readme import guide
from torch import nn

from timm_dyacts import cli
from timm_dyacts.coverage import COLUMNS, default_operations, operations, summarise
from timm_dyacts.coverage.trained_like import trained_like_
from timm_dyacts.operators import OPERATORS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / 'scripts' / 'coverage.py'


@pytest.fixture
def call_script(monkeypatch):
    """Run the script within this process, which saves its start."""
    def call(*options):
        monkeypatch.setattr(sys, 'argv', ['coverage.py', *options])
        runpy.run_path(str(SCRIPT), run_name='__main__')
    return call


def start(table, *options):
    env = dict(os.environ, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1')
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), '--output', str(table), *options],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def read(table):
    with open(table, newline='') as f:
        return {(row['architecture'], row['operation']): row for row in csv.DictReader(f)}


def wait_for_rows(process, table, count):
    while process.poll() is None:
        if table.exists() and table.read_text().count('\n') > count:
            return
        time.sleep(0.01)
    raise AssertionError(f'the script ended before it could be interrupted: {process.communicate()}')


@pytest.fixture(scope='module')
def table(tmp_path_factory):
    """The table of two architectures, whose making was cut short in the middle of a row."""
    path = tmp_path_factory.mktemp('coverage') / 'coverage.csv'
    cases = '--filter', 'test_resnet', 'test_vit'
    process = start(path, *cases)
    wait_for_rows(process, path, 2)
    process.kill()
    process.communicate()
    before = path.read_text()
    with open(path, 'a') as f:
        f.write('test_vit,no')
    finish(start(path, *cases))
    assert path.read_text().startswith(before), 'what was done is not done again'
    return path


def test_a_killed_run_resumes_to_the_full_table(table):
    with open(table, newline='') as f:
        rows = [(row['architecture'], row['operation']) for row in csv.DictReader(f)]
    assert sorted(rows) == sorted((a, o) for a in ('test_resnet', 'test_vit') for o in default_operations())


def test_rows_tell_what_came_of_each_case(table):
    rows = read(table)
    resnet = {operation: row for (name, operation), row in rows.items() if name == 'test_resnet'}
    assert {row['contains'] + row['relu_cnn'] for row in resnet.values()} == {'11'}
    assert {operation: row['result'] for operation, row in resnet.items()} == dict(
        dyrelu_b='exact', brelu='exact', softpool='approximate', nobn='exact')
    assert all(int(row['replaced']) > 0 for row in resnet.values())
    assert float(resnet['dyrelu_b']['difference']) == float(resnet['brelu']['difference']) == 0
    assert 0 < float(resnet['nobn']['difference']) < 1e-4 < float(resnet['softpool']['difference'])
    assert resnet['nobn']['remaining'] == '0'

    vit = {operation: row for (name, operation), row in rows.items() if name == 'test_vit'}
    assert {row['relu_cnn'] for row in vit.values()} == {'0'}, 'its activation is GELU'
    assert (vit['dyrelu_b']['contains'], vit['dyrelu_b']['result']) == ('1', 'approximate')
    for operation in ('softpool', 'nobn'):
        assert (vit[operation]['contains'], vit[operation]['result']) == ('0', 'absent')


def test_a_case_out_of_time_is_stopped_and_can_be_retried(tmp_path):
    path = tmp_path / 'coverage.csv'
    case = '--filter', 'test_resnet', '--operations', 'nobn'
    finish(start(path, *case, '--timeout', '0.001'))
    row, = read(path).values()
    assert (row['result'], row['reason']) == ('timeout', 'more than 0.001 s')
    finish(start(path, *case, '--retry', 'timeout', '--max-params', '0'))
    row, = read(path).values()
    assert (row['result'], row['difference']) == ('exact', ''), 'too large to be run, by the limit given'


@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='finds the worker through /proc')
def test_the_death_of_a_worker_costs_one_case(tmp_path):
    """As when the system runs out of memory."""
    path = tmp_path / 'coverage.csv'
    process = start(path, '--filter', 'test_resnet', 'test_byobnet')
    wait_for_rows(process, path, 1)
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    worker, = (int(pid) for pid in children if 'spawn_main' in Path(f'/proc/{pid}/cmdline').read_text())
    os.kill(worker, signal.SIGKILL)
    finish(process)
    rows = read(path).values()
    assert len(rows) == 2 * len(default_operations())
    lost, = (row for row in rows if row['result'] == 'error')
    assert lost['reason'] == 'the process died (exit code -9)'


def row(
        architecture, contains, relu_cnn, result, operation='brelu', difference='', reason='', library='timm'):
    return dict.fromkeys(COLUMNS, '') | dict(
        library=library,
        architecture=architecture,
        operation=operation,
        contains=contains,
        relu_cnn=relu_cnn,
        result=result,
        difference=difference,
        reason=reason,
    )


def test_summary_adds_up():
    """Of the architectures with an activation, 4 of 8 convert, 2 exactly; of the 2 ReLU CNNs 1 exactly.

    One that no row tells about in full ('f') counts as containing what is asked for, and one without a comparison ('g')
    does not count in the median.
    """
    text = summarise([
        row('a', '1', '1', 'exact', difference='0'),
        row('b', '1', '1', 'approximate', difference='0.25'),
        row('c', '1', '0', 'exact', difference='1e-06'),
        row('d', '1', '0', 'refused'),
        row('e', '0', '0', 'absent'),
        row('f', '', '', 'timeout'),
        row('g', '1', '0', 'approximate'),
        row('h', '', '', 'error', reason='the process died (exit code -9)'),
        row('i', '1', '0', 'error', reason='ZeroDivisionError at file.py:1: division by zero'),
        row('a', '1', '1', 'exact', operation='nobn'),
    ])
    header, _, brelu, nobn, _, *notes = text.splitlines()
    assert header.count('|') == brelu.count('|') == nobn.count('|')
    assert brelu == '| timm | `brelu` | 8 | 4 (50.0%) | 2 (25.0%) | 1 of 2 (50.0%) | 1 | 2 |'
    assert nobn == '| timm | `nobn` | 1 | 1 (100.0%) | 1 (100.0%) | 1 of 1 (100.0%) | 0 | 0 |'
    assert notes == [
        '- timm, `brelu`, where not exact: median difference 0.25 of the largest output',
        '- timm, `brelu`, errors: 1 (i)',
    ]


def test_the_summary_is_the_table_of_the_guide():
    """Rows that are made up from the numbers in the guide's table give that table."""
    table = re.search(
        r'^\| library \| operation \| architectures .*?(?=\n\n)', guide('any-model'), re.MULTILINE | re.DOTALL)[0]
    rows = []
    for line in table.splitlines()[2:]:
        library, operation, contain, convert, exact, relu, refused, ran_out = line.strip('| ').split(' | ')
        converted, exactly, refused, ran_out = (int(re.match(r'\d+', cell)[0]) for cell in (
            convert, exact, refused, ran_out))
        exact_relus, relus = map(int, re.match(r'(\d+) of (\d+)', relu).groups())
        results = ['exact'] * exactly + ['approximate'] * (converted - exactly) \
            + ['refused'] * refused + ['timeout'] * ran_out
        assert len(results) == int(contain), 'no case is lost'
        is_relu = [i < exact_relus or exactly <= i < exactly + relus - exact_relus for i in range(len(results))]
        rows += [
            row(str(i), '1', str(int(cnn)), result, operation.strip('`'), library=library)
            for i, (result, cnn) in enumerate(zip(results, is_relu, strict=True))
        ]
    assert summarise(rows) == table


def test_summary_of_a_table(table, call_script, capsys):
    call_script('--summary', '--output', str(table))
    rows = read(table)
    moved = {operation: float(rows['test_vit', operation]['difference']) for operation in ('dyrelu_b', 'brelu')}
    moved['softpool'] = float(rows['test_resnet', 'softpool']['difference'])
    assert capsys.readouterr().out.splitlines()[2:] == [
        '| timm | `dyrelu_b` | 2 | 2 (100.0%) | 1 (50.0%) | 1 of 1 (100.0%) | 0 | 0 |',
        '| timm | `brelu` | 2 | 2 (100.0%) | 1 (50.0%) | 1 of 1 (100.0%) | 0 | 0 |',
        '| timm | `softpool` | 1 | 1 (100.0%) | 0 (0.0%) | 0 of 1 (0.0%) | 0 | 0 |',
        '| timm | `nobn` | 1 | 1 (100.0%) | 1 (100.0%) | 1 of 1 (100.0%) | 0 | 0 |',
        '',
        *(f'- timm, `{operation}`, where not exact: median difference {value} of the largest output'
          for operation, value in moved.items()),
    ]


def test_the_operations_come_from_the_table_of_operators():
    assert default_operations() == ['dyrelu_b', 'brelu', 'softpool', 'nobn']
    transitions = {f'{name}_transition' for name in ('dyrelu_b', 'brelu', 'softpool')}
    assert set(operations()) == {
        *OPERATORS, 'nobn', 'dyrelu_b_fit', 'dyrelu_b_fit_k3', 'dyrelu_b_late', *transitions}
    assert operations()['softpool_transition'] == dict(pool='softpool', transition=True)
    assert operations()['dyrelu_b_fit_k3'] == dict(act='dyrelu_b', start='fit', act_kwargs=dict(k=3))
    assert operations()['dyrelu_b_late'] == dict(act='dyrelu_b', where='late')
    assert operations()['softpool'] == dict(pool='softpool')


def test_a_fitted_start_moves_the_outputs_less(tmp_path):
    path = tmp_path / 'coverage.csv'
    starts = 'dyrelu_b', 'dyrelu_b_fit', 'dyrelu_b_fit_k3'
    finish(start(path, '--filter', 'test_efficientnet', '--operations', *starts))
    rows = read(path)
    moved = [float(rows['test_efficientnet', operation]['difference']) for operation in starts]
    assert moved == sorted(moved, reverse=True)


@pytest.mark.parametrize('options, message', [
    (['--filter', 'no_such_net'], '--filter must match an architecture of timm, got no_such_net'),
    (['--library', 'timm', 'torchvision', '--filter', 'test_resnet'],
     '--filter must match an architecture of torchvision, got test_resnet'),
    (['--workers', '0'], '--workers must be at least 1, got 0'),
    (['--summary', '--output', 'no_such.csv'], "--output must be an existing table, got 'no_such.csv'"),
])
def test_bad_input_is_one_clear_line(options, message, tmp_path, call_script):
    with pytest.raises(SystemExit) as exit_info:
        call_script('--output', str(tmp_path / 'coverage.csv'), *options)
    assert exit_info.value.code == f'coverage.py: error: {message}'


class TestTrainedLike:
    """Stand-ins for trained models: the same numbers as ever, or nothing could be compared with former tables."""

    def build(self, exact_statistics):
        torch.manual_seed(0)
        model = timm.create_model('test_resnet')
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        return trained_like_(model, [x], generator, scales=(0.1, 0.5), exact_statistics=exact_statistics), x

    def test_exact_statistics_are_those_of_the_batch(self):
        model, x = self.build(exact_statistics=True)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        inputs = []
        handle = norms[0].register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
        with torch.no_grad():
            model.train()(x)
        handle.remove()
        torch.testing.assert_close(norms[0].num_batches_tracked, torch.tensor(2))
        model, _ = self.build(exact_statistics=True)
        norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
        torch.testing.assert_close(norm.running_mean, inputs[0].mean((0, 2, 3)))
        torch.testing.assert_close(norm.running_var, inputs[0].var((0, 2, 3)))
        assert norm.momentum == 0.1 and not model.training
        assert norm.weight.abs().min() >= 0.1 and norm.weight.abs().max() <= 0.6

    def test_other_statistics_are_moved(self):
        (exact, _), (moved, _) = self.build(True), self.build(False)
        for (name, a), b in zip(exact.state_dict().items(), moved.state_dict().values(), strict=True):
            assert torch.equal(a, b) == ('running' not in name), name


@pytest.mark.parametrize('content', [b'{"a": 1}\n', b'library,architecture\ntimm,a\n', b'\xff\xfe', b'not a table'])
@pytest.mark.parametrize('options', [[], ['--summary']])
def test_another_file_is_no_table_and_stays(tmp_path, content, options):
    path = tmp_path / 'mine.csv'
    path.write_bytes(content)
    with pytest.raises(SystemExit, match='mine.csv.* is no table of coverage'):
        cli.main(['coverage', '--filter', 'test_resnet', '--output', str(path), *options])
    assert path.read_bytes() == content


def test_a_pipe_is_no_table(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    with pytest.raises(SystemExit, match='is no file, and a table is read again to go on'):
        cli.main(['coverage', '--filter', 'test_resnet', '--output', str(tmp_path / 'pipe')])


def test_a_table_that_cannot_be_written(tmp_path):
    """One line, and nothing beside it."""
    (tmp_path / 'file').write_text('')
    for output in (tmp_path, tmp_path / 'file' / 'table.csv', tmp_path / 'no' / 'table.csv'):
        with pytest.raises(SystemExit) as error:
            cli.main(['coverage', '--filter', 'test_resnet', '--output', str(output)])
        assert 'cannot be read or written' in error.value.code and '\n' not in error.value.code
    assert [path.name for path in tmp_path.iterdir()] == ['file']
