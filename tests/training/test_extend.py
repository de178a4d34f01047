"""A run is given more epochs."""
import pytest
import yaml
from support.small_run import assert_same_end, train_small, train_with

import timm_dyacts  # noqa: F401
from timm_dyacts.run_folder import RunFolder
from timm_dyacts.training import TrainingInterrupted
from timm_dyacts.training.state import load_state


@pytest.fixture
def run(photos, tmp_path, without_pictures):
    """Train for some epochs of three batches."""
    def call(experiment, epochs, *options):
        train_small(
            photos, tmp_path, '--epochs', epochs, '--experiment', experiment, '--warmup-epochs', 1, '--drop', 0.3,
            *options)
        return RunFolder(tmp_path / experiment)
    return call


@pytest.mark.parametrize('options', [
    ['--sched', 'constant', '--model-ema'],
    ['--sched', 'step', '--decay-epochs', '1.5', '--grad-accum-steps', '2', '--early-stopping', '8'],
    ['--sched', 'plateau', '--patience-epochs', '0', '--val-interval', '2'],
], ids=' '.join)
def test_a_schedule_that_does_not_know_the_end_gives_the_longer_run(run, options):
    whole = run('whole', 4, *options)
    run('extended', 2, *options)
    extended = run('extended', 4, *options, '--resume', 'auto')
    assert_same_end(whole.path, extended.path)


def test_the_learning_rate_is_that_of_the_longer_run(run, interrupt, capsys):
    whole = run('whole', 5).read_summary()
    first = run('extended', 2)
    short = first.read_summary()
    interrupt(2)  # in the epoch after the extension
    with pytest.raises(TrainingInterrupted):
        train_with('--resume', first.path, '--epochs', 5)
    interrupt(-1)
    assert 'Extended from 2 to 5 epochs: from there on the learning rate is that of --epochs 5.\n' in (
        capsys.readouterr().out)
    train_with('--resume', first.path)  # which is an extended one by now
    rows = first.read_summary()
    assert rows[:2] == short
    assert [row['lr'] for row in rows[2:]] == [row['lr'] for row in whole[2:]]
    text = first.options.read_text()
    assert text.startswith('# Up to 0 images of epoch 2 the learning rate is that of --epochs 2.\n')
    assert yaml.safe_load(text)['epochs'] == 5
    assert load_state(first.state)['progress']['extensions'] == [dict(epochs=2, epoch=2, images=0)]


def test_the_first_batch_after_it_has_the_new_rate(run, capsys):
    run('extended', 2)
    capsys.readouterr()
    run('extended', 4, '--resume', 'auto', '--log-interval', 1)
    extended = [line for line in capsys.readouterr().out.splitlines() if line.startswith('train   2')]
    run('whole', 4, '--log-interval', 1)
    whole = [line for line in capsys.readouterr().out.splitlines() if line.startswith('train   2')]
    rates = [[line.split('  lr ')[1].split()[0] for line in lines] for lines in (extended, whole)]
    assert rates[0] == rates[1] != ['0.00e+00'] * 2


def test_extended_before_its_end(run, interrupt):
    interrupt(4)
    with pytest.raises(TrainingInterrupted):
        run('stopped', 2)
    interrupt(-1)
    rows = run('stopped', 3, '--resume', 'auto').read_summary()
    assert len(rows) == 3
    assert [row['lr'] for row in rows[1:]] == [row['lr'] for row in run('whole', 3).read_summary()[1:]]


def test_fewer_epochs_are_refused(run):
    run('done', 2)
    with pytest.raises(ValueError, match=r'--resume: the run was started with other options: --epochs 2 \(now 1\)'):
        run('done', 1, '--resume', 'auto')


def test_a_run_that_stopped_early_goes_on_with_more_patience(run, monkeypatch):
    values = iter([50.0, 40.0, 30.0, 60.0, 20.0])
    monkeypatch.setattr('timm_dyacts.training.trainer.evaluate', lambda *args, **kwargs: dict(
        loss=0.0, top1=next(values), top5=100.0))
    folder = run('stopped', 5, '--early-stopping', 2)
    best = folder.checkpoint('best')
    assert len(folder.read_summary()) == 3 and best.read_results().stopped_early
    run('stopped', 5, '--early-stopping', 3, '--resume', 'auto')
    assert len(folder.read_summary()) == 5
    assert best.read_results().stopped_early is None and best.read_results().epoch == 3


def test_auto_without_a_name_says_why_it_starts_another_run(run, tmp_path, caplog):
    run('', 1)
    [folder] = tmp_path.iterdir()
    run('', 2, '--resume', 'auto')
    assert len(list(tmp_path.iterdir())) == 2
    assert (
        f'--resume auto starts a new run: {folder} has other options, --epochs 1 (now 2). To go on with that one, name '
        f'it: --resume {folder}') in caplog.text
    caplog.clear()
    run('', 2, '--resume', 'auto', '--lr', 0.5)
    assert not caplog.text
