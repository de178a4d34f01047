"""Data sets that can only be read from their beginning: a run is resumed between epochs, and says so."""
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.photos import COLORS
from support.small_run import assert_same_end, train_small
from timm.data import IterableImageDataset

import timm_dyacts  # noqa: F401
from timm_dyacts.cli.train import main
from timm_dyacts.evaluation import evaluate
from timm_dyacts.training import TrainingInterrupted
from timm_dyacts.training.state import load_state


class Reader:
    """What stands in for a reader of tar files: images that depend on the epoch, one after the other."""
    class_to_idx = {name: label for label, name in enumerate(COLORS)}

    def __init__(self, count: int) -> None:
        self.count = count
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        generator = np.random.default_rng(self.epoch)
        for i in range(self.count):
            color = list(COLORS.values())[i % 3]
            noise = generator.integers(-30, 31, (36, 40, 3))
            yield Image.fromarray((np.array(color) + noise).clip(0, 255).astype(np.uint8)), i % 3


@pytest.fixture
def run(tmp_path, monkeypatch, without_pictures):
    """Train on a stream for three epochs of three steps."""
    def create(name, split, **kwargs):
        return IterableImageDataset(name, reader=Reader(24 if split == 'train' else 12))

    monkeypatch.setattr('timm_dyacts.training.setup.create_dataset', create)

    def call(experiment, *options):
        return train_small(
            Path('stream'), tmp_path, '--dataset', 'wds/stream', '--epochs', 3, '--drop', 0.3, '--experiment',
            experiment, *options)
    return call


def test_stopped_in_the_first_epoch(run, interrupt, tmp_path):
    """There is nothing to resume, so no command to resume is given; --resume auto begins again."""
    interrupt(2)
    with pytest.raises(TrainingInterrupted) as stopped:
        run('stopped')
    assert str(stopped.value) == (
        'Stopped by SIGTERM at epoch 0 after 16 images. A stream of data cannot be resumed within an epoch: nothing is '
        'kept.')
    assert not (tmp_path / 'stopped' / 'checkpoint').exists()
    interrupt(-1)
    run('stopped', '--resume', 'auto')
    run('whole')
    assert_same_end(tmp_path / 'whole', tmp_path / 'stopped')


@pytest.mark.parametrize('options', [[], ['--checkpoint-interval', '2'], ['--checkpoint-interval', '9epochs']], ids=str)
def test_finished_epochs_are_kept(run, interrupt, tmp_path, options):
    run('whole', *options)
    interrupt(8)
    with pytest.raises(TrainingInterrupted) as stopped:
        run('stopped', *options)
    assert str(stopped.value) == (
        f'Stopped by SIGTERM at epoch 2 after 16 images. A stream of data cannot be resumed within an epoch: what was '
        f'trained before epoch 2 is kept. Go on with: timm-dyacts train --resume {tmp_path / "stopped"}')
    assert load_state(tmp_path / 'stopped' / 'checkpoint' / 'state.pt')['progress']['epoch'] == 2
    interrupt(-1)
    main(str(stopped.value).partition('timm-dyacts train ')[2].split())
    assert_same_end(tmp_path / 'whole', tmp_path / 'stopped')


def test_stopped_at_the_end_of_an_epoch(run, interrupt, tmp_path):
    """After its last update an epoch is trained, and only to be evaluated."""
    run('whole')
    interrupt(3)
    with pytest.raises(TrainingInterrupted, match=r'at epoch 0 after 24 images\. Go on with: timm-dyacts train'):
        run('stopped')
    interrupt(-1)
    run('stopped', '--resume', 'auto')
    assert_same_end(tmp_path / 'whole', tmp_path / 'stopped')


def test_stopped_while_evaluating(run, tmp_path, monkeypatch):
    def stop_and_evaluate(model, loader, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(model, loader, *args, **kwargs)

    run('whole')
    with monkeypatch.context() as patch:
        patch.setattr('timm_dyacts.training.trainer.evaluate', stop_and_evaluate)
        with pytest.raises(TrainingInterrupted, match=r'at epoch 0 after 24 images\. Go on with: timm-dyacts train'):
            run('stopped')
    run('stopped', '--resume', str(tmp_path / 'stopped'))
    assert_same_end(tmp_path / 'whole', tmp_path / 'stopped')
