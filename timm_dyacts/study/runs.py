"""The runs of a comparison: trained in processes of their own, each resumable, some at the same time."""
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from ..files import replace_text
from ..options import plain
from ..run_folder import RunFolder
from ..training import TrainConfig
from ..training.resume import FREE_OPTIONS, differing_options
from .plan import Run
from .records import Outcome, Record, recipe_of

__all__ = ['RunError', 'config_of', 'execute']

_POLL_SECONDS = 0.2


class RunError(RuntimeError):
    """A run failed. The message says which and why; those that are finished are kept."""


def config_of(run: Run, options: Mapping[str, Any]) -> TrainConfig:
    """Give the options of a run.

    Args:
        run: The run.
        options: The options of ``train`` that all runs share; those of its contender win.

    Raises:
        ValueError: An option is out of range.
    """
    shared = {**options, **run.contender.options}
    model_kwargs = {**shared.pop('model_kwargs', {}), **run.contender.model_kwargs}
    return TrainConfig(**shared | dict(
        model=run.contender.model,
        model_kwargs=model_kwargs,
        seed=run.seed,
        output=str(run.folder.parent),
        experiment=run.folder.name,
        resume='auto',
    ))


def execute(
        runs: Sequence[Run],
        options: Mapping[str, Any],
        kept: Mapping[tuple[str, int], Record],
        jobs: int = 1,
) -> Iterator[Outcome | int]:
    """Train what is not finished yet, ``jobs`` runs at a time.

    The state from which a finished run could be resumed, which takes most of the space, is removed.

    Args:
        runs: In the order in which they are started.
        options: The options of ``train`` that all share.
        kept: Runs that are known to be finished, by label and seed.
        jobs: Most processes at a time. With several GPUs they take turns on them; on CPUs they share the cores.

    Yields:
        An outcome for each run that is finished, those of before at once; between them, several times a second, the
        number of epochs that the runs in progress have done.

    Raises:
        RunError: A run failed. The others that are running are asked to save their state and stop.
    """
    waiting = []
    for run in runs:
        record = _finished(run, options, kept.get((run.contender.label, run.seed)))
        if record is None:
            waiting.append(run)
        else:
            yield Outcome(run, record)
    active: list[_Process] = []
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                slot = min(set(range(jobs)) - {process.slot for process in active})
                active.append(_Process(waiting.pop(0), options, slot, jobs))
            time.sleep(_POLL_SECONDS)
            for process in list(active):
                if process.has_ended():
                    active.remove(process)
                    yield process.outcome()
            yield sum(len(RunFolder(process.run.folder).read_summary()) for process in active)
    finally:
        for process in active:
            process.stop()


def _finished(run: Run, options: Mapping[str, Any], kept: Record | None) -> Record | None:
    """The record of a run that is done, None for one that is not.

    Raises:
        RunError: It was done, or begun, with other options.
    """
    record = Record.read(run)
    if record is None or not record.finished:
        record = kept
    config = config_of(run, options)
    if record is not None and record.recipe == recipe_of(config):
        return record
    saved = RunFolder(run.folder).read_options()
    different = differing_options(config, saved, FREE_OPTIONS - {'on_bad_image'}) if saved is not None else []
    if record is None and not different:
        return None
    raise RunError(
        f'{run.folder} is a{"" if record is None else " finished"} run with other options'
        f'{": " if different else ""}{", ".join(different)}. Choose another --experiment for another comparison.')


class _Process:
    """The training of a run in a process of its own.

    Args:
        run: The run.
        options: The options that all runs share.
        slot: Its number among those that run at the same time.
        jobs: How many these are.
    """

    def __init__(self, run: Run, options: Mapping[str, Any], slot: int, jobs: int) -> None:
        self.run = run
        self.slot = slot
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        config = config_of(run, options)
        self.recipe = recipe_of(config)
        given = {name: plain(getattr(config, name)) for name in (*options, *run.contender.options, 'model_kwargs')}
        path = run.folder.with_name(f'{run.folder.name}.yaml')
        replace_text(path, yaml.safe_dump(given | dict(model=config.model, seed=config.seed)))
        self.log: IO[bytes] = open(run.folder.with_name(f'{run.folder.name}.log'), 'ab')
        self.began = time.monotonic()
        self.peak_mib: float | None = None
        self.process = subprocess.Popen(
            [sys.executable, '-m', 'timm_dyacts', 'train', '--config', str(path), '--output', str(run.folder.parent),
             '--experiment', run.folder.name, '--resume', 'auto'],
            stdout=self.log,
            stderr=self.log,
            env=_environment(slot, jobs),
        )

    def has_ended(self) -> bool:
        """Whether the process is over. Its peak memory is known then."""
        if self.process.returncode is not None:
            return True
        if not hasattr(os, 'wait4'):
            return self.process.poll() is not None
        pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if pid == 0:
            return False
        self.process.returncode = os.waitstatus_to_exitcode(status)
        self.peak_mib = usage.ru_maxrss / (2 ** 20 if sys.platform == 'darwin' else 2 ** 10)
        return True

    def outcome(self) -> Outcome:
        """Give the outcome, and keep on record that the run is finished.

        Raises:
            RunError: It failed.
        """
        self.log.close()
        record = self._write_record(finished=self.process.returncode == 0)
        if self.process.returncode:
            lines = Path(self.log.name).read_text(encoding='utf-8', errors='replace').strip().splitlines()
            raise RunError(
                f'{self.run.contender.label} with seed {self.run.seed} ended with exit status '
                f'{self.process.returncode}: {lines[-1] if lines else "no message"} ({self.log.name})')
        folder = RunFolder(self.run.folder)
        for state in (folder.state, folder.previous_state):
            state.unlink(missing_ok=True)
        return Outcome(self.run, record)

    def stop(self) -> None:
        """Ask the process to save its state, and wait until it has."""
        if self.process.returncode is None:
            with_signal = signal.SIGTERM if sys.platform != 'win32' else signal.CTRL_BREAK_EVENT
            self.process.send_signal(with_signal)
            while not self.has_ended():
                time.sleep(_POLL_SECONDS)
        self.log.close()
        self._write_record(finished=False)

    def _write_record(self, finished: bool) -> Record:
        before = Record.read(self.run)
        seconds = time.monotonic() - self.began + (before.seconds if before is not None else 0.0)
        rows = RunFolder(self.run.folder).read_summary() if finished else []
        record = Record(finished, seconds, self.peak_mib, self.recipe, rows)
        record.write(self.run)
        return record


def _environment(slot: int, jobs: int) -> dict[str, str]:
    """A GPU for each job as long as there are some, and a share of the cores."""
    environment = dict(os.environ)
    gpus = torch.cuda.device_count()
    if jobs > 1 and gpus > 1 and 'CUDA_VISIBLE_DEVICES' not in environment:
        environment['CUDA_VISIBLE_DEVICES'] = str(slot % gpus)
    if jobs > 1 and gpus == 0:
        environment.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1) // jobs)))
    return environment
