"""A whole run: train a model and leave a folder that is a checkpoint, and that the run can be resumed from."""
import copy
import shlex
import signal
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.utils import distribute_bn
from torch import Tensor, nn
from tqdm import tqdm

from ..convert import get_transition
from ..convert.transition import idle_parameters
from ..data.errors import worker_errors
from ..data.resumable import BatchDataset
from ..device import resolve_device, set_numerics
from ..evaluation.loop import evaluate
from ..loading import resolve_model_name
from ..plotting import require_matplotlib
from ..run_folder import RunFolder
from ..world import StopSignal, TrainingInterrupted, World
from .config import TrainConfig
from .finetune import freeze, unfreeze
from .log import best_row, early_stop
from .loop import train_one_epoch
from .nonfinite import NonFiniteLossError, check_finite
from .pace import Pace
from .profiling import UpdateProfiler, check_profile
from .recorder import Recorder, open_folder
from .resume import check_resumable, extend, find_state, load_newest
from .setup import Setup, build_setup
from .state import Progress, broadcast_outline, capture_state, restore_state
from .trackers import check_trackers
from .transition import move_transition, t_of_update

__all__ = ['RunResult', 'Trainer', 'make_ready', 'train']


@dataclass(frozen=True)
class RunResult:
    """What a training run came to.

    Attributes:
        folder: The run folder. It is itself the best checkpoint.
        best_epoch: Epoch of the best checkpoint, counted from 0.
        best: Its evaluation: ``'loss'``, and ``'top1'`` and ``'top5'`` in percent.
        is_primary: Whether this process is the one that writes and prints.
        stopped_early: Why the run ended before its last epoch, ``None`` if it did not.
    """
    folder: str
    best_epoch: int
    best: OrderedDict[str, Any]
    is_primary: bool = True
    stopped_early: str | None = None


@worker_errors
def train(config: TrainConfig) -> RunResult:
    """Train, in as many processes as torchrun or Slurm started.

    The run folder holds the best checkpoint, that of the last epoch, that of the moving average, the options, the log,
    pictures, and what resuming needs (see ``run_folder``).

    Args:
        config: The options.

    Returns:
        Where the run is and how good it became.

    Raises:
        NonFiniteLossError: The loss became NaN or infinite. The folder keeps the epochs before.
        TrainingInterrupted: A signal asked to stop. The message says what has been saved.
        OSError: Something could not be read or written. What was written before is kept.
        ValueError: Options that do not fit each other, the model, the data, or the run to be resumed.
    """
    require_matplotlib()
    check_trackers(config)
    resolve_model_name(config.model)  # a misspelt name is better found before the data are read
    world = World.join(resolve_device(config.device))
    set_numerics(world.device, config.deterministic)
    with StopSignal(world) as stop, ExitStack() as held:
        try:
            result = _prepare(config, world, stop, held).train()
        except TrainingInterrupted:
            world.leave()  # all processes are here
            raise
    world.leave()
    return result


def _prepare(config: TrainConfig, world: World, stop: StopSignal, held: ExitStack) -> 'Trainer':
    """Build a run, and set it to the state that it is resumed from, if any; hold its folder until the run is over."""
    run, state_path, state = None, None, None
    if world.is_primary:
        run, state_path = find_state(config)
        if run is not None:
            held.enter_context(run.lock())
        if state_path is not None:
            state_path, state = load_newest(config, state_path)
    # Each process does not read the file for itself: the machines need not share a file system.
    broadcast = world.broadcast if config.dist_strategy == 'ddp' else partial(broadcast_outline, world=world)
    state = broadcast(state)
    setup = build_setup(config, world, initialize=state is None)
    progress = Progress()
    if state is not None:
        check_resumable(state, setup.config, setup.datasets.identity, world.size)
        progress = restore_state(state, setup.resumable, world)
        if setup.config.epochs != state['args']['epochs']:
            extend(setup, progress, state['args']['epochs'])
    check_profile(setup.config.profile, setup.updates_per_epoch)
    frozen = make_ready(setup, progress)
    if world.is_primary:
        is_new = run is None
        run = open_folder(setup, run, progress)
        if is_new:
            held.enter_context(run.lock())
    run = RunFolder(world.broadcast(str(run) if world.is_primary else None))
    recorder = None
    if world.is_primary:
        state_is_good = state_path is None or state_path.name == run.state.name
        recorder = Recorder(setup, run, progress, state_is_good)
        recorder.print_start(progress, resumed=state is not None)
    return Trainer(setup, run, progress, recorder, stop, frozen)


def make_ready(setup: Setup, progress: Progress) -> list[nn.Module] | None:
    """Freeze, compile and distribute a model as its options ask for.

    Args:
        setup: The objects of the run, set to its state.
        progress: How far it is.

    Returns:
        If a part is frozen, the modules that stay in eval mode.
    """
    frozen = None if _is_unfrozen(setup.config, progress) else freeze(setup.model, setup.config.freeze)
    if setup.config.torchcompile:
        setup.task.compile(backend=setup.config.torchcompile, mode=setup.config.torchcompile_mode)
    _distribute(setup)
    return frozen


def _is_unfrozen(config: TrainConfig, progress: Progress) -> bool:
    return config.freeze == 'none' or (config.unfreeze_epoch is not None and progress.epoch >= config.unfreeze_epoch)


def _distribute(setup: Setup) -> None:
    """Wrap the model for more than one process, each of which has the whole of it."""
    if setup.world.size > 1 and setup.sharding is None:
        device_ids = [setup.world.device] if setup.world.device.type == 'cuda' else None
        # DDP waits for the gradients of all parameters, unless it is told that some may have none.
        unused = dict(find_unused_parameters=True) if idle_parameters(setup.model) else {}
        setup.task.prepare_distributed(device_ids=device_ids, **unused)


def _redistribute(setup: Setup) -> None:
    """Wrap the model again: DDP looks at what is to be trained when it is made."""
    if setup.world.size > 1 and setup.sharding is None:
        setup.task.trainable_module = setup.task.get_trainable_module().module
        _distribute(setup)


class Trainer:
    """The epochs of a run.

    Args:
        setup: Its objects.
        run: Its folder.
        progress: How far it is.
        recorder: What writes and prints, for the primary process.
        stop: Says whether a signal asks to stop.
        frozen: If a part of the model is frozen, the modules that stay in eval mode until it is trained again.
    """

    def __init__(
            self,
            setup: Setup,
            run: RunFolder,
            progress: Progress,
            recorder: Recorder | None,
            stop: StopSignal,
            frozen: list[nn.Module] | None,
    ) -> None:
        self.setup = setup
        self.run = run
        self.progress = progress
        self.recorder = recorder
        self.stop = stop
        self.frozen = frozen
        self.t: float | None = None  # of the last update, once there was one
        self.images_per_epoch = (
            len(setup.loader) * setup.loader.samples_per_step * max(setup.config.aug_splits, 1))
        self.pace = Pace(self.images_per_epoch, setup.num_epochs)
        self.profiler: UpdateProfiler | None = None
        if setup.config.profile is not None and recorder is not None:
            self.profiler = UpdateProfiler(run.profile, setup.config.profile, setup.updates_per_epoch, setup.world)

    def train(self) -> RunResult:
        """Train to the end."""
        setup, progress = self.setup, self.progress
        self.bar = tqdm(
            total=setup.num_epochs * self.images_per_epoch,
            initial=progress.epoch * self.images_per_epoch + progress.samples * max(setup.config.aug_splits, 1),
            unit='img',
            unit_scale=True,
            leave=False,
            disable=None if setup.world.is_primary else True,
        )
        try:
            stopped_early = early_stop(progress.rows, setup.config, setup.num_epochs)
            while progress.epoch < setup.num_epochs and stopped_early is None:
                stopped_early = self._run_epoch()
        finally:
            self.bar.close()
            if self.profiler is not None:
                self.profiler.close()
            if self.recorder is not None:
                self.recorder.close(progress)
        best = best_row(progress.rows, setup.config.best_column())
        if best is None:
            raise NonFiniteLossError(
                f'No epoch has a finite evaluation: the model overflows on images of --val-split '
                f'{setup.config.val_split}. Train without --amp, or with --amp-dtype bfloat16. The last epoch is in '
                f'{self.run.checkpoint("last").path}.')
        if self.recorder is not None:
            self.recorder.write_end(stopped_early)
        metrics = OrderedDict((name, best[f'eval_{name}']) for name in ('loss', 'top1', 'top5'))
        return RunResult(str(self.run), int(best['epoch']), metrics, setup.world.is_primary, stopped_early)

    def _run_epoch(self) -> str | None:
        """Train an epoch and evaluate, and say why the run is to end here, if it is."""
        setup, progress = self.setup, self.progress
        if self.frozen is not None and _is_unfrozen(setup.config, progress):
            _unfreeze(setup)
            self.frozen = None
        self.pace.start_training(progress.meter)
        train_metrics = _train_epoch(
            setup, progress, self.bar, self.frozen or (), self._before_update, self._after_update,
            self._after_interval if self.recorder is not None else None)
        self.pace.finish_training(progress.meter)
        check_finite(setup.model, progress.epoch, progress.samples)
        row = dict(epoch=progress.epoch)
        is_evaluated = (
            (progress.epoch + 1) % setup.config.val_interval == 0 or progress.epoch + 1 == setup.num_epochs)
        evaluations = _evaluate(setup, self._stop_in_evaluation) if is_evaluated else {}
        for kind, metrics in dict(train=train_metrics, **evaluations).items():
            row.update({f'{kind}_{name}': value for name, value in metrics.items()})
        row['lr'] = setup.mean_lr
        if setup.config.transition_epochs:
            row['t'] = get_transition(setup.model)
        setup.scheduler.step(progress.epoch + 1, metric=row.get(setup.config.best_column()))
        stopped_early = self._finish_epoch(row)
        self.pace.finish_evaluation()
        return stopped_early

    def _finish_epoch(self, row: dict[str, float]) -> str | None:
        """Write the checkpoints of an epoch and its row, and then the state, which vouches for them."""
        setup, progress = self.setup, self.progress
        unreadable = _gather_unreadable(setup)
        progress.finish_epoch(row)
        model, average = setup.whole(setup.model), setup.whole(setup.ema_model)
        if self.recorder is not None:
            self.recorder.write_epoch(progress.rows, unreadable, model, average)
        # A stream can only be resumed between epochs, so the end of each counts.
        is_due = setup.config.interval.is_due_after_epoch(progress.epoch) or not setup.loader.resumes_within_epoch
        stopped_early = early_stop(progress.rows, setup.config, setup.num_epochs)
        if is_due or progress.epoch == setup.num_epochs or stopped_early is not None:
            self._save_state()
        return stopped_early

    def _before_update(self, update: int) -> None:
        """Move the transition, if there is one, do what DDP would, and begin to profile where that is asked for."""
        setup = self.setup
        if self.profiler is not None:
            self.profiler.before_update(update)
        if setup.sharding is not None:
            setup.sharding.share_statistics(setup.model)
        if setup.config.transition_epochs:
            t = t_of_update(setup.config, update, setup.updates_per_epoch)
            if t == self.t:  # at its end: nothing is to be done for the rest of the run
                return
            self.t = t
            if move_transition([setup.model, *filter(None, [setup.ema_model])], t):
                _redistribute(setup)

    def _after_update(self, steps: int, read_losses: Callable[[], None]) -> None:
        """Save the state where it is due or a signal asks for it."""
        setup, progress = self.setup, self.progress
        if self.profiler is not None and self.profiler.after_update():
            tqdm.write(f'Profiled {self.profiler.updates} updates: trace.json and operators.txt in {self.run.profile}')
        updates = setup.count_updates(progress.epoch, steps)
        signum = self.stop.agreed()
        samples = steps * setup.loader.samples_per_step
        is_resumable = setup.loader.resumes_within_epoch or steps == len(setup.loader)
        if is_resumable and (signum or setup.config.interval.is_due(updates)):
            read_losses()
            progress.samples = samples
            check_finite(setup.model, progress.epoch, samples)
            self._save_state()
        if signum:
            raise _interruption(self.setup, self.run, progress, signum, samples)

    def _after_interval(self, steps: int) -> None:
        """Report what was trained since the last reading."""
        progress = self.progress
        self.recorder.write_reading(progress.epoch, steps, self.pace.read(progress.epoch, progress.meter))

    def _stop_in_evaluation(self) -> None:
        """Save the state of the trained, not yet evaluated epoch where a signal asks for it."""
        signum = self.stop.agreed()
        if signum:
            self._save_state()
            raise _interruption(self.setup, self.run, self.progress, signum, self.progress.samples)

    def _save_state(self) -> None:
        state = capture_state(self.setup.resumable, self.progress, self.setup.world)
        if self.recorder is not None:
            self.recorder.write_state(state)


def _train_epoch(
        setup: Setup,
        progress: Progress,
        bar: tqdm,
        in_eval_mode: Iterable[nn.Module],
        before_update: Callable[[int], None],
        after_update: Callable[[int, Callable[[], None]], None],
        after_interval: Callable[[int], None] | None,
) -> OrderedDict[str, Any]:
    """Train what is left of an epoch, and give its metrics."""
    first_step = setup.loader.set_position(progress.epoch, progress.samples)
    metrics = train_one_epoch(
        setup.task,
        setup.loader,
        setup.optimizer,
        progress.epoch,
        scheduler=setup.scheduler,
        log_interval=setup.config.log_interval,
        progress=bar,
        meter=progress.meter,
        first_step=first_step,
        in_eval_mode=in_eval_mode,
        before_update=before_update,
        after_update=after_update,
        after_interval=after_interval,
        **setup.step_options,
    )
    progress.samples = len(setup.loader) * setup.loader.samples_per_step
    return metrics


def _interruption(
        setup: Setup,
        run: RunFolder,
        progress: Progress,
        signum: int,
        samples: int,
) -> TrainingInterrupted:
    """Give the error that ends a stopped run and says what is kept and, if there is a state, how to go on.

    Args:
        setup: The objects of the run.
        run: Its folder.
        progress: How far it is, as saved.
        signum: The signal that stopped it.
        samples: Number of images of the epoch that have been trained on. Those of a stream that are not saved are lost.
    """
    epoch, has_state = progress.epoch, True
    message = f'Stopped by {signal.Signals(signum).name} at epoch {epoch} after {samples} images.'
    if samples != progress.samples:
        has_state = epoch > 0
        kept = f'what was trained before epoch {epoch} is' if has_state else 'nothing is'
        message += f' A stream of data cannot be resumed within an epoch: {kept} kept.'
    if has_state:
        message += f' Go on with: timm-dyacts train --resume {shlex.quote(str(run))}'
    return TrainingInterrupted(message, signum, setup.world.is_primary)


def _unfreeze(setup: Setup) -> None:
    """Train all of the model from now on."""
    unfreeze(setup.model)
    _redistribute(setup)


def _evaluate(setup: Setup, after_batch: Callable[[], None]) -> dict[str, OrderedDict]:
    """Evaluate the model as ``'eval'``, and its moving average as ``'ema'`` if there is one.

    What they do on held-out training images, if there are any, is ``'eval_holdout'`` and ``'ema_holdout'``.

    Args:
        setup: The objects of the run.
        after_batch: Called after each batch if there is one process only; several may have different numbers of them.
    """
    config, world = setup.config, setup.world
    # Not the module that DDP wraps: its forward pass synchronises, once per batch.
    modules = dict(eval=getattr(setup.task, 'eval_model', setup.model))
    if config.model_ema:
        average = setup.ema_model
        modules['ema'] = copy.deepcopy(average).to(world.device) if config.model_ema_force_cpu else average
    metrics = {}
    for kind, module in modules.items():
        if world.size > 1 and config.dist_bn != 'none':
            distribute_bn(module, world.size, config.dist_bn == 'reduce')
        loaders = {kind: setup.validation_loader}
        if setup.held_out_loader is not None:
            loaders[f'{kind}_holdout'] = setup.held_out_loader
        for name, loader in loaders.items():
            if setup.sharding is not None:
                loader = setup.sharding.in_step(loader, setup.data_config['input_size'])
            metrics[name] = evaluate(
                module,
                loader,
                setup.autocast,
                channels_last=config.channels_last,
                world=world,
                after_batch=after_batch if world.size == 1 else None,
            )
    return metrics


def _gather_unreadable(setup: Setup) -> dict[str, Tensor]:
    """Give the primary process which images could not be read so far. Of data sets that are streams nothing is known.

    Returns:
        For ``'training'``, ``'held-out training'`` and ``'validation'``, a mask of the images.
    """
    masks = {}
    for kind, loader in setup.loaders.items():
        if isinstance(loader.loader.dataset, BatchDataset):
            gathered = setup.world.gather(loader.loader.dataset.unreadable)
            if gathered is not None:
                masks[kind] = torch.stack(gathered).any(0)
    return masks
