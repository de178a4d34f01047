"""What a run needs to go on as if it had never stopped, in one file that is always whole.

``checkpoint/state.pt`` is written beside, flushed to the disk and renamed; the state before it stays as
``checkpoint/previous.pt``. Both are loaded with ``weights_only=True``: they hold tensors and plain values.
"""
import os
import random
import re
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from ..files import write_durably
from ..world import World

__all__ = [
    'CheckpointInterval',
    'EpochMeter',
    'Progress',
    'StateFile',
    'capture_state',
    'get_rng_state',
    'load_state',
    'restore_state',
    'set_rng_state',
    'state_paths',
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
        """Training loss of a sample, 0 before the first."""
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
        samples: Samples of it that have been trained on, by all processes together.
        meter: Their losses.
        rows: The rows of ``summary.csv``, one for each epoch that is done.
    """
    epoch: int = 0
    samples: int = 0
    meter: EpochMeter = field(default_factory=EpochMeter)
    rows: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> 'Progress':
        """The inverse of ``dataclasses.asdict``."""
        return cls(**dict(values, meter=EpochMeter(**values['meter'])))


@dataclass(frozen=True)
class CheckpointInterval:
    """How often a state is written.

    Attributes:
        every: Number of updates or epochs.
        in_epochs: Which of the two.
    """
    every: int
    in_epochs: bool

    @classmethod
    def parse(cls, text: str) -> 'CheckpointInterval':
        """Read ``'500'`` or ``'500steps'`` (updates), ``'2epochs'``, or ``'2e'`` for short.

        Raises:
            ValueError: Anything else.
        """
        match = re.fullmatch(r'([1-9]\d*) ?(s|steps?|e|epochs?)?', str(text))
        if match is None:
            raise ValueError(
                f"--checkpoint-interval must be a number of updates such as 500 or '500steps', or of epochs such as "
                f"'1epoch', got {text!r}.")
        return cls(int(match[1]), (match[2] or 's').startswith('e'))

    def is_due(self, updates: int) -> bool:
        """Whether a state is due after that many updates of the run."""
        return not self.in_epochs and updates % self.every == 0

    def is_due_after_epoch(self, epochs: int) -> bool:
        """Whether a state is due after that many epochs."""
        return self.in_epochs and epochs % self.every == 0


def get_rng_state(device: torch.device) -> dict[str, Any]:
    """The states of the global random generators of Python, NumPy and PyTorch (CPU and ``device``)."""
    name, keys, *rest = np.random.get_state()
    return dict(
        python=random.getstate(),
        numpy=(name, torch.from_numpy(keys.astype(np.int64)), *rest),
        torch=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state(device) if device.type == 'cuda' else None,
    )


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Set the global random generators to what ``get_rng_state`` gave."""
    random.setstate(state['python'])
    name, keys, *rest = state['numpy']
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state['torch'])
    if state['cuda'] is not None and device.type == 'cuda':
        torch.cuda.set_rng_state(state['cuda'], device)


class StateFile:
    """Writes the states of a run: the newest and the one before it.

    Args:
        folder: The run folder.
        is_good: Whether the ``state.pt`` that is there may take the place of ``previous.pt`` at the next writing. Not
            if the run was resumed from another file: then it may be broken, and ``previous.pt`` worth more.
    """

    def __init__(self, folder: str, is_good: bool = True) -> None:
        self.path, self.previous = state_paths(folder)
        self.is_good = is_good

    def write(self, state: dict[str, Any]) -> None:
        """Write a state.

        Raises:
            OSError: It could not be written, as on a full disk. The states before are as they were.
        """
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        beside = self.path + '.tmp'
        try:
            write_durably(beside, lambda file: torch.save(dict(state, format=_FORMAT, version=_VERSION), file))
            if self.is_good and os.path.exists(self.path):
                os.replace(self.path, self.previous)
            os.replace(beside, self.path)
        except (OSError, RuntimeError) as e:  # torch.save turns what a full disk says into a RuntimeError
            if os.path.exists(beside):
                os.remove(beside)
            raise OSError(f'{self.path} could not be written ({e}). The state before it is kept.') from e
        self.is_good = True


def state_paths(folder: str) -> tuple[str, str]:
    """Paths of the newest state of a run folder and of the one before it."""
    return os.path.join(folder, 'checkpoint', 'state.pt'), os.path.join(folder, 'checkpoint', 'previous.pt')


def load_state(path: str) -> dict[str, Any]:
    """Load a state.

    Raises:
        ValueError: The file is not a whole state of a training run.
    """
    folder = os.path.dirname(os.path.dirname(path))
    other = next((p for p in state_paths(folder) if p != path and os.path.isfile(p)), None)
    hint = f' The state beside it may do: --resume {other}' if other else ''
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:  # a broken file makes torch.load raise almost anything
        raise ValueError(
            f'{path} cannot be read: truncated, or no state of a training run ({type(e).__name__}).{hint}') from None
    if not isinstance(state, dict) or state.get('format') != _FORMAT:
        raise ValueError(f'{path} is a checkpoint, but not the state of a training run of this package.{hint}')
    if state['version'] != _VERSION:
        raise ValueError(f'{path} has version {state["version"]} of the state, this package reads {_VERSION}.')
    return state


def capture_state(objects: dict[str, Any], progress: Progress, world: World) -> dict[str, Any] | None:
    """The state of a run, for the primary process; None for the others. All of them must call this.

    Args:
        objects: What has a ``state_dict``, by name.
        progress: How far the run is.
        world: The processes, each with random generators of its own.
    """
    rng = world.gather(get_rng_state(world.device))
    if not world.is_primary:
        return None
    return dict({name: part.state_dict() for name, part in objects.items()}, progress=asdict(progress), rng=rng)


def restore_state(state: dict[str, Any], objects: dict[str, Any], world: World) -> Progress:
    """Set a run to a state. Processes beyond those that the state knows keep their random generators."""
    for name, part in objects.items():
        part.load_state_dict(state[name])
    if world.rank < len(state['rng']):
        set_rng_state(state['rng'][world.rank], world.device)
    return Progress.from_dict(state['progress'])
