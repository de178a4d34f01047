"""What lies where in a run folder, and the schema of its results: the one contract of training, evaluation and Hub.

A run folder is itself the best checkpoint, so that ``timm.create_model('local-dir:<folder>', pretrained=True)`` loads
it::

    <folder>/
      model.safetensors config.json results.json     the best epoch
      ema/   ...                                      the best epoch of the moving average
      last/  ...                                      the last epoch
      history/best-7/ ema-7/ ...                      the best epochs, if more than one is kept, by number
      checkpoint/state.pt previous.pt                 what resuming needs
      args.yaml summary.csv                           the options, and a row for each epoch
      .lock                                           which process trained in it last, or does
      trackers.json                                   what trackers call the run
      classes.csv                                     precision, recall, F1 and images of each class, best epoch
      curves.png classes.png confusion.png mistakes.png dyrelu.png softpool.png
      profile/trace.json operators.txt                where the time of some updates went
      publish/                                        what a dry run of publishing leaves
"""
import csv
import importlib
import itertools
import json
import os
import reprlib
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

from .files import lock, replace_text
from .messages import one_line
from .options import published
from .privacy import reduced

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
    'check_folder_name',
    'how_to_finish',
    'read_rows',
]

CARD = 'README.md'
CONFIG = 'config.json'
WEIGHTS = 'model.safetensors'
PICKLED_WEIGHTS = 'pytorch_model.bin'
RESULTS = 'results.json'
OPTIONS = 'args.yaml'
SUMMARY = 'summary.csv'
CLASSES = 'classes.csv'
HISTORY = 'history'

# The checkpoints of a run, and their folders within it
CHECKPOINTS = dict(best='.', ema='ema', last='last')
# Published beside a checkpoint. Not all pictures: some show images of the data, which may not be for everybody.
PUBLISHED_EXTRAS = (OPTIONS, SUMMARY, CLASSES, 'curves.png', 'classes.png', 'confusion.png', 'dyrelu.png')

# The class that declares what OPTIONS holds. It lies in a room that stands below this one, so it goes by its name.
_OPTIONS_CLASS = ('timm_dyacts.training.config', 'TrainConfig')

_Record = TypeVar('_Record', bound='_FromDict')


def check_folder_name(name: str | None, option: str) -> None:
    """Raise ``ValueError`` for the name of a folder that would lie elsewhere than below ``--output``, or be that."""
    if not name:
        return
    parts = Path(name).parts
    if not name.isprintable() or os.pardir in parts or Path(name).is_absolute():
        raise ValueError(f'{option} must be the name of a folder below --output, got {name!r}.')


class _FromDict:
    """A dataclass that can be read from JSON, whatever the JSON holds."""

    @classmethod
    def from_dict(cls: type[_Record], values: Any) -> _Record:
        """Read what ``json.loads`` gave. Entries that are not known are passed over.

        Raises:
            ValueError: Entries are missing or not of their type. The message names all of them.
        """
        missing: list[str] = []
        wrong: list[str] = []
        record = _read_record(cls, values, '', missing, wrong)
        problems = [f'lacks {", ".join(missing)}'] if missing else []
        problems += [f'has {", ".join(wrong)}'] if wrong else []
        if problems:
            raise ValueError('; '.join(problems))
        return record


@dataclass(frozen=True)
class Preprocessing(_FromDict):
    """What was done to the images.

    Attributes:
        input_size: Channels, height and width.
        interpolation: Method of the resizing.
        mean: Mean that was subtracted, for each channel.
        std: Standard deviation that was divided by, for each channel.
        crop_pct: Share of the resized image that the crop keeps, in height and width.
    """
    input_size: tuple[int, ...]
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float


@dataclass(frozen=True)
class Start(_FromDict):
    """What a training started from.

    Attributes:
        model: The model that was asked for.
        pretrained: Whether it started from pretrained weights.
        source: Where they came from: a repo of the Hub, a URL or a file.
        license: Their licence.
        warm_start: ``'exact'`` (by a transition, too), ``'approximate'`` or, where it could not be compared,
            ``'unchecked'``; ``None`` where nothing was converted.
        kd_model: The teacher of a distillation.
        sha256: Of the file, if they came from one.
        entries: Number of entries of the model that the file gave, without those of the classifier.
        entries_of: Number of those that there are.
    """
    model: str
    pretrained: bool
    source: str | None = None
    license: str | None = None
    warm_start: str | None = None
    kd_model: str | None = None
    sha256: str | None = None
    entries: int | None = None
    entries_of: int | None = None


@dataclass(frozen=True)
class Results(_FromDict):
    """How good a checkpoint is, and how that was measured.

    Attributes:
        top1: Accuracy in percent.
        top5: Share of images, in percent, whose class is among the five likeliest.
        loss: Mean cross entropy.
        epoch: The epoch of the checkpoint, counted from 0, if it is of one.
        stopped_early: Why the run ended before its last epoch, ``None`` if it did not.
        dataset: Name of the data set.
        split: Its split.
        num_images: Number of images in the split.
        preprocessing: What was done to them.
        date: Day of the measurement, ISO 8601.
        start: What the training started from.
        versions: Versions by package.
        environment: What else it takes to repeat the measurement to the last digit, as
            ``evaluation.environment`` has it.
    """
    top1: float
    top5: float
    loss: float
    epoch: int | None = field(default=None, kw_only=True)
    dataset: str
    split: str
    num_images: int
    preprocessing: Preprocessing
    date: str
    start: Start
    versions: Mapping[str, str]
    stopped_early: str | None = field(default=None, kw_only=True)
    environment: Mapping[str, str] = field(default_factory=dict, kw_only=True)

    def to_dict(self) -> dict[str, Any]:
        """Give the content of ``results.json``."""
        values = asdict(replace(self, versions=dict(self.versions), environment=dict(self.environment)))
        if self.stopped_early is None:
            del values['stopped_early']
        if not self.environment:
            del values['environment']
        for name in ('sha256', 'entries', 'entries_of'):
            if values['start'][name] is None:
                del values['start'][name]
        return values


# What a record need not hold. All else has to be written, also what a constructor has a default for: no entry for the
# licence does not mean that there is none.
_MAY_BE_ABSENT = frozenset({'entries', 'entries_of', 'environment', 'epoch', 'sha256', 'stopped_early'})


class _Kind(NamedTuple):
    """A type of entries, in words and as a test."""
    words: str
    fits: Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    # Neither NaN nor infinity, nor an integer beyond all floats
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (list, tuple)) and len(value) > 0 and all(map(fits, value))


def _is_text_by_name(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_is_text, (*value, *value.values())))


_KINDS: dict[Any, _Kind] = {
    bool: _Kind('true or false', lambda value: isinstance(value, bool)),
    int: _Kind('a whole number, 0 or more', _is_count),
    int | None: _Kind('a whole number, 0 or more, or null', lambda value: value is None or _is_count(value)),
    float: _Kind('a finite number', _is_number),
    str: _Kind('a text', _is_text),
    str | None: _Kind('a text or null', lambda value: value is None or _is_text(value)),
    tuple[int, ...]: _Kind('a list of whole numbers, 0 or more', _is_list_of(_is_count)),
    tuple[float, ...]: _Kind('a list of finite numbers', _is_list_of(_is_number)),
    Mapping[str, str]: _Kind('a text for each name', _is_text_by_name),
}


def _read_record(cls: type, values: Any, path: str, missing: list[str], wrong: list[str]) -> Any:
    """Make a dataclass of what JSON holds, or note what it lacks and what in it is not of its type.

    Args:
        cls: The dataclass.
        values: What should be a mapping with an entry for each of its fields.
        path: What comes before the names of the entries, for the notes.
        missing: Notes go here.
        wrong: Notes go here.

    Returns:
        The record, None if anything was noted.
    """
    if not isinstance(values, Mapping):
        if path:
            wrong.append(f'{path[:-1]} = {reprlib.repr(values)} instead of named entries')
            return None
        values = {}
    noted = len(missing) + len(wrong)
    read = {}
    for entry in fields(cls):
        name = path + entry.name
        if entry.name not in values:
            if entry.name not in _MAY_BE_ABSENT:
                missing.append(name)
            continue
        value = values[entry.name]
        if is_dataclass(entry.type):
            read[entry.name] = _read_record(entry.type, value, f'{name}.', missing, wrong)
        elif _KINDS[entry.type].fits(value):
            read[entry.name] = tuple(value) if isinstance(value, list) else value
        else:
            wrong.append(f'{name} = {reprlib.repr(value)} instead of {_KINDS[entry.type].words}')
    return None if len(missing) + len(wrong) > noted else cls(**read)


class _Folder:
    """A folder that need not exist."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Path = Path(path)

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f'{type(self).__name__}({str(self.path)!r})'

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.path == self.path

    def __hash__(self) -> int:
        return hash(self.path)


class CheckpointFolder(_Folder):
    """A folder with the weights of a model, as timm and the Hub have them.

    Args:
        path: The folder. It need not exist.
    """

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
        """Name the files that are not there, of those without which nothing can be loaded."""
        return [path.name for path in (self.config, self.weights) if not path.is_file()]

    def read_results(self) -> Results | None:
        """Read the results, None if there are none.

        Raises:
            ValueError: The file holds something else. The message names the file and the entries.
        """
        if not self.results.is_file():
            return None
        try:
            return Results.from_dict(json.loads(self.results.read_text(encoding='utf-8')))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
            problem = f'is not JSON ({one_line(e)})'
        except ValueError as e:
            problem = str(e)
        raise ValueError(
            f"'{self.results}' cannot be read: it {problem}. Correct it, or remove it to go on without results.")

    def replace_results(self, **changes: Any) -> None:
        """Write the results anew if they are there and some entries are others now."""
        results = self.read_results()
        if results is not None and (changed := replace(results, **changes)) != results:
            replace_text(self.results, json.dumps(changed.to_dict(), indent=2))


def read_rows(summary: str | os.PathLike[str]) -> list[dict[str, float]]:
    """Read the rows of a ``summary.csv``, one per epoch, without the cells that are empty."""
    with open(summary, newline='', encoding='utf-8') as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


class RunFolder(_Folder):
    """The files of a run.

    Args:
        path: The folder. It need not exist.
    """

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from training in the folder, which has to exist.

        Raises:
            ValueError: One does. The message says which.
        """
        with ExitStack() as held:
            try:
                held.enter_context(lock(self.path / '.lock'))
            except BlockingIOError as e:
                raise ValueError(
                    f'{self} is in use: {e} trains in it. Wait until that has ended, or choose another --experiment.'
                ) from None
            yield

    @classmethod
    def containing(cls, checkpoint: str | os.PathLike[str]) -> 'RunFolder | None':
        """Find the run of a checkpoint folder: the folder itself or, for ``last/`` and others, one above.

        Returns:
            The run, None if there are no options of one, or no such folder.
        """
        folder = Path(checkpoint)
        above = folder.resolve().parent
        candidates = (folder, above, above.parent) if folder.is_dir() else ()
        if above.name != HISTORY:
            candidates = candidates[:2]
        return next((cls(path) for path in candidates if (path / OPTIONS).is_file()), None)

    @classmethod
    def of_state(cls, state: str | os.PathLike[str]) -> 'RunFolder':
        """Give the run that a state file belongs to."""
        return cls(Path(os.path.abspath(state)).parent.parent)

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
    def classes(self) -> Path:
        return self.path / CLASSES

    @property
    def classes_picture(self) -> Path:
        return self.path / 'classes.png'

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
        """The state before the newest."""
        return self.path / 'checkpoint' / 'previous.pt'

    @property
    def trackers(self) -> Path:
        """What trackers call the run."""
        return self.path / 'trackers.json'

    @property
    def profile(self) -> Path:
        """Where a profile of some updates lies."""
        return self.path / 'profile'

    @property
    def publish(self) -> Path:
        """Where a dry run of publishing leaves its files."""
        return self.path / 'publish'

    def checkpoint(self, which: str) -> CheckpointFolder:
        """Give the folder of one of ``CHECKPOINTS``."""
        return CheckpointFolder(self.path / CHECKPOINTS[which])

    def history(self, which: str, epoch: int) -> CheckpointFolder:
        """Give the folder of one of the best epochs, where more than one is kept.

        Args:
            which: ``'best'``, or ``'ema'`` for the moving average.
            epoch: The epoch.
        """
        return CheckpointFolder(self.path / HISTORY / f'{which}-{epoch}')

    def prune_history(self, which: str, epochs: Collection[int]) -> None:
        """Remove the folders of all but some epochs."""
        kept = {self.history(which, epoch).path for epoch in epochs}
        for path in (self.path / HISTORY).glob(f'{which}-*'):
            if path not in kept:
                shutil.rmtree(path)

    def checkpoints(self) -> list[str]:
        """Name those of ``CHECKPOINTS`` that are there."""
        return [which for which in CHECKPOINTS if not self.checkpoint(which).missing()]

    def find_state(self) -> Path | None:
        """Give the newest state that is there, None if there is none."""
        return next((path for path in (self.state, self.previous_state) if path.is_file()), None)

    def read_options(self) -> dict[str, Any] | None:
        """Read the options of the run, None if they are not there.

        Raises:
            ValueError: The file holds something else. The message names it.
        """
        if not self.options.is_file():
            return None
        try:
            options = yaml.safe_load(self.options.read_text(encoding='utf-8'))
        except (ValueError, RecursionError, yaml.YAMLError) as e:
            problem = f'is not YAML ({one_line(e)})'
        else:
            if isinstance(options, dict) and all(map(_is_text, options)):
                return options
            problem = "does not hold the options of a run, one 'option: value' per line"
        raise ValueError(f"'{self.options}' {problem}. Correct it, or remove it to go on without the options.")

    def read_recipe(self) -> dict[str, Any] | None:
        """Read what others may see of the options, None if there are none: see ``options.published``.

        Raises:
            ValueError: As of ``read_options``.
        """
        options = self.read_options()
        module, name = _OPTIONS_CLASS
        return None if options is None else published(options, getattr(importlib.import_module(module), name))

    def read_notes(self) -> list[str]:
        """Read the lines for who reads the options that ``write_options`` has put above them."""
        lines = self.options.read_text(encoding='utf-8').splitlines() if self.options.is_file() else ()
        notes = itertools.takewhile(lambda line: line.startswith('#'), lines)
        return [' '.join(map(reduced, line.removeprefix('#').split())) for line in notes]

    def read_summary(self) -> list[dict[str, float]]:
        """Read the rows of the epochs, none if there is no file."""
        return read_rows(self.summary) if self.summary.is_file() else []

    def write_options(self, options: Mapping[str, Any], notes: Sequence[str] = ()) -> None:
        """Write the options, all or nothing, under some lines for who reads the file."""
        comments = ''.join(f'# {note}\n' for note in notes)
        replace_text(self.options, comments + yaml.safe_dump(dict(options)))


def how_to_finish(model: str | None, t: float) -> str:
    """Say how the unfinished transition of a checkpoint gets to its end, in sentences for a message.

    Args:
        model: What was loaded: ``'local-dir:<folder>'``, ``'hf-hub:<id>'``, a folder or a name; ``None`` for a mere
            file of weights.
        t: Where the transition is, from 0 to 1.
    """
    if t == 1:
        return 'Load it, call finish_transition(model), with which it computes the same, and save that.'
    run = None if model is None else RunFolder.containing(model.removeprefix('local-dir:'))
    if run is not None and run.find_state() is not None:
        way = f"Train on: timm-dyacts train --resume '{run}'. Or load"
    elif model is not None and t == 0:
        way = f"Train it: timm-dyacts train --model '{model}' --pretrained --transition-epochs N. Or load"
    else:
        way = 'Load'
    return (
        f'{way} it, call finish_transition(model), with which it jumps to operators that its '
        f'weights are not trained for, see how good it is then, and save that.')
