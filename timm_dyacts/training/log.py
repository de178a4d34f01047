"""The log of a run: summary.csv, what is read out of its rows, and the trackers where asked for."""
import math
import os
from collections.abc import Mapping, Sequence

from ..files import format_csv, replace_text
from ..run_folder import RunFolder
from .config import TrainConfig
from .trackers import open_trackers

__all__ = ['RunLog', 'best_row', 'best_rows', 'early_stop', 'write_summary']


def write_summary(rows: Sequence[dict[str, float]], path: str | os.PathLike[str]) -> None:
    """Write ``summary.csv`` as timm's ``update_summary`` would have, one row per epoch, in one piece.

    Where an epoch was not evaluated, its cells are empty.
    """
    replace_text(path, format_csv(rows, list(max(rows, key=len))))


def best_rows(rows: Sequence[dict[str, float]], metric: str, count: int) -> list[dict[str, float]]:
    """Give the rows with the best values in a column, the best first, the first of equals before the others.

    Losses are best when small. An epoch whose evaluation is not finite has no result, whatever its accuracy says. Of an
    epoch that ended within a transition the model is not yet the one that is trained for: it is passed over, as is one
    that was not evaluated.
    """
    sign = 1 if metric.endswith('loss') else -1
    loss = f'{metric.rpartition("_")[0]}_loss'
    candidates = [
        row for row in rows
        if row.get('t', 1) == 1 and metric in row and math.isfinite(row[metric]) and math.isfinite(row.get(loss, 0))]
    return sorted(candidates, key=lambda row: sign * row[metric])[:count]


def best_row(rows: Sequence[dict[str, float]], metric: str) -> dict[str, float] | None:
    """Give the first of ``best_rows``, ``None`` if there is none."""
    return next(iter(best_rows(rows, metric, 1)), None)


def early_stop(rows: Sequence[dict[str, float]], config: TrainConfig, num_epochs: int) -> str | None:
    """Say why a run ends before its last epoch, ``None`` if it goes on.

    Args:
        rows: The rows of the epochs so far.
        config: The options.
        num_epochs: Number of epochs that it was to have.
    """
    column, patience = config.best_column(), config.early_stopping
    evaluated = [row for row in rows if row.get('t', 1) == 1 and column in row]
    if patience is None or not evaluated or column not in rows[-1] or len(rows) == num_epochs:
        return None
    best, last = best_row(rows, column) or evaluated[0], int(rows[-1]['epoch'])
    waited = last - int(best['epoch'])
    if waited < patience:
        return None
    return (
        f'after epoch {last}, as {column} has not become better in the {waited} epochs since epoch '
        f'{int(best["epoch"])} (--early-stopping {patience})')


class RunLog:
    """Where the rows of a run go.

    Args:
        config: The options.
        run: The run folder.
        rows: Rows of the epochs before the run was resumed.
        batches_per_epoch: Number of batches of an epoch.
        batches: Number of batches that are done of the epoch in progress.
    """

    def __init__(
            self,
            config: TrainConfig,
            run: RunFolder,
            rows: Sequence[dict[str, float]],
            batches_per_epoch: int,
            batches: int = 0,
    ) -> None:
        self.run = run
        self.batches_per_epoch = batches_per_epoch
        if rows:
            write_summary(rows, run.summary)  # rows of epochs that will be done again are gone
        self.trackers = open_trackers(config, run, len(rows), len(rows) * batches_per_epoch + batches)

    def write(self, rows: Sequence[dict[str, float]]) -> None:
        """Write the rows of all epochs, of which the last one is new."""
        write_summary(rows, self.run.summary)
        for tracker in self.trackers:
            tracker.log_epoch(rows[-1], len(rows) * self.batches_per_epoch)

    def write_reading(self, values: Mapping[str, float], epoch: int, batches: int) -> None:
        """Hand on what was read after some batches of an epoch."""
        for tracker in self.trackers:
            tracker.log_reading(values, epoch * self.batches_per_epoch + batches)

    def close(self) -> None:
        """Finish what is still being written."""
        for tracker in self.trackers:
            tracker.close()
