"""Where the time of training goes: PyTorch's profiler over some updates."""
import os
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from ..files import replace_text
from ..world import World

__all__ = ['UpdateProfiler', 'check_profile']

# Updates before those that are recorded: kernels are chosen and compiled, memory is gathered.
_WARMUP = 5
_ROWS = 60


def check_profile(updates: int | None, updates_per_epoch: int) -> None:
    """Raise ``ValueError`` if so many updates to record, and those of the warmup, do not fit into an epoch."""
    most = updates_per_epoch - _WARMUP
    if updates is not None and updates > most:
        raise ValueError(
            f'--profile must be at most {max(most, 0)}, as an epoch has {updates_per_epoch} updates, of which '
            f'{_WARMUP} warm up, got {updates}.')


class UpdateProfiler:
    """Records updates of one epoch, the first in which they fit, as a Chrome trace and a table of the operators.

    Args:
        folder: Where to write ``trace.json`` and ``operators.txt``.
        updates: Number of updates to record.
        updates_per_epoch: Number of updates in an epoch.
        world: The processes that train together. This one is recorded.
    """

    def __init__(self, folder: Path, updates: int, updates_per_epoch: int, world: World) -> None:
        self.folder = folder
        self.updates = updates
        self.updates_per_epoch = updates_per_epoch
        self.device_type: str = world.device.type
        self.is_done = False
        self._profiler: Any = None
        self._left = 0

    def before_update(self, update: int) -> None:
        """Begin if what is to be recorded fits into the epoch from here on. Updates count from 1."""
        left_in_epoch = self.updates_per_epoch - (update - 1) % self.updates_per_epoch
        needed = _WARMUP + self.updates
        if self.is_done or self._profiler is not None or left_in_epoch < needed:
            return
        activities = [ProfilerActivity.CPU]
        if self.device_type == 'cuda':
            activities.append(ProfilerActivity.CUDA)
        self._left = needed
        self._profiler = profile(
            activities=activities,
            schedule=schedule(skip_first=_WARMUP - 1, wait=0, warmup=1, active=self.updates, repeat=1),
            record_shapes=True,
        )
        self._profiler.start()

    def after_update(self) -> bool:
        """Count an update, and say whether it was the last to be recorded. Then all is written."""
        if self._profiler is None:
            return False
        self._left -= 1
        if self._left:
            self._profiler.step()
            return False
        if self.device_type == 'cuda':
            torch.cuda.synchronize()
        self._profiler.stop()
        self._write()
        self._profiler, self.is_done = None, True
        return True

    def close(self) -> None:
        """End without a record if it is not complete."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        trace, beside = self.folder / 'trace.json', self.folder / 'trace.tmp.json'
        self._profiler.export_chrome_trace(str(beside))
        os.replace(beside, trace)
        sort_by = 'self_cpu_time_total' if self.device_type == 'cpu' else 'self_cuda_time_total'
        table = self._profiler.key_averages().table(sort_by=sort_by, row_limit=_ROWS, max_name_column_width=60)
        replace_text(self.folder / 'operators.txt', f'{self.updates} updates\n{table}')
