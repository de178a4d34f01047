"""The options of a training run, and what follows from them."""
import copy
import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.photos import write_photos
from timm.data.transforms import str_to_pil_interp

from timm_dyacts.evaluation.config import INTERPOLATIONS
from timm_dyacts.options import declarations, plain, read_yaml, to_dict
from timm_dyacts.training import TrainConfig
from timm_dyacts.training.config import CheckpointInterval

ROOT = Path(__file__).parents[2]

# args.yaml as version 0.1 wrote it, but for the order
VERSION_0_1 = """
{aa: null, amp: false, amp_dtype: float16, batch_size: 64, channels_last: false, checkpoint_interval: '5',
class_map: null, clip_grad: null, clip_mode: norm, color_jitter: 0.0, crop_pct: 1.0, cutmix: 0.0, data_dir: null,
dataset: digits, dataset_download: false, decay_epochs: 10, decay_rate: 0.1, deterministic: false, device: cpu,
dist_bn: reduce, distill_loss_weight: null, drop: 0.2, drop_path: null, epochs: 3, eval_metric: top1,
experiment: stopped, freeze: none, grad_accum_steps: 1, grad_checkpointing: false, hflip: 0.0, img_size: 32,
in_chans: 3, init: default, initial_checkpoint: null, input_size: null, interpolation: null, kd_model: null,
kd_temperature: 4.0, layer_decay: null, log_interval: 5, log_tensorboard: false, log_wandb: false, lr: 0.001,
lr_ops: 1.0, mean: [0.5], min_lr: 0.0, mixup: 0.2, mixup_mode: batch, mixup_prob: 1.0, mixup_switch_prob: 0.5,
model: test_resnet, model_ema: true, model_ema_decay: 0.9, model_ema_force_cpu: false, model_ema_warmup: false,
model_kwargs: {act_layer: dyrelu_b}, momentum: 0.9, no_aug: false, num_classes: 10, on_bad_image: skip, opt: adamw,
opt_betas: null, opt_eps: null, output: ./output/train, pretrained: false, pretrained_path: null,
ratio: [0.85, 1.18], recount: 1, remode: pixel, reprob: 0.3, scale: [0.7, 1.0], sched: cosine, seed: 42,
smoothing: 0.1, std: null, sync_bn: false, task_loss_weight: null, torchcompile: null, train_interpolation: random,
train_split: train, unfreeze_epoch: null, val_split: validation, validation_batch_size: null, vflip: 0.0,
wandb_project: null, wandb_resume_id: null, wandb_tags: [], warmup_epochs: 1, warmup_lr: 1.0e-05, weight_decay: 0.05,
workers: 0}
"""


# What is filled in


def test_the_digits_have_a_recipe_of_their_own():
    config = TrainConfig(model='resnet18_dyrelu_b', epochs=2)
    assert (config.dataset, config.img_size, config.batch_size, config.hflip) == ('digits', 32, 64, 0.0)
    assert config.epochs == 2, 'what is given is given'
    assert TrainConfig(hflip=0.5).hflip == 0.5, 'also where it is the default'
    assert TrainConfig(dataset='digits') == TrainConfig()


def test_other_data_have_the_defaults():
    config = TrainConfig(data_dir='photos')
    assert (config.dataset, config.img_size, config.batch_size, config.hflip) == ('', None, 128, 0.5)
    assert TrainConfig(dataset='torch/cifar10', data_dir='x').dataset == 'torch/cifar10'


def test_what_is_resolved_stays():
    """Filling in what depends on the data must not bring back the recipe, nor take it away."""
    config = TrainConfig(hflip=0.3)
    replaced = dataclasses.replace(config, num_classes=10, in_chans=3, device='cpu')
    assert to_dict(replaced) == to_dict(config) | dict(num_classes=10, in_chans=3, device='cpu')
    other = TrainConfig(data_dir='photos')
    assert dataclasses.replace(other, dataset='digits', data_dir=None).hflip == 0.5


def test_input_size_says_the_channels():
    assert TrainConfig(input_size=(1, 32, 48), in_chans=3).in_chans == 1


def test_options_travel():
    config = TrainConfig(model_kwargs=dict(act_layer='brelu'))
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert again == config and dataclasses.replace(again) == config


# What does not fit each other


@pytest.mark.parametrize('options, message', [
    (dict(mixup=0.2, batch_size=7), '--batch-size must be even with --mixup or --cutmix, got 7'),
    (dict(cutmix=1, batch_size=7), '--batch-size must be even'),
    (dict(init='lsuv', pretrained=True), '--init lsuv would overwrite the weights'),
    (dict(init='lsuv', initial_checkpoint='x'), '--init lsuv would overwrite the weights'),
    (dict(kd_model='net', task_loss_weight=1.5), '--task-loss-weight must be at most 1 without --distill-loss-weight'),
    (dict(init='lsuv', head_init_scale=0.1), '--init lsuv would overwrite --head-init-scale'),
    (dict(cutmix_minmax=(0.2, 0.8), batch_size=7), '--batch-size must be even'),
    (dict(cutmix_minmax=(0.2, 0.2)), r'--cutmix-minmax must be two different numbers, got \[0.2, 0.2\]'),
    (dict(split_bn=True, resplit=True, reprob=0.1, batch_size=7), '--batch-size must be even with --split-bn'),
    (dict(aug_splits=1), '--aug-splits must be 0, or 2 or more, got 1'),
    (dict(aug_splits=3, mixup=0.2), '--aug-splits must be left out with --mixup or --cutmix'),
    (dict(aug_splits=3, no_aug=True), '--aug-splits must be left out with --no-aug'),
    (dict(aug_splits=3, split_bn=True, sync_bn=True), '--split-bn must be left out with --sync-bn'),
    (dict(aug_splits=3, jsd_loss=True, bce_loss=True), '--jsd-loss must be left out with --bce-loss'),
    (dict(jsd_loss=True), '--jsd-loss must be left out without --aug-splits, got True'),
    (dict(split_bn=True), '--split-bn must be left out without --aug-splits or --resplit'),
    (dict(bce_target_thresh=0.2), '--bce-target-thresh must be left out without --bce-loss, got 0.2'),
    (dict(mixup_off_epoch=3), '--mixup-off-epoch must be left out without --mixup, --cutmix or --cutmix-minmax'),
    (dict(aug_repeats=0.5), '--aug-repeats must be 0, or 1 or more, got 0.5'),
    (dict(lr_base_size=128), '--lr-base-size must be left out without --lr-base, got 128'),
    (dict(layer_decay_min_scale=0.1), '--layer-decay-min-scale must be left out without --layer-decay'),
    (dict(layer_decay=0.5, layer_decay_no_opt_scale=0.1, freeze='backbone'), 'must be left out with --freeze'),
    (dict(sched='step', cooldown_epochs=1), '--cooldown-epochs must be left out without --sched cosine, tanh or poly'),
    (dict(lr_noise=(0.1, 0.2, 0.3)), '--lr-noise must be one or two numbers'),
    (dict(torchcompile_mode='max-autotune'), '--torchcompile-mode must be left out without --torchcompile inductor'),
    (dict(gp='max', model_kwargs=dict(global_pool='avg')), '--model-kwargs must not hold global_pool'),
    (dict(opt_betas=0.9), r'--opt-betas must be two or three numbers, got \[0.9\]'),
    (dict(warmup_epochs=20), '--warmup-epochs must be at most --epochs, 10, or --warmup-prefix given, got 20'),
    (dict(min_lr=5), '--min-lr must be at most --lr, 0.001, got 5'),
    (dict(warmup_lr=5), '--warmup-lr must be at most --lr, 0.001, got 5'),
    *((dict(aa=name), rf"aa \(--aa\) must be 'original', .* got '{name}'") for name in ('nope', 'rand-m9x')),
    (dict(checkpoint_interval='soon'), "--checkpoint-interval must be a number of updates.* got 'soon'"),
])
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_no_text_is_none_for_batch_norm():
    assert TrainConfig(dist_bn='').dist_bn == 'none'
    with pytest.raises(ValueError, match="must be one of reduce, broadcast, none, got 'all'"):
        TrainConfig(dist_bn='all')


def test_interpolations_are_those_of_timm():
    for name in INTERPOLATIONS:
        str_to_pil_interp(name)


@pytest.mark.parametrize('text, every, in_epochs', [
    ('500', 500, False), ('500steps', 500, False), ('1step', 1, False), ('2epochs', 2, True), ('1e', 1, True),
    (500, 500, False)])
def test_checkpoint_interval(text, every, in_epochs):
    assert CheckpointInterval.parse(text) == CheckpointInterval(every, in_epochs)
    assert TrainConfig(checkpoint_interval=text).interval == CheckpointInterval(every, in_epochs)


@pytest.mark.parametrize('text', ['0', '-1', '1.5', '2 hours', '', 'epochs'])
def test_checkpoint_interval_refuses(text):
    with pytest.raises(ValueError, match='--checkpoint-interval must be a number of updates such as 500 or'):
        CheckpointInterval.parse(text)


# What version 0.1 wrote


def test_options_of_version_0_1_are_read(tmp_path):
    saved = yaml.safe_load(VERSION_0_1)
    (tmp_path / 'args.yaml').write_text(VERSION_0_1)
    config = TrainConfig(**read_yaml(tmp_path / 'args.yaml', TrainConfig))
    newer = {name: plain(d.default) for name, d in declarations(TrainConfig).items() if name not in saved}
    assert to_dict(config) == newer | saved | dict(resume=None)


# From Python


def test_train_validate_and_predict_from_python(tmp_path):
    write_photos(tmp_path / 'photos')
    code = f"""
from timm_dyacts.evaluation import PredictConfig, ValidateConfig, predict, validate
from timm_dyacts.training import TrainConfig, train

photos = {str(tmp_path / 'photos')!r}
result = train(TrainConfig(
    model='test_resnet', data_dir=photos, img_size=32, batch_size=8, epochs=1, workers=0,
    output={str(tmp_path / 'out')!r}, model_kwargs=dict(act_layer='dyrelu_b')))
record = validate(ValidateConfig(model=result.folder, workers=0))
assert record['top1'] == round(result.best['top1'], 4), (record, result)
records = predict(PredictConfig(model=result.folder, images=photos, topk=2, workers=0))
assert len(records) == 36 and all(len(r['predictions']) == 2 for r in records)
"""
    done = subprocess.run(
        [sys.executable, '-c', code], env=dict(PYTHONPATH=str(ROOT)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
