"""A whole run: train a model and leave a folder that is a checkpoint, and that the run can be resumed from."""
import copy
import os
import shlex
import signal
import sys
from argparse import Namespace
from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from timm.layers import convert_sync_batchnorm
from timm.models import load_checkpoint
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import distribute_bn, get_outdir, random_seed
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from ..data import class_names
from ..data.loaders import (
    build_dataset,
    build_eval_loader,
    build_train_loader,
    check_num_classes,
    check_several_classes,
    check_splits,
)
from ..data.resumable import BatchDataset
from ..device import build_amp, resolve_device, set_numerics
from ..evaluation.curves import plot_curves, require_matplotlib
from ..evaluation.loop import evaluate
from ..evaluation.report import write_report
from ..files import replace_text
from ..loading import build_model, count_parameters, resolve_input, resolve_model_name
from ..lsuv import lsuv_
from ..world import StopSignal, TrainingInterrupted, World
from .checkpoint import dataset_title, describe_run, describe_start, save_checkpoint, set_pretrained_cfg
from .finetune import build_optimizer, freeze, unfreeze
from .log import RunLog, best_row, check_loggers
from .loop import train_one_epoch
from .nonfinite import NonFiniteLossError, first_nonfinite_tensor
from .resume import check_resumable, find_state
from .state import CheckpointInterval, EpochMeter, Progress, StateFile, capture_state, load_state, restore_state
from .task import build_task

__all__ = ['RunResult', 'train']

_AT_LEAST_ONE = ('epochs', 'batch_size', 'log_interval', 'grad_accum_steps')


@dataclass(frozen=True)
class RunResult:
    """What a training run came to.

    Attributes:
        folder: The run folder. It is itself the best checkpoint.
        best_epoch: Epoch of the best checkpoint, counted from 0.
        best: Its evaluation: 'loss', and 'top1' and 'top5' in percent.
        is_primary: Whether this process is the one that writes and prints.
    """
    folder: str
    best_epoch: int
    best: OrderedDict
    is_primary: bool = True


def train(args: Namespace) -> RunResult:
    """Train as the options of scripts/train.py say, in as many processes as torchrun or Slurm started.

    The run folder holds the best checkpoint (``model.safetensors``, ``config.json``, ``results.json``), the one of the
    last epoch (``last/``), that of the moving average (``ema/``), ``args.yaml``, ``summary.csv``, pictures, and what
    resuming needs (``checkpoint/``).

    Args:
        args: The options. Those left open (number of classes, channels, device) are filled in.

    Returns:
        Where the run is and how good it became.

    Raises:
        NonFiniteLossError: The loss became NaN or infinite. The folder keeps the epochs before.
        TrainingInterrupted: A signal asked to stop. The state has been saved.
        OSError: Something could not be read or written. What was written before is kept.
        ValueError: Options that do not fit each other, the model, the data, or the run to be resumed.
    """
    require_matplotlib()
    check_loggers(args)
    resolve_model_name(args.model)  # a misspelt name is better found before the data are read
    for option in _AT_LEAST_ONE:
        if getattr(args, option) < 1:
            raise ValueError(f'--{option.replace("_", "-")} must be at least 1, got {getattr(args, option)}.')
    if args.seed < 0:
        raise ValueError(f'--seed must be at least 0, got {args.seed}.')
    if args.init != 'default' and (args.pretrained or args.pretrained_path or args.initial_checkpoint):
        raise ValueError(f'--init {args.init} would overwrite the weights that the run is to start from.')
    interval = CheckpointInterval.parse(args.checkpoint_interval)
    world = World.join(resolve_device(args.device))
    set_numerics(world.device, args.deterministic)
    with StopSignal(world) as stop:
        try:
            result = _Run(args, world, interval, stop).train()
        except TrainingInterrupted:
            world.leave()  # all processes are here
            raise
    world.leave()
    return result


class _Run:
    """The objects of a run, and what it does with them."""

    def __init__(self, args: Namespace, world: World, interval: CheckpointInterval, stop: StopSignal) -> None:
        self.args = args
        self.world = world
        self.interval = interval
        self.stop = stop
        args.device = world.device.type
        folder, state_path = find_state(args) if world.is_primary else (None, None)
        # Each process does not read the file for itself: the machines need not share a file system.
        state = world.broadcast(load_state(state_path) if state_path else None)

        random_seed(args.seed)  # the same in all processes, for the same initial weights
        names = self._build_data_and_model()
        if args.init == 'lsuv' and state is None:
            self.loader.set_position(0)
            lsuv_(self.model, next(iter(self.loader))[0])
        random_seed(args.seed, world.rank)
        self._build_training()

        self.data = dict(num_images=len(self.dataset_train), classes=names)
        self.progress = Progress()
        if state is not None:
            check_resumable(state, args, self.data, world.size)
            self.progress = restore_state(state, self._resumable(), world)
        self.frozen = freeze(self.model, args.freeze) if not self._is_unfrozen() else []
        if args.torchcompile:
            self.task.compile(backend=args.torchcompile)
        self._wrap()
        self.folder = world.broadcast(self._open_folder(folder) if world.is_primary else None)
        if world.is_primary:
            is_good = state_path is None or os.path.basename(state_path) == 'state.pt'
            self.state_file = StateFile(self.folder, is_good)
            self.log = RunLog(args, self.folder, self.progress.rows)
            self._print_start(resumed=state is not None)

    def _build_data_and_model(self) -> list[str] | None:
        """Build data sets, model and loaders. Returns the class names."""
        args, world = self.args, self.world
        self.dataset_train, self.dataset_eval, names = _create_datasets(args)
        self.label_names = names if names and len(names) == args.num_classes else None
        model = _create_model(args)
        self.start = describe_start(args, model)
        self.data_config = resolve_input(args, model)
        set_pretrained_cfg(model, self.data_config, from_pretrained=self.start['pretrained'])
        if args.grad_checkpointing:
            model.set_grad_checkpointing(True)
        if args.sync_bn and world.size > 1:
            if world.device.type == 'cpu':
                raise ValueError('--sync-bn needs GPUs: PyTorch synchronises BatchNorm on them alone.')
            model = convert_sync_batchnorm(model)
        memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        self.model = model.to(device=world.device, memory_format=memory_format)
        self.loader = build_train_loader(self.dataset_train, args, self.data_config, world)
        self.loader_eval = self._build_eval_loader(world)
        return names

    def _build_eval_loader(self, world: World):
        batch_size = self.args.validation_batch_size or self.args.batch_size
        return build_eval_loader(self.dataset_eval, self.args, self.data_config, world, batch_size)

    def _build_training(self) -> None:
        """Build optimizer, schedule, task and moving average."""
        args = self.args
        self.updates_per_epoch = -(-len(self.loader) // args.grad_accum_steps)
        self.optimizer = build_optimizer(args, self.model)
        schedule = dict(scheduler_kwargs(args), step_on_epochs=False)
        self.scheduler, self.num_epochs = create_scheduler_v2(
            self.optimizer, **schedule, updates_per_epoch=self.updates_per_epoch)
        self.autocast, self.loss_scaler = build_amp(args, self.world.device)
        self.task = build_task(args, self.model, self.world.device)
        if args.model_ema:
            self.task.setup_ema(
                decay=args.model_ema_decay,
                use_warmup=args.model_ema_warmup,
                device=torch.device('cpu') if args.model_ema_force_cpu else None,
            )

    def _resumable(self) -> dict[str, Any]:
        parts = dict(model=self.model, optimizer=self.optimizer)
        if self.loss_scaler is not None:
            parts['loss_scaler'] = self.loss_scaler
        if self.args.model_ema:
            parts['ema'] = self.task.get_trainable_module(ema=True).module
        return parts

    def _is_unfrozen(self) -> bool:
        until = self.args.unfreeze_epoch
        return self.args.freeze == 'none' or (until is not None and self.progress.epoch >= until)

    def _wrap(self) -> None:
        if self.world.size > 1:
            device_ids = [self.world.device] if self.world.device.type == 'cuda' else None
            self.task.prepare_distributed(device_ids=device_ids)

    def _open_folder(self, folder: str | None) -> str:
        """The folder of the resumed run, or a new one."""
        args = self.args
        if folder is None:
            architecture, size = self.model.pretrained_cfg['architecture'], self.data_config['input_size'][-1]
            experiment = args.experiment or f'{datetime.now():%Y%m%d-%H%M%S}-{architecture}-{size}'
            folder = get_outdir(args.output, experiment, inc=True)
        options = {key: value for key, value in vars(args).items() if key != 'resume'}
        replace_text(os.path.join(folder, 'args.yaml'), yaml.safe_dump(options))
        return folder

    def _print_start(self, resumed: bool) -> None:
        size = self.data_config['input_size'][-1]
        processes = f' in {self.world.size} processes' if self.world.size > 1 else ''
        print(
            f'{self.model.pretrained_cfg["architecture"]} ({count_parameters(self.model):.2f} M parameters) on '
            f'{dataset_title(self.args)}: {len(self.dataset_train)} training and {len(self.dataset_eval)} validation '
            f'images of {self.args.num_classes} classes at {size} pixels, on {self.world.device.type}{processes}')
        if resumed:
            print(f'Resumed {self.folder} at epoch {self.progress.epoch} after {self.progress.samples} images.')

    # The epochs

    def train(self) -> RunResult:
        steps = self.num_epochs * len(self.loader)
        done = self.progress.epoch * len(self.loader) * self.loader.samples_per_step + self.progress.samples
        self.bar = tqdm(
            total=steps * self.loader.samples_per_step,
            initial=done,
            unit='img',
            unit_scale=True,
            leave=False,
            disable=None if self.world.is_primary else True,
        )
        try:
            for _ in range(self.progress.epoch, self.num_epochs):
                self._run_epoch()
        finally:
            self.bar.close()
            if self.world.is_primary and self.progress.rows:
                title = f'{self.model.pretrained_cfg["architecture"]} on {dataset_title(self.args)}'
                plot_curves(
                    os.path.join(self.folder, 'summary.csv'), os.path.join(self.folder, 'curves.png'), title=title)
            if self.world.is_primary:
                self.log.close()
        best = best_row(self.progress.rows, f'eval_{self.args.eval_metric}')
        if self.world.is_primary:
            self._report()
        metrics = OrderedDict((name, best[f'eval_{name}']) for name in ('loss', 'top1', 'top5'))
        return RunResult(self.folder, int(best['epoch']), metrics, self.world.is_primary)

    def _report(self) -> None:
        """Draw what the best checkpoint does on the validation set."""
        self.model.load_state_dict(load_file(os.path.join(self.folder, 'model.safetensors')))
        loader = self._build_eval_loader(World(self.world.device))  # all images, in this process
        write_report(self.model, loader, self.folder, self.data_config, self.label_names, self.autocast)

    def _run_epoch(self) -> None:
        progress = self.progress
        if self.frozen and self._is_unfrozen():
            self._unfreeze()
        first_step = self.loader.set_position(progress.epoch, progress.samples)
        train_metrics = train_one_epoch(
            self.task,
            self.loader,
            self.optimizer,
            progress.epoch,
            scheduler=self.scheduler,
            autocast=self.autocast,
            loss_scaler=self.loss_scaler,
            clip_grad=self.args.clip_grad,
            clip_mode=self.args.clip_mode,
            channels_last=self.args.channels_last,
            grad_accum_steps=self.args.grad_accum_steps,
            log_interval=self.args.log_interval,
            progress=self.bar,
            world=self.world,
            meter=progress.meter,
            first_step=first_step,
            in_eval_mode=self.frozen,
            after_update=self._after_update,
        )
        progress.samples = len(self.loader) * self.loader.samples_per_step
        self._check_finite()
        eval_metrics, ema_metrics = self._evaluate()
        lr = sum(group['lr'] for group in self.optimizer.param_groups) / len(self.optimizer.param_groups)
        row = dict(epoch=progress.epoch)
        for kind, metrics in (('train', train_metrics), ('eval', eval_metrics), ('ema', ema_metrics)):
            row.update({f'{kind}_{name}': value for name, value in metrics.items()})
        row['lr'] = lr
        self._finish_epoch(row)

    def _finish_epoch(self, row: dict[str, float]) -> None:
        """Write the checkpoints of an epoch and its row, and then the state, which vouches for them."""
        progress, args = self.progress, self.args
        unreadable = self._gather_unreadable()
        if self.world.is_primary:
            num_images = len(self.dataset_eval)
            if 'validation' in unreadable:
                num_images -= int(unreadable['validation'].sum())
            self.log.add(row)
            self._save(self.model, 'last')
            if best_row(progress.rows, f'eval_{args.eval_metric}') is row:
                self._save(self.model, '', self._results(row, 'eval', num_images))
            if args.model_ema and best_row(progress.rows, f'ema_{args.eval_metric}') is row:
                ema_model = self.task.get_trainable_module(ema=True).module
                self._save(ema_model, 'ema', self._results(row, 'ema', num_images))
            ema = f'  ema top1 {row["ema_top1"]:6.2f}' if args.model_ema else ''
            self.bar.write(
                f'epoch {row["epoch"]:>3}  train loss {row["train_loss"]:.4f}  eval loss {row["eval_loss"]:.4f}  '
                f'top1 {row["eval_top1"]:6.2f}  top5 {row["eval_top5"]:6.2f}{ema}  lr {row["lr"]:.2e}')
            sys.stdout.flush()  # whoever pipes the output wants to see an epoch when it is done
            if row['epoch'] == 0:
                self._report_unreadable(unreadable)
        else:
            progress.rows.append(row)
        progress.epoch, progress.samples, progress.meter = progress.epoch + 1, 0, EpochMeter()
        if self.interval.is_due_after_epoch(progress.epoch) or progress.epoch == self.num_epochs:
            self._save_state()

    def _after_update(self, steps: int, read_losses) -> None:
        """Save the state where it is due or a signal asks for it."""
        updates = self.progress.epoch * self.updates_per_epoch + -(-steps // self.args.grad_accum_steps)
        signum = self.stop.agreed()
        if self.loader.resumes_within_epoch and (signum or self.interval.is_due(updates)):
            read_losses()
            self.progress.samples = steps * self.loader.samples_per_step
            self._check_finite()
            self._save_state()
        if signum:
            self._interrupt(signum)

    def _interrupt(self, signum: int) -> None:
        command = f'--resume {shlex.quote(self.folder)}'
        raise TrainingInterrupted(
            f'Stopped by {signal.Signals(signum).name} at epoch {self.progress.epoch} after {self.progress.samples} '
            f'images. Go on with: python scripts/train.py {command}', signum, self.world.is_primary)

    def _evaluate(self) -> tuple[OrderedDict, OrderedDict]:
        """Evaluate the model and its moving average; empty for an average that there is not."""
        # Not the module that DDP wraps: its forward pass synchronises, and the processes may have unlike numbers of
        # batches to evaluate.
        modules = [getattr(self.task, 'eval_model', self.model)]
        if self.args.model_ema:
            ema = self.task.get_trainable_module(ema=True).module
            modules.append(copy.deepcopy(ema).to(self.world.device) if self.args.model_ema_force_cpu else ema)
        metrics = [OrderedDict(), OrderedDict()]
        for i, module in enumerate(modules):
            if self.world.size > 1 and self.args.dist_bn != 'none':
                distribute_bn(module, self.world.size, self.args.dist_bn == 'reduce')
            metrics[i] = evaluate(
                module,
                self.loader_eval,
                self.autocast,
                channels_last=self.args.channels_last,
                world=self.world,
                after_batch=self._stop_in_evaluation if self.world.size == 1 else None,
            )
        return metrics[0], metrics[1]

    def _stop_in_evaluation(self) -> None:
        """Save the state of the trained, not yet evaluated epoch where a signal asks for it."""
        signum = self.stop.agreed()
        if signum:
            self._save_state()
            self._interrupt(signum)

    def _unfreeze(self) -> None:
        unfreeze(self.model)
        self.frozen = []
        if self.world.size > 1:
            self.task.trainable_module = self.task.trainable_module.module
            self._wrap()

    # What is written

    def _check_finite(self) -> None:
        """A state with a NaN in it must not take the place of a good one."""
        name = first_nonfinite_tensor(self.model)
        if name is not None:
            raise NonFiniteLossError(
                f'{name} is not finite any more at epoch {self.progress.epoch} after {self.progress.samples} images. '
                f'Lower --lr, set --clip-grad, or train without --amp; the checkpoints before are kept.')

    def _save_state(self) -> None:
        state = capture_state(self._resumable(), self.progress, self.world)
        if state is not None:
            options = dict(vars(self.args))
            self.state_file.write(dict(state, args=options, data=self.data, world_size=self.world.size))

    def _save(self, model: nn.Module, name: str, results: dict[str, Any] | None = None) -> None:
        save_checkpoint(
            model,
            os.path.join(self.folder, name),
            label_names=self.label_names,
            model_args=dict(self.args.model_kwargs, in_chans=self.args.in_chans),
            results=results,
        )

    def _results(self, row: dict[str, float], kind: str, num_images: int) -> dict[str, Any]:
        """What ``results.json`` says of the weights of an epoch; ``kind`` is 'eval' or 'ema'."""
        metrics = {name: row[f'{kind}_{name}'] for name in ('top1', 'top5', 'loss')}
        about = describe_run(self.args, self.data_config, num_images, self.start)
        return dict(metrics, epoch=int(row['epoch']), **about)

    def _gather_unreadable(self) -> dict[str, torch.Tensor]:
        """Which images could not be read so far, by all processes. Empty for data sets that are streams."""
        masks = {}
        for kind, loader in (('training', self.loader.loader), ('validation', self.loader_eval)):
            if isinstance(loader.loader.dataset, BatchDataset):
                gathered = self.world.gather(loader.loader.dataset.unreadable)
                if gathered is not None:
                    masks[kind] = torch.stack(gathered).any(0)
        return masks

    def _report_unreadable(self, masks: dict[str, torch.Tensor]) -> None:
        for kind, mask in masks.items():
            indices = mask.nonzero().flatten().tolist()
            if not indices:
                continue
            loader = self.loader.loader if kind == 'training' else self.loader_eval
            names = ', '.join(loader.loader.dataset.name(index) for index in indices[:3])
            more = ', ...' if len(indices) > 3 else ''
            self.bar.write(f'{len(indices)} of {len(mask)} {kind} images cannot be read: {names}{more}')


def _create_datasets(args: Namespace) -> tuple[Dataset, Dataset, list[str] | None]:
    """Both splits and the class names; fills in ``args.in_chans`` and ``args.num_classes``."""
    args.in_chans = args.input_size[0] if args.input_size else args.in_chans or 3
    dataset_train = build_dataset(
        args, args.train_split, args.in_chans, is_training=True, batch_size=args.batch_size, seed=args.seed)
    dataset_eval = build_dataset(args, args.val_split, args.in_chans, batch_size=args.batch_size)
    names = class_names(dataset_train)
    check_several_classes(names)
    check_splits(dataset_train, dataset_eval)
    if args.num_classes is None:
        if names is None:
            raise ValueError(f'--num-classes is needed: the data set {args.dataset!r} does not name its classes.')
        args.num_classes = len(names)
    check_num_classes(args.num_classes, names)
    return dataset_train, dataset_eval, names


def _create_model(args: Namespace) -> nn.Module:
    for option in ('pretrained_path', 'initial_checkpoint'):
        path = getattr(args, option)
        if path is not None and not os.path.isfile(path):
            raise FileNotFoundError(f'--{option.replace("_", "-")} must be a checkpoint file, got {path!r}.')
    overlay = None
    if args.pretrained_path is not None:
        overlay = dict(file=args.pretrained_path, num_classes=-1)  # -1: the file's classifier is never taken over
    model = build_model(
        args,
        pretrained=args.pretrained or overlay is not None,
        pretrained_cfg_overlay=overlay,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
    )
    if args.initial_checkpoint is not None:
        load_checkpoint(model, args.initial_checkpoint)
    return model
