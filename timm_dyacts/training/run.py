"""A whole run: train a model and leave a folder; evaluate a model."""
import logging
import os
from argparse import Namespace
from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime

import torch
import yaml
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask
from timm.utils import get_outdir, random_seed, update_summary
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from ..data import class_names
from .build import (
    build_amp,
    build_criterion,
    build_dataset,
    build_eval_loader,
    build_model,
    build_train_loader,
    check_num_classes,
    check_splits,
    resolve_device,
    resolve_input,
    resolve_model_name,
)
from .checkpoint import save_checkpoint, set_pretrained_cfg
from .curves import plot_curves, require_matplotlib
from .loop import evaluate, train_one_epoch

__all__ = ['RunResult', 'train', 'validate']

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """What a training run came to.

    Attributes:
        folder: The run folder. It is itself the best checkpoint.
        best_epoch: Epoch of the best checkpoint, counted from 0.
        best: Its evaluation: 'loss', and 'top1' and 'top5' in percent.
    """
    folder: str
    best_epoch: int
    best: OrderedDict


def train(args: Namespace) -> RunResult:
    """Train as the options of scripts/train.py say.

    The run folder holds the best checkpoint (``model.safetensors``, ``config.json``), the one of the last epoch
    (``last/``), ``args.yaml``, ``summary.csv`` and ``curves.png``.

    Args:
        args: The options. Those left open (number of classes, channels, device) are filled in.

    Returns:
        Where the run is and how good it became.

    Raises:
        NonFiniteLossError: The loss became NaN or infinite. The folder keeps the epochs before.
        ValueError: Options that do not fit each other, the model or the data.
    """
    require_matplotlib()
    resolve_model_name(args.model)  # a misspelt name is better found before the data are read
    for option in ('epochs', 'batch_size', 'log_interval'):
        if getattr(args, option) < 1:
            raise ValueError(f'--{option.replace("_", "-")} must be at least 1, got {getattr(args, option)}.')
    device = resolve_device(args.device)
    args.device = str(device)
    random_seed(args.seed)

    dataset_train, dataset_eval, names = _create_datasets(args)
    model = _create_model(args)
    data_config = resolve_input(args, model)
    set_pretrained_cfg(model, data_config, from_pretrained=args.pretrained or args.pretrained_path is not None)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    model.to(device=device, memory_format=memory_format)

    loader_train = build_train_loader(dataset_train, args, data_config, device)
    loader_eval = build_eval_loader(
        dataset_eval, args, data_config, device, args.validation_batch_size or args.batch_size)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
    schedule = dict(scheduler_kwargs(args), step_on_epochs=False)
    scheduler, num_epochs = create_scheduler_v2(optimizer, **schedule, updates_per_epoch=len(loader_train))
    autocast, loss_scaler = build_amp(args, device)
    # The optimizer and the checkpoints see the plain model, the task its compiled form: they share their parameters.
    forward_model = torch.compile(model, backend=args.torchcompile) if args.torchcompile else model
    task = ClassificationTask(forward_model, build_criterion(args), device=device, verbose=False)

    architecture = model.pretrained_cfg['architecture']
    data_name = args.dataset or os.path.basename(os.path.abspath(args.data_dir))
    size = data_config['input_size'][-1]
    experiment = args.experiment or f'{datetime.now():%Y%m%d-%H%M%S}-{architecture}-{size}'
    folder = get_outdir(args.output, experiment, inc=True)
    summary = os.path.join(folder, 'summary.csv')
    with open(os.path.join(folder, 'args.yaml'), 'w') as f:
        yaml.safe_dump(vars(args), f)
    checkpoint = dict(
        label_names=names if names and len(names) == args.num_classes else None,
        model_args=dict(args.model_kwargs, in_chans=args.in_chans),
    )
    print(
        f'{architecture} ({_count_parameters(model):.2f} M parameters) on {data_name}: '
        f'{len(dataset_train)} training and {len(dataset_eval)} validation images of {args.num_classes} classes '
        f'at {size} pixels, on {device}')

    best, best_epoch = None, 0
    progress = tqdm(total=num_epochs * len(loader_train), unit='batch', leave=False, disable=None)
    try:
        for epoch in range(num_epochs):
            train_metrics = train_one_epoch(
                task,
                loader_train,
                optimizer,
                epoch,
                scheduler=scheduler,
                autocast=autocast,
                loss_scaler=loss_scaler,
                clip_grad=args.clip_grad,
                channels_last=args.channels_last,
                log_interval=args.log_interval,
                progress=progress,
            )
            eval_metrics = evaluate(forward_model, loader_eval, autocast, channels_last=args.channels_last)
            lr = sum(group['lr'] for group in optimizer.param_groups) / len(optimizer.param_groups)
            update_summary(epoch, train_metrics, eval_metrics, summary, lr=lr, write_header=epoch == 0)
            save_checkpoint(model, os.path.join(folder, 'last'), **checkpoint)
            if best is None or _is_better(eval_metrics, best, args.eval_metric):
                best, best_epoch = eval_metrics, epoch
                save_checkpoint(model, folder, **checkpoint)
            progress.write(
                f'epoch {epoch:>3}  train loss {train_metrics["loss"]:.4f}  eval loss {eval_metrics["loss"]:.4f}  '
                f'top1 {eval_metrics["top1"]:6.2f}  top5 {eval_metrics["top5"]:6.2f}  lr {lr:.2e}')
    except KeyboardInterrupt:
        if best is None:
            raise
        progress.write('Interrupted.')
    finally:
        progress.close()
        if best is not None:
            plot_curves(summary, os.path.join(folder, 'curves.png'), title=f'{architecture} on {data_name}')
    return RunResult(folder, best_epoch, best)


def _create_datasets(args: Namespace) -> tuple[Dataset, Dataset, list[str] | None]:
    """Both splits and the class names; fills in ``args.in_chans`` and ``args.num_classes``."""
    args.in_chans = args.input_size[0] if args.input_size else args.in_chans or 3
    dataset_train = build_dataset(
        args, args.train_split, args.in_chans, is_training=True, batch_size=args.batch_size, seed=args.seed)
    dataset_eval = build_dataset(args, args.val_split, args.in_chans, batch_size=args.batch_size)
    check_splits(dataset_train, dataset_eval)
    names = class_names(dataset_train)
    if args.num_classes is None:
        if names is None:
            raise ValueError(f'--num-classes is needed: the data set {args.dataset!r} does not name its classes.')
        args.num_classes = len(names)
    check_num_classes(args.num_classes, names)
    return dataset_train, dataset_eval, names


def _create_model(args: Namespace) -> nn.Module:
    overlay = None
    if args.pretrained_path is not None:
        if not os.path.isfile(args.pretrained_path):
            raise FileNotFoundError(f'--pretrained-path must be a checkpoint file, got {args.pretrained_path!r}.')
        overlay = dict(file=args.pretrained_path, num_classes=-1)  # -1: the file's classifier is never taken over
    return build_model(
        args,
        pretrained=args.pretrained or overlay is not None,
        pretrained_cfg_overlay=overlay,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
    )


def _count_parameters(model: nn.Module) -> float:
    """Number of parameters, in millions."""
    return sum(p.numel() for p in model.parameters()) / 1e6


def _is_better(metrics: OrderedDict, best: OrderedDict, metric: str) -> bool:
    if metric == 'loss':
        return metrics['loss'] < best['loss']
    return metrics[metric] > best[metric]


def validate(args: Namespace) -> OrderedDict:
    """Evaluate a model as the options of scripts/validate.py say.

    Returns:
        The record that timm's validate.py prints: accuracies and errors in percent, parameters in millions.
    """
    _inherit_dataset(args)
    if args.input_size:
        args.in_chans = args.input_size[0]
    device = resolve_device(args.device)
    model = build_model(args, pretrained=not args.checkpoint, checkpoint_path=args.checkpoint)
    data_config = resolve_input(args, model, use_test_size=not args.use_train_size)
    dataset = build_dataset(args, args.split, data_config['input_size'][0], batch_size=args.batch_size)
    names = class_names(dataset)
    check_num_classes(model.num_classes, names)
    label_names = model.pretrained_cfg.get('label_names')
    if names and label_names and names != list(label_names):
        _logger.warning(
            'The classes differ, so the accuracy may mean nothing. Those of the data set: %s. Those of the model: %s.',
            names, label_names)
    loader = build_eval_loader(dataset, args, data_config, device, args.batch_size)
    autocast, _ = build_amp(args, device)
    model.to(device=device, memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)
    forward_model = torch.compile(model, backend=args.torchcompile) if args.torchcompile else model
    metrics = evaluate(forward_model, loader, autocast, channels_last=args.channels_last)
    return OrderedDict(
        model=args.model,
        top1=round(metrics['top1'], 4),
        top1_err=round(100 - metrics['top1'], 4),
        top5=round(metrics['top5'], 4),
        top5_err=round(100 - metrics['top5'], 4),
        param_count=round(_count_parameters(model), 2),
        img_size=data_config['input_size'][-1],
        crop_pct=data_config['crop_pct'],
        interpolation=data_config['interpolation'],
    )


def _inherit_dataset(args: Namespace) -> None:
    """Fill in the data set that the options leave open: that of the model's run folder, else the digits."""
    if args.dataset is not None or args.data_dir is not None:
        args.dataset = args.dataset or ''
        args.split = args.split or 'validation'
        return
    folder = args.model.removeprefix('local-dir:')
    run = dict(dataset='digits', data_dir=None, val_split='validation', class_map=None)
    for path in (os.path.join(folder, 'args.yaml'), os.path.join(folder, os.pardir, 'args.yaml')):
        if os.path.isfile(path):
            with open(path) as f:
                run = yaml.safe_load(f)
            break
    args.dataset, args.data_dir = run['dataset'], run['data_dir']
    args.split = args.split or run['val_split']
    args.class_map = args.class_map or run['class_map']
