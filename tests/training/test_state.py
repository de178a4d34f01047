"""The file that a run is resumed from."""
import os
import random
import resource
import signal
from argparse import Namespace

import numpy as np
import pytest
import torch

from timm_dyacts.rng import get_rng_state, isolated_rng, set_rng_state
from timm_dyacts.run_folder import RunFolder
from timm_dyacts.training.state import EpochMeter, Progress, StateFile, capture_state, load_state, restore_state
from timm_dyacts.world import World

CPU = torch.device('cpu')


def test_the_two_newest_states_are_kept(tmp_path):
    file = StateFile(RunFolder(tmp_path))
    for i in range(3):
        file.write(dict(number=i))
    assert (load_state(file.path)['number'], load_state(file.previous)['number']) == (2, 1)
    # Resumed from previous.pt: the newest is not to be trusted, and must not take its place.
    StateFile(RunFolder(tmp_path), is_good=False).write(dict(number=3))
    assert (load_state(file.path)['number'], load_state(file.previous)['number']) == (3, 1)


def test_full_disk(tmp_path):
    """The limit on the size of a file stands in for a disk that is full after 100 kB."""
    file = StateFile(RunFolder(tmp_path))
    file.write(dict(number=0))
    old = file.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(OSError, match=r'state.pt could not be written \(.*\)\. The state before it is kept'):
            file.write(dict(number=1, weights=torch.zeros(100_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert file.path.read_bytes() == old
    assert os.listdir(tmp_path / 'checkpoint') == ['state.pt']


def test_a_flipped_bit_is_noticed(tmp_path):
    """PyTorch does not compare the checksums of the archive, and would give other weights."""
    file = StateFile(RunFolder(tmp_path))
    file.write(dict(weights=torch.ones(1000)))
    content = bytearray(file.path.read_bytes())
    at = content.index(torch.ones(4).numpy().tobytes()) + 101
    content[at] ^= 1
    file.path.write_bytes(content)
    assert not torch.load(file.path, weights_only=True)['weights'].equal(torch.ones(1000))
    with pytest.raises(ValueError, match='cannot be read: truncated, damaged'):
        load_state(file.path)


def test_foreign_files(tmp_path):
    path = tmp_path / 'state.pt'
    torch.save(dict(state_dict={}), path)
    with pytest.raises(ValueError, match='is a checkpoint, but not the state of a training run'):
        load_state(str(path))
    path.write_text('no checkpoint')
    with pytest.raises(ValueError, match='cannot be read: truncated, damaged, or no state'):
        load_state(str(path))
    torch.save(Namespace(), path)  # would run code of its own choice without weights_only
    with pytest.raises(ValueError, match='cannot be read'):
        load_state(str(path))


def test_random_generators_return():
    state = get_rng_state(CPU)

    def draw():
        return random.gauss(0, 1), np.random.randn(), torch.randn(1).item()

    expected = draw()
    draw()
    set_rng_state(state, CPU)
    assert draw() == expected


# What is in it


def parts():
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return dict(model=model, optimizer=optimizer)


def test_a_state_goes_through_its_file(tmp_path):
    """Weights, optimizer, position, log and random generators come back."""
    saved = parts()
    progress = Progress(3, 24, EpochMeter(1.5, 2, 24), [dict(epoch=0, lr=0.1)])
    file = StateFile(RunFolder(tmp_path))
    file.write(capture_state(saved, progress, World(CPU)))
    expected = random.random(), np.random.rand(), torch.rand(1).item()

    fresh = dict(model=torch.nn.Linear(2, 2))
    fresh['optimizer'] = torch.optim.Adam(fresh['model'].parameters())
    restored = restore_state(load_state(file.path), fresh, World(CPU))
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert restored == progress
    assert torch.equal(fresh['model'].weight, saved['model'].weight)
    for ours, theirs in zip(*(p['optimizer'].state_dict()['state'].values() for p in (fresh, saved)), strict=True):
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_a_process_that_the_state_does_not_know_keeps_its_generators():
    state = capture_state(parts(), Progress(), World(CPU))
    torch.manual_seed(5)
    expected = torch.rand(1).item()
    torch.manual_seed(5)
    restore_state(state, parts_without_seed(), World(CPU, rank=1))
    assert torch.rand(1).item() == expected


def parts_without_seed():
    with isolated_rng():
        return parts()


def test_only_the_primary_process_has_the_state(monkeypatch):
    monkeypatch.setattr(World, 'gather', lambda self, value: None)
    assert capture_state(parts(), Progress(), World(CPU, rank=1, size=2)) is None


def test_an_epoch_is_finished():
    progress = Progress(0, 24, EpochMeter(3.0, 12, 24))
    assert (progress.meter.mean_loss, progress.meter.top1) == (0.125, 50)
    progress.finish_epoch(dict(epoch=0))
    assert progress == Progress(1, 0, EpochMeter(), [dict(epoch=0)])
    assert (progress.meter.mean_loss, progress.meter.top1) == (0, 0)


def test_another_version_of_the_state(tmp_path):
    torch.save(dict(format='timm_dyacts.training', version=9), tmp_path / 'state.pt')
    with pytest.raises(ValueError, match='has version 9 of the state, this package reads 1'):
        load_state(tmp_path / 'state.pt')
