"""Recipes as timm's train.py has them: its options file is taken as it is, and published recipes run as written."""
import csv
import logging
import re
from pathlib import Path

import pytest
import torch
import yaml
from support.small_run import assert_same_end, config_of, train_with
from timm.loss import BinaryCrossEntropy
from timm.optim import Lamb

import timm_dyacts  # noqa: F401
from timm_dyacts.data.resumable import RepeatedBatches
from timm_dyacts.options import declarations, read_yaml, to_dict
from timm_dyacts.training import TrainConfig, TrainingInterrupted
from timm_dyacts.training.setup import build_setup
from timm_dyacts.training.timm_args import REFUSED, WITHOUT_EFFECT
from timm_dyacts.world import World

ROOT = Path(__file__).parents[2]
# What train.py of timm 1.0.31 writes when it is given no option
DEFAULTS = Path(__file__).with_name('timm_args.yaml')
THEIRS = yaml.safe_load(DEFAULTS.read_text())
RENAMED = {'data', 'kd_model_name', 'sched_on_updates'}

# ResNet strikes back, arXiv:2110.00476, table 2, with timm's threshold for "all mixed classes are there". It gives the
# learning rate for 2048 images, 256 on each of 8 GPUs.
_ALL = dict(
    model='resnet50', batch_size=256, opt='lamb', sched='cosine', warmup_epochs=5, amp=True, bce_loss=True,
    bce_target_thresh=0.2, cutmix=1.0, color_jitter=0.0, train_interpolation='random', crop_pct=0.95)
RECIPES = dict(
    a1=dict(_ALL, epochs=600, lr=5e-3, weight_decay=0.01, smoothing=0.1, drop_path=0.05, aug_repeats=3,
            aa='rand-m7-mstd0.5-inc1', mixup=0.2, img_size=224),
    a2=dict(_ALL, epochs=300, lr=5e-3, weight_decay=0.02, smoothing=0.0, drop_path=0.05, aug_repeats=3,
            aa='rand-m7-mstd0.5-inc1', mixup=0.1, img_size=224),
    a3=dict(_ALL, epochs=100, lr=8e-3, weight_decay=0.02, smoothing=0.0, aug_repeats=0,
            aa='rand-m6-mstd0.5-inc1', mixup=0.1, img_size=160),
)


@pytest.fixture
def write(tmp_path):
    """An options file of timm's train.py, whole, with some other values."""
    def call(**values):
        path = tmp_path / 'theirs.yaml'
        path.write_text(yaml.safe_dump(THEIRS | values))
        return path
    return call


# Options files


def test_a_file_of_timm_means_what_it_means_there(write, caplog):
    config = config_of('-c', write(data_dir='photos'))
    ours = to_dict(config)
    assert {name: ours[name] for name in THEIRS.keys() & ours.keys() if THEIRS[name] != ''} == {
        name: value for name, value in (THEIRS | dict(data_dir='photos')).items() if name in ours and value != ''}
    assert config.sched_on_epochs and config.effective_lr(2) == pytest.approx(0.1)
    assert not caplog.records, 'nothing is left out that anybody asked for'
    assert not config_of('-c', write(data_dir='photos', sched_on_updates=True)).sched_on_epochs


def test_each_option_of_timm_is_dealt_with():
    known = declarations(TrainConfig).keys()
    assert THEIRS.keys() <= known | RENAMED | WITHOUT_EFFECT.keys() | REFUSED.keys()
    assert {name: WITHOUT_EFFECT[name] for name in WITHOUT_EFFECT.keys() & THEIRS.keys()} == {
        name: THEIRS[name] for name in WITHOUT_EFFECT.keys() & THEIRS.keys()}
    assert {name: off for name, (off, _) in REFUSED.items() if name in THEIRS} == {
        name: THEIRS[name] for name in REFUSED.keys() & THEIRS.keys()}


def test_older_and_shorter_names(write):
    config = config_of('-c', write(data='photos', kd_model_name='resnet18', native_amp=True, apex_amp=False))
    assert (config.data_dir, config.kd_model, config.amp) == ('photos', 'resnet18', True)
    assert config_of('-c', write(data='a', data_dir='b')).data_dir == 'b'


def test_what_changes_no_result_is_left_out_in_one_line(write, caplog):
    config_of('-c', write(data_dir='x', pin_mem=True, save_images=True, recovery_interval=0))
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().endswith('that change no result are left out: pin_mem, save_images.')


@pytest.mark.parametrize('values, message', [
    (dict(fuser='nvfuser', no_ddp_bb=True),
     r'options of timm.s train.py would change the result: fuser nvfuser \(obsolete: .*\); no_ddp_bb True \(unknown'),
    (dict(torchscript=True), r'torchscript True \(obsolete: torchcompile takes its place\)'),
    (dict(apex_amp=True), 'apex_amp True'),
    (dict(start_epoch=3), r'start_epoch 3 \(a resumed run knows its epoch\)'),
    (dict(naflex_loader=True), 'naflex_loader True'),
    (dict(train_img_sizes=[128, 160]), 'train_img_sizes'),
    (dict(kd_distill_type='feature'), 'kd_distill_type feature'),
    (dict(drop_conect=0.1), "unknown option 'drop_conect'"),
], ids=str)
def test_what_would_change_the_result_is_refused_by_name(write, capsys, values, message):
    with pytest.raises(SystemExit):
        config_of('-c', write(**values))
    assert re.search(rf'theirs.yaml: .*{message}', capsys.readouterr().err)


# The page of defaults


def test_the_page_lists_all_defaults_that_differ():
    text = (ROOT / 'model_cards' / 'guides' / 'training-defaults.md').read_text()
    rows = [re.split(r' *\| *', line.strip())[1:-1] for line in text.splitlines() if line.startswith('| `')]
    page = {name.strip('`'): (here, there) for name, here, there, why in rows if why}

    ours = to_dict(TrainConfig(data_dir='photos'))
    theirs = to_dict(TrainConfig(**read_yaml(DEFAULTS, TrainConfig) | dict(data_dir='photos')))
    machine = {'workers', 'device'}  # depend on it
    differ = {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name] and name not in machine}
    assert {name: tuple(map(yaml.safe_load, pair)) for name, pair in page.items()} == differ


# Published recipes


@pytest.mark.parametrize('name', RECIPES)
def test_resnet_strikes_back(name, write, photos, tmp_path, without_pictures):
    """The recipe is the file, whole; the command line makes it small, and no more than that."""
    recipe = RECIPES[name]
    options = [
        '-c', write(**recipe), '--model', 'test_resnet', '--data-dir', photos, '--img-size', 32, '--epochs', 1,
        '--warmup-epochs', 1, '--batch-size', 8, '--workers', 0, '--device', 'cpu', '--output', tmp_path,
        '--experiment', name]
    setup = build_setup(config_of(*options), World(torch.device('cpu')), initialize=True)
    assert isinstance(setup.optimizer, Lamb)
    assert {group['weight_decay'] for group in setup.optimizer.param_groups} == {0.0, recipe['weight_decay']}
    assert [group['initial_lr'] for group in setup.optimizer.param_groups] == [recipe['lr']] * 2
    assert setup.scheduler.warmup_t == 1 and setup.scheduler.t_in_epochs
    assert isinstance(setup.task.criterion, BinaryCrossEntropy) and setup.task.criterion.target_threshold == 0.2
    assert isinstance(setup.loader.batches, RepeatedBatches) == bool(recipe['aug_repeats'])
    mixup = setup.loader.mixup
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.label_smoothing) == (
        recipe['mixup'], 1.0, recipe['smoothing'])

    folder = train_with(*options).folder
    [row] = csv.DictReader(Path(folder, 'summary.csv').open(newline=''))
    assert 0 < float(row['train_loss']) < 2


# Whole runs


@pytest.fixture
def run(photos, tmp_path, without_pictures):
    """Train a small model for three epochs of three steps; options come on top."""
    def call(experiment, *options):
        return train_with(
            '--data-dir', photos, '--model', 'test_resnet', '--img-size', 32, '--workers', 0, '--batch-size', 8,
            '--epochs', 3, '--warmup-epochs', 1, '--output', tmp_path, '--experiment', experiment, *options)
    return call


@pytest.mark.parametrize('options', [
    ['--aug-repeats', '3', '--reprob', '0.5', '--mixup', '0.2', '--mixup-off-epoch', '1', '--bce-loss', '--workers',
     '1'],
    ['--aug-splits', '3', '--jsd-loss', '--split-bn', '--aa', 'augmix-m5-w2', '--reprob', '0.5', '--resplit',
     '--model-ema'],
    ['--sched', 'multistep', '--sched-on-epochs', '--lr-base', '0.1', '--opt', 'sgd', '--grad-accum-steps', '2'],
    ['--lr-cycle-limit', '2', '--epochs', '1', '--cooldown-epochs', '1', '--lr-noise', '0.1', '0.9', '--opt',
     'rmsproptf', '--opt-kwargs', 'alpha=0.95', '--cutmix-minmax', '0.2', '0.8', '--warmup-epochs', '0'],
], ids=' '.join)
def test_stopped_in_two_epochs_and_resumed(run, interrupt, tmp_path, options):
    run('whole', *options)
    for updates in (2, 2):
        interrupt(updates)
        with pytest.raises(TrainingInterrupted):
            run('stopped', *options, '--resume', 'auto')
    interrupt(-1)
    run('stopped', *options, '--resume', 'auto')
    assert_same_end(tmp_path / 'whole', tmp_path / 'stopped')


def test_the_learning_rate_is_said_and_kept(run, tmp_path, capsys):
    folder = run('scaled', '--opt', 'sgd', '--lr-base', '0.5', '--lr-base-size', '32', '--epochs', '1').folder
    assert 'Learning rate 0.125, for 8 images an update.' in capsys.readouterr().out
    assert yaml.safe_load(Path(folder, 'args.yaml').read_text())['lr'] == 0.125
    # The run is found again by the options that it was started with, which do not say that number.
    again = run('', '--opt', 'sgd', '--lr-base', '0.5', '--lr-base-size', '32', '--epochs', '1', '--resume', 'auto')
    assert again.folder == folder
    # A base on the command line wins over the rate in a file.
    options = ['-c', Path(folder, 'args.yaml'), '--lr-base', '1']
    assert config_of(*options).effective_lr(1) == 0.25
    assert config_of(*options, '--lr', '0.3').effective_lr(1) == 0.3


@pytest.mark.parametrize('options, lr', [
    (dict(lr=0.3), 0.3), (dict(), 1e-3), (dict(lr_base=0.1, lr=0.3), 0.3),
    (dict(lr_base=0.1, opt='sgd'), 0.4), (dict(lr_base=0.1), 0.2), (dict(lr_base=0.1, opt='lamb'), 0.2),
    (dict(lr_base=0.1, lr_base_scale='linear'), 0.4), (dict(lr_base=0.1, opt='sgd', lr_base_scale='sqrt'), 0.2),
    (dict(lr_base=0.1, lr_base_size=512, opt='sgd', grad_accum_steps=4), 0.8),
], ids=str)
def test_effective_learning_rate(options, lr):
    assert TrainConfig(batch_size=256, **options).effective_lr(4) == pytest.approx(lr)
