"""Runs of scripts/train.py in this process."""
import runpy
from pathlib import Path

from timm_dyacts.training import RunResult, train
from timm_dyacts.training.options import parse_train_args

CREATE_PARSER = runpy.run_path(str(Path(__file__).parents[2] / 'scripts' / 'train.py'))['create_parser']


def train_with(*options: object) -> RunResult:
    """Train as the command line with these options would."""
    return train(parse_train_args(CREATE_PARSER(), [*map(str, options)]))


def train_small(images: Path, output: Path, *options: object) -> RunResult:
    """Train timm's smallest ResNet on a folder of images for an epoch; options come on top."""
    return train_with(
        '--data-dir', images, '--model', 'test_resnet', '--img-size', 32, '--epochs', 1, '--workers', 0,
        '--batch-size', 8, '--output', output, *options)
