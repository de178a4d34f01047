"""The learning rate schedule of a run, from timm's parts."""
import warnings
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.scheduler import PlateauLRScheduler, create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler

from ..version import needs
from .config import TrainConfig

__all__ = ['PlateauState', 'build_scheduler']


def build_scheduler(
        config: TrainConfig,
        optimizer: torch.optim.Optimizer,
        updates_per_epoch: int,
) -> tuple[Scheduler, int]:
    """Create the schedule.

    Args:
        config: The options.
        optimizer: Whose learning rate it moves.
        updates_per_epoch: Number of updates in an epoch.

    Returns:
        The schedule, and the number of epochs with those of a warmup before, of cycles and of the cooldown.

    Raises:
        ImportError: timm is too old for the schedule.
    """
    kwargs = dict(
        scheduler_kwargs(config),
        decay_milestones=config.decay_milestones or (),
        step_on_epochs=config.sched_on_epochs or config.sched == 'plateau',
        updates_per_epoch=updates_per_epoch,
    )
    with warnings.catch_warnings():
        # timm warns that the state of this one is lost where a run is resumed. Here it is not, see below.
        warnings.filterwarnings('ignore', 'PlateauLRScheduler is deprecated', FutureWarning)
        try:
            scheduler, num_epochs = create_scheduler_v2(optimizer, **kwargs)
        except TypeError as e:
            if config.sched != 'plateau' or 'verbose' not in str(e):
                raise
            raise needs(f'--sched plateau with torch {torch.__version__}', 'timm', '1.0.23', timm.__version__) from e
    if scheduler is None:
        raise needs(f'--sched {config.sched}', 'timm', '1.0.31', timm.__version__)
    return scheduler, num_epochs


class PlateauState:
    """The state of the one schedule of timm's that is no function of the time, all of it.

    Args:
        scheduler: The schedule.
    """

    def __init__(self, scheduler: PlateauLRScheduler) -> None:
        self.scheduler = scheduler

    def state_dict(self) -> dict[str, Any]:
        """Give the state, of plain values: what has been seen, and the learning rates without their noise."""
        return dict(plateau=self.scheduler.lr_scheduler.state_dict(), restore_lr=self.scheduler.restore_lr)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the schedule to a state."""
        self.scheduler.lr_scheduler.load_state_dict(state['plateau'])
        self.scheduler.restore_lr = state['restore_lr']
