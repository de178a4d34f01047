"""What lies where in a run folder, and the schema of its results: the one contract of training, evaluation and Hub.

A run folder is itself the best checkpoint, so that ``timm.create_model('local-dir:<folder>', pretrained=True)`` loads
it::

    <folder>/
      model.safetensors config.json results.json     the best epoch
      ema/   ...                                      the best epoch of the moving average
      last/  ...                                      the last epoch
      checkpoint/state.pt previous.pt                 what resuming needs
      args.yaml summary.csv                           the options, and a row for each epoch
      curves.png confusion.png mistakes.png dyrelu.png softpool.png
      publish/                                        what a dry run of publishing leaves
"""
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from .files import replace_text

__all__ = [
    'CARD',
    'CHECKPOINTS',
    'CONFIG',
    'OPTIONS',
    'PICKLED_WEIGHTS',
    'PUBLISHED_EXTRAS',
    'RESULTS',
    'SUMMARY',
    'WEIGHTS',
    'CheckpointFolder',
    'Preprocessing',
    'Results',
    'RunFolder',
    'Start',
]

CARD = 'README.md'
CONFIG = 'config.json'
WEIGHTS = 'model.safetensors'
PICKLED_WEIGHTS = 'pytorch_model.bin'
RESULTS = 'results.json'
OPTIONS = 'args.yaml'
SUMMARY = 'summary.csv'

# The checkpoints of a run, and their folders within it
CHECKPOINTS = dict(best='.', ema='ema', last='last')
# Published beside a checkpoint. Not all pictures: some show images of the data, which may not be for everybody.
PUBLISHED_EXTRAS = (OPTIONS, SUMMARY, 'curves.png', 'confusion.png', 'dyrelu.png')


@dataclass(frozen=True)
class Preprocessing:
    """What was done to the images.

    Attributes:
        input_size: Channels, height and width.
        interpolation: Of the resizing.
        mean: Subtracted from each channel.
        std: Divided by, for each channel.
        crop_pct: Share of the image, before it is cropped to the input size, that is kept.
    """
    input_size: tuple[int, ...]
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float


@dataclass(frozen=True)
class Start:
    """What a training started from.

    Attributes:
        model: What was asked for.
        pretrained: Whether it started from pretrained weights.
        source: Where they came from: a repo of the Hub, a URL or a file.
        license: Their licence.
        warm_start: ``'exact'`` or ``'approximate'``, ``None`` where nothing was converted.
        kd_model: The teacher of a distillation.
    """
    model: str
    pretrained: bool
    source: str | None = None
    license: str | None = None
    warm_start: str | None = None
    kd_model: str | None = None


@dataclass(frozen=True)
class Results:
    """How good a checkpoint is, and of what that was measured.

    Attributes:
        top1: Accuracy in percent.
        top5: Share of images, in percent, whose class is among the five likeliest.
        loss: Mean cross entropy.
        dataset: Name of the data set.
        split: Its split.
        num_images: Number of its images.
        preprocessing: What was done to them.
        date: Day of the measurement, ISO 8601.
        start: What the training started from.
        versions: Versions by package.
        epoch: The epoch of the checkpoint, counted from 0.
    """
    top1: float
    top5: float
    loss: float
    dataset: str
    split: str
    num_images: int
    preprocessing: Preprocessing
    date: str
    start: Start
    versions: Mapping[str, str]
    epoch: int | None = None

    @classmethod
    def from_dict(cls, values: Any) -> 'Results':
        """Read what ``to_dict`` gave.

        Raises:
            ValueError: Something is missing, or a number is not finite. Entries that are not known are passed over.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f'holds {type(values).__name__}, not one entry per result')
        parts = dict(preprocessing=Preprocessing, start=Start)
        missing = [name for name in _required(cls) if name not in values]
        for key, part in parts.items():
            if key in values:
                there = values[key] if isinstance(values[key], Mapping) else {}
                missing += [f'{key}.{name}' for name in (f.name for f in fields(part)) if name not in there]
        if missing:
            raise ValueError(f'lacks {", ".join(missing)}')
        wrong = [f'{name} = {values[name]}' for name in ('top1', 'top5', 'loss') if not _is_finite(values[name])]
        if wrong:
            raise ValueError(f'has {", ".join(wrong)}')
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        for key, part in parts.items():
            known[key] = part(**{f.name: _frozen(values[key][f.name]) for f in fields(part)})
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """The content of ``results.json``."""
        values = asdict(self)
        values['versions'] = dict(self.versions)
        return values


def _required(cls: type) -> list[str]:
    return [f.name for f in fields(cls) if f.name != 'epoch']


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class CheckpointFolder:
    """A folder with the weights of a model, as timm and the Hub have them."""
    path: Path

    @property
    def config(self) -> Path:
        return self.path / CONFIG

    @property
    def weights(self) -> Path:
        return self.path / WEIGHTS

    @property
    def results(self) -> Path:
        return self.path / RESULTS

    def missing(self) -> list[str]:
        """The names of the files without which nothing can be loaded, of those that are not there."""
        return [name for name in (CONFIG, WEIGHTS) if not (self.path / name).is_file()]

    def read_results(self) -> Results | None:
        """The results on record, None if there are none.

        Raises:
            ValueError: The file cannot be read, or lacks something. The message names it.
        """
        if not self.results.is_file():
            return None
        try:
            return Results.from_dict(json.loads(self.results.read_text(encoding='utf-8')))
        except ValueError as e:
            raise ValueError(f"'{self.results}' {e}") from e


class RunFolder:
    """The files of a run.

    Args:
        path: The folder. It need not exist.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    @classmethod
    def containing(cls, checkpoint: str | os.PathLike) -> 'RunFolder | None':
        """The run that a checkpoint folder is of: the folder itself or, of ``last/`` and ``ema/``, the one above."""
        for path in (Path(checkpoint), Path(checkpoint, os.pardir)):
            if (path / OPTIONS).is_file():
                return cls(path)
        return None

    @classmethod
    def of_state(cls, state: str | os.PathLike) -> 'RunFolder':
        """The run that a state file is of."""
        return cls(Path(state).absolute().parents[1])

    @property
    def options(self) -> Path:
        return self.path / OPTIONS

    @property
    def summary(self) -> Path:
        return self.path / SUMMARY

    @property
    def curves(self) -> Path:
        return self.path / 'curves.png'

    @property
    def confusion(self) -> Path:
        return self.path / 'confusion.png'

    @property
    def mistakes(self) -> Path:
        return self.path / 'mistakes.png'

    @property
    def dyrelu(self) -> Path:
        return self.path / 'dyrelu.png'

    @property
    def softpool(self) -> Path:
        return self.path / 'softpool.png'

    @property
    def state(self) -> Path:
        """What resuming needs, the newest."""
        return self.path / 'checkpoint' / 'state.pt'

    @property
    def previous_state(self) -> Path:
        """The one before it."""
        return self.path / 'checkpoint' / 'previous.pt'

    @property
    def publish(self) -> Path:
        """Where a dry run of publishing leaves its files."""
        return self.path / 'publish'

    def checkpoint(self, which: str) -> CheckpointFolder:
        """The folder of one of ``CHECKPOINTS``."""
        return CheckpointFolder(self.path / CHECKPOINTS[which])

    def checkpoints(self) -> list[str]:
        """Which of ``CHECKPOINTS`` are there."""
        return [which for which in CHECKPOINTS if not self.checkpoint(which).missing()]

    def find_state(self) -> Path | None:
        """The newest state that is there."""
        return next((path for path in (self.state, self.previous_state) if path.is_file()), None)

    def read_options(self) -> dict[str, Any] | None:
        """The options of the run, None if they are not there.

        Raises:
            ValueError: The file holds something else. The message names it.
        """
        if not self.options.is_file():
            return None
        try:
            options = yaml.safe_load(self.options.read_text(encoding='utf-8'))
        except (ValueError, yaml.YAMLError) as e:
            raise ValueError(f"'{self.options}' is not YAML: {e}") from e
        if not isinstance(options, dict):
            raise ValueError(f"'{self.options}' does not hold the options of a run")
        return options

    def write_options(self, options: Mapping[str, Any]) -> None:
        """Write the options, all or nothing."""
        replace_text(self.options, yaml.safe_dump(dict(options)))
