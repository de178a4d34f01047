"""TensorBoard, Weights & Biases and MLflow: what a run reports to, where asked for.

The libraries are optional. Each tracker is told of epochs, and of readings within them under ``step/``. A run keeps the
names that it has there in its folder, so that it goes on under them when it is resumed, as often as that may be.
"""
import json
import os
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Protocol

from ..files import replace_text
from ..options import to_dict
from ..run_folder import RunFolder
from .config import TrainConfig

__all__ = ['Tracker', 'check_trackers', 'open_trackers']


class Tracker(Protocol):
    """What is told how a run goes. Steps are the batches of the run so far."""

    def log_epoch(self, row: Mapping[str, float], step: int) -> None:
        """Take the row of an epoch."""

    def log_reading(self, values: Mapping[str, float], step: int) -> None:
        """Take what was read within an epoch."""

    def close(self) -> None:
        """Finish what is still being written."""


def _import(module: str, option: str) -> Any:
    try:
        return import_module(module)
    except ImportError as e:
        package = module.split('.')[0]
        raise ImportError(f'{option} needs {package}: pip install {package} ({e}).') from None


class _Names:
    """The names of a run at the trackers that make them up, in a file of its folder."""

    def __init__(self, run: RunFolder) -> None:
        self.path = run.trackers
        self.names: dict[str, str] = json.loads(self.path.read_text('utf-8')) if self.path.is_file() else {}

    def get(self, tracker: str) -> str | None:
        return self.names.get(tracker)

    def keep(self, tracker: str, name: str) -> None:
        if self.names.get(tracker) != name:
            self.names[tracker] = name
            replace_text(self.path, json.dumps(self.names, indent=2) + '\n')


class _TensorBoard:
    def __init__(self, config: TrainConfig, run: RunFolder, epochs: int, step: int) -> None:
        writer = _import('torch.utils.tensorboard', '--log-tensorboard').SummaryWriter
        # What was written after the state that a run is resumed from is purged. The two scales need files of their own.
        self.epochs = writer(str(run), purge_step=epochs)
        self.readings = writer(os.path.join(run, 'step'), purge_step=step + 1)

    def log_epoch(self, row: Mapping[str, float], step: int) -> None:
        for name, value in row.items():
            if name != 'epoch':
                self.epochs.add_scalar(name.replace('_', '/', 1), value, row['epoch'])

    def log_reading(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.readings.add_scalar(f'step/{name}', value, step)

    def close(self) -> None:
        self.epochs.close()
        self.readings.close()


class _Wandb:
    def __init__(self, config: TrainConfig, run: RunFolder, epochs: int, step: int) -> None:
        wandb = _import('wandb', '--log-wandb')
        names = _Names(run)
        name = config.wandb_resume_id or names.get('wandb')
        try:
            self.run = wandb.init(
                project=config.wandb_project,
                name=run.path.name,
                config=to_dict(config),
                tags=list(config.wandb_tags),
                dir=str(run),
                id=name,
                resume='must' if config.wandb_resume_id else 'allow' if name else None,
                allow_val_change=True,  # such as a path, when the run is resumed elsewhere
            )
        except wandb.Error as e:
            raise OSError(f'--log-wandb: {e}') from e
        names.keep('wandb', self.run.id)
        self.run.define_metric('*', step_metric='epoch')
        self.run.define_metric('step/*', step_metric='step/batches')

    def log_epoch(self, row: Mapping[str, float], step: int) -> None:
        self.run.log(dict(row), step=step)

    def log_reading(self, values: Mapping[str, float], step: int) -> None:
        self.run.log({f'step/{name}': value for name, value in dict(values, batches=step).items()}, step=step)

    def close(self) -> None:
        self.run.finish()


class _MLflow:
    def __init__(self, config: TrainConfig, run: RunFolder, epochs: int, step: int) -> None:
        mlflow = _import('mlflow', '--log-mlflow')
        names = _Names(run)
        name = names.get('mlflow')
        try:
            # Not mlflow.start_run, after which a program could have no other run of its own.
            self.client = mlflow.MlflowClient()
            if name is None:
                experiment = os.environ.get('MLFLOW_EXPERIMENT_NAME', 'Default')
                found = self.client.get_experiment_by_name(experiment)
                experiment_id = found.experiment_id if found else self.client.create_experiment(experiment)
                name = self.client.create_run(experiment_id, run_name=run.path.name).info.run_id
                for option, value in to_dict(config).items():
                    self.client.log_param(name, option, value)
                names.keep('mlflow', name)
            else:
                self.client.update_run(name, status='RUNNING')
        except mlflow.MlflowException as e:
            raise OSError(f'--log-mlflow: {e}') from e
        self.name = name

    def log_epoch(self, row: Mapping[str, float], step: int) -> None:
        for metric, value in row.items():
            self.client.log_metric(self.name, metric, value, step=step)

    def log_reading(self, values: Mapping[str, float], step: int) -> None:
        for metric, value in values.items():
            self.client.log_metric(self.name, f'step/{metric}', value, step=step)

    def close(self) -> None:
        self.client.set_terminated(self.name)


# By the option that asks for it: the package, and what is made of it
_TRACKERS: dict[str, tuple[str, Callable[..., Tracker]]] = dict(
    log_tensorboard=('tensorboard', _TensorBoard),
    log_wandb=('wandb', _Wandb),
    log_mlflow=('mlflow', _MLflow),
)


def check_trackers(config: TrainConfig) -> None:
    """Raise ``ImportError`` if a tracker is asked for and not installed, so that a run fails before it trains."""
    for option, (package, _) in _TRACKERS.items():
        if getattr(config, option):
            _import(package, f'--{option.replace("_", "-")}')


def open_trackers(config: TrainConfig, run: RunFolder, epochs: int, step: int) -> list[Tracker]:
    """Open what the options ask for.

    Args:
        config: The options.
        run: The run folder.
        epochs: Number of epochs that are done.
        step: Number of batches that are done.

    Raises:
        OSError: A tracker does not answer, or does not know who asks.
    """
    return [tracker(config, run, epochs, step) for option, (_, tracker) in _TRACKERS.items() if getattr(config, option)]
