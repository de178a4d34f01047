"""The training loop, its checkpoints and curves, and a whole run on a tiny image folder."""
import csv
import json
import math
import os
import tarfile
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from support.small_run import train_small, train_with
from support.versions import needs_timm
from timm.scheduler import CosineLRScheduler
from torch import nn

import timm_dyacts  # noqa: F401
from timm_dyacts.data.loaders import check_splits
from timm_dyacts.device import resolve_device
from timm_dyacts.evaluation import evaluate, plot_curves
from timm_dyacts.loading import resolve_model_name
from timm_dyacts.training import NonFiniteLossError, save_checkpoint, set_pretrained_cfg, train_one_epoch
from timm_dyacts.training.task import classification_task

COLORS = dict(blue=(30, 30, 200), green=(30, 200, 30), red=(200, 30, 30))


@pytest.fixture(scope='session')
def color_folder(tmp_path_factory):
    """An image folder of three colours: 24 training and 12 validation images."""
    root = tmp_path_factory.mktemp('colors')
    for split, count in (('train', 8), ('validation', 4)):
        for name, color in COLORS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new('RGB', (40, 36), tuple(c + 4 * i for c in color)).save(folder / f'{i}.png')
    return root


@pytest.fixture
def train_on_colors(color_folder, tmp_path, monkeypatch):
    """Train timm's smallest ResNet on the colours; options come on top."""
    monkeypatch.setattr('timm_dyacts.training.recorder.write_report', lambda *args: None)  # see test_report.py

    def run(*options):
        return train_small(color_folder, tmp_path, *options)
    return run


def batches(count, size=4, num_classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, 8, 8, generator=generator), torch.randint(num_classes, (size,), generator=generator))
        for _ in range(count)
    ]


def small_net(num_classes=3):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)
    return nn.Sequential(*layers)


def logits_of(model, size=32, in_chans=3):
    images = torch.randn(2, in_chans, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(images)


# One epoch and one evaluation


def test_train_one_epoch_is_plain_training():
    """Nothing but forward, backward and step happens to the weights: they equal those of a loop written by hand."""
    data = batches(5)
    ours, by_hand = small_net(), small_net()

    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    metrics = train_one_epoch(classification_task(ours, nn.CrossEntropyLoss()), data, optimizer, epoch=0)

    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for images, labels in data:
        loss = F.cross_entropy(by_hand(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    for p, q in zip(ours.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(p, q)
    assert metrics == OrderedDict(loss=pytest.approx(sum(losses) / len(losses)))


@pytest.mark.parametrize('log_interval', [1, 2, 3, 100])
def test_train_loss_weighs_every_sample_once(log_interval):
    data = batches(4, size=4) + batches(1, size=2, seed=1)
    model = small_net()
    expected = sum(F.cross_entropy(model(x), y, reduction='sum').item() for x, y in data) / 18
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    task = classification_task(model, nn.CrossEntropyLoss())
    assert train_one_epoch(task, data, optimizer, 0, log_interval=log_interval)['loss'] == pytest.approx(expected)


def test_schedule_counts_updates_over_epochs():
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = CosineLRScheduler(optimizer, t_initial=10, t_in_epochs=False)
    task = classification_task(model, nn.CrossEntropyLoss())
    for epoch, updates in enumerate((5, 10)):
        train_one_epoch(task, batches(5), optimizer, epoch, scheduler=scheduler)
        assert optimizer.param_groups[0]['lr'] == pytest.approx((1 + math.cos(math.pi * updates / 10)) / 2)


def test_clip_grad_bounds_the_update():
    model = small_net()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    task = classification_task(model, nn.CrossEntropyLoss())
    train_one_epoch(task, batches(1), optimizer, 0, clip_grad=1e-2)
    update = torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), before, strict=True)])
    assert update.norm().item() == pytest.approx(1e-2, rel=1e-3)


@pytest.mark.parametrize('log_interval', [1, 4, 50])
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_non_finite_loss_names_epoch_and_step(value, log_interval):
    data = batches(7)
    data[5][0][0, 0, 0, 0] = value
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    task = classification_task(model, nn.CrossEntropyLoss())
    with pytest.raises(NonFiniteLossError, match=r'The training loss is (nan|inf) at epoch 3, step 5\.'):
        train_one_epoch(task, data, optimizer, epoch=3, log_interval=log_interval)


def test_evaluate_counts_as_defined():
    model = small_net(num_classes=7).eval()
    data = batches(4, num_classes=7) + batches(1, size=3, num_classes=7, seed=1)
    images, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    with torch.no_grad():
        logits = model(images)
    rank = (logits > logits.gather(1, labels[:, None])).sum(1)

    metrics = evaluate(model, data)
    assert metrics['loss'] == pytest.approx(F.cross_entropy(logits, labels).item())
    assert metrics['top1'] == 100 * (rank < 1).sum().item() / 19
    assert metrics['top5'] == 100 * (rank < 5).sum().item() / 19
    assert 0 < metrics['top1'] < metrics['top5'] < 100
    # The same samples in one batch.
    whole = evaluate(model, [(images, labels)])
    assert (whole['top1'], whole['top5']) == (metrics['top1'], metrics['top5'])


def test_evaluate_with_fewer_than_five_classes():
    assert evaluate(small_net(num_classes=3), batches(2))['top5'] == 100


def test_evaluate_needs_data():
    with pytest.raises(ValueError, match='at least one batch'):
        evaluate(small_net(), [])


# Checkpoints


def tiny_model(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('test_resnet', num_classes=3, **kwargs)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_checkpoint_gives_the_model_back(tmp_path, memory_format):
    model = tiny_model().to(memory_format=memory_format)
    save_checkpoint(model, tmp_path, label_names=['a', 'b', 'c'])
    assert model.conv1[0].weight.is_contiguous(memory_format=memory_format), 'saving must not touch the model'
    restored = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert torch.equal(logits_of(restored), logits_of(model.to(memory_format=torch.contiguous_format)))
    assert restored.pretrained_cfg['label_names'] == ['a', 'b', 'c']
    assert sorted(p.name for p in tmp_path.iterdir()) == ['config.json', 'model.safetensors']
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['num_classes'] == 3 and 'num_classes' not in config.get('model_args', {})


def test_checkpoint_describes_the_trained_weights(tmp_path):
    model = timm.create_model('resnet18', num_classes=3, pretrained_cfg_overlay=dict(
        test_input_size=(3, 288, 288), test_crop_pct=1.0, label_names=['x'], hf_hub_id='timm/'))
    data_config = dict(input_size=(3, 48, 48), mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0), crop_pct=0.9,
                       interpolation='bilinear', crop_mode='center')
    set_pretrained_cfg(model, data_config, from_pretrained=True)
    save_checkpoint(model, tmp_path)
    restored = timm.create_model(f'local-dir:{tmp_path}')
    for use_test_size in (False, True):
        resolved = timm.data.resolve_model_data_config(restored, use_test_size=use_test_size)
        assert {k: tuple(v) if isinstance(v, list) else v for k, v in resolved.items()} == data_config
    assert restored.num_classes == 3
    assert not restored.pretrained_cfg.get('label_names')


@pytest.mark.parametrize('from_pretrained', [False, True])
def test_origin_is_claimed_only_by_a_fine_tune(from_pretrained):
    model = timm.create_model('resnet18')
    assert model.pretrained_cfg['license'] == 'apache-2.0'
    set_pretrained_cfg(model, dict(input_size=(3, 32, 32)), from_pretrained=from_pretrained)
    assert ('license' in model.pretrained_cfg) == from_pretrained
    assert ('tag' in model.pretrained_cfg) == from_pretrained


def test_failed_save_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    model = tiny_model()
    save_checkpoint(model, tmp_path)
    old = logits_of(model)

    def disk_full(model, folder, **kwargs):
        Path(folder, 'model.safetensors').touch()
        raise OSError('No space left on device')

    monkeypatch.setattr('timm_dyacts.training.checkpoint.save_for_hf', disk_full)
    with torch.no_grad():
        model.fc.bias.add_(1)
    with pytest.raises(OSError, match='No space left'):
        save_checkpoint(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['config.json', 'model.safetensors']
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['num_classes'] == 3 and 'num_classes' not in config.get('model_args', {})
    assert torch.equal(logits_of(timm.create_model(f'local-dir:{tmp_path}', pretrained=True)), old)


# Curves


def test_plot_curves(tmp_path):
    pytest.importorskip('matplotlib')
    with open(tmp_path / 'summary.csv', 'w', newline='') as f:
        writer = csv.DictWriter(f, ['epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr'])
        writer.writeheader()
        for epoch in range(3):
            writer.writerow(dict(epoch=epoch, train_loss=2 - epoch, eval_loss=1, eval_top1=50, eval_top5=90, lr=0.1))
    plot_curves(tmp_path / 'summary.csv', tmp_path / 'curves.png', title='net on data')
    with Image.open(tmp_path / 'curves.png') as img:
        assert img.format == 'PNG' and img.width > img.height > 300
        assert len(img.convert('RGB').getcolors(1 << 20)) > 10, 'the picture is not blank'


# Options and data that do not fit


@pytest.mark.parametrize('name, close', [('resnet18_dyrely_b', 'resnet18_dyrelu_b'), ('resnet5O', 'resnet50')])
def test_unknown_model_suggests_names(name, close):
    with pytest.raises(ValueError, match=rf"--model '{name}' is neither .* Close names: .*\b{close}\b"):
        resolve_model_name(name)


def test_model_names(tmp_path):
    assert resolve_model_name('resnet50.a1_in1k') == 'resnet50.a1_in1k'
    assert resolve_model_name('hf-hub:someone/some_model') == 'hf-hub:someone/some_model'
    save_checkpoint(tiny_model(), tmp_path)
    assert resolve_model_name(str(tmp_path)) == f'local-dir:{tmp_path}'


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without a GPU')
def test_missing_gpu():
    assert resolve_device(None) == torch.device('cpu')
    with pytest.raises(ValueError, match='--device cuda needs a GPU.*--device cpu'):
        resolve_device('cuda')


def test_splits_must_agree_on_classes(color_folder):
    def split(*classes):
        dataset = timm.data.create_dataset('', root=str(color_folder), split='train')
        dataset.reader.class_to_idx = {name: idx for idx, name in enumerate(classes)}
        dataset.reader.samples = [(f'{classes}/{i}.png', 0) for i in range(2)]
        return dataset

    with pytest.raises(ValueError, match=r"same classes.*\['a', 'b'\].*\['a', 'c'\]"):
        check_splits(split('a', 'b'), split('a', 'c'))


@pytest.mark.parametrize('options, message', [
    (['--val-split', 'train'], '--train-split and --val-split share 24 images'),
    (['--train-split', 'no_such_split'], 'split must be one of train, validation, .* got .no_such_split'),
    (['--val-split', '../photos/train'], 'split must be the name of a split in root'),
    (['--batch-size', '25'], '--batch-size 25 is more than the 24 training images'),
    (['--batch-size', '7', '--mixup', '0.2'], '--batch-size must be even with --mixup or --cutmix, got 7'),
    (['--epochs', '0'], r'epochs \(--epochs\) must be an integer of at least 1, got 0'),
    (['--log-interval', '0'], r'log_interval \(--log-interval\) must be an integer of at least 1, got 0'),
    (['--num-classes', '2'], 'The data set has 3 classes, more than the 2 of the model'),
    (['--mean', '0.5', '0.5'], r'--mean takes 1 or 3 numbers, one per input channel, got \[0.5, 0.5\]'),
    (['--model', 'test_resne'], "--model 'test_resne' is neither .* Close names: .*test_resnet"),
])
def test_train_refuses(train_on_colors, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train_on_colors(*options)
    assert not list(tmp_path.iterdir()), 'nothing may be left behind'


def test_train_refuses_missing_checkpoint(train_on_colors):
    with pytest.raises(FileNotFoundError, match="--pretrained-path must be a checkpoint file, got 'nowhere.pth'"):
        train_on_colors('--pretrained-path', 'nowhere.pth')


def test_train_needs_matplotlib_before_it_starts(train_on_colors, tmp_path, monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'timm-dyacts\[demo\]'"):
        train_on_colors()
    assert not list(tmp_path.iterdir())


def test_non_finite_run_keeps_the_epochs_before(train_on_colors, tmp_path, monkeypatch):
    def diverge(task, loader, optimizer, epoch, **kwargs):
        if epoch == 1:
            raise NonFiniteLossError('The training loss is nan at epoch 1, step 0.')
        return train_one_epoch(task, loader, optimizer, epoch, **kwargs)

    monkeypatch.setattr('timm_dyacts.training.trainer.train_one_epoch', diverge)
    with pytest.raises(NonFiniteLossError):
        train_on_colors('--epochs', '3', '--experiment', 'diverged')
    files = {p.name for p in (tmp_path / 'diverged').iterdir()}
    assert {'model.safetensors', 'config.json', 'summary.csv', 'curves.png', 'last'} <= files
    assert timm.create_model(f'local-dir:{tmp_path / "diverged"}', pretrained=True).num_classes == 3


# Whole runs


def test_run_learns_and_keeps_the_best(train_on_colors):
    result = train_on_colors('--epochs', '6', '--lr', '5e-3', '--color-jitter', '0', '--warmup-epochs', '1')
    with open(f'{result.folder}/summary.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == ['epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr']
    assert [int(row['epoch']) for row in rows] == list(range(6))
    top1 = [float(row['eval_top1']) for row in rows]
    assert result.best['top1'] == max(top1) > 90
    assert result.best_epoch == top1.index(max(top1))
    assert float(rows[-1]['train_loss']) < float(rows[0]['train_loss'])


def test_runs_repeat_with_the_seed_and_differ_without(train_on_colors):
    folders = [train_on_colors('--seed', seed).folder for seed in ('1', '1', '2')]
    first, same, other = (load_file(f'{folder}/model.safetensors')['fc.weight'] for folder in folders)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_runs_never_share_a_folder(train_on_colors, tmp_path):
    folders = {train_on_colors('--experiment', 'colors').folder for _ in range(2)}
    assert folders == {str(tmp_path / 'colors'), str(tmp_path / 'colors-1')}


@pytest.mark.parametrize('metric', ['loss', 'top5'])
def test_eval_metric_chooses_the_best(train_on_colors, metric, monkeypatch):
    values = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr('timm_dyacts.training.trainer.evaluate', lambda *args, **kwargs: OrderedDict(
        [('loss', 0.0), ('top1', 0.0), ('top5', 0.0), (metric, next(values))]))
    result = train_on_colors('--epochs', '3', '--eval-metric', metric)
    assert result.best_epoch == (1 if metric == 'loss' else 0)


@pytest.mark.parametrize('options', [
    ['--mixup', '0.2', '--cutmix', '1.0'],
    ['--smoothing', '0'],
    ['--no-aug'],
    ['--aa', 'rand-m5-mstd0.5', '--reprob', '0.5', '--vflip', '0.5'],
    ['--opt', 'sgd', '--momentum', '0.8', '--lr', '0.1', '--layer-decay', '0.7', '--clip-grad', '1'],
    ['--opt-betas', '0.8', '0.99', '--opt-eps', '1e-6', '--opt', 'lookahead_adamw'],
    ['--sched', 'step', '--decay-epochs', '0.5', '--decay-rate', '0.5'],
    ['--sched', 'tanh', '--layer-decay', '0.9'],
    ['--sched', 'poly', '--min-lr', '1e-6', '--warmup-epochs', '0'],
    ['--amp'],
    ['--amp', '--amp-dtype', 'bfloat16'],
    ['--channels-last'],
    ['--torchcompile', 'eager'],
    ['--workers', '1'],
    ['--grad-accum-steps', '2', '--clip-grad', '1', '--clip-mode', 'agc'],
    ['--grad-checkpointing', '--clip-grad', '0.1', '--clip-mode', 'value'],
    ['--model-ema', '--model-ema-force-cpu', '--model-ema-warmup', '--sync-bn', '--dist-bn', 'broadcast'],
    pytest.param(['--sched', 'wsd', '--decay-epochs', '0.5', '--warmup-epochs', '0'], marks=needs_timm('1.0.31')),
    ['--mixup', '0.2', '--mixup-mode', 'elem', '--mixup-prob', '0.5'],
    pytest.param(
        ['--sched', 'constant', '--reprob', '0.9', '--remode', 'const', '--recount', '2'], marks=needs_timm('1.0.31')),
    ['--train-interpolation', 'bilinear', '--unfreeze-epoch', '1', '--freeze', 'backbone'],
    ['--drop', '0.2', '--drop-path', '0.1', '-vb', '5'],
    ['--in-chans', '1'],
    ['--dataset', 'torch/image_folder'],
    ['--dataset', 'torch/image_folder', '--in-chans', '1'],
    ['--input-size', '3', '40', '24', '--img-size', '99'],
    ['--input-size', '1', '32', '32'],
    ['--mean', '0.5', '--std', '0.25', '--crop-pct', '0.8', '--interpolation', 'bilinear'],
    ['--num-classes', '5'],
    ['--model', 'test_vit', '--img-size', '64'],
    ['--model-kwargs', 'act_layer=dyrelu_b'],
    ['--model-kwargs', 'global_pool=max'],
    ['--model', 'resnet18_softpool', '--batch-size', '12'],
    ['--gp', 'max', '--drop-block', '0.1', '--head-init-scale', '0.01', '--head-init-bias', '-2', '--grayscale-prob',
     '0.5', '--gaussian-blur-prob', '0.5', '--color-jitter-prob', '0.5', '--train-crop-mode', 'rkrc', '--model',
     'resnet10t_dyrelu_b', '--img-size', '96'],
    pytest.param(
        ['--model', 'test_efficientnet', '--bn-eps', '0.5', '--bn-momentum', '0.01', '--split-bn', '--reprob', '0.5',
         '--resplit', '--dist-bn', ''], marks=needs_timm('1.0.31')),
    pytest.param(
        ['--input-img-mode', 'YCbCr', '--layer-decay', '0.5', '--layer-decay-min-scale', '0.3',
         '--layer-decay-no-opt-scale', '0.4', '--opt-kwargs', 'amsgrad=True'], marks=needs_timm('1.0.17')),
    ['--dataset', 'torch/image_folder', '--aug-splits', '2', '--bce-loss', '--bce-sum', '--bce-pos-weight', '2'],
], ids=' '.join)
def test_every_option_trains_and_reloads(train_on_colors, options):
    """The folder gives back a model of the same input, whose evaluation is the one that was recorded."""
    folder = train_on_colors(*options).folder
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    in_chans, *size = model.pretrained_cfg['input_size']
    images = torch.randn(2, in_chans, *size)
    with torch.no_grad():
        assert model.eval()(images).isfinite().all()
    assert model.pretrained_cfg.get('label_names') == (None if '--num-classes' in options else list(COLORS))


def test_deterministic(train_on_colors):
    before = torch.are_deterministic_algorithms_enabled()
    try:
        train_on_colors('--deterministic')
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(before)


def test_pretrained_path_starts_from_the_file(train_on_colors, tmp_path):
    source = tiny_model()
    save_file(source.state_dict(), tmp_path / 'source.safetensors')
    result = train_on_colors(
        '--pretrained-path', str(tmp_path / 'source.safetensors'), '--lr', '1e-30', '--warmup-lr', '0')
    trained = load_file(f'{result.folder}/model.safetensors')
    assert torch.equal(trained['layer1.0.conv1.weight'], source.state_dict()['layer1.0.conv1.weight'])


def test_run_folder_is_a_model_to_fine_tune(train_on_colors):
    first = train_on_colors()
    second = train_on_colors('--model', first.folder, '--pretrained', '--lr', '1e-30', '--warmup-lr', '0')
    a, b = (load_file(f'{result.folder}/model.safetensors') for result in (first, second))
    assert torch.equal(a['fc.weight'], b['fc.weight'])


def test_the_same_split_twice_is_refused(photos, tmp_path):
    with pytest.raises(ValueError, match='--train-split and --val-split give the same images'):
        train_with('--train-split', 'train', '--val-split', 'train', '--output', tmp_path)
    with tarfile.open(tmp_path / 'photos.tar', 'w') as tar:
        tar.add(photos, '.')
    with pytest.raises(ValueError, match='--train-split and --val-split (give|share)'):
        train_small(tmp_path / 'photos.tar', tmp_path)
    with pytest.raises(ValueError, match='--train-split and --val-split give the same images'):
        train_small(
            photos / 'train', tmp_path, '--dataset', 'torch/image_folder', '--train-split', '', '--val-split', '')


def test_an_evaluation_that_is_not_finite_is_never_the_best(photos, tmp_path, monkeypatch, without_pictures):
    losses = iter([math.nan, 1.0, math.nan])

    def evaluate(*args, **kwargs):
        return OrderedDict(loss=next(losses), top1=100.0, top5=100.0)

    monkeypatch.setattr('timm_dyacts.training.trainer.evaluate', evaluate)
    assert train_small(photos, tmp_path, '--epochs', 3, '--experiment', 'some').best_epoch == 1
    losses = iter([math.nan])
    with pytest.raises(NonFiniteLossError, match='No epoch has a finite evaluation: the model overflows'):
        train_small(photos, tmp_path, '--epochs', 1, '--experiment', 'none')
    assert (tmp_path / 'none/last/model.safetensors').is_file()
    assert not (tmp_path / 'none/model.safetensors').exists()


def test_files_of_a_checkpoint_follow_the_umask(tmp_path):
    """safetensors keeps its files to their owner."""
    before = os.umask(0o027)
    try:
        save_checkpoint(timm.create_model('test_resnet'), tmp_path)
    finally:
        os.umask(before)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == {
        'model.safetensors': '0o640', 'config.json': '0o640'}
