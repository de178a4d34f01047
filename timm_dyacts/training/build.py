"""From options to objects: the model, data and loss of a run, all from timm's factories.

``args`` is the namespace of a command line in the dialect of timm's train.py and validate.py.
"""
import difflib
import os
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from operator import methodcaller
from typing import Any

import timm
import torch
from timm.data import FastCollateMixup, create_loader, resolve_data_config
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import get_pretrained_cfg, is_model, list_models
from timm.task import ClassificationTask, LogitDistillationTask, TrainingTask
from timm.utils import NativeScaler
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from torchvision.transforms import Compose

from ..data import class_names, create_dataset
from ..data.resumable import (
    BatchDataset,
    EvalBatches,
    ResumableLoader,
    SeededErasing,
    StreamLoader,
    TrainBatches,
)
from .world import World

__all__ = [
    'build_amp',
    'build_criterion',
    'build_dataset',
    'build_eval_loader',
    'build_model',
    'build_task',
    'build_train_loader',
    'check_num_classes',
    'check_several_classes',
    'check_splits',
    'count_parameters',
    'resolve_device',
    'resolve_input',
    'resolve_model_name',
    'set_numerics',
]


def resolve_device(name: str | None) -> torch.device:
    """The device called ``name``, or the GPU if there is one for None."""
    device = torch.device(name or ('cuda' if torch.cuda.is_available() else 'cpu'))
    if device.type == 'cuda' and not torch.cuda.is_available():
        raise ValueError(f'--device {name} needs a GPU, and PyTorch {torch.__version__} sees none; use --device cpu.')
    return device


def set_numerics(device: torch.device, deterministic: bool) -> None:
    """Let a GPU be fast, as timm's train.py does, or make it compute the same bits in each run."""
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
    elif device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


def resolve_model_name(name: str, option: str = '--model') -> str:
    """The name under which ``timm.create_model`` knows a model.

    Args:
        name: A model name, 'hf-hub:<id>', 'local-dir:<folder>', or just the path of a run or checkpoint folder.
        option: The option that gave it, for the message.

    Raises:
        ValueError: An unknown model; the error lists names that look alike.
    """
    if ':' in name:
        return name
    if os.path.isfile(os.path.join(name, 'config.json')):
        return f'local-dir:{name}'
    architecture = name.split('.')[0]
    if not is_model(architecture):
        close = difflib.get_close_matches(architecture, list_models(), n=5)
        hint = f' Close names: {", ".join(close)}.' if close else ''
        raise ValueError(
            f'{option} {name!r} is neither a name from timm.list_models() nor a folder with a config.json.{hint}')
    return name


def build_model(args: Namespace, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Create the model of ``--model`` with the classes and the input that the options ask for.

    Args:
        args: Options ``model``, ``num_classes``, ``in_chans``, ``img_size``, ``input_size`` and ``model_kwargs``.
        pretrained: Load its weights.
        **kwargs: Further arguments of ``timm.create_model``.
    """
    name = resolve_model_name(args.model)
    model_kwargs = dict(args.model_kwargs)
    img_size = tuple(args.input_size[1:]) if args.input_size else args.img_size
    if img_size is not None and ':' not in name and get_pretrained_cfg(name).fixed_input_size:
        model_kwargs.setdefault('img_size', img_size)  # position embeddings are built for one size
    model = timm.create_model(
        name,
        pretrained=pretrained,
        num_classes=args.num_classes,
        in_chans=args.in_chans,
        **kwargs,
        **model_kwargs,
    )
    if any(is_lazy(p) for p in model.parameters()):
        # Activations that learn their number of channels from the first input have no parameters to train before it.
        with torch.no_grad():
            model.eval()(torch.zeros(1, *resolve_input(args, model)['input_size']))
    return model


def count_parameters(model: nn.Module) -> float:
    """Number of parameters, in millions."""
    return sum(p.numel() for p in model.parameters()) / 1e6


def resolve_input(args: Namespace, model: nn.Module, use_test_size: bool = False) -> dict[str, Any]:
    """Preprocessing as ``timm.data.resolve_data_config`` has it, with the channels of the model.

    Args:
        args: Options ``img_size``, ``input_size``, ``in_chans``, ``mean``, ``std``, ``crop_pct`` and ``interpolation``.
            Where they are None, the model's own configuration speaks.
        model: A timm model.
        use_test_size: Prefer the size that the model's authors recommend for evaluation.
    """
    in_chans = args.in_chans or getattr(model, 'in_chans', model.pretrained_cfg['input_size'][0])
    for option in ('mean', 'std'):
        value = getattr(args, option)
        if value is not None and len(value) not in (1, in_chans):
            raise ValueError(f'--{option} takes 1 or {in_chans} numbers, one per input channel, got {value}.')
    config = resolve_data_config(dict(vars(args), in_chans=in_chans), model=model, use_test_size=use_test_size)
    config['input_size'] = (in_chans, *config['input_size'][1:])
    for key in ('mean', 'std'):
        if len(config[key]) != in_chans:
            config[key] = (sum(config[key]) / len(config[key]),) * in_chans
    return config


def build_dataset(args: Namespace, split: str, in_chans: int, **kwargs: Any) -> Dataset:
    """Create one split of the data set of ``--dataset`` and ``--data-dir``."""
    return create_dataset(
        args.dataset,
        root=args.data_dir,
        split=split,
        class_map=args.class_map,
        download=args.dataset_download,
        input_img_mode=_image_mode(in_chans),
        **kwargs,
    )


def check_splits(dataset_train: Dataset, dataset_eval: Dataset) -> None:
    """Raise ValueError if two splits share images or do not agree on their classes."""
    readers = [getattr(dataset, 'reader', None) for dataset in (dataset_train, dataset_eval)]
    if all(isinstance(reader, ReaderImageFolder) for reader in readers):
        train_paths, eval_paths = ({path for path, _ in reader.samples} for reader in readers)
        if train_paths & eval_paths:
            # timm falls back to the whole folder where it finds no sub-folder for a split.
            raise ValueError(
                f'--train-split and --val-split share {len(train_paths & eval_paths)} images ({readers[0].root} and '
                f'{readers[1].root}). Each must name a sub-folder of --data-dir of its own.')
    names_train, names_eval = class_names(dataset_train), class_names(dataset_eval)
    if names_train != names_eval:
        raise ValueError(
            f'The splits must have the same classes. --train-split has {names_train}, --val-split has {names_eval}.')


def check_several_classes(names: list[str] | None) -> None:
    """Raise ValueError if a data set has one class only."""
    if names is not None and len(names) < 2:
        raise ValueError(
            f'The data set has one class only ({names[0]!r}): there is nothing to tell apart. An image folder needs a '
            f'sub-folder for each class.')


def check_num_classes(num_classes: int, names: list[str] | None) -> None:
    """Raise ValueError if a model of ``num_classes`` classes has no logit for some label of the data set."""
    if names is not None and len(names) > num_classes:
        raise ValueError(
            f'The data set has {len(names)} classes, more than the {num_classes} of the model (--num-classes).')


def build_train_loader(
        dataset: Dataset,
        args: Namespace,
        data_config: dict[str, Any],
        world: World,
) -> ResumableLoader | StreamLoader:
    """Create the loader of augmented training batches; mixup and cutmix turn its labels into distributions."""
    collate_fn = None
    if args.mixup > 0 or args.cutmix > 0:
        if args.batch_size % 2:
            raise ValueError(f'--batch-size must be even with --mixup or --cutmix, got {args.batch_size}.')
        collate_fn = FastCollateMixup(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=args.num_classes,
        )
    loader = _create_loader(
        dataset,
        args,
        data_config,
        world,
        batch_size=args.batch_size,
        is_training=True,
        no_aug=args.no_aug,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        auto_augment=args.aa,
        interpolation=data_config['interpolation'] if args.no_aug else args.train_interpolation,
        collate_fn=collate_fn,
    )
    if isinstance(dataset, IterableDataset):
        return StreamLoader(loader, args.batch_size * world.size)
    batches = TrainBatches(len(dataset), args.batch_size, args.seed, world.rank, world.size)
    if len(batches) == 0:
        processes = f' times {world.size} processes' if world.size > 1 else ''
        raise ValueError(
            f'--batch-size {args.batch_size}{processes} is more than the {len(dataset)} training images; a batch must '
            f'be full.')
    _load_by_batches(loader, batches, args, data_config, is_training=True, rank=world.rank)
    if loader.random_erasing is not None:
        loader.random_erasing = SeededErasing(loader.random_erasing, batches, world.device)
    return ResumableLoader(loader, batches)


def build_eval_loader(
        dataset: Dataset,
        args: Namespace,
        data_config: dict[str, Any],
        world: World,
        batch_size: int,
):
    """Create the loader of evaluation batches: this process's share of the samples, each of them once."""
    loader = _create_loader(
        dataset,
        args,
        data_config,
        world,
        batch_size=batch_size,
        interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config['crop_mode'],
    )
    if not isinstance(dataset, IterableDataset):
        batches = EvalBatches(len(dataset), batch_size, world.rank, world.size)
        _load_by_batches(loader, batches, args, data_config, is_training=False)
    return loader


def _create_loader(
        dataset: Dataset,
        args: Namespace,
        data_config: dict[str, Any],
        world: World,
        **kwargs: Any,
):
    loader = create_loader(
        dataset,
        input_size=data_config['input_size'],
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=args.workers,
        distributed=world.size > 1,
        persistent_workers=args.workers > 0,
        pin_memory=world.device.type == 'cuda',
        device=world.device,
        **kwargs,
    )
    if args.dataset.lower().startswith('torch/'):
        # torchvision hands out images in the mode of their files, where timm's readers convert them.
        convert = methodcaller('convert', _image_mode(data_config['input_size'][0]))
        dataset.transform = Compose([convert, dataset.transform])
    return loader


def _load_by_batches(
        loader,
        batches: Sampler,
        args: Namespace,
        data_config: dict[str, Any],
        is_training: bool,
        rank: int = 0,
) -> None:
    """Let a timm loader, in place, take its batches from a ``BatchDataset``. All else about it stays."""
    inner = loader.loader
    dataset = BatchDataset(
        inner.dataset,
        inner.collate_fn,
        data_config['input_size'],
        seed=args.seed if is_training else 0,
        rank=rank,
        is_training=is_training,
        on_bad_image=args.on_bad_image,
        num_classes=args.num_classes,
    )
    loader.loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=batches,
        num_workers=inner.num_workers,
        pin_memory=inner.pin_memory,
        persistent_workers=inner.persistent_workers,
        generator=torch.Generator(),  # the base seed of the workers is not to be drawn from the global one
    )


def _image_mode(in_chans: int) -> str:
    return 'RGB' if in_chans == 3 else 'L'


def build_criterion(args: Namespace) -> nn.Module:
    """Create the training loss. With mixup or cutmix the smoothing is already in the targets."""
    if args.mixup > 0 or args.cutmix > 0:
        return SoftTargetCrossEntropy()
    if args.smoothing:
        return LabelSmoothingCrossEntropy(smoothing=args.smoothing)
    return nn.CrossEntropyLoss()


def build_task(args: Namespace, model: nn.Module, device: torch.device) -> TrainingTask:
    """Create the training task: classification, distilled from the model of ``--kd-model`` if there is one."""
    criterion = build_criterion(args)
    if args.kd_model is None:
        return ClassificationTask(model, criterion, device=device, verbose=False)
    teacher = timm.create_model(resolve_model_name(args.kd_model, '--kd-model'), pretrained=True)
    if (teacher.num_classes, teacher.in_chans) != (args.num_classes, args.in_chans):
        raise ValueError(
            f'--kd-model must have the {args.num_classes} classes and {args.in_chans} input channels of the model, got '
            f'{args.kd_model!r} with {teacher.num_classes} and {teacher.in_chans}.')
    return LogitDistillationTask(
        model,
        teacher.to(device).requires_grad_(False),
        criterion,
        distill_loss_weight=args.distill_loss_weight,
        task_loss_weight=args.task_loss_weight,
        temperature=args.kd_temperature,
        device=device,
        verbose=False,
    )


def build_amp(
        args: Namespace,
        device: torch.device,
) -> tuple[Callable[[], AbstractContextManager], NativeScaler | None]:
    """Context of the forward pass and scaler of the loss for ``--amp``; only float16 needs a scaler."""
    if not args.amp:
        return nullcontext, None
    autocast = partial(torch.autocast, device_type=device.type, dtype=getattr(torch, args.amp_dtype))
    return autocast, NativeScaler(device=device.type) if args.amp_dtype == 'float16' else None
