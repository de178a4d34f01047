"""``--transition-epochs``: t moves with every update, resumes to the bit, and what is saved at its end is plain."""
import csv
import json
import math
import os
import re
import socket

import pytest
import timm
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from support.small_run import assert_same_end, config_of, train_small, train_with
from timm.models import save_for_hf
from torch import nn

from timm_dyacts import finish_transition, get_transition, hub, set_transition
from timm_dyacts.cli import main as timm_dyacts
from timm_dyacts.convert import convert
from timm_dyacts.convert.transition import idle_parameters
from timm_dyacts.evaluation.curves import plot_curves
from timm_dyacts.hub.errors import HubError
from timm_dyacts.training import TrainingInterrupted
from timm_dyacts.training.log import best_row
from timm_dyacts.training.task import classification_task
from timm_dyacts.training.transition import move_transition, t_of_update

MODEL = 'mobilenetv3_small_050_dyrelu_b'


@pytest.fixture
def run(photos, tmp_path, without_pictures):
    """Train for three epochs of three updates, of which so many lead on; options come on top."""
    def call(experiment, epochs, *options):
        return train_small(
            photos, tmp_path, '--model', MODEL, '--epochs', 3, '--warmup-epochs', 1, '--transition-epochs', epochs,
            '--experiment', experiment, *options)
    return call


def rows_of(folder):
    with open(folder / 'summary.csv', newline='') as f:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(f)]


def args_of(folder):
    return json.loads((folder / 'config.json').read_text())['model_args']


# The options


@pytest.mark.parametrize('sched, halfway', [('linear', 0.25), ('cosine', 0.14644660940672624)])
def test_t_of_each_update(sched, halfway):
    config = config_of('--transition-epochs', 2, '--transition-sched', sched)
    ts = [t_of_update(config, update, 10) for update in range(1, 23)]
    assert 0 < ts[0] and ts == sorted(ts) and ts[4] == pytest.approx(halfway)
    assert ts[18] < ts[19] == ts[21] == 1
    half = config_of('--transition-epochs', 0.001)
    assert t_of_update(half, 1, 10) == 1, 'at least one update'


@pytest.mark.parametrize('options, message', [
    (['--transition-epochs', 4], '--transition-epochs must be at most --epochs, 3, got 4'),
    (['--transition-epochs', -1], 'transition_epochs .*must be .*at least 0'),
    (['--transition-epochs', 'nan'], 'transition_epochs .*must be a finite number'),
    (['--transition-sched', 'cosine'], '--transition-sched must be left out without --transition-epochs, got cosine'),
    (['--transition-epochs', 1, '--transition-sched', 'step'], 'one of linear, cosine'),
], ids=str)
def test_values(options, message):
    with pytest.raises((ValueError, SystemExit)) as error:
        config_of('--epochs', 3, *options)
    assert isinstance(error.value, SystemExit) or re.search(message, str(error.value))


@pytest.mark.parametrize('options, message', [
    (['--model', 'mobilenetv2_050_dyrelu_b'], 'must be left out for .*, which starts exactly as its base'),
    (['--model', 'test_resnet'], 'needs a variant, such as resnet50_softpool, got --model .test_resnet.'),
    (['--model-kwargs', 'transition=True'], '--model-kwargs must not hold transition'),
], ids=str)
def test_models_that_it_does_not_fit(run, options, message):
    with pytest.raises(ValueError, match=message):
        run('refused', 1, *options)


# Runs


def test_what_a_run_leaves(run, tmp_path, capsys):
    run('run', 1.5, '--transition-sched', 'cosine', '--model-ema', '--model-ema-decay', 0.5)
    folder = tmp_path / 'run'
    rows = rows_of(folder)
    # The third of four updates (4.5 are rounded), then its end
    assert [row['t'] for row in rows] == pytest.approx([(1 + math.sqrt(0.5)) / 2, 1, 1])
    assert re.findall(r'  t (\S+)\n', capsys.readouterr().out) == [f'{row["t"]:.3f}' for row in rows]
    plain = timm.create_model(MODEL, num_classes=3)
    for part in ('.', 'last', 'ema'):
        assert args_of(folder / part) == {'start': 'fit', 'in_chans': 3, 'global_pool': 'avg'}
        assert 'transition' not in json.loads((folder / part / 'config.json').read_text())
        assert load_file(folder / part / 'model.safetensors').keys() == plain.state_dict().keys()
        loaded = timm.create_model(f'local-dir:{folder / part}', pretrained=True)
        assert get_transition(loaded) is None
    assert json.loads((folder / 'results.json').read_text())['epoch'] >= 1
    plot_curves(folder / 'summary.csv', tmp_path / 'curves.png')
    with pytest.raises(ValueError, match=f'which is one of {MODEL} itself, got True'):
        run('again', 1, '--model', folder, '--pretrained')


def test_the_pictures_of_a_run_show_the_plain_variant(photos, tmp_path):
    train_small(photos, tmp_path, '--model', MODEL, '--transition-epochs', 1, '--experiment', 'run')
    assert (tmp_path / 'run' / 'dyrelu.png').is_file() and (tmp_path / 'run' / 'curves.png').is_file()


@pytest.mark.parametrize('options', [
    ['--model-ema', '--model-ema-decay', '0.9', '--checkpoint-interval', '1'],
    ['--grad-accum-steps', '2', '--batch-size', '4', '--transition-sched', 'cosine', '--checkpoint-interval', '1',
     '--model', 'mobilenetv3_small_050_softpool'],
    ['--freeze', 'backbone', '--unfreeze-epoch', '1', '--lr-ops', '3', '--model-kwargs', 'start=relu'],
], ids=' '.join)
def test_stopped_and_resumed(run, interrupt, tmp_path, options):
    run('whole', 2, *options)
    for updates in (2, 3, 1):
        interrupt(updates)
        with pytest.raises(TrainingInterrupted):
            run('stopped', 2, *options, '--resume', 'auto')
    interrupt(-1)
    run('stopped', 2, *options, '--resume', 'auto')
    assert_same_end(tmp_path / 'whole', tmp_path / 'stopped')


def test_an_unfinished_run_says_so(run, interrupt, tmp_path):
    interrupt(5)
    with pytest.raises(TrainingInterrupted):
        run('run', 3)
    folder, last = tmp_path / 'run', tmp_path / 'run' / 'last'
    assert not (folder / 'config.json').exists(), 'no epoch can be the best yet'
    config = json.loads((last / 'config.json').read_text())
    assert config['model_args']['transition'] is True
    assert config['transition'] == dict(t=pytest.approx(1 / 3), finished=False)
    model = timm.create_model(f'local-dir:{last}', pretrained=True)
    assert get_transition(model) == pytest.approx(1 / 3)
    with pytest.raises(HubError, match=r'not finished .t = 0\.3333.*Train on: .*--resume.*finish_transition.model.'):
        hub.publish(folder, 'user/name', weights='last', dry_run=True)
    with pytest.raises(HubError, match='model.safetensors is missing|config.json is missing'):
        hub.publish(folder, 'user/name', dry_run=True)
    with pytest.raises(ValueError, match=r'begins at t = 0, and .* is at t = 0\.3333 of another transition'):
        run('other', 1, '--model', last, '--pretrained')
    with pytest.raises(ValueError, match=r'has an unfinished transition .t = 0\.3333., which no option leads to its'):
        run('other', 0, '--model', last, '--pretrained')
    plot_curves(folder / 'summary.csv', tmp_path / 'curves.png')
    assert finish_transition(model).conversion.function == 'approximate'


def test_it_goes_on_from_what_convert_left(run, tmp_path):
    save_for_hf(timm.create_model('mobilenetv3_small_050', num_classes=3), tmp_path / 'base', safe_serialization=True)
    folder = tmp_path / 'converted'
    timm_dyacts(['convert', f'{tmp_path}/base', '--act', 'dyrelu_b', '--transition', '--output', str(folder)])
    with pytest.raises(ValueError, match=r'is at the start of a transition .t = 0.: --transition-epochs leads it to'):
        run('refused', 0, '--model', folder, '--pretrained')
    result = run('run', 2, '--model', folder, '--pretrained')
    assert [row['t'] for row in rows_of(tmp_path / 'run')] == [0.5, 1, 1]
    loaded = timm.create_model(f'local-dir:{tmp_path / "run"}', pretrained=True)
    assert get_transition(loaded) is None and args_of(tmp_path / 'run')['start'] == 'fit'
    start = json.loads((tmp_path / 'run' / 'results.json').read_text())['start']
    assert start['warm_start'] == 'exact' and start['source'] == str(folder) and result is not None


def test_only_an_epoch_at_t_1_is_the_best():
    rows = [
        dict(epoch=0, t=0.5, eval_top1=90.0),
        dict(epoch=1, t=1.0, eval_top1=70.0),
        dict(epoch=2, t=1.0, eval_top1=80.0),
    ]
    assert best_row(rows[:1], 'eval_top1') is None
    assert best_row(rows, 'eval_top1')['epoch'] == 2
    assert best_row([dict(epoch=0, eval_loss=1.0)], 'eval_loss')['epoch'] == 0


def test_model_and_average_move_together():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.PReLU(4))
    convert(model, act='dyrelu_b', transition=True, input_size=(3, 2, 2))
    average = nn.Sequential(nn.Conv2d(3, 4, 1), nn.PReLU(4))
    convert(average, act='dyrelu_b', transition=True)
    changes = [move_transition([model, average], t) for t in (0, 0.2, 0.4, 1, 1)]
    assert changes == [False, True, False, True, False], 'which parameters have a gradient'
    assert get_transition(average) == 1


# More processes


def _free_port():
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]


def _run_as_rank(rank, port, options):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='localhost', MASTER_PORT=str(port))
    train_with(*options)


def test_two_processes_go_the_same_way(photos, tmp_path):
    """Without BatchNorm only rounding would tell them apart; these agree on t, and on all that is saved."""
    options = [
        '--data-dir', photos, '--model', MODEL, '--img-size', 32, '--epochs', 3, '--workers', 0, '-b', 4, '--lr', 1e-4,
        '--transition-epochs', 2, '--warmup-epochs', 0, '--model-ema', '--output', tmp_path, '--experiment', 'two']
    mp.start_processes(_run_as_rank, args=(_free_port(), options), nprocs=2, start_method='fork')
    rows = rows_of(tmp_path / 'two')
    assert [row['t'] for row in rows] == [0.5, 1, 1]
    assert all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in rows)
    assert get_transition(timm.create_model(f'local-dir:{tmp_path / "two"}', pretrained=True)) is None


def _step_by_step(rank, store, results):
    """SGD through a transition from an activation with parameters to another one, as the trainer wraps it."""
    from timm_dyacts.training.trainer import _distribute, _redistribute

    torch.distributed.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.PReLU(4), nn.Flatten(), nn.Linear(16, 3))
    convert(model, act='dyrelu_b', transition=True, input_size=(3, 2, 2))
    task = classification_task(model, nn.CrossEntropyLoss())

    class Setup:
        sharding = None
        world = type('World', (), dict(size=2, device=torch.device('cpu')))

    Setup.model, Setup.task = model, task
    _distribute(Setup)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for t in (0, 0, 0.3, 0.6, 1, 1, 1):
        if move_transition([model], t):
            _redistribute(Setup)
        images, labels = torch.randn(2, 4, 3, 2, 2, generator=generator), torch.arange(8).view(2, 4) % 3
        optimizer.zero_grad()
        task(images[rank], labels[rank])['loss'].backward()
        idle = idle_parameters(model)
        assert all(p.grad is None for p in idle)
        optimizer.step()
    torch.save(model.state_dict(), f'{results}/{rank}.pt')
    torch.distributed.destroy_process_group()


def test_ddp_waits_for_no_gradient_that_does_not_come(tmp_path):
    mp.start_processes(_step_by_step, args=(str(tmp_path / 'store'), str(tmp_path)), nprocs=2, start_method='fork')
    states = [torch.load(tmp_path / f'{rank}.pt') for rank in range(2)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.PReLU(4), nn.Flatten(), nn.Linear(16, 3))
    convert(model, act='dyrelu_b', transition=True, input_size=(3, 2, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for t in (0, 0, 0.3, 0.6, 1, 1, 1):
        set_transition(model, t)
        images, labels = torch.randn(2, 4, 3, 2, 2, generator=generator), torch.arange(8) % 3
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images.flatten(0, 1)), labels).backward()
        optimizer.step()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(states[0][key], value, msg=key)
