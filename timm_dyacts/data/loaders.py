"""Data sets and loaders as the options of a run say, from timm's parts."""
from argparse import Namespace
from operator import methodcaller
from typing import Any

import torch
from timm.data import FastCollateMixup, create_loader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from torchvision.transforms import Compose

from ..world import World
from .factory import class_names, create_dataset
from .resumable import (
    BatchDataset,
    EvalBatches,
    ResumableLoader,
    SeededErasing,
    StreamLoader,
    TrainBatches,
)

__all__ = [
    'build_dataset',
    'build_eval_loader',
    'build_train_loader',
    'check_num_classes',
    'check_several_classes',
    'check_splits',
]


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
