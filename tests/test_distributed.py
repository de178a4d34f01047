"""Two processes over gloo train as one process with the doubled batch does."""
import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from photos import write_photos
from timm.task import ClassificationTask
from torch import nn

from timm_dyacts.training.loop import evaluate, train_one_epoch
from timm_dyacts.training.world import StopSignal, World

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason='needs torch.distributed')


def train_command(*options):
    return [str(ROOT / 'scripts' / 'train.py'), *map(str, options)]


def start(processes, *options):
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(processes)]
    return subprocess.Popen(
        [sys.executable, *(launcher if processes > 1 else []), *train_command(*options)],
        env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    return stdout


def rows_of(folder):
    with open(folder / 'summary.csv', newline='') as f:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(f)]


def test_two_processes_equal_one_and_resume_in_one(tmp_path):
    """test_vit has no BatchNorm: only rounding tells the runs apart. 13 validation images cannot be shared evenly."""
    photos = write_photos(tmp_path / 'photos', train=8, validation=5)
    (photos / 'validation' / 'red' / '0.png').unlink()
    (photos / 'validation' / 'red' / '1.png').unlink()
    options = [
        '--data-dir', photos, '--model', 'test_vit', '--model-kwargs', 'act_layer=dyrelu_b', '--img-size', '64',
        '--epochs', '3', '--workers', '0', '--opt', 'sgd', '--lr', '0.02', '--clip-grad', '1', '--reprob', '0.3',
        '--aa', 'rand-m5', '--model-ema', '--output', tmp_path]
    two = start(2, *options, '-b', '4', '--experiment', 'two')
    finish(start(1, *options, '-b', '8', '--experiment', 'one'))
    stdout = finish(two)
    assert stdout.count('in 2 processes') == 1, 'the first process alone prints'

    one, two = rows_of(tmp_path / 'one'), rows_of(tmp_path / 'two')
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
        correct = ours['eval_top1'] * 13 / 100
        assert correct == pytest.approx(round(correct), abs=1e-6), 'each of the 13 images counts once'

    # Accumulation in place of processes, half-way: the run goes on in one process.
    stopped = start(2, *options, '-b', '4', '--experiment', 'stopped', '--checkpoint-interval', '2')
    for line in stopped.stdout:
        if line.startswith('epoch   0'):
            break
    stopped.send_signal(signal.SIGTERM)
    _, stderr = stopped.communicate(timeout=240)
    assert re.search('Stopped by SIGTERM at epoch [12]', stderr)
    stdout = finish(start(1, *options, '-b', '4', '--grad-accum-steps', '2', '--experiment', 'stopped',
                          '--resume', 'auto'))
    assert 'Resumed' in stdout
    for ours, theirs in zip(rows_of(tmp_path / 'stopped'), one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_an_error_of_one_process_ends_all(tmp_path):
    photos = write_photos(tmp_path / 'photos', train=4)
    began = time.monotonic()
    process = start(
        2, '--data-dir', photos, '--model', 'test_vit', '--img-size', '64', '-b', '8', '--output', tmp_path / 'out')
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0
    assert '--batch-size 8 times 2 processes is more than the 12 training images' in stderr
    assert time.monotonic() - began < 120


# The parts, in processes that this one starts


def _join(rank, store):
    torch.distributed.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
    return World(torch.device('cpu'), rank, 2, torch.distributed.new_group(backend='gloo'))


def _spawn(function, tmp_path):
    mp.start_processes(function, args=(str(tmp_path / 'store'),), nprocs=2, start_method='fork')


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
    _spawn(_check_agreement, tmp_path)


def _check_accumulation(rank, store):
    world = _join(rank, store)
    torch.manual_seed(rank)  # DDP takes the weights of the first process
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False).prepare_distributed()
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
    task = ClassificationTask(alone, nn.CrossEntropyLoss(), verbose=False)
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
    _spawn(_check_accumulation, tmp_path)
