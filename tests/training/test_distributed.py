"""Two processes over gloo train as one process with the doubled batch does."""
import csv
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from support.photos import write_photos
from support.small_run import config_of, train_with
from torch import nn

import timm_dyacts  # noqa: F401
from timm_dyacts.evaluation import evaluate
from timm_dyacts.run_folder import RunFolder
from timm_dyacts.training import find_lr, train_one_epoch
from timm_dyacts.training.task import classification_task
from timm_dyacts.world import StopSignal, World

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason='needs torch.distributed')


def _be_rank(rank, port):
    """Set what torchrun tells its processes."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='localhost', MASTER_PORT=str(port))


def _run_as_rank(rank, port, options):
    _be_rank(rank, port)
    train_with(*options)


def _find_lr_as_rank(rank, port, options):
    _be_rank(rank, port)
    find_lr(config_of(*options))


def free_port():
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]


def rows_of(folder):
    with open(folder / 'summary.csv', newline='') as f:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(f)]


@pytest.fixture(scope='module')
def options(tmp_path_factory):
    """A model without BatchNorm: only rounding tells the runs apart. 13 validation images cannot be shared evenly."""
    photos = write_photos(tmp_path_factory.mktemp('photos'), train=8, validation=5)
    (photos / 'validation' / 'red' / '0.png').unlink()
    (photos / 'validation' / 'red' / '1.png').unlink()
    return [
        '--data-dir', photos, '--model', 'test_vit', '--model-kwargs', 'act_layer=dyrelu_b', '--img-size', '64',
        '--epochs', '3', '--workers', '0', '--opt', 'sgd', '--lr', '0.02', '--clip-grad', '1', '--reprob', '0.3',
        '--aa', 'rand-m5', '--model-ema']


@pytest.fixture(scope='module')
def one(options, tmp_path_factory):
    """The rows of a run in one process."""
    return rows_of(Path(train_with(*options, '-b', '8', '--output', tmp_path_factory.mktemp('one')).folder))


def test_two_processes_equal_one(options, one, tmp_path):
    _spawn(_run_as_rank, free_port(), [*options, '-b', '4', '--output', tmp_path, '--experiment', 'two'])
    for ours, theirs in zip(rows_of(tmp_path / 'two'), one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
        correct = ours['eval_top1'] * 13 / 100
        assert correct == pytest.approx(round(correct), abs=1e-6), 'each of the 13 images counts once'


def test_classes_of_unlike_size_in_two_processes(options, tmp_path):
    options = [
        *options, '--epochs', '2', '--balanced-sampler', '--class-weights', '1,2,3', '--val-interval', '2',
        '--early-stopping', '1', '--checkpoint-hist', '2', '--log-interval', '1', '--output', tmp_path]
    train_with(*options, '-b', '4', '--experiment', 'one')
    _spawn(_run_as_rank, free_port(), [*options, '-b', '2', '--profile', '1', '--experiment', 'two'])
    rows, expected = (RunFolder(tmp_path / name).read_summary() for name in ('two', 'one'))
    for ours, theirs in zip(rows, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    assert (tmp_path / 'two' / 'profile' / 'trace.json').is_file()


def test_a_range_test_in_two_processes(options, tmp_path, monkeypatch):
    monkeypatch.setattr('timm_dyacts.training.lr_range._UPDATES', 12)
    _spawn(_find_lr_as_rank, free_port(), [*options, '-b', '4', '--output', tmp_path, '--experiment', 'two'])
    assert {path.name for path in (tmp_path / 'two-lr').iterdir()} == {'lr.csv', 'lr.png'}


def test_torchrun_is_stopped_and_goes_on_in_one_process(options, one, tmp_path, capsys):
    options = [*options, '-b', '4', '--output', tmp_path, '--experiment', 'stopped', '--checkpoint-interval', '2']
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    process = subprocess.Popen(
        [*launcher, str(ROOT / 'scripts' / 'train.py'), *map(str, options)],
        env=dict(os.environ, PYTHONPATH=str(ROOT)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = process.stdout.readline()
    while not process.stdout.readline().startswith('epoch   0'):
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=240)
    assert 'in 2 processes' in first
    assert len(re.findall('Stopped by SIGTERM at epoch [12]', stderr)) == 1, 'the first process alone speaks'

    # Accumulation takes the place of the second process.
    train_with(*options, '--grad-accum-steps', '2', '--resume', 'auto')
    assert 'Resumed' in capsys.readouterr().out
    for ours, theirs in zip(rows_of(tmp_path / 'stopped'), one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize('launched', [['-m', 'timm_dyacts', 'train'], ['--no-python', 'timm-dyacts', 'train']], ids=str)
def test_torchrun_starts_the_command(options, tmp_path, launched):
    """As a module, and as the program that the package installs."""
    program = tmp_path / 'timm-dyacts'
    program.write_text(f'#!{sys.executable}\nfrom timm_dyacts.cli import main\nmain()\n')
    program.chmod(0o755)
    launched = [str(program) if part == program.name else part for part in launched]
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', *launched,
         *map(str, options), '--epochs', '1', '-b', '4', '--output', str(tmp_path), '--experiment', 'one'],
        env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr
    assert 'in 2 processes' in done.stdout
    assert len(re.findall('check it with: timm-dyacts validate --model', done.stdout)) == 1, 'one process speaks'
    assert len(rows_of(tmp_path / 'one')) == 1


# The parts, in processes that this one starts


def _join(rank, store):
    torch.distributed.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
    return World(torch.device('cpu'), rank, 2, torch.distributed.new_group(backend='gloo'))


def _spawn(function, *args):
    mp.start_processes(function, args=args, nprocs=2, start_method='fork')


def _check_agreement(rank, store):
    world = _join(rank, store)
    assert world.broadcast(f'from {rank}') == 'from 0'
    assert world.gather(rank) == ([0, 1] if rank == 0 else None)
    assert world.sum(torch.tensor([1.0, rank], dtype=torch.float64)).tolist() == [2, 1]
    with StopSignal(world) as stop:
        answers = []
        for step in range(4):
            if rank == 1 and step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            answers.append(stop.agreed())
    assert answers == [0, 0, signal.SIGTERM, signal.SIGTERM], 'all learn of it at the same step'


def test_processes_agree(tmp_path):
    _spawn(_check_agreement, str(tmp_path / 'store'))


def _check_accumulation(rank, store):
    world = _join(rank, store)
    torch.manual_seed(rank)  # DDP takes the weights of the first process
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    task = classification_task(model, nn.CrossEntropyLoss()).prepare_distributed()
    syncs = []
    task.trainable_module.register_comm_hook(None, lambda _, bucket: _average(bucket, syncs))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 6, 4, 3, 2, 2, generator=generator)
    labels = torch.randint(3, (2, 6, 4), generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = list(zip(images[rank], labels[rank], strict=True))
    metrics = train_one_epoch(task, data, optimizer, 0, grad_accum_steps=4, world=world)
    assert len(syncs) == 2, 'once per update, not once per batch'

    torch.manual_seed(0)
    alone = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    task = classification_task(alone, nn.CrossEntropyLoss())
    data = list(zip(images.movedim(0, 1).flatten(1, 2), labels.movedim(0, 1).flatten(1, 2), strict=True))
    expected = train_one_epoch(task, data, optimizer, 0, grad_accum_steps=4)
    torch.testing.assert_close(model[1].weight, alone[1].weight)
    assert metrics['loss'] == pytest.approx(expected['loss'], rel=1e-5)
    ours = evaluate(model, data[rank::2], world=world)
    assert ours == pytest.approx(evaluate(alone, data), rel=1e-4)


def _average(bucket, syncs):
    syncs.append(bucket.index())
    work = torch.distributed.all_reduce(bucket.buffer().div_(2), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def test_accumulation_does_not_synchronise(tmp_path):
    _spawn(_check_accumulation, str(tmp_path / 'store'))
