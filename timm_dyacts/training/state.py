"""What a run needs to go on as if it had never stopped, in one file that is always whole.

The newest state is written beside, flushed to the disk and renamed; the one before it is kept. Both are loaded with
``weights_only=True``: they hold tensors and plain values.
"""
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import write_durably
from ..rng import get_rng_state, set_rng_state
from ..run_folder import RunFolder
from ..world import World

__all__ = [
    'EpochMeter',
    'Progress',
    'StateFile',
    'broadcast_outline',
    'capture_state',
    'load_state',
    'map_tensors',
    'restore_state',
]

_FORMAT = 'timm_dyacts.training'
_VERSION = 1


@dataclass
class EpochMeter:
    """Sums over the samples of an epoch, of all processes together.

    Attributes:
        loss: Sum of the training losses.
        correct: Number of samples whose label was the most likely class.
        count: Number of samples.
    """
    loss: float = 0.0
    correct: int = 0
    count: int = 0

    @property
    def mean_loss(self) -> float:
        """Mean training loss of a sample, 0 before the first."""
        return self.loss / max(self.count, 1)

    @property
    def top1(self) -> float:
        """Training accuracy in percent, 0 before the first sample."""
        return 100 * self.correct / max(self.count, 1)


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        epoch: The epoch in progress, counted from 0.
        samples: Number of its samples that have been trained on, by all processes together.
        meter: Their losses.
        rows: The rows of the log, one for each epoch that is done.
        extensions: For each time that the run was given more epochs, the number of ``'epochs'`` before, and the
            ``'epoch'`` and its ``'images'`` that were done then.
    """
    epoch: int = 0
    samples: int = 0
    meter: EpochMeter = field(default_factory=EpochMeter)
    rows: list[dict[str, float]] = field(default_factory=list)
    extensions: list[dict[str, int]] = field(default_factory=list)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> 'Progress':
        """Undo ``dataclasses.asdict``."""
        return cls(**dict(values, meter=EpochMeter(**values['meter'])))

    def finish_epoch(self, row: dict[str, float]) -> None:
        """Go on to the next epoch."""
        self.rows.append(row)
        self.epoch, self.samples, self.meter = self.epoch + 1, 0, EpochMeter()


class StateFile:
    """Writes the states of a run: the newest and the one before it.

    Args:
        run: The run folder.
        is_good: Whether the newest state that is there may take the place of the one before it at the next writing. Not
            if the run was resumed from another file: then it may be broken, and the one before it worth more.
    """

    def __init__(self, run: RunFolder, is_good: bool = True) -> None:
        self.path: Path = run.state
        self.previous: Path = run.previous_state
        self.is_good = is_good

    def write(self, state: Mapping[str, Any]) -> None:
        """Write a state.

        Raises:
            OSError: It could not be written, as on a full disk. The states before are as they were.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f'{self.path.name}.tmp')
        try:
            write_durably(beside, lambda file: torch.save(dict(state, format=_FORMAT, version=_VERSION), file))
            if self.is_good and self.path.exists():
                os.replace(self.path, self.previous)
            os.replace(beside, self.path)
        except OSError as e:
            beside.unlink(missing_ok=True)
            raise OSError(f'{self.path} could not be written ({e}). The state before it is kept.') from e
        self.is_good = True


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load a state.

    Raises:
        ValueError: The file is not a whole state of a training run.
    """
    run = RunFolder.of_state(path)
    beside = (run.state, run.previous_state)
    other = next((p for p in beside if p != Path(path).absolute() and p.is_file()), None)
    hint = f' The state beside it may do: --resume {other}' if other else ''
    try:
        with zipfile.ZipFile(path) as file:
            if (broken := file.testzip()) is not None:  # PyTorch does not compare the checksums
                raise zipfile.BadZipFile(broken)
        state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:  # a broken file makes torch.load raise almost anything
        raise ValueError(
            f'{path} cannot be read: truncated, damaged, or no state of a training run ({type(e).__name__}).{hint}'
        ) from None
    if not isinstance(state, dict) or state.get('format') != _FORMAT:
        raise ValueError(f'{path} is a checkpoint, but not the state of a training run of this package.{hint}')
    if state['version'] != _VERSION:
        raise ValueError(f'{path} has version {state["version"]} of the state, this package reads {_VERSION}.')
    return state


def capture_state(parts: Mapping[str, Any], progress: Progress, world: World) -> dict[str, Any] | None:
    """Give the state of a run to the primary process, ``None`` to the others. All of them must call this.

    Args:
        parts: Objects with a ``state_dict``, by name.
        progress: How far the run is.
        world: The processes, each with random generators of its own.
    """
    rng = world.gather(get_rng_state(world.device))
    states = {name: part.state_dict() for name, part in parts.items()}  # in all processes, which may share a part
    if not world.is_primary:
        return None
    return dict(states, progress=asdict(progress), rng=rng)


def restore_state(state: Mapping[str, Any], parts: Mapping[str, Any], world: World) -> Progress:
    """Set a run to a state. Processes beyond those that the state knows keep their random generators."""
    for name, part in parts.items():
        part.load_state_dict(state[name])
    if world.rank < len(state['rng']):
        set_rng_state(state['rng'][world.rank], world.device)
    return Progress.from_dict(state['progress'])


def broadcast_outline(state: Mapping[str, Any] | None, world: World) -> Mapping[str, Any] | None:
    """Give the state of a run to all processes, without the values of the large parts, which are shared out later.

    Args:
        state: The state in the primary process, ``None`` if there is none, and in the others.
        world: The processes.

    Returns:
        The state itself to the primary process. To the others one with meta tensors in model, average and optimizer.
    """
    outline = state
    if state is not None:
        parts = state.keys() & {'model', 'ema', 'optimizer'}
        outline = dict(state, **{name: map_tensors(state[name], lambda value: value.to('meta')) for name in parts})
    received = world.broadcast(outline)
    return state if world.is_primary else received


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Apply a function to all tensors in dictionaries, lists and tuples."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(item, function) for item in value)
    return value
