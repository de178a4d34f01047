"""scripts/coverage.py, as a user runs it: killed and resumed, out of time, bereft of a worker."""
import csv
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / 'scripts' / 'coverage.py'


@pytest.fixture(scope='module')
def script():
    """What the script defines."""
    return runpy.run_path(str(SCRIPT))


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


def test_a_killed_run_resumes_to_the_full_table(table, script):
    with open(table, newline='') as f:
        rows = [(row['architecture'], row['operation']) for row in csv.DictReader(f)]
    assert sorted(rows) == sorted((a, o) for a in ('test_resnet', 'test_vit') for o in script['DEFAULT_OPERATIONS'])


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
def test_the_death_of_a_worker_costs_one_case(tmp_path, script):
    """As when the system runs out of memory."""
    path = tmp_path / 'coverage.csv'
    process = start(path, '--filter', 'test_resnet', 'test_byobnet')
    wait_for_rows(process, path, 1)
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    worker, = (int(pid) for pid in children if 'spawn_main' in Path(f'/proc/{pid}/cmdline').read_text())
    os.kill(worker, signal.SIGKILL)
    finish(process)
    rows = read(path).values()
    assert len(rows) == 2 * len(script['DEFAULT_OPERATIONS'])
    lost, = (row for row in rows if row['result'] == 'error')
    assert lost['reason'] == 'the process died (exit code -9)'


def test_summary_adds_up(script):
    """Of the architectures with an activation, 4 of 6 convert, 2 exactly; of the 2 ReLU CNNs 1 exactly.

    One that no row tells about in full ('f') counts as containing what is asked for, and one without a comparison ('g')
    does not count in the median.
    """
    def row(architecture, contains, relu_cnn, result, operation='brelu', difference=''):
        return dict.fromkeys(script['COLUMNS'], '') | dict(
            architecture=architecture,
            operation=operation,
            contains=contains,
            relu_cnn=relu_cnn,
            result=result,
            difference=difference,
        )

    text = script['summary']([
        row('a', '1', '1', 'exact', difference='0'),
        row('b', '1', '1', 'approximate', difference='0.25'),
        row('c', '1', '0', 'exact', difference='1e-06'),
        row('d', '1', '0', 'refused'),
        row('e', '0', '0', 'absent'),
        row('f', '', '', 'timeout'),
        row('g', '1', '0', 'approximate'),
        row('a', '1', '1', 'exact', operation='nobn'),
    ])
    header, _, brelu, nobn = text.splitlines()
    assert header.count('|') == brelu.count('|') == nobn.count('|')
    assert brelu == '| `brelu` | 6 | 4 (66.7%) | 2 (33.3%) | 1 of 2 (50.0%) | 0.25 | 1 | 1 |'
    assert nobn == '| `nobn` | 1 | 1 (100.0%) | 1 (100.0%) | 1 of 1 (100.0%) |  | 0 | 0 |'


def test_summary_of_a_table(table, call_script, capsys):
    call_script('--summary', '--output', str(table))
    rows = read(table)
    moved = {operation: float(rows['test_vit', operation]['difference']) for operation in ('dyrelu_b', 'brelu')}
    moved['softpool'] = float(rows['test_resnet', 'softpool']['difference'])
    assert capsys.readouterr().out.splitlines()[2:] == [
        f'| `dyrelu_b` | 2 | 2 (100.0%) | 1 (50.0%) | 1 of 1 (100.0%) | {moved["dyrelu_b"]} | 0 | 0 |',
        f'| `brelu` | 2 | 2 (100.0%) | 1 (50.0%) | 1 of 1 (100.0%) | {moved["brelu"]} | 0 | 0 |',
        f'| `softpool` | 1 | 1 (100.0%) | 0 (0.0%) | 0 of 1 (0.0%) | {moved["softpool"]} | 0 | 0 |',
        '| `nobn` | 1 | 1 (100.0%) | 1 (100.0%) | 1 of 1 (100.0%) |  | 0 | 0 |',
    ]


def test_a_fitted_start_moves_the_outputs_less(tmp_path):
    path = tmp_path / 'coverage.csv'
    starts = 'dyrelu_b', 'dyrelu_b_fit', 'dyrelu_b_fit_k3'
    finish(start(path, '--filter', 'test_efficientnet', '--operations', *starts))
    rows = read(path)
    moved = [float(rows['test_efficientnet', operation]['difference']) for operation in starts]
    assert moved == sorted(moved, reverse=True)


@pytest.mark.parametrize('options, message', [
    (['--filter', 'no_such_net'], '--filter must match an architecture of timm, got no_such_net'),
    (['--workers', '0'], '--workers must be at least 1, got 0'),
    (['--summary', '--output', 'no_such.csv'], "--output must be an existing table, got 'no_such.csv'"),
])
def test_bad_input_is_one_clear_line(options, message, tmp_path, call_script):
    with pytest.raises(SystemExit) as exit_info:
        call_script('--output', str(tmp_path / 'coverage.csv'), *options)
    assert exit_info.value.code == f'coverage.py: error: {message}'
