"""The course of a run: readings within an epoch, which epochs are evaluated and kept, and when it ends."""
import json
import re
import shutil
from collections import OrderedDict

import pytest
import timm
import torch
from safetensors.torch import load_file
from support.small_run import assert_same_end, train_small

import timm_dyacts  # noqa: F401
from timm_dyacts.evaluation import ValidateConfig, plot_curves, validate
from timm_dyacts.run_folder import RunFolder
from timm_dyacts.training import TrainConfig, TrainingInterrupted
from timm_dyacts.training.log import best_rows, early_stop, write_summary
from timm_dyacts.training.pace import Pace
from timm_dyacts.training.state import EpochMeter


@pytest.fixture
def run(photos, tmp_path, without_pictures):
    """Train for some epochs of three batches."""
    def call(experiment, *options):
        result = train_small(photos, tmp_path, '--experiment', experiment, *options)
        return RunFolder(result.folder), result
    return call


@pytest.fixture
def evaluations(monkeypatch):
    """Let evaluations come out as told, for the model and, where there is one, its average."""
    def tell(*top1):
        values = iter(top1)
        monkeypatch.setattr('timm_dyacts.training.trainer.evaluate', lambda *args, **kwargs: OrderedDict(
            loss=0.0, top1=float(next(values)), top5=100.0))
    return tell


# Readings within an epoch


def test_pace():
    now = 0.0
    pace = Pace(images_per_epoch=100, num_epochs=3, clock=lambda: now)
    meter = EpochMeter(loss=50.0, correct=0, count=20)  # of before the run was resumed
    pace.start_training(meter)
    now, meter.loss, meter.count = 4.0, 90.0, 40
    reading = pace.read(0, meter)
    assert (reading.loss, reading.images_per_second) == (2.0, 5.0)
    assert (reading.seconds_left_in_epoch, reading.seconds_left) == (12.0, 52.0)
    now, meter.count = 10.0, 100
    pace.finish_training(meter)
    now = 15.0
    pace.finish_evaluation()
    meter = EpochMeter()
    pace.start_training(meter)
    now, meter.count = 16.0, 10
    reading = pace.read(1, meter)
    assert reading.images_per_second == 10
    per_image = (4 + 6 + 1) / (20 + 60 + 10)
    assert reading.seconds_left_in_epoch == pytest.approx(90 * per_image)
    assert reading.seconds_left == pytest.approx(190 * per_image + 2 * 5), 'two evaluations of five seconds each'


@pytest.mark.parametrize('interval, batches', [(1, [1, 2]), (2, [2]), (3, []), (50, [])])
def test_a_line_for_each_interval(run, capsys, interval, batches):
    folder, _ = run('lines', '--epochs', 2, '--log-interval', interval, '--grad-accum-steps', 2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('train ')]
    number = r'[\d.e+-]+'
    pattern = (
        rf'train +(\d)  batch (\d) of 3  loss {number}  lr {number}  {number} images/s  left [\d:]+ of the epoch, '
        r'[\d:]+ of the run')
    found = [tuple(map(int, re.fullmatch(pattern, line).groups())) for line in lines]
    assert found == [(epoch, batch) for epoch in (0, 1) for batch in batches]


def test_no_lines_beside_the_bar_of_a_terminal(run, capsys, monkeypatch):
    monkeypatch.setattr('sys.stdout.isatty', lambda: True, raising=False)
    run('terminal', '--log-interval', 1)
    assert 'images/s' not in capsys.readouterr().out


# Which epochs are evaluated


def test_an_evaluation_every_so_many_epochs_and_after_the_last(run, photos):
    folder, result = run('every', '--epochs', 5, '--val-interval', 2, '--model-ema')
    rows = folder.read_summary()
    assert [row['epoch'] for row in rows] == [0, 1, 2, 3, 4]
    assert [row['epoch'] for row in rows if 'eval_top1' in row] == [1, 3, 4]
    assert [row['epoch'] for row in rows if 'ema_top1' in row] == [1, 3, 4]
    assert result.best_epoch in (1, 3, 4)
    header, first = folder.summary.read_text().splitlines()[:2]
    assert header == 'epoch,train_loss,eval_loss,eval_top1,eval_top5,ema_loss,ema_top1,ema_top5,lr'
    assert ',,,,,,' in first
    plain, _ = run('plain', '--epochs', 5, '--model-ema')
    for ours, theirs in zip(rows, plain.read_summary(), strict=True):
        assert ours == {name: value for name, value in theirs.items() if name in ours}, 'training is the same'


def test_resumed_between_evaluations(run, interrupt):
    options = '--epochs', 3, '--val-interval', 2
    whole, _ = run('whole', *options)
    interrupt(2)
    with pytest.raises(TrainingInterrupted):
        run('stopped', *options)
    interrupt(5)
    with pytest.raises(TrainingInterrupted):
        run('stopped', *options, '--resume', 'auto')
    interrupt(-1)
    stopped, _ = run('stopped', *options, '--resume', 'auto')
    assert_same_end(whole.path, stopped.path)


def test_curves_have_gaps(tmp_path):
    pytest.importorskip('matplotlib')
    rows = [dict(epoch=i, train_loss=1 / (i + 1), lr=0.1) for i in range(4)]
    rows[2] = dict(epoch=2, train_loss=0.3, eval_loss=0.5, eval_top1=60.0, eval_top5=90.0, lr=0.1)
    write_summary(rows, tmp_path / 'summary.csv')
    plot_curves(tmp_path / 'summary.csv', tmp_path / 'curves.png')
    write_summary(rows[:2], tmp_path / 'summary.csv')
    plot_curves(tmp_path / 'summary.csv', tmp_path / 'curves.png')


# Early stopping


def test_when_to_stop():
    config = TrainConfig(early_stopping=2)

    def stops(*values, metric='top1'):
        rows = [
            dict(epoch=i) if value is None else {'epoch': i, f'eval_{metric}': value} for i, value in enumerate(values)]
        return early_stop(rows, TrainConfig(early_stopping=2, eval_metric=metric), 30) is not None

    assert not stops(5.0, 4.0) and stops(5.0, 4.0, 3.0)
    assert stops(5.0, 5.0, 5.0), 'equal is not better'
    assert not stops(5.0, 4.0, 6.0)
    assert not stops(5.0, None, None) and stops(5.0, None, None, 4.0), 'it takes an evaluation'
    assert stops(3.0, 4.0, 5.0, metric='loss') and not stops(5.0, 4.0, 3.0, metric='loss')
    assert stops(float('nan'), float('nan'), float('nan')), 'nothing becomes better any more'
    assert early_stop([], config, 30) is None
    within = [dict(epoch=i, eval_top1=9.0 - i, t=0.5) for i in range(4)]
    assert early_stop(within, config, 30) is None, 'within a transition there is no best epoch yet'
    assert early_stop([dict(epoch=i, eval_top1=9.0 - i) for i in range(3)], config, 3) is None, 'the end is no stop'


def test_a_run_ends_early_and_says_so(run, evaluations, capsys):
    evaluations(10, 20, 15, 20)
    folder, result = run('early', '--epochs', 9, '--early-stopping', 2, '--model-kwargs', 'act_layer=dyrelu_b')
    why = 'after epoch 3, as eval_top1 has not become better in the 2 epochs since epoch 1 (--early-stopping 2)'
    assert result.stopped_early == why and result.best_epoch == 1
    assert f'Stopped early {why}.\n' in capsys.readouterr().out
    assert len(folder.read_summary()) == 4
    assert folder.checkpoint('best').read_results().stopped_early == why
    evaluations()  # there is nothing left to train or to evaluate
    again, result = run(
        'early', '--epochs', 9, '--early-stopping', 2, '--model-kwargs', 'act_layer=dyrelu_b', '--resume', 'auto')
    assert result.stopped_early == why and len(again.read_summary()) == 4


def test_a_resumed_run_goes_on_counting(run, evaluations, interrupt):
    options = '--epochs', 9, '--early-stopping', 2, '--model-ema'
    values = [value for top1 in (30, 10, 20, 25) for value in (top1, 50)]
    evaluations(*values)
    whole, _ = run('whole', *options)
    evaluations(*values)
    interrupt(7)  # in the third epoch
    with pytest.raises(TrainingInterrupted):
        run('stopped', *options)
    interrupt(-1)
    stopped, result = run('stopped', *options, '--resume', 'auto')
    assert result.stopped_early is not None and result.best_epoch == 0
    assert_same_end(whole.path, stopped.path)
    assert stopped.checkpoint('ema').read_results().stopped_early == result.stopped_early


def test_a_run_to_its_end_says_nothing(run):
    folder, result = run('whole', '--early-stopping', 9)
    assert result.stopped_early is None
    assert 'stopped_early' not in json.loads(folder.checkpoint('best').results.read_text())


# The best checkpoints


def test_best_rows():
    rows = [dict(epoch=i, eval_top1=value) for i, value in enumerate((3.0, float('nan'), 5.0, 5.0, 1.0))]
    assert [row['epoch'] for row in best_rows(rows, 'eval_top1', 9)] == [2, 3, 0, 4]
    rows = [dict(row, eval_loss=row['eval_top1']) for row in rows]
    assert [row['epoch'] for row in best_rows(rows, 'eval_loss', 3)] == [4, 0, 2]


def test_the_best_checkpoints_are_kept(run, evaluations, photos):
    evaluations(30, 3, 10, 4, 20, 2, 40, 5)
    folder, _ = run('history', '--epochs', 4, '--checkpoint-hist', 2, '--model-ema')
    history = folder.path / 'history'
    assert {path.name for path in history.iterdir()} == {'best-0', 'best-3', 'ema-1', 'ema-3'}
    for which, epoch, top1 in (('best', 0, 30), ('best', 3, 40), ('ema', 1, 4), ('ema', 3, 5)):
        checkpoint = folder.history(which, epoch)
        results = checkpoint.read_results()
        assert (results.epoch, results.top1) == (epoch, top1)
        assert timm.create_model(f'local-dir:{checkpoint}', pretrained=True).num_classes == 3
        assert RunFolder.containing(checkpoint) == RunFolder(folder.path.resolve())
    best, kept = (load_file(c.weights) for c in (folder.checkpoint('best'), folder.history('best', 3)))
    assert all(torch.equal(value, kept[name]) for name, value in best.items())
    record = validate(ValidateConfig(model=str(folder.history('best', 3)), workers=0))
    assert 0 <= record['top1'] <= 100, 'on the data of the run'


def test_killed_while_it_writes_the_history(run, interrupt):
    """What a later epoch had written is written again, or removed."""
    options = '--epochs', 3, '--checkpoint-hist', 2, '--checkpoint-interval', '1epoch'
    whole, _ = run('whole', *options)
    interrupt(7)
    with pytest.raises(TrainingInterrupted):
        run('killed', *options)
    interrupt(-1)
    killed = RunFolder(whole.path.with_name('killed'))
    half = killed.history('best', 2)
    shutil.copytree(killed.checkpoint('last').path, half.path)
    half.weights.write_bytes(b'')
    run('killed', *options, '--resume', 'auto')
    assert_same_end(whole.path, killed.path)


def test_no_history_unless_asked_for(run):
    folder, _ = run('plain')
    assert not (folder.path / 'history').exists()
