"""What a run leaves: its folder with checkpoints, results, log, pictures and state, and its messages."""
import sys
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.utils import get_outdir
from torch import Tensor, nn
from tqdm import tqdm

from ..convert import finish_transition
from ..evaluation.curves import plot_curves
from ..evaluation.report import write_report
from ..loading import count_parameters
from ..messages import one_line
from ..options import to_dict
from ..run_folder import CheckpointFolder, Results, RunFolder
from ..world import World
from .checkpoint import dataset_title, describe_results, save_checkpoint
from .log import RunLog, best_rows
from .pace import Reading
from .setup import Setup, build_validation_loader
from .split_bn import drop_split_bn
from .state import Progress, StateFile
from .transition import to_save

__all__ = ['Recorder', 'open_folder']


def open_folder(setup: Setup, run: RunFolder | None, progress: Progress) -> RunFolder:
    """Open the folder of a resumed run, or of a new one for ``None``, and write the options to it."""
    config = setup.config
    if run is None:
        run = RunFolder(get_outdir(config.output, setup.new_name(), inc=True))
    notes = [
        f'Up to {extension["images"]} images of epoch {extension["epoch"]} the learning rate is that of '
        f'--epochs {extension["epochs"]}.' for extension in progress.extensions]
    run.write_options({name: value for name, value in to_dict(config).items() if name != 'resume'}, notes)
    return run


class Recorder:
    """Writes and prints what a run leaves. Only the primary process has one.

    Args:
        setup: The objects of the run.
        run: Its folder.
        progress: How far it is.
        state_is_good: See ``StateFile``.
    """

    def __init__(self, setup: Setup, run: RunFolder, progress: Progress, state_is_good: bool) -> None:
        self.setup = setup
        self.run = run
        self.state_file: StateFile = StateFile(run, state_is_good)
        batches = progress.samples // setup.loader.samples_per_step
        self.log: RunLog = RunLog(setup.config, run, progress.rows, len(setup.loader), batches)

    def print_start(self, progress: Progress, resumed: bool) -> None:
        """Say what is trained on what."""
        setup = self.setup
        processes = f' in {setup.world.size} processes' if setup.world.size > 1 else ''
        if setup.sharding is not None:
            processes += ' that share the model'
        held_out = '' if setup.datasets.held_out is None else f', {len(setup.datasets.held_out)} held-out'
        print(
            f'{setup.architecture} ({count_parameters(setup.model):.2f} M parameters) on '
            f'{dataset_title(setup.config)}: {len(setup.datasets.train)} training{held_out} and '
            f'{len(setup.datasets.validation)} validation images of {setup.config.num_classes} classes at '
            f'{setup.data_config["input_size"][-1]} pixels, on {setup.world.device.type}{processes}')
        if setup.config.lr_base is not None:
            images = setup.config.images_per_update * setup.world.size
            print(f'Learning rate {setup.config.lr:.4g}, for {images} images an update.')
        if resumed:
            print(f'Resumed {self.run} at epoch {progress.epoch} after {progress.samples} images.')
        if progress.extensions:
            before = progress.extensions[-1]['epochs']
            print(
                f'Extended from {before} to {setup.config.epochs} epochs: from there on the learning rate is that of '
                f'--epochs {setup.config.epochs}.')

    def write_state(self, state: Mapping[str, Any]) -> None:
        """Write what ``capture_state`` gave, and what it is checked against when the run is resumed."""
        setup = self.setup
        self.state_file.write(dict(
            state, args=to_dict(setup.config), data=setup.datasets.identity, world_size=setup.world.size))

    def write_epoch(
            self,
            rows: list[dict[str, float]],
            unreadable: Mapping[str, Tensor],
            model: nn.Module,
            average: nn.Module | None,
    ) -> None:
        """Write the checkpoints of an epoch, and its row.

        Args:
            rows: The rows of all epochs, the new one last.
            unreadable: For each kind of images, a mask of those that could not be read so far.
            model: The model.
            average: Its moving average, if there is one.
        """
        num_images = len(self.setup.datasets.validation)
        if 'validation' in unreadable:
            num_images -= int(unreadable['validation'].sum())
        self.log.write(rows)
        self._save(model, self.run.checkpoint('last'))
        self._save_if_best(model, 'best', rows, num_images)
        if average is not None:
            self._save_if_best(average, 'ema', rows, num_images)
        _print_row(rows[-1])
        if 'eval_loss' in rows[-1] and not any('eval_loss' in earlier for earlier in rows[:-1]):
            self._print_unreadable(unreadable)

    def write_reading(self, epoch: int, batches: int, reading: Reading) -> None:
        """Report what was read within an epoch: to the trackers, and in a line where no terminal shows the bar.

        Args:
            epoch: The epoch.
            batches: Number of its batches that are done.
            reading: What was read.
        """
        lr, total = self.setup.mean_lr, self.log.batches_per_epoch
        values = dict(loss=reading.loss, lr=lr, images_per_second=reading.images_per_second)
        self.log.write_reading(values, epoch, batches)
        if not sys.stdout.isatty():
            left, left_in_epoch = map(tqdm.format_interval, (reading.seconds_left, reading.seconds_left_in_epoch))
            tqdm.write(
                f'train {epoch:>3}  batch {batches:>{len(str(total))}} of {total}  loss {reading.loss:.4f}  '
                f'lr {lr:.2e}  {reading.images_per_second:.4g} images/s  left {left_in_epoch} of the epoch, {left} of '
                f'the run')
            sys.stdout.flush()

    def _save_if_best(
            self, model: nn.Module, which: str, rows: list[dict[str, float]], num_images: int) -> None:
        """Keep the weights of the last row if it is the best one, or among those to keep.

        Args:
            model: The model, or its moving average.
            which: ``'best'`` or ``'ema'``.
            rows: The rows of all epochs, the new one last.
            num_images: Number of images that it was evaluated on.
        """
        config, row = self.setup.config, rows[-1]
        kind = 'eval' if which == 'best' else 'ema'
        best = best_rows(rows, config.best_column(kind), config.checkpoint_hist)
        if not any(kept is row for kept in best):
            return
        results = self._results(row, kind, num_images)
        if config.checkpoint_hist > 1:
            self._save(model, self.run.history(which, int(row['epoch'])), results)
            self.run.prune_history(which, [int(kept['epoch']) for kept in best])
        if best[0] is row:
            self._save(model, self.run.checkpoint(which), results)

    def _save(self, model: nn.Module, folder: CheckpointFolder, results: Results | None = None) -> None:
        config = self.setup.config
        save_checkpoint(
            to_save(model),
            folder.path,
            label_names=self.setup.label_names,
            model_args=dict(config.architecture_kwargs, in_chans=config.in_chans),
            results=results,
        )

    def _results(self, row: Mapping[str, float], kind: str, num_images: int) -> Results:
        """Give the results of the weights of an epoch; ``kind`` is ``'eval'`` or ``'ema'``."""
        metrics = {name: row[f'{kind}_{name}'] for name in ('top1', 'top5', 'loss')}
        setup = self.setup
        return describe_results(
            metrics, int(row['epoch']), setup.config, setup.data_config, num_images, setup.start, setup.world)

    def _print_unreadable(self, unreadable: Mapping[str, Tensor]) -> None:
        loaders = self.setup.loaders
        for kind, mask in unreadable.items():
            indices = mask.nonzero().flatten().tolist()
            if indices:
                names = ', '.join(loaders[kind].loader.dataset.name(index) for index in indices[:3])
                more = ', ...' if len(indices) > 3 else ''
                tqdm.write(f'{len(indices)} of {len(mask)} {kind} images cannot be read: {names}{more}')

    def close(self, progress: Progress) -> None:
        """Draw the curves of a run, and close its log, however it ended."""
        if progress.rows and self.run.summary.is_file():
            plot_curves(self.run.summary, self.run.curves, title=self.setup.title)
        self.log.close()

    def write_end(self, stopped_early: str | None) -> None:
        """Put on record how the run ended, and draw what the best checkpoint does on the validation set.

        Args:
            stopped_early: Why it ended before its last epoch, if it did.
        """
        setup = self.setup
        if stopped_early is not None:
            tqdm.write(f'Stopped early {stopped_early}.')
        for which in ('best', 'ema'):
            self.run.checkpoint(which).replace_results(stopped_early=stopped_early)
        # The others have left by now: a model that they share is built whole.
        model = setup.model if setup.sharding is None else setup.sharding.outline()
        if setup.config.transition_epochs:
            finish_transition(model)
        drop_split_bn(model)
        weights = self.run.checkpoint('best').weights
        try:
            model.load_state_dict(load_file(weights), assign=setup.sharding is not None)
        except (RuntimeError, SafetensorError) as e:
            raise OSError(
                f'{weights} has been damaged ({one_line(e)[:200]}), and the best epoch with it; the last one is in '
                f'{self.run.checkpoint("last")}.') from None
        model.to(setup.world.device)
        loader = build_validation_loader(  # of all images, in this process
            setup.config, setup.datasets.validation, setup.data_config, World(setup.world.device))
        write_report(model, loader, self.run, setup.data_config, setup.label_names, setup.autocast)


def _print_row(row: Mapping[str, float]) -> None:
    """Print the row of an epoch in one line."""
    names = dict(
        train_loss=('train loss', '.4f'), eval_loss=('eval loss', '.4f'), eval_top1=('top1', '6.2f'),
        eval_top5=('top5', '6.2f'), eval_holdout_top1=('held out', '6.2f'), ema_top1=('ema top1', '6.2f'),
        lr=('lr', '.2e'), t=('t', '.3f'))
    parts = [f'{words} {row[name]:{digits}}' for name, (words, digits) in names.items() if name in row]
    tqdm.write('  '.join([f'epoch {row["epoch"]:>3}', *parts]))
    sys.stdout.flush()  # whoever pipes the output wants to see an epoch when it is done
