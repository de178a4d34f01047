"""The log of a run: summary.csv, and TensorBoard and Weights & Biases where asked for."""
import math
import os
from argparse import Namespace
from importlib import import_module
from types import ModuleType
from typing import Any

from ..files import format_csv, replace_text

__all__ = ['RunLog', 'best_row', 'check_loggers', 'write_summary']

_LOGGERS = dict(log_wandb='wandb', log_tensorboard='tensorboard')


def check_loggers(args: Namespace) -> None:
    """Raise ImportError if a logger is asked for and not installed, so that a run fails before it trains."""
    for option, package in _LOGGERS.items():
        if getattr(args, option):
            _import(package, option)


def _import(module: str, option: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as e:
        package = module.split('.')[0]
        raise ImportError(f'--{option.replace("_", "-")} needs {package}: pip install {package} ({e}).') from None


def write_summary(rows: list[dict[str, float]], folder: str) -> None:
    """Write ``summary.csv`` as timm's ``update_summary`` would have, one row per epoch, in one piece."""
    replace_text(os.path.join(folder, 'summary.csv'), format_csv(rows, list(rows[0])))


def best_row(rows: list[dict[str, float]], metric: str) -> dict[str, float]:
    """The row with the best value in a column, the first of equals. Losses are best when small, NaN is the worst."""
    sign = -1 if metric.endswith('loss') else 1
    return max(rows, key=lambda row: -math.inf if math.isnan(row[metric]) else sign * row[metric])


class RunLog:
    """Where the rows of a run go.

    Args:
        args: Options ``log_wandb``, ``wandb_project``, ``wandb_tags``, ``wandb_resume_id`` and ``log_tensorboard``.
        folder: The run folder.
        rows: Rows of the epochs before the run was resumed.
    """

    def __init__(self, args: Namespace, folder: str, rows: list[dict[str, float]]) -> None:
        self.folder = folder
        self.rows = rows
        self.wandb = self.tensorboard = None
        if rows:
            write_summary(rows, folder)  # rows of epochs that will be done again are gone
        if args.log_wandb:
            self.wandb = _import('wandb', 'log_wandb').init(
                project=args.wandb_project,
                name=os.path.basename(folder),
                config=vars(args),
                tags=args.wandb_tags,
                dir=folder,
                id=args.wandb_resume_id or None,
                resume='must' if args.wandb_resume_id else None,
            )
        if args.log_tensorboard:
            tensorboard = _import('torch.utils.tensorboard', 'log_tensorboard')
            self.tensorboard = tensorboard.SummaryWriter(folder, purge_step=len(rows))

    def add(self, row: dict[str, Any]) -> None:
        """Add the row of an epoch."""
        self.rows.append(row)
        write_summary(self.rows, self.folder)
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
