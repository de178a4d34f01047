"""Two processes that share a model train as two with a whole model each, and go on from each other's state."""
import csv
import os
import re
import shlex
import shutil
import socket
from pathlib import Path

import pytest
import timm
import timm.optim
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from support.photos import write_photos
from support.small_run import config_of, train_with
from torch import nn

import timm_dyacts  # noqa: F401
from timm_dyacts.evaluation import evaluate
from timm_dyacts.run_folder import RunFolder
from timm_dyacts.training.sharding import Sharding, blocks_of
from timm_dyacts.training.state import load_state
from timm_dyacts.world import World

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:
    fully_shard = None

pytestmark = pytest.mark.skipif(fully_shard is None, reason='--dist-strategy fsdp needs torch>=2.6')


def _free_port():
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]


def _as_rank(rank, port, function, args):
    # What torchrun tells its processes.
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='localhost', MASTER_PORT=str(port))
    function(*args)


def _in_two_processes(function, *args):
    mp.start_processes(_as_rank, args=(_free_port(), function, args), nprocs=2, start_method='fork')


def _train_in_two(strategy, folder, *options):
    options = [*options, '-b', 4, '--dist-strategy', strategy, '--output', folder.parent, '--experiment', folder.name]
    _in_two_processes(train_with, *options)
    return folder


def _rows(folder):
    with open(RunFolder(folder).summary, newline='') as f:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(f)]


def _assert_same_rows(folder, other, rel=1e-4):
    for ours, theirs in zip(_rows(folder), _rows(other), strict=True):
        assert ours == pytest.approx(theirs, rel=rel)


def _assert_same_weights(path, other, **tolerance):
    ours, theirs = load_file(path), load_file(other)
    assert list(ours) == list(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], **tolerance, msg=lambda text, n=name: f'{n}: {text}')


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """13 validation images, of which one process gets fewer batches than the other."""
    photos = write_photos(tmp_path_factory.mktemp('photos'), train=8, validation=5)
    (photos / 'validation' / 'red' / '0.png').unlink()
    (photos / 'validation' / 'red' / '1.png').unlink()
    return photos


@pytest.fixture(scope='module')
def options(photos):
    return [
        '--data-dir', photos, '--model', 'test_vit', '--model-kwargs', 'act_layer=dyrelu_b', '--img-size', '64',
        '--epochs', '3', '--workers', '0', '--opt', 'adamw', '--lr', '0.002', '--clip-grad', '1', '--reprob', '0.3',
        '--model-ema', '--model-ema-decay', '0.5', '--layer-decay', '0.8', '--lr-ops', '2', '-vb', '3',
        '--checkpoint-interval', '2']


@pytest.fixture(scope='module')
def runs(options, tmp_path_factory):
    """A run of each strategy."""
    output = tmp_path_factory.mktemp('runs')
    return {strategy: _train_in_two(strategy, output / strategy, *options) for strategy in ('ddp', 'fsdp')}


def test_the_same_losses(runs):
    _assert_same_rows(runs['fsdp'], runs['ddp'])


def test_the_same_checkpoints(runs):
    for which in ('best', 'last', 'ema'):
        ours, theirs = (RunFolder(runs[strategy]).checkpoint(which) for strategy in ('fsdp', 'ddp'))
        _assert_same_weights(ours.weights, theirs.weights, rtol=1e-3, atol=1e-5)
    model = timm.create_model(f'local-dir:{runs["fsdp"]}', pretrained=True)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert {path.name for path in runs['fsdp'].iterdir()} == {path.name for path in runs['ddp'].iterdir()}


def test_the_same_state(runs):
    def shapes(value):
        if isinstance(value, dict):
            return {key: shapes(item) for key, item in value.items()}
        return (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else type(value)

    ours, theirs = (load_state(RunFolder(runs[strategy]).state) for strategy in ('fsdp', 'ddp'))
    for name in ('model', 'ema', 'optimizer'):
        assert shapes(dict(ours[name])) == shapes(dict(theirs[name]))
    moments = [state['state'][0]['exp_avg'] for state in (ours['optimizer'], theirs['optimizer'])]
    torch.testing.assert_close(*moments, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize('before, after', [('ddp', 'fsdp'), ('fsdp', 'ddp')])
def test_goes_on_under_the_other(runs, options, tmp_path, before, after):
    """From the state before the last, which is one within an epoch."""
    run = RunFolder(shutil.copytree(runs[before], tmp_path / 'run'))
    assert load_state(run.previous_state)['progress']['samples'] == 16
    _in_two_processes(
        train_with, *options, '-b', 4, '--dist-strategy', after, '--resume', run.previous_state)
    _assert_same_rows(run.path, runs['ddp'])
    _assert_same_weights(
        run.checkpoint('last').weights, RunFolder(runs['ddp']).checkpoint('last').weights, rtol=1e-3, atol=1e-5)


def test_goes_on_in_one_process(runs, options, tmp_path):
    run = RunFolder(shutil.copytree(runs['fsdp'], tmp_path / 'run'))
    train_with(*options, '-b', 4, '--grad-accum-steps', 2, '--dist-strategy', 'ddp', '--resume', run.previous_state)
    # The images that are left are erased by the generators of one process, in place of those of two.
    _assert_same_rows(run.path, runs['ddp'], rel=0.05)


OTHER_RUNS = {
    'a transition, BatchNorm, its average, and float16': [
        '--model', 'test_resnet_belu', '--img-size', 32, '--transition-epochs', 1, '--model-ema',
        '--model-ema-decay', 0.5, '--amp', '--channels-last', '--clip-grad', 0.1, '--clip-mode', 'value'],
    'from LSUV, frozen, accumulated, and recomputed': [
        '--model', 'test_vit', '--model-kwargs', 'act_layer=dyrelu_b', '--img-size', 64, '--init', 'lsuv',
        '--freeze', 'backbone', '--unfreeze-epoch', 1, '--grad-accum-steps', 2, '--grad-checkpointing',
        '--opt', 'lookahead_sgd'],
}


@pytest.mark.parametrize('name', OTHER_RUNS)
def test_other_runs(photos, tmp_path, name):
    options = ['--data-dir', photos, '--epochs', 2, '--workers', 0, '--lr', 0.002, *OTHER_RUNS[name]]
    runs = [_train_in_two(strategy, tmp_path / strategy, *options) for strategy in ('ddp', 'fsdp')]
    _assert_same_rows(*runs, rel=1e-3)
    _assert_same_weights(*(RunFolder(run).checkpoint('last').weights for run in runs), rtol=0.01, atol=3e-3)


# The parts


def _options(*more):
    return config_of('--data-dir', '.', '--num-classes', 4, '--lr', 0.01, '--dist-strategy', 'fsdp', *more)


def _check_shares():
    world = World.join(torch.device('cpu'))
    sharding = Sharding(_options('--model', 'test_vit'), world)
    torch.manual_seed(world.rank)  # the weights of the first process count
    model = timm.create_model('test_vit', img_size=32, num_classes=4)
    weight = model.head.weight.detach().clone()
    size = sum(parameter.numel() for parameter in model.parameters())
    sharding.shard(model, None)
    optimizer = timm.optim.create_optimizer_v2(model, opt='adamw', lr=0.01)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        model(images)  # before the first update, as where a run is resumed after an epoch
    model(images).sum().backward()
    optimizer.step()
    for values in (
            list(model.parameters()),
            [parameter.grad for parameter in model.parameters()],
            [state['exp_avg'] for state in optimizer.state.values()]):
        local = sum(value.to_local().numel() for value in values)
        assert abs(local - size / 2) < 0.01 * size
    whole = sharding.whole(model)
    assert (whole is None) == (world.rank > 0)
    if whole is not None:
        assert 0 < (whole.head.weight - weight).abs().max() < 0.02, 'a step away from that of the first process'

    # One process has no image at all
    batches = [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))] * (3 if world.rank else 0)
    metrics = evaluate(model, sharding.in_step(batches, (3, 32, 32)), world=world)
    if world.rank:
        expected = nn.functional.cross_entropy(model.eval()(batches[0][0]), batches[0][1]).item()
        assert metrics['loss'] == pytest.approx(expected, rel=1e-5)
    else:
        model.eval()(torch.zeros(1, 3, 32, 32))
    world.leave()


def test_each_process_has_half():
    _in_two_processes(_check_shares)


def _check_optimizers():
    world = World.join(torch.device('cpu'))
    for name in ('sgd', 'adamw', 'lamb', 'lookahead_lion'):
        Sharding(_options('--opt', name, '--layer-decay', 0.9), world).check_optimizer()
    before = torch.get_rng_state()
    for name in ('adafactorbv', 'muon'):
        with pytest.raises(ValueError, match=f'--opt {name} does not work on shares'):
            Sharding(_options('--opt', name), world).check_optimizer()
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match='skipinit_gain'):
        model = timm.create_model('test_nfnet')
        model.skipinit_gain = nn.Parameter(torch.zeros(()))
        Sharding(_options(), world).shard(model, None)
    world.leave()


def test_optimizers_that_need_whole_parameters_are_refused():
    _in_two_processes(_check_optimizers)


def _train_and_diverge(*options):
    from timm_dyacts.training import NonFiniteLossError
    with pytest.raises(NonFiniteLossError, match='The training loss is (nan|inf)'):
        train_with(*options)


def test_a_loss_that_is_not_finite_stops_all(photos, tmp_path):
    _in_two_processes(
        _train_and_diverge, '--data-dir', photos, '--model', 'test_vit', '--img-size', 32, '--workers', 0, '-b', 4,
        '--opt', 'sgd', '--lr', 1000, '--warmup-epochs', 0, '--dist-strategy', 'fsdp', '--output', tmp_path)


@pytest.mark.parametrize('options, size, message', [
    ([], 1, 'got one: start them with torchrun'),
    (['--torchcompile'], 2, "--torchcompile must be left out .* got 'inductor'"),
    (['--clip-grad', 0.01, '--clip-mode', 'agc'], 2, "--clip-mode must be norm or value .* got 'agc'"),
    (['--model-ema', '--model-ema-force-cpu'], 2, '--model-ema-force-cpu must be left out'),
])
def test_refused(options, size, message):
    with pytest.raises(ValueError, match=message):
        Sharding(_options(*options), World(torch.device('cpu'), size=size))


def test_an_old_pytorch_is_named(monkeypatch):
    monkeypatch.setattr('timm_dyacts.training.sharding._TORCH_SHARDS', False)
    with pytest.raises(ImportError, match='--dist-strategy fsdp needs torch>=2.6, got torch'):
        Sharding(_options(), World(torch.device('cpu'), size=2))


def test_the_command_of_the_guide():
    text = (Path(__file__).parents[2] / 'model_cards' / 'guides' / 'large-models.md').read_text()
    [command] = re.findall(r'```sh\n(.*?)```', text, re.DOTALL)
    launcher, options = command.replace('\\\n', '').split(' train ')
    assert launcher == 'torchrun --nproc-per-node 8 -m timm_dyacts'
    config = config_of(*shlex.split(options))
    assert config.dist_strategy == 'fsdp'
    assert timm.is_model(config.model)
    with pytest.raises(ValueError, match='got one'):  # all else is taken
        Sharding(config, World(torch.device('cpu')))


@pytest.mark.parametrize('name, number, some', [
    ('vit_tiny_patch16_224', 12, {'blocks.0', 'blocks.11'}),
    ('convnext_tiny', 16, {'stages.0', 'stages.2.blocks.8', 'stages.3.downsample.1'}),
    ('resnet50_dyrelu_b', 16, {'layer1.0', 'layer4.2'}),
    ('regnety_008', 17, {'s1', 's3.b1', 's4.b1.conv1'}),
])
def test_blocks(name, number, some):
    model = timm.create_model(name)
    blocks = blocks_of(model)
    names = {path for path, module in model.named_modules() if any(module is block for block in blocks)}
    assert len(blocks) == len(names) == number
    assert some <= names
    assert not any(inner.startswith(f'{outer}.') for inner in names for outer in names)
