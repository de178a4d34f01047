"""Loaders of training and evaluation batches, from timm's parts, and checks of the data sets that they load."""
import math
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import timm
import torch
from PIL import ImageMode
from timm.data import AugMixDataset, create_loader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from torchvision.datasets import VisionDataset
from torchvision.transforms import Compose

from ..version import unsupported
from ..world import World
from .factory import class_names
from .identity import is_same
from .images import INPUT_MODES, SizeLimit, to_mode
from .label_file import ReaderLabelFile
from .mixing import EpochMixup, SplitDataset
from .resumable import (
    BalancedBatches,
    BatchDataset,
    EvalBatches,
    RepeatedBatches,
    ResumableLoader,
    SeededErasing,
    StreamLoader,
    TrainBatches,
)
from .streams import ImageStream
from .subsets import Subset, labels_of

__all__ = [
    'build_eval_loader',
    'build_train_loader',
    'check_num_classes',
    'check_several_classes',
    'check_splits',
    'image_mode',
]

# What images are converted to for a number of channels
_MODES = {1: 'L', 3: 'RGB'}


def image_mode(in_chans: int, mode: str | None = None) -> str:
    """Give the mode of PIL images for a number of channels, or ``mode`` itself.

    Raises:
        ValueError: ``mode`` is unknown, has another number of channels, or is needed.
    """
    if mode is None:
        if in_chans not in _MODES:
            raise ValueError(
                f'--input-img-mode is needed for {in_chans} channels, such as RGBA or CMYK for 4, LA for 2. Without it '
                f'images have 1 (L) or 3 (RGB).')
        return _MODES[in_chans]
    if mode not in INPUT_MODES:
        raise ValueError(f'--input-img-mode must be one of {", ".join(INPUT_MODES)}, got {mode!r}.')
    bands = len(ImageMode.getmode(mode).bands)
    if bands != in_chans:
        raise ValueError(
            f'--input-img-mode must have the {in_chans} channels of the model, got {mode!r}, which has {bands}.')
    return mode


def check_splits(dataset_train: Dataset[Any], dataset_eval: Dataset[Any]) -> None:
    """Raise ``ValueError`` if two splits share images or do not agree on their classes."""
    readers = [getattr(dataset, 'reader', None) for dataset in (dataset_train, dataset_eval)]
    if all(isinstance(reader, (ReaderImageFolder, ReaderLabelFile)) for reader in readers):
        train_paths, eval_paths = ({path for path, _ in reader.samples} for reader in readers)
        shared = train_paths & eval_paths
        if shared and isinstance(readers[0], ReaderLabelFile):
            problem = 'its splits' if readers[0].has_splits else 'without a column split, all splits'
            raise ValueError(
                f'--labels {readers[0].path}: {problem} share {len(shared)} images, such as {min(shared)}.')
        if shared:
            # timm falls back to the whole folder where it finds no sub-folder for a split.
            raise ValueError(
                f'--train-split and --val-split share {len(shared)} images ({readers[0].root} and '
                f'{readers[1].root}). Each must name a sub-folder of --data-dir of its own.')
    if is_same(dataset_train, dataset_eval):
        raise ValueError(
            '--train-split and --val-split give the same images: what is measured would be how well they are '
            'remembered. Choose two splits that the data set has.')
    names_train, names_eval = class_names(dataset_train), class_names(dataset_eval)
    if names_train != names_eval:
        raise ValueError(
            f'The splits must have the same classes. --train-split has {names_train}, --val-split has {names_eval}.')


def check_several_classes(names: list[str] | None) -> None:
    """Raise ``ValueError`` if a data set has one class only."""
    if names is not None and len(names) < 2:
        raise ValueError(
            f'The data set has one class only ({names[0]!r}): there is nothing to tell apart. An image folder needs a '
            f'sub-folder for each class.')


def check_num_classes(num_classes: int, names: list[str] | None) -> None:
    """Raise ``ValueError`` if a model of ``num_classes`` classes has no logit for some label of the data set."""
    if names is not None and len(names) > num_classes:
        raise ValueError(
            f'The data set has {len(names)} classes, more than the {num_classes} of the model (--num-classes).')


def build_train_loader(
        dataset: Dataset[Any],
        data_config: dict[str, Any],
        world: World,
        batch_size: int,
        seed: int,
        num_classes: int,
        workers: int = 0,
        on_bad_image: str = 'skip',
        input_img_mode: str | None = None,
        mixup: EpochMixup | None = None,
        aug_repeats: float = 0,
        aug_splits: int = 0,
        balanced: bool = False,
        **augmentation: Any,
) -> ResumableLoader | StreamLoader:
    """Create the loader of augmented training batches.

    Args:
        dataset: (image, label) pairs.
        data_config: Preprocessing, as ``loading.resolve_input`` gives it.
        world: The processes that train together.
        batch_size: Number of images in a batch of one process.
        seed: Of order and augmentation.
        num_classes: Number of classes that labels must stay below.
        workers: Number of processes that load data.
        on_bad_image: What to do with an image that cannot be read, ``'skip'`` or ``'error'``.
        input_img_mode: Mode of PIL images, that of the number of channels for ``None``.
        mixup: Mixes the images of a batch; labels become distributions (N, num_classes).
        aug_repeats: Number of views of an image that follow each other, 0 for one per epoch.
        aug_splits: Number of views of each image in a batch of then ``aug_splits * batch_size`` images, 0 for one.
        balanced: Whether each class comes up equally often.
        **augmentation: Further arguments of ``timm.data.create_loader``.

    Raises:
        ValueError: There are too few images for a batch, or a stream is to give its images in another order.
    """
    is_stream = isinstance(dataset, IterableDataset)
    of_any_image = {'--aug-repeats': aug_repeats, '--aug-splits': aug_splits, '--balanced-sampler': balanced}
    for option, value in of_any_image.items():
        if value and is_stream:
            raise ValueError(f'{option} needs a data set of which any image can be read, not a stream.')
    loader = _create_loader(
        SplitDataset(dataset, aug_splits) if aug_splits else dataset,
        data_config,
        world,
        workers,
        on_bad_image,
        input_img_mode,
        batch_size=batch_size,
        is_training=True,
        collate_fn=mixup,
        num_aug_splits=aug_splits,
        **augmentation,
    )
    if is_stream:
        return StreamLoader(loader, batch_size * world.size, mixup)
    order = dict(size=len(dataset), batch_size=batch_size, seed=seed, rank=world.rank, world_size=world.size)
    if balanced:
        del order['size']
        batches = BalancedBatches(labels_of(dataset, '--balanced-sampler'), **order)
    else:
        batches = RepeatedBatches(aug_repeats, **order) if aug_repeats else TrainBatches(**order)
    if len(batches) == 0:
        processes = f' times {world.size} processes' if world.size > 1 else ''
        raise ValueError(
            f'--batch-size {batch_size}{processes} is more than the {len(dataset)} training images; a batch must be '
            f'full.')
    _load_by_batches(
        loader,
        batches,
        input_size=data_config['input_size'],
        seed=seed,
        rank=world.rank,
        is_training=True,
        on_bad_image=on_bad_image,
        num_classes=num_classes,
    )
    if loader.random_erasing is not None:
        loader.random_erasing = SeededErasing(loader.random_erasing, batches, world.device)
    return ResumableLoader(loader, batches, mixup)


def build_eval_loader(
        dataset: Dataset[Any],
        data_config: dict[str, Any],
        world: World,
        batch_size: int,
        num_classes: int | None = None,
        workers: int = 0,
        on_bad_image: str = 'skip',
        input_img_mode: str | None = None,
):
    """Create the loader of evaluation batches, which has this process's share of the samples, each of them once.

    Args:
        dataset: (image, label) pairs.
        data_config: Preprocessing, as ``loading.resolve_input`` gives it.
        world: The processes that evaluate together.
        batch_size: Number of images in a batch of one process.
        num_classes: Number of classes that labels must stay below, ``None`` where they are no classes.
        workers: Number of processes that load data.
        on_bad_image: What to do with an image that cannot be read, ``'skip'`` or ``'error'``.
        input_img_mode: Mode of PIL images, that of the number of channels for ``None``.
    """
    loader = _create_loader(
        dataset,
        data_config,
        world,
        workers,
        on_bad_image,
        input_img_mode,
        batch_size=batch_size,
        interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config['crop_mode'],
    )
    if isinstance(dataset, IterableDataset):
        loader.loader.generator = torch.Generator()  # nothing is to be drawn from the global one
    else:
        batches = EvalBatches(len(dataset), batch_size, world.rank, world.size)
        _load_by_batches(
            loader,
            batches,
            input_size=data_config['input_size'],
            on_bad_image=on_bad_image,
            num_classes=num_classes,
        )
    return loader


def _check_memory(batch_size: int, input_size: Sequence[int]) -> None:
    """Raise ``ValueError`` for batches that the memory of the machine cannot hold, where it is known."""
    try:
        memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    except (AttributeError, OSError, ValueError):
        return
    needed = 4 * batch_size * math.prod(input_size)
    if needed > memory:
        raise ValueError(
            f'--batch-size and --img-size must fit into memory: {batch_size} images of '
            f'{" x ".join(map(str, input_size))} take {needed / 2 ** 30:.0f} GiB as numbers of fp32, and the machine '
            f'has {memory / 2 ** 30:.0f} GiB.')


def _create_loader(
        dataset: Dataset[Any],
        data_config: dict[str, Any],
        world: World,
        workers: int,
        on_bad_image: str,
        input_img_mode: str | None,
        **kwargs: Any,
):
    _check_memory(kwargs['batch_size'], data_config['input_size'])
    loader = create_loader(
        dataset,
        input_size=data_config['input_size'],
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=workers,
        distributed=world.size > 1,
        persistent_workers=workers > 0,
        pin_memory=world.device.type == 'cuda',
        device=world.device,
        **kwargs,
    )
    for attribute in ('loader', 'random_erasing'):
        if not hasattr(loader, attribute):
            raise unsupported('timm', timm.__version__, f'the attribute {attribute!r} of the loader of create_loader')
    if isinstance(dataset, AugMixDataset):
        dataset = dataset.dataset  # which has the first of the transforms
    source = dataset.dataset if isinstance(dataset, Subset) else dataset
    side = max(data_config['input_size'][1:]) / data_config.get('crop_pct', 1)
    transforms = [SizeLimit(side), dataset.transform]
    if isinstance(source, (VisionDataset, ImageStream)):
        # which hand out images in the mode of their files, where timm's readers convert them
        transforms.insert(0, partial(to_mode, mode=image_mode(data_config['input_size'][0], input_img_mode)))
    dataset.transform = Compose(transforms)
    if isinstance(source, ImageStream):
        source.on_bad_image = on_bad_image
    return loader


def _load_by_batches(loader, batches: Sampler, **kwargs: Any) -> None:
    """Let a timm loader, in place, take its batches from a ``BatchDataset`` made with ``kwargs``. All else stays."""
    inner = loader.loader
    loader.loader = DataLoader(
        BatchDataset(inner.dataset, inner.collate_fn, **kwargs),
        batch_size=None,
        sampler=batches,
        num_workers=inner.num_workers,
        pin_memory=inner.pin_memory,
        persistent_workers=inner.persistent_workers,
        generator=torch.Generator(),  # the base seed of the workers is not to be drawn from the global one
    )
