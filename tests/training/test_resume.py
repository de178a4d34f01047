"""A run that is stopped at any moment and resumed ends as it would have ended: bit for bit."""
import csv
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.photos import write_photos
from support.small_disk import largest_file
from support.small_run import assert_same_end, train_small, train_with

import timm_dyacts  # noqa: F401
from timm_dyacts.cli.train import main
from timm_dyacts.evaluation import evaluate
from timm_dyacts.options import to_dict
from timm_dyacts.run_folder import RunFolder
from timm_dyacts.training import TrainConfig, TrainingInterrupted
from timm_dyacts.training.resume import check_resumable
from timm_dyacts.world import StopSignal, World

ROOT = Path(__file__).parents[2]
CPU = torch.device('cpu')


@pytest.fixture
def run(photos, tmp_path, without_pictures):
    """Train a small model with dropout for two epochs of three steps; options come on top."""
    def call(experiment, *options):
        return train_small(
            photos, tmp_path, '--epochs', 2, '--drop', 0.3, '--warmup-epochs', 1, '--checkpoint-interval', 2,
            '--experiment', experiment, *options)
    return call


# Runs that are stopped


@pytest.mark.parametrize('options', [
    [],
    ['--model-kwargs', 'act_layer=dyrelu_b', '--freeze', 'backbone', '--unfreeze-epoch', '1', '--lr-ops', '3'],
    ['--aa', 'rand-m5-mstd0.5', '--reprob', '0.5', '--mixup', '0.2', '--cutmix', '1', '--drop-path', '0.1'],
    ['--model-ema', '--model-ema-decay', '0.9', '--model-ema-warmup', '--opt', 'lookahead_sgd', '--lr', '0.05'],
    ['--grad-accum-steps', '2', '--batch-size', '4', '--clip-grad', '1', '--sched', 'step'],
    ['--amp', '--channels-last', '--layer-decay', '0.7', '--opt', 'adafactor'],
    ['--workers', '1', '--reprob', '0.5'],
], ids=' '.join)
def test_stopped_in_both_epochs_and_resumed(run, interrupt, tmp_path, options):
    run('whole', *options)
    for updates in (2, 3):
        interrupt(updates)
        with pytest.raises(TrainingInterrupted, match=r'Stopped by SIGTERM at epoch \d after \d+ images\. Go on with'):
            run('stopped', *options, '--resume', 'auto')
    interrupt(-1)
    run('stopped', *options, '--resume', 'auto')
    assert_same_end(tmp_path / 'whole', tmp_path / 'stopped')


def test_stopped_while_evaluating(run, tmp_path, monkeypatch):
    def stop_and_evaluate(model, loader, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate(model, loader, *args, **kwargs)

    run('whole')
    with monkeypatch.context() as patch:
        patch.setattr('timm_dyacts.training.trainer.evaluate', stop_and_evaluate)
        with pytest.raises(TrainingInterrupted, match='SIGINT at epoch 0 after 24 images'):
            run('stopped')
    assert not (tmp_path / 'stopped' / 'summary.csv').exists()
    run('stopped', '--resume', 'auto')
    assert_same_end(tmp_path / 'whole', tmp_path / 'stopped')


def test_killed_at_random_moments(photos):
    """SIGKILL, which no program can answer. `python tests/training/kill_and_resume.py` does it more often."""
    command = [
        sys.executable, str(Path(__file__).with_name('kill_and_resume.py')), '--kills', '3', '--model', 'test_resnet',
        '--data-dir', str(photos), '--img-size', '32', '--epochs', '3', '--batch-size', '4', '--workers', '0',
        '--checkpoint-interval', '2', '--reprob', '0.3', '--model-ema']
    done = subprocess.run(command, env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'all of 4 files equal' in done.stdout


@pytest.mark.parametrize('signum, status', [
    (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)])
def test_exit_status_and_message(run, interrupt, tmp_path, photos, capsys, signum, status):
    interrupt(1, signum)
    with pytest.raises(SystemExit) as exit_info:
        main([
            '--data-dir', str(photos), '--model', 'test_resnet', '--img-size', '32', '-b', '8', '-j', '0',
            '--output', str(tmp_path), '--experiment', 'stopped'])
    assert exit_info.value.code == status
    assert f'Go on with: timm-dyacts train --resume {tmp_path / "stopped"}\n' in capsys.readouterr().err


def test_signals_have_their_old_handlers_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal(World(CPU)) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed() == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal(World(CPU)) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.agreed()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_second_ctrl_c_stops_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have background jobs ignore Ctrl-C
    with pytest.raises(KeyboardInterrupt), StopSignal(World(CPU)) as stop:
        signal.raise_signal(signal.SIGINT)
        while not stop.signum:  # Python handles a signal some time after it came, and two of them as one
            time.sleep(0.001)
        signal.raise_signal(signal.SIGINT)
        time.sleep(10)
    signal.signal(signal.SIGINT, before)


# Which run is resumed


def test_auto_starts_what_is_not_there_and_repeats_what_is_done(run, tmp_path):
    first = run('colors', '--resume', 'auto')
    rows = (tmp_path / 'colors' / 'summary.csv').read_text()
    again = run('colors', '--resume', 'auto')
    assert again.folder == first.folder == str(tmp_path / 'colors')
    assert again.best == first.best
    assert (tmp_path / 'colors' / 'summary.csv').read_text() == rows


def test_auto_without_a_name_finds_the_run_of_the_same_options(run, interrupt, tmp_path):
    interrupt(4)
    with pytest.raises(TrainingInterrupted):
        run('')
    [folder] = tmp_path.iterdir()
    interrupt(-1)
    assert run('', '--lr', '0.5', '--resume', 'auto').folder != str(folder)
    assert run('', '--resume', 'auto').folder == str(folder)


def test_a_path_alone_is_enough(run, interrupt, tmp_path):
    interrupt(4)
    with pytest.raises(TrainingInterrupted):
        run('stopped', '--lr', '0.01')
    interrupt(-1)
    result = train_with('--resume', tmp_path / 'stopped')
    assert result.folder == str(tmp_path / 'stopped')
    run('whole', '--lr', '0.01')
    assert_same_end(tmp_path / 'whole', tmp_path / 'stopped')


@pytest.mark.parametrize('full_at', ['args.yaml', 'config.json', 'model.safetensors', 'checkpoint/state.pt'])
def test_a_full_disk_costs_no_epoch(run, tmp_path, full_at):
    """Whatever cannot be written, the run ends with an error that names it, and goes on once there is room."""
    run('whole')
    with largest_file((tmp_path / 'whole' / full_at).stat().st_size - 1):
        with pytest.raises(OSError, match='File too large') as error:
            run('stopped', '--resume', 'auto')
    assert 'stopped' in str(error.value)
    assert not [path for path in (tmp_path / 'stopped').rglob('*') if path.suffix == '.tmp' or path.name == '.saving']
    run('stopped', '--resume', 'auto')
    assert_same_end(tmp_path / 'whole', tmp_path / 'stopped')


@pytest.mark.parametrize('by_itself', [True, False])
def test_the_state_before_is_kept_and_used(run, interrupt, tmp_path, caplog, by_itself):
    run('whole')
    interrupt(5)
    with pytest.raises(TrainingInterrupted):
        run('stopped')
    interrupt(-1)
    state = tmp_path / 'stopped' / 'checkpoint' / 'state.pt'
    previous = state.with_name('previous.pt')
    good = previous.read_bytes()
    state.write_bytes(state.read_bytes()[:5000])
    with pytest.raises(ValueError, match=f'state.pt cannot be read: truncated.* --resume {previous}'):
        run('stopped', '--resume', str(state))
    assert previous.read_bytes() == good
    if by_itself:
        run('stopped', '--resume', 'auto')
        assert f'Going on from the state before it, {previous}.' in caplog.text
    else:
        run('stopped', '--resume', str(previous))
    assert_same_end(tmp_path / 'whole', tmp_path / 'stopped')


def test_rows_after_the_state_are_dropped(run, interrupt, tmp_path):
    """summary.csv may be ahead of the state. What it says of epochs that will be done again goes."""
    run('whole', '--checkpoint-interval', '2epochs')
    interrupt(4)
    with pytest.raises(TrainingInterrupted):
        run('stopped', '--checkpoint-interval', '2epochs')
    with open(tmp_path / 'stopped' / 'summary.csv', 'a') as f:
        f.write('1,0,0,0,0,0\n1,0,')
    interrupt(-1)
    run('stopped', '--resume', 'auto')
    with open(tmp_path / 'stopped' / 'summary.csv', newline='') as f:
        assert [row['epoch'] for row in csv.DictReader(f)] == ['0', '1']
    assert_same_end(tmp_path / 'whole', tmp_path / 'stopped')


@pytest.mark.parametrize('options, message', [
    (['--lr', '0.5'], r'other options: --lr 0.001 \(now 0.5\)'),
    (['--model-ema'], r'--model-ema False \(now True\)'),
    (['--batch-size', '4'], r'--batch-size 8 \(now 4\)'),
    (['--model', 'test_vit', '--img-size', '64'], r'--img-size 32 \(now 64\), --model test_resnet \(now test_vit\)'),
], ids=' '.join)
def test_other_options_do_not_match(run, options, message):
    run('done', '--epochs', '1')
    with pytest.raises(ValueError, match=message):
        run('done', '--epochs', '1', '--resume', 'auto', *options)


def test_auto_does_not_write_over_another_run(run, tmp_path):
    """A folder without a state is that of a run killed before its first one, or not to be touched."""
    run('done', '--epochs', '1', '--lr', '0.5')
    for name in ('state.pt', 'previous.pt'):
        (tmp_path / 'done' / 'checkpoint' / name).unlink()
    with pytest.raises(ValueError, match=r'has no state, and holds a run with other options: --lr 0.5 \(now 0.1\)'):
        run('done', '--epochs', '1', '--lr', '0.1', '--resume', 'auto')
    run('done', '--epochs', '1', '--lr', '0.5', '--resume', 'auto')


def test_two_processes_do_not_train_in_one_folder(run, interrupt, tmp_path):
    interrupt(4)
    with pytest.raises(TrainingInterrupted):
        run('stopped')
    interrupt(-1)
    state = (tmp_path / 'stopped/checkpoint/state.pt').read_bytes()
    with RunFolder(tmp_path / 'stopped').lock(), pytest.raises(
            ValueError, match=rf'stopped is in use: process {os.getpid()} on .* trains in it'):
        run('stopped', '--resume', 'auto')
    assert (tmp_path / 'stopped/checkpoint/state.pt').read_bytes() == state
    run('stopped', '--resume', 'auto')


def test_labels_that_were_swapped_do_not_match(run, tmp_path):
    photos = write_photos(tmp_path / 'photos')
    run('done', '--epochs', '1', '--data-dir', str(photos))
    os.rename(photos / 'train/red', photos / 'train/beside')
    os.rename(photos / 'train/blue/0.png', photos / 'train/beside/new.png')
    os.rename(photos / 'train/beside', photos / 'train/red')
    os.rename(photos / 'train/red/0.png', photos / 'train/blue/0.png')
    with pytest.raises(ValueError, match='as many, but other files, or other labels'):
        run('done', '--epochs', '1', '--data-dir', str(photos), '--resume', 'auto')


def test_other_data_do_not_match(run, tmp_path):
    run('done', '--epochs', '1')
    other = write_photos(tmp_path / 'other', train=9)
    with pytest.raises(ValueError, match='24 training images of 3 classes, and there are 27 training images'):
        run('done', '--epochs', '1', '--resume', 'auto', '--data-dir', str(other))


@pytest.mark.parametrize('batch_size, world_size, warns', [(8, 2, False), (16, 1, False), (8, 1, True), (8, 4, True)])
def test_other_numbers_of_processes_match(batch_size, world_size, warns, caplog):
    config = TrainConfig(batch_size=8, grad_accum_steps=1, lr=0.1)
    state = dict(args=to_dict(config), world_size=2, data=None)
    check_resumable(state, dataclasses.replace(config, batch_size=batch_size), None, world_size)
    assert ('an update now takes' in caplog.text) == warns


def test_paths_without_a_state(run, tmp_path):
    (tmp_path / 'empty').mkdir()
    for path in ('empty', 'nowhere'):
        with pytest.raises(FileNotFoundError, match=f"--resume must be 'auto'.*{path}' *, which has no checkpoint"):
            run('x', '--resume', str(tmp_path / path))
