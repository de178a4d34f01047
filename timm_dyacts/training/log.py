"""The log of a run: summary.csv, and TensorBoard and Weights & Biases where asked for."""
import math
import os
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from ..files import format_csv, replace_text
from ..options import to_dict
from ..run_folder import RunFolder
from .config import TrainConfig

__all__ = ['RunLog', 'best_row', 'check_loggers', 'write_summary']

_LOGGERS = dict(log_wandb='wandb', log_tensorboard='tensorboard')


def check_loggers(config: TrainConfig) -> None:
    """Raise ``ImportError`` if a logger is asked for and not installed, so that a run fails before it trains."""
    for option, package in _LOGGERS.items():
        if getattr(config, option):
            _import(package, option)


def _import(module: str, option: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as e:
        package = module.split('.')[0]
        raise ImportError(f'--{option.replace("_", "-")} needs {package}: pip install {package} ({e}).') from None


def write_summary(rows: Sequence[dict[str, float]], path: str | os.PathLike[str]) -> None:
    """Write ``summary.csv`` as timm's ``update_summary`` would have, one row per epoch, in one piece."""
    replace_text(path, format_csv(rows, list(rows[0])))


def best_row(rows: Sequence[dict[str, float]], metric: str) -> dict[str, float] | None:
    """Give the row with the best value in a column, the first of equals. Losses are best when small, NaN is worst.

    Of an epoch that ended within a transition the model is not yet the one that is trained for: it is passed over.
    ``None`` if there is no other.
    """
    sign = -1 if metric.endswith('loss') else 1
    finished = (row for row in rows if row.get('t', 1) == 1)
    return max(finished, key=lambda row: -math.inf if math.isnan(row[metric]) else sign * row[metric], default=None)


class RunLog:
    """Where the rows of a run go.

    Args:
        config: The options.
        run: The run folder.
        rows: Rows of the epochs before the run was resumed.
    """

    def __init__(self, config: TrainConfig, run: RunFolder, rows: Sequence[dict[str, float]]) -> None:
        self.run = run
        self.wandb = self.tensorboard = None
        if rows:
            write_summary(rows, run.summary)  # rows of epochs that will be done again are gone
        if config.log_wandb:
            self.wandb = _import('wandb', 'log_wandb').init(
                project=config.wandb_project,
                name=run.path.name,
                config=to_dict(config),
                tags=list(config.wandb_tags),
                dir=str(run),
                id=config.wandb_resume_id or None,
                resume='must' if config.wandb_resume_id else None,
            )
        if config.log_tensorboard:
            tensorboard = _import('torch.utils.tensorboard', 'log_tensorboard')
            self.tensorboard = tensorboard.SummaryWriter(str(run), purge_step=len(rows))

    def write(self, rows: Sequence[dict[str, float]]) -> None:
        """Write the rows of all epochs, of which the last one is new."""
        write_summary(rows, self.run.summary)
        row = rows[-1]
        if self.wandb is not None:
            self.wandb.log(row, step=row['epoch'])
        if self.tensorboard is not None:
            for name, value in row.items():
                if name != 'epoch':
                    self.tensorboard.add_scalar(name.replace('_', '/', 1), value, row['epoch'])

    def close(self) -> None:
        """Finish what is still being written."""
        if self.wandb is not None:
            self.wandb.finish()
        if self.tensorboard is not None:
            self.tensorboard.close()
