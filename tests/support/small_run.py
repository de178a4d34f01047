"""Runs of training in this process."""
from pathlib import Path

import torch
from safetensors.torch import load_file

from timm_dyacts.cli.train import parse_config
from timm_dyacts.training import RunResult, TrainConfig, train


def config_of(*options: object) -> TrainConfig:
    """Give the options as the command line has them."""
    return parse_config([*map(str, options)])


def train_with(*options: object) -> RunResult:
    """Train as the command line with these options would."""
    return train(config_of(*options))


def train_small(images: Path, output: Path, *options: object) -> RunResult:
    """Train timm's smallest ResNet on a folder of images for an epoch; options come on top."""
    return train_with(
        '--data-dir', images, '--model', 'test_resnet', '--img-size', 32, '--epochs', 1, '--workers', 0,
        '--batch-size', 8, '--output', output, *options)


def assert_same_end(folder: Path, other: Path) -> None:
    """Assert that two runs left the same weights and the same log, bit for bit."""
    weights = sorted(path.relative_to(folder) for path in folder.rglob('*.safetensors'))
    assert weights == sorted(path.relative_to(other) for path in other.rglob('*.safetensors'))
    for path in weights:
        ours, theirs = load_file(folder / path), load_file(other / path)
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items()), path
    assert (folder / 'summary.csv').read_bytes() == (other / 'summary.csv').read_bytes()
