"""The profile of some updates, and the range test of the learning rate."""
import csv
import json

import pytest
from support.small_run import assert_same_end, config_of, train_small

import timm_dyacts  # noqa: F401
from timm_dyacts.cli.train import main
from timm_dyacts.run_folder import RunFolder
from timm_dyacts.training import TrainingInterrupted, find_lr, loop
from timm_dyacts.training.lr_range import LrRange, suggest

pytest.importorskip('matplotlib')


@pytest.fixture
def run(photos, tmp_path, without_pictures):
    def call(experiment, *options):
        train_small(photos, tmp_path, '--experiment', experiment, '-b', 2, *options)
        return RunFolder(tmp_path / experiment)
    return call


# Profile


def test_a_trace_and_a_table(run, capsys):
    plain = run('plain', '--epochs', 2)
    profiled = run('profiled', '--epochs', 2, '--profile', 3)
    assert_same_end(plain.path, profiled.path)
    assert {path.name for path in profiled.profile.iterdir()} == {'trace.json', 'operators.txt'}
    events = json.loads((profiled.profile / 'trace.json').read_text())['traceEvents']
    steps = {event['name'] for event in events if str(event.get('name', '')).startswith('ProfilerStep#')}
    assert steps == {'ProfilerStep#5', 'ProfilerStep#6', 'ProfilerStep#7'}, 'after five of warmup'
    table = (profiled.profile / 'operators.txt').read_text()
    assert table.startswith('3 updates\n') and 'convolution' in table and 'Self CPU %' in table
    assert f'Profiled 3 updates: trace.json and operators.txt in {profiled.profile}\n' in capsys.readouterr().out
    assert not plain.profile.exists()


def test_it_waits_for_an_epoch_in_which_it_fits(run, interrupt, tmp_path):
    interrupt(8)
    with pytest.raises(TrainingInterrupted):
        run('stopped', '--epochs', 2, '--profile', 7)
    folder = RunFolder(tmp_path / 'stopped')
    assert not folder.profile.exists(), 'it is not complete'
    interrupt(-1)
    run('stopped', '--epochs', 2, '--profile', 7, '--resume', 'auto')
    assert (folder.profile / 'operators.txt').read_text().startswith('7 updates\n')


def test_more_than_an_epoch_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match='--profile must be at most 7, as an epoch has 12 updates, of which 5 warm up'):
        run('none', '--profile', 8)
    assert not (tmp_path / 'none').exists()


# Learning rate


def test_a_range_test_leaves_a_table_and_a_picture(photos, tmp_path, capsys):
    argv = [
        '--data-dir', str(photos), '--model', 'test_resnet', '--img-size', '32', '--workers', '0', '-b', '8', '--opt',
        'sgd', '--find-lr', '--output', str(tmp_path), '--experiment', 'colors']
    main(argv)
    [folder] = tmp_path.iterdir()
    assert folder.name == 'colors-lr' and {path.name for path in folder.iterdir()} == {'lr.csv', 'lr.png'}
    with open(folder / 'lr.csv', newline='') as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    ratios = [b['lr'] / a['lr'] for a, b in zip(rows[:-1], rows[1:], strict=True)]
    assert rows[0]['lr'] == 1e-6 and ratios == pytest.approx([1e7 ** (1 / 99)] * len(ratios))
    assert len(rows) <= 100 and all(0 < row['loss'] for row in rows)
    out = capsys.readouterr().out
    assert f'lr.csv and lr.png are in {folder}\n' in out
    assert 'Suggested: --lr ' in out and 'epoch' not in out


def test_the_rate_grows_in_all_groups_until_the_loss_explodes(photos, tmp_path, monkeypatch):
    rates = []
    train_one_epoch = loop.train_one_epoch

    def watch(task, loader, optimizer, epoch, before_update, **kwargs):
        def note(update):
            before_update(update)
            rates.append({group['lr'] / group.get('lr_scale', 1) for group in optimizer.param_groups})
        return train_one_epoch(task, loader, optimizer, epoch, before_update=note, **kwargs)

    monkeypatch.setattr('timm_dyacts.training.lr_range.train_one_epoch', watch)
    monkeypatch.setattr('timm_dyacts.training.lr_range._UPDATES', 20)
    found = find_lr(config_of(
        '--data-dir', photos, '--model', 'test_resnet', '--img-size', 32, '--workers', 0, '-b', 8, '--output', tmp_path,
        '--layer-decay', 0.7, '--opt', 'adamw'))
    assert found.lrs == pytest.approx([max(rate) for rate in rates[:len(found.lrs)]])
    assert all(max(rate) == pytest.approx(min(rate)) for rate in rates)
    assert isinstance(found, LrRange) and len(found.lrs) == len(found.losses) == len(found.smoothed)


def test_what_is_suggested():
    lrs = [1e-4, 1e-3, 1e-2, 1e-1]
    assert suggest(lrs, [3, 2, 1, 9]) == pytest.approx(1e-3)
    assert suggest(lrs, [1, 2, 3, 4]) is None
    assert suggest([], []) is None


def test_it_is_not_for_a_run_that_is_there(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(['--find-lr', '--resume', 'auto', '--output', str(tmp_path)])
    assert not list(tmp_path.iterdir())
