"""The learning rate over the epochs of a run."""
import csv
import math
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from support.photos import write_photos
from support.small_run import assert_same_end, train_small
from support.versions import needs_timm
from torch import nn

import timm_dyacts  # noqa: F401
from timm_dyacts.training import TrainConfig, TrainingInterrupted
from timm_dyacts.training.schedule import build_scheduler


def rates(updates_per_epoch=4, **options):
    """The learning rate of each update, and the number of epochs."""
    config = TrainConfig(**dict(dict(data_dir='x', epochs=10, warmup_epochs=0, lr=1.0), **options))
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=config.lr)
    scheduler, num_epochs = build_scheduler(config, optimizer, updates_per_epoch)
    values = []
    for epoch in range(num_epochs):
        for update in range(updates_per_epoch):
            values.append(optimizer.param_groups[0]['lr'])
            scheduler.step_update(num_updates=epoch * updates_per_epoch + update + 1)
        scheduler.step(epoch + 1, metric=0.0)
    return values, num_epochs


def test_milestones():
    values, num_epochs = rates(sched='multistep', decay_milestones=(2, 5), decay_rate=0.5)
    assert num_epochs == 10
    # timm counts a milestone from the update before it.
    assert values == [1.0] * 7 + [0.5] * 12 + [0.25] * 21
    assert TrainConfig(data_dir='x', sched='multistep', epochs=300).decay_milestones == (90, 180, 270)
    assert TrainConfig(data_dir='x', sched='multistep', epochs=1).decay_milestones == (1, 1, 1)


def test_on_epochs():
    values, _ = rates(sched_on_epochs=True)
    assert values == pytest.approx([(1 + math.cos(math.pi * epoch / 10)) / 2 for epoch in range(10) for _ in range(4)])


def test_cooldown_and_warmup_before():
    values, num_epochs = rates(warmup_epochs=2, warmup_prefix=True, cooldown_epochs=3, min_lr=0.1, warmup_lr=0.5)
    assert num_epochs == 15
    assert values[:9] == pytest.approx([0.5 + 0.5 * i / 8 for i in range(9)])
    assert values[48:] == [0.1] * 12 and min(values[8:48]) > 0.1


def test_cycles():
    values, num_epochs = rates(lr_cycle_limit=2, lr_cycle_mul=2, lr_cycle_decay=0.25, lr_k_decay=2.0)
    assert num_epochs == 30
    assert [i for i in range(1, 120) if values[i] > values[i - 1]] == [40], 'one restart'
    assert (values[0], values[40]) == (1.0, 0.25)
    assert values[20] == pytest.approx((1 + math.cos(math.pi * 0.25)) / 2)


def test_noise():
    noise = dict(sched='step', decay_rate=1.0, lr_noise=(0.5, 0.75), lr_noise_pct=0.3, lr_noise_std=0.2)
    noisy, _ = rates(**noise)
    assert noisy == rates(**noise)[0] != rates(**noise, seed=1)[0]
    quiet, _ = rates(**noise | dict(lr_noise=None, lr_noise_pct=0.67, lr_noise_std=1.0))
    noise = [b / a - 1 for a, b in zip(quiet, noisy, strict=True)]
    assert not any(noise[:20] + noise[30:]) and all(0 < abs(x) < 0.3 for x in noise[20:30])


def test_an_old_timm_is_named(monkeypatch):
    """One that does not know a schedule trains at a constant rate, without a word."""
    monkeypatch.setattr('timm_dyacts.training.schedule.create_scheduler_v2', lambda *args, **kwargs: (None, 10))
    with pytest.raises(ImportError, match=r'--sched wsd needs timm>=1\.0\.31'):
        rates(sched='wsd')


@needs_timm('1.0.23')
@pytest.mark.parametrize('noise', [[], ['--lr-noise', '0']], ids=str)
def test_a_plateau_is_remembered(interrupt, tmp_path, monkeypatch, without_pictures, recwarn, noise):
    """No epoch is better than the first. How many have passed since then is nothing that the weights could tell."""
    monkeypatch.setattr('timm_dyacts.training.trainer.evaluate', lambda *args, **kwargs: OrderedDict(
        loss=1.0, top1=50.0, top5=100.0))
    photos = write_photos(tmp_path / 'photos')

    def run(experiment, *options):
        return train_small(
            photos, tmp_path, '--epochs', 5, '--sched', 'plateau', '--patience-epochs', 1, '--decay-rate', 0.5,
            '--warmup-epochs', 0, '--lr', 0.01, *noise, '--experiment', experiment, *options)

    folder = run('whole').folder
    lr = [float(row['lr']) for row in csv.DictReader(Path(folder, 'summary.csv').open(newline=''))]
    if not noise:
        assert lr == [0.01, 0.01, 0.01, 0.005, 0.005]
    interrupt(8)
    with pytest.raises(TrainingInterrupted, match='at epoch 2 after'):
        run('stopped')
    interrupt(-1)
    run('stopped', '--resume', 'auto')
    assert_same_end(tmp_path / 'whole', tmp_path / 'stopped')
    assert not [w for w in recwarn if 'Plateau' in str(w.message)]
