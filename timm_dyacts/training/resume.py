"""Which run to resume, and whether it is the same."""
import logging
import os
from argparse import Namespace
from typing import Any

import yaml

from .state import state_paths

__all__ = ['check_resumable', 'differing_options', 'find_state']

_logger = logging.getLogger(__name__)

# Options that change where a run is, how it is watched or how fast it is, and not what it computes.
_FREE = frozenset({
    'checkpoint_interval', 'data_dir', 'dataset_download', 'device', 'experiment', 'log_interval', 'log_tensorboard',
    'log_wandb', 'on_bad_image', 'output', 'resume', 'validation_batch_size', 'wandb_project', 'wandb_resume_id',
    'wandb_tags', 'workers',
})
# Their product with the number of processes counts.
_BATCH = ('batch_size', 'grad_accum_steps')
# Options that a run fills in from its data.
_FILLED_IN = ('in_chans', 'num_classes')


def find_state(args: Namespace) -> tuple[str | None, str | None]:
    """The run folder and the state file that ``--resume`` means; None where there is none.

    'auto' means the run of the same ``--output`` and ``--experiment``. Without ``--experiment`` it means the newest
    run in ``--output`` with the same options. If there is none, a new run begins, so that one command both starts a
    run and resumes it.

    Raises:
        FileNotFoundError: ``--resume`` names something without a state.
        ValueError: The folder of the run holds another one.
    """
    if args.resume is None:
        return None, None
    if args.resume == 'auto':
        folder = os.path.join(args.output, args.experiment) if args.experiment else _newest_like(args)
        if folder is None or not os.path.isdir(folder):
            return None, None
        path = _state_in(folder)
        if path is None:
            _check_own(folder, args)
        return folder, path
    if os.path.isfile(args.resume):
        return os.path.dirname(os.path.dirname(os.path.abspath(args.resume))), args.resume
    path = _state_in(args.resume)
    if path is None:
        raise FileNotFoundError(
            f"--resume must be 'auto', the folder of a run or a state file in it, got {args.resume!r}, which has no "
            f'{os.path.relpath(state_paths("")[0])}.')
    return args.resume, path


def _state_in(folder: str) -> str | None:
    return next((path for path in state_paths(folder) if os.path.isfile(path)), None)


def _check_own(folder: str, args: Namespace) -> None:
    """Raise ValueError if a folder without a state, about to be used again, holds a run with other options."""
    path = os.path.join(folder, 'args.yaml')
    if not os.path.isfile(path):
        return
    with open(path) as f:
        different = differing_options(args, yaml.safe_load(f))
    if different:
        raise ValueError(
            f'--resume auto: {folder} has no state, and holds a run with other options: {", ".join(different)}. '
            f'Choose another --experiment.')


def _newest_like(args: Namespace) -> str | None:
    if not os.path.isdir(args.output):
        return None
    paths = [os.path.join(args.output, name, 'args.yaml') for name in os.listdir(args.output)]
    for path in sorted(filter(os.path.isfile, paths), key=os.path.getmtime, reverse=True):
        with open(path) as f:
            if not differing_options(args, yaml.safe_load(f), free=_FREE - {'data_dir'}):
                return os.path.dirname(path)
    return None


def differing_options(args: Namespace, saved: dict[str, Any], free: frozenset[str] = _FREE) -> list[str]:
    """Describe the options that a run was started with otherwise, e.g. ``'--lr 0.1 (now 0.2)'``."""
    return [
        f'--{option.replace("_", "-")} {saved.get(option)} (now {value})'
        for option, value in vars(args).items()
        if option not in free and saved.get(option) != value and not (option in _FILLED_IN and value is None)
    ]


def check_resumable(state: dict[str, Any], args: Namespace, data: dict[str, Any], world_size: int) -> None:
    """Raise ValueError if a state is of a run with other options or other data. Call it when ``args`` is filled in."""
    if state['data'] != data:
        raise ValueError(
            f'--resume: the data set is another one. The run was started on {_describe(state["data"])}, and there are '
            f'{_describe(data)}.')
    saved = state['args']
    before = saved['batch_size'] * saved['grad_accum_steps'] * state['world_size']
    now = args.batch_size * args.grad_accum_steps * world_size
    free = _FREE | set(_BATCH) if before == now else _FREE
    different = differing_options(args, saved, free)
    if different:
        raise ValueError(
            f'--resume: the run was started with other options: {", ".join(different)}. Repeat them, or start a new '
            f'run from its weights with --initial-checkpoint.')
    if before != now:
        _logger.warning(
            'Resuming on %d processes instead of %d: an update now takes %d images instead of %d. Set --batch-size to '
            'keep their number.', world_size, state['world_size'], now, before)


def _describe(data: dict[str, Any]) -> str:
    classes = data['classes']
    return f'{data["num_images"]} training images' + (f' of {len(classes)} classes' if classes else '')
