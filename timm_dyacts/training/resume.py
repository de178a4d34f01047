"""Which run to resume, and whether it is the same."""
import logging
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.scheduler import PlateauLRScheduler

from ..options import declarations, plain, to_dict
from ..run_folder import OPTIONS, RunFolder
from .config import TrainConfig
from .setup import Setup
from .state import Progress, load_state

__all__ = ['FREE_OPTIONS', 'check_resumable', 'differing_options', 'extend', 'find_state', 'load_newest']

_logger = logging.getLogger(__name__)

# Options that change where a run is, how it is watched or how fast it is, and not what it computes.
FREE_OPTIONS = frozenset({
    'checkpoint_hist', 'checkpoint_interval', 'data_dir', 'dataset_download', 'device', 'dist_strategy', 'experiment',
    'labels', 'log_interval', 'log_mlflow', 'log_tensorboard', 'log_wandb', 'on_bad_image', 'output', 'profile',
    'resume', 'validation_batch_size', 'wandb_project', 'wandb_resume_id', 'wandb_tags', 'workers',
})
# Options that say when a run ends. A resumed run may have others.
_END = frozenset({'early_stopping', 'epochs'})
# Their product with the number of processes counts.
_BATCH = ('batch_size', 'grad_accum_steps')
# Options that a run fills in from its data and its number of processes.
_FILLED_IN = ('in_chans', 'lr', 'num_classes')


def find_state(config: TrainConfig) -> tuple[RunFolder | None, Path | None]:
    """Find the run folder and the state file that ``--resume`` means; ``None`` where there is none.

    ``'auto'`` means the run of the same ``--output`` and ``--experiment``. Without ``--experiment`` it means the newest
    run in ``--output`` with the same options. If there is none, a new run begins, so that one command both starts a
    run and resumes it.

    Raises:
        FileNotFoundError: ``--resume`` names something without a state.
        ValueError: The folder of the run holds another one.
    """
    if config.resume is None:
        return None, None
    if config.resume == 'auto':
        run = RunFolder(Path(config.output, config.experiment)) if config.experiment else _newest_like(config)
        if run is None or not run.path.is_dir():
            return None, None
        state = run.find_state()
        if state is None:
            _check_own(run, config)
        return run, state
    if os.path.isfile(config.resume):
        return RunFolder.of_state(config.resume), Path(config.resume)
    run = RunFolder(config.resume)
    state = run.find_state()
    if state is None:
        raise FileNotFoundError(
            f"--resume must be 'auto', the folder of a run or a state file in it, got {config.resume!r}, which has no "
            f'{run.state.relative_to(run.path)}.')
    return run, state


def load_newest(config: TrainConfig, path: Path) -> tuple[Path, dict[str, Any]]:
    """Load a state that ``find_state`` found, or the one before it where the newest is broken.

    A state that ``--resume`` names itself is loaded or refused.

    Returns:
        The file that was loaded, and what it holds.

    Raises:
        ValueError: The file is not a whole state, and there is no other.
    """
    previous = RunFolder.of_state(path).previous_state
    try:
        return path, load_state(path)
    except ValueError as e:
        if os.path.isfile(config.resume) or path == previous or not previous.is_file():
            raise
        state = load_state(previous)
        _logger.warning('%s Going on from the state before it, %s.', str(e).partition(' The state beside')[0], previous)
        return previous, state


def _check_own(run: RunFolder, config: TrainConfig) -> None:
    """Raise ``ValueError`` if a folder without a state, about to be used again, holds a run with other options."""
    options = run.read_options()
    different = differing_options(config, options) if options is not None else []
    if different:
        raise ValueError(
            f'--resume auto: {run} has no state, and holds a run with other options: {", ".join(different)}. '
            f'Choose another --experiment.')


def _newest_like(config: TrainConfig) -> RunFolder | None:
    """Find the newest run with the same options. If there is none, say so of one that differs in its end alone."""
    paths = Path(config.output).glob(f'*/{OPTIONS}')
    free = FREE_OPTIONS - {'data_dir', 'labels'}
    hint = None
    for path in sorted(paths, key=os.path.getmtime, reverse=True):
        run = RunFolder(path.parent)
        options = run.read_options()
        different = differing_options(config, options, free)
        if not different:
            return run
        if hint is None and not differing_options(config, options, free | _END):
            hint = run, ', '.join(different)
    if hint is not None:
        _logger.warning(
            '--resume auto starts a new run: %s has other options, %s. To go on with that one, name it: --resume %s',
            hint[0], hint[1], hint[0])
    return None


def differing_options(
        config: TrainConfig,
        saved: Mapping[str, Any],
        free: frozenset[str] = FREE_OPTIONS,
) -> list[str]:
    """Describe the options that a run was started with otherwise, e.g. ``'--lr 0.1 (now 0.2)'``."""
    declared = declarations(TrainConfig)
    different = []
    for name, value in to_dict(config).items():
        before = plain(saved.get(name, declared[name].default))
        if name not in free and before != value and not (name in _FILLED_IN and value is None):
            different.append(f'{declared[name].flag} {before} (now {value})')
    return different


def check_resumable(state: Mapping[str, Any], config: TrainConfig, data: Mapping[str, Any], world_size: int) -> None:
    """Raise ``ValueError`` if a state is of a run with other options or other data.

    Args:
        state: As ``state.load_state`` gives it.
        config: The options of this run, filled in.
        data: Number of images and names of the classes of this run.
        world_size: Number of processes of this run.
    """
    before = state['data']
    if before is not None and 'files' not in before:  # of an earlier version
        data = {name: value for name, value in data.items() if name != 'files'}
    if before != data:
        was, now = _describe(before), _describe(data)
        difference = 'as many, but other files, or other labels' if was == now else now
        raise ValueError(
            f'--resume: the data set is another one. The run was started on {was}, and there are {difference}.')
    saved = state['args']
    before = saved['batch_size'] * saved['grad_accum_steps'] * state['world_size']
    now = config.batch_size * config.grad_accum_steps * world_size
    free = FREE_OPTIONS | (_END if config.epochs >= saved['epochs'] else _END - {'epochs'})
    different = differing_options(config, saved, free.union(_BATCH) if before == now else free)
    if different:
        raise ValueError(
            f'--resume: the run was started with other options: {", ".join(different)}. Repeat them, or start a new '
            f'run from its weights with --initial-checkpoint.')
    if before != now:
        _logger.warning(
            'Resuming on %d processes instead of %d: an update now takes %d images instead of %d. Set --batch-size to '
            'keep their number.', world_size, state['world_size'], now, before)


def extend(setup: Setup, progress: Progress, epochs: int) -> None:
    """Let a resumed run go on for more epochs, with the learning rate of a run that was started with their number.

    Only the rates before the extension are those of the shorter schedule. One that follows the metric goes on as it is.

    Args:
        setup: The objects of the run, set to its state.
        progress: How far it is. Gets a note of the extension.
        epochs: The number of epochs before.
    """
    progress.extensions.append(dict(epochs=epochs, epoch=progress.epoch, images=progress.samples))
    if isinstance(setup.scheduler, PlateauLRScheduler):
        return
    updates = setup.count_updates(progress.epoch, progress.samples // setup.loader.samples_per_step)
    setup.scheduler.step(progress.epoch)
    if updates:
        setup.scheduler.step_update(updates)


def _describe(data: Mapping[str, Any]) -> str:
    classes = data['classes']
    weights = data.get('class_weights')
    return (
        f'{data["num_images"]} training images' + (f' of {len(classes)} classes' if classes else '')
        + (f' with weights {reprlib.repr(weights)}' if weights else ''))
