"""What a run leaves: its folder with checkpoints, results, log, pictures and state, and its messages."""
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from safetensors.torch import load_file
from timm.utils import get_outdir
from torch import Tensor, nn
from tqdm import tqdm

from ..convert import finish_transition
from ..evaluation.curves import plot_curves
from ..evaluation.report import write_report
from ..loading import count_parameters
from ..options import to_dict
from ..run_folder import Results, RunFolder
from ..world import World
from .checkpoint import dataset_title, describe_results, save_checkpoint
from .log import RunLog, best_row
from .setup import Setup, build_validation_loader
from .split_bn import drop_split_bn
from .state import Progress, StateFile
from .transition import to_save

__all__ = ['Recorder', 'open_folder']


def open_folder(setup: Setup, run: RunFolder | None) -> RunFolder:
    """Open the folder of a resumed run, or of a new one for ``None``, and write the options to it."""
    config = setup.config
    if run is None:
        size = setup.data_config['input_size'][-1]
        experiment = config.experiment or f'{datetime.now():%Y%m%d-%H%M%S}-{setup.architecture}-{size}'
        run = RunFolder(get_outdir(config.output, experiment, inc=True))
    run.write_options({name: value for name, value in to_dict(config).items() if name != 'resume'})
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
        self.log: RunLog = RunLog(setup.config, run, progress.rows)

    def print_start(self, progress: Progress, resumed: bool) -> None:
        """Say what is trained on what."""
        setup = self.setup
        processes = f' in {setup.world.size} processes' if setup.world.size > 1 else ''
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

    def write_state(self, state: Mapping[str, Any]) -> None:
        """Write what ``capture_state`` gave, and what it is checked against when the run is resumed."""
        setup = self.setup
        self.state_file.write(dict(
            state, args=to_dict(setup.config), data=setup.datasets.identity, world_size=setup.world.size))

    def write_epoch(self, rows: list[dict[str, float]], unreadable: Mapping[str, Tensor]) -> None:
        """Write the checkpoints of an epoch, and its row.

        Args:
            rows: The rows of all epochs, the new one last.
            unreadable: For each kind of images, a mask of those that could not be read so far.
        """
        config, row = self.setup.config, rows[-1]
        num_images = len(self.setup.datasets.validation)
        if 'validation' in unreadable:
            num_images -= int(unreadable['validation'].sum())
        self.log.write(rows)
        self._save(self.setup.model, 'last')
        if best_row(rows, config.best_column()) is row:
            self._save(self.setup.model, 'best', self._results(row, 'eval', num_images))
        if config.model_ema and best_row(rows, config.best_column('ema')) is row:
            self._save(self.setup.ema_model, 'ema', self._results(row, 'ema', num_images))
        holdout = f'  held out {row["eval_holdout_top1"]:6.2f}' if config.val_fraction else ''
        ema = f'  ema top1 {row["ema_top1"]:6.2f}' if config.model_ema else ''
        t = f'  t {row["t"]:.3f}' if 't' in row else ''
        tqdm.write(
            f'epoch {row["epoch"]:>3}  train loss {row["train_loss"]:.4f}  eval loss {row["eval_loss"]:.4f}  '
            f'top1 {row["eval_top1"]:6.2f}  top5 {row["eval_top5"]:6.2f}{holdout}{ema}  lr {row["lr"]:.2e}{t}')
        sys.stdout.flush()  # whoever pipes the output wants to see an epoch when it is done
        if row['epoch'] == 0:
            self._print_unreadable(unreadable)

    def _save(self, model: nn.Module, which: str, results: Results | None = None) -> None:
        config = self.setup.config
        save_checkpoint(
            to_save(model),
            self.run.checkpoint(which).path,
            label_names=self.setup.label_names,
            model_args=dict(config.architecture_kwargs, in_chans=config.in_chans),
            results=results,
        )

    def _results(self, row: Mapping[str, float], kind: str, num_images: int) -> Results:
        """Give the results of the weights of an epoch; ``kind`` is ``'eval'`` or ``'ema'``."""
        metrics = {name: row[f'{kind}_{name}'] for name in ('top1', 'top5', 'loss')}
        setup = self.setup
        return describe_results(metrics, int(row['epoch']), setup.config, setup.data_config, num_images, setup.start)

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

    def write_report(self) -> None:
        """Draw what the best checkpoint does on the validation set."""
        setup = self.setup
        if setup.config.transition_epochs:
            finish_transition(setup.model)
        drop_split_bn(setup.model)
        setup.model.load_state_dict(load_file(self.run.checkpoint('best').weights))
        loader = build_validation_loader(  # of all images, in this process
            setup.config, setup.datasets.validation, setup.data_config, World(setup.world.device))
        write_report(setup.model, loader, self.run, setup.data_config, setup.label_names, setup.autocast)
