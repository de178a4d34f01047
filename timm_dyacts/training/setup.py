"""The objects of a training run, built from its options."""
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from timm.scheduler import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import NativeScaler, random_seed
from torch import nn
from torch.utils.data import Dataset

from ..data import ResumableLoader, class_names, create_dataset
from ..data.identity import fingerprint
from ..data.loaders import (
    build_eval_loader,
    build_train_loader,
    check_num_classes,
    check_several_classes,
    check_splits,
    image_mode,
)
from ..data.mixing import EpochMixup
from ..data.resumable import StreamLoader
from ..data.subsets import hold_out, pick_per_class
from ..device import build_amp
from ..loading import resolve_input
from ..lsuv import lsuv_
from ..run_folder import Start
from ..world import World
from .checkpoint import dataset_title, set_pretrained_cfg
from .class_weights import resolve_class_weights
from .config import TrainConfig
from .finetune import build_optimizer
from .initial_model import create_initial_model
from .schedule import PlateauState, build_scheduler
from .sharding import Sharding
from .split_bn import split_bn
from .task import Task, build_task

__all__ = ['Datasets', 'Setup', 'build_datasets', 'build_setup', 'build_validation_loader']


@dataclass(frozen=True)
class Datasets:
    """The data of a run.

    Attributes:
        train: The training split.
        validation: The validation split.
        held_out: Training images that are not trained on and tell which epoch is the best, ``None`` if there are none.
        class_names: Class names in the order of the labels, ``None`` if the data set does not say.
        class_weights: Weight of each class in the loss, ``None`` for none.
    """
    train: Dataset[Any]
    validation: Dataset[Any]
    held_out: Dataset[Any] | None
    class_names: list[str] | None
    class_weights: list[float] | None = None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a state keeps, to recognise the data by."""
        weights = {} if self.class_weights is None else dict(class_weights=self.class_weights)
        return dict(num_images=len(self.train), classes=self.class_names, files=fingerprint(self.train), **weights)


@dataclass(frozen=True)
class Setup:
    """The objects of a run. What they hold changes while it trains; which they are does not.

    Attributes:
        config: The options, with what depends on data and machine filled in.
        world: The processes that train together.
        datasets: The data.
        data_config: Preprocessing, as ``loading.resolve_input`` gives it.
        loader: The training batches.
        validation_loader: The validation batches of this process.
        held_out_loader: The batches of held-out training images of this process, if there are any.
        model: The model, on its device.
        start: Where its weights come from.
        task: Model and loss, and the moving average.
        optimizer: The optimizer.
        scheduler: The learning rate schedule, moved by every update or every epoch.
        num_epochs: Number of epochs of the schedule.
        autocast: Context of the forward pass.
        loss_scaler: For float16.
        sharding: How the processes share the model, ``None`` if each has the whole of it.
    """
    config: TrainConfig
    world: World
    datasets: Datasets
    data_config: dict[str, Any]
    loader: ResumableLoader | StreamLoader
    validation_loader: Any
    held_out_loader: Any
    model: nn.Module
    start: Start
    task: Task
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    num_epochs: int
    autocast: Callable[[], AbstractContextManager[Any]]
    loss_scaler: NativeScaler | None
    sharding: Sharding | None = None

    @property
    def loaders(self) -> dict[str, Any]:
        """timm's loaders, by the kind of images that they load."""
        loaders = {'training': self.loader.loader}
        if self.held_out_loader is not None:
            loaders['held-out training'] = self.held_out_loader
        return loaders | {'validation': self.validation_loader}

    @property
    def updates_per_epoch(self) -> int:
        """Number of updates of the weights in an epoch."""
        return -(-len(self.loader) // self.config.grad_accum_steps)

    def count_updates(self, epoch: int, steps: int) -> int:
        """Give the number of updates of the run once so many batches of an epoch are done."""
        return epoch * self.updates_per_epoch + -(-steps // self.config.grad_accum_steps)

    @property
    def step_options(self) -> dict[str, Any]:
        """The arguments of ``train_one_epoch`` that say how a batch is trained on."""
        return dict(
            autocast=self.autocast,
            loss_scaler=self.loss_scaler,
            clip_grad=self.config.clip_grad,
            clip_mode=self.config.clip_mode,
            channels_last=self.config.channels_last,
            grad_accum_steps=self.config.grad_accum_steps,
            world=self.world,
        )

    @property
    def mean_lr(self) -> float:
        """Learning rate, the mean of the parameter groups."""
        return sum(group['lr'] for group in self.optimizer.param_groups) / len(self.optimizer.param_groups)

    @property
    def ema_model(self) -> nn.Module | None:
        """The moving average of the model, if there is one."""
        return self.task.get_trainable_module(ema=True).module if self.config.model_ema else None

    @property
    def label_names(self) -> list[str] | None:
        """Class names in the order of the logits, ``None`` if not all logits have one."""
        names = self.datasets.class_names
        return names if names and len(names) == self.config.num_classes else None

    @property
    def architecture(self) -> str:
        """Name of the architecture, for messages and folders."""
        return self.model.pretrained_cfg['architecture']

    def new_name(self) -> str:
        """Name a folder for what is about to be done: as the options do, else after time, model and size."""
        size = self.data_config['input_size'][-1]
        return self.config.experiment or f'{datetime.now():%Y%m%d-%H%M%S}-{self.architecture}-{size}'

    @property
    def title(self) -> str:
        """Heading of the pictures."""
        return f'{self.architecture} on {dataset_title(self.config)}'

    @property
    def resumable(self) -> dict[str, Any]:
        """The objects whose states a resumed run needs, by name."""
        models = dict(model=self.model)
        if self.ema_model is not None:
            models['ema'] = self.ema_model
        parts = dict(models, optimizer=self.optimizer)
        if self.sharding is not None:
            parts = self.sharding.parts(models, self.optimizer)
        if self.loss_scaler is not None:
            parts['loss_scaler'] = self.loss_scaler
        if isinstance(self.scheduler, PlateauLRScheduler):
            parts['schedule'] = PlateauState(self.scheduler)
        return parts

    def whole(self, model: nn.Module | None) -> nn.Module | None:
        """Give the model or its average to who saves it, the primary process. All processes must call this."""
        return model if self.sharding is None or model is None else self.sharding.whole(model)


def build_setup(config: TrainConfig, world: World, initialize: bool) -> Setup:
    """Build the objects of a run.

    Args:
        config: The options.
        world: The processes that train together.
        initialize: Whether the weights are to be initialised as ``--init`` says. A run that is resumed has its own.

    Raises:
        OSError: Data or weights could not be read.
        ValueError: Options that do not fit the data, the model or the machine.
    """
    random_seed(config.seed)  # the same in all processes, for the same initial weights
    datasets, config = build_datasets(config, world)
    sharding = Sharding(config, world) if config.dist_strategy == 'fsdp' else None
    model, start = create_initial_model(config)
    data_config = resolve_input(model, config.preprocessing)
    set_pretrained_cfg(model, data_config, from_pretrained=start.pretrained and start.sha256 is None)
    model = _prepare_model(model, config, world)
    loader = _build_train_loader(config, datasets.train, data_config, world)
    validation_loader = build_validation_loader(config, datasets.validation, data_config, world)
    held_out_loader = None
    if datasets.held_out is not None:
        held_out_loader = build_validation_loader(config, datasets.held_out, data_config, world)
    if config.init == 'lsuv' and initialize:
        loader.set_position(0)
        lsuv_(model, next(iter(loader))[0].to(next(model.parameters()).device))

    random_seed(config.seed, world.rank)
    autocast, loss_scaler = build_amp(world.device, config.amp, config.amp_dtype)
    task = build_task(config, model, world.device, datasets.class_weights)
    if config.model_ema:
        task.setup_ema(
            decay=config.model_ema_decay,
            use_warmup=config.model_ema_warmup,
            device=torch.device('cpu') if config.model_ema_force_cpu else None,
        )
    if sharding is not None:
        sharding.shard(model, task.get_trainable_module(ema=True) if config.model_ema else None)
    optimizer = build_optimizer(config, model)
    if sharding is not None:
        sharding.check_optimizer()
    scheduler, num_epochs = build_scheduler(config, optimizer, -(-len(loader) // config.grad_accum_steps))
    return Setup(
        config=config,
        world=world,
        datasets=datasets,
        data_config=data_config,
        loader=loader,
        validation_loader=validation_loader,
        held_out_loader=held_out_loader,
        model=model,
        start=start,
        task=task,
        optimizer=optimizer,
        scheduler=scheduler,
        num_epochs=num_epochs,
        autocast=autocast,
        loss_scaler=loss_scaler,
        sharding=sharding,
    )


def build_validation_loader(config: TrainConfig, dataset: Dataset[Any], data_config: dict[str, Any], world: World):
    """Create the loader of validation batches: this process's share of the samples, each of them once."""
    return build_eval_loader(
        dataset,
        data_config,
        world,
        batch_size=config.validation_batch_size or config.batch_size,
        num_classes=config.num_classes,
        workers=config.workers,
        on_bad_image=config.on_bad_image,
        input_img_mode=config.input_img_mode,
    )


def build_datasets(config: TrainConfig, world: World) -> tuple[Datasets, TrainConfig]:
    """Create the splits of a run, and fill in the options that depend on them and on the machine.

    Args:
        config: The options.
        world: The processes that train together.

    Raises:
        OSError: The data could not be read.
        ValueError: Options that do not fit the data.
    """
    in_chans = config.in_chans or 3

    def create(split: str, **kwargs: Any) -> Dataset[Any]:
        return create_dataset(
            config.dataset,
            root=config.data_dir,
            split=split,
            labels=config.labels,
            class_map=config.class_map,
            download=config.dataset_download,
            input_img_mode=image_mode(in_chans, config.input_img_mode),
            input_key=config.input_key,
            target_key=config.target_key,
            batch_size=config.batch_size,
            **kwargs,
        )

    train = create(config.train_split, is_training=True, seed=config.seed, num_samples=config.train_num_samples)
    validation = create(config.val_split, num_samples=config.val_num_samples)
    names = class_names(train)
    check_several_classes(names)
    check_splits(train, validation)
    num_classes = config.num_classes
    if num_classes is None:
        if names is None:
            raise ValueError(f'--num-classes is needed: the data set {config.dataset!r} does not name its classes.')
        num_classes = len(names)
    check_num_classes(num_classes, names)
    config = dataclasses.replace(
        config,
        num_classes=num_classes,
        in_chans=in_chans,
        device=world.device.type,
        lr=config.effective_lr(world.size),
    )
    held_out = None
    if config.images_per_class is not None:
        train = pick_per_class(train, config.images_per_class, config.seed)
    if config.val_fraction:
        train, held_out = hold_out(train, config.val_fraction, config.seed)
    weights = None
    if config.class_weights is not None:
        weights = resolve_class_weights(config.class_weights, train, names, num_classes)
    return Datasets(train, validation, held_out, names, weights), config


def _prepare_model(model: nn.Module, config: TrainConfig, world: World) -> nn.Module:
    """Put a model on its device, ready to be trained."""
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True)
    if config.sync_bn and world.size > 1:
        if world.device.type == 'cpu':
            raise ValueError('--sync-bn needs GPUs: PyTorch synchronises BatchNorm on them alone.')
        model = convert_sync_batchnorm(model)
    if config.split_bn:
        model = split_bn(model, max(config.aug_splits, 2))
    if config.dist_strategy == 'fsdp':
        return model  # of which each device gets a share, in the one memory format that can be shared
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    return model.to(device=world.device, memory_format=memory_format)


def _build_train_loader(
        config: TrainConfig,
        dataset: Dataset[Any],
        data_config: dict[str, Any],
        world: World,
) -> ResumableLoader | StreamLoader:
    """Create the loader of training batches. Mixup and cutmix turn their labels into distributions."""
    mixup = None
    if config.mixes:
        _check_cutmix(config, data_config['input_size'])
        mixup = EpochMixup(
            config.mixup_off_epoch,
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            cutmix_minmax=config.cutmix_minmax,
            prob=config.mixup_prob,
            switch_prob=config.mixup_switch_prob,
            mode=config.mixup_mode,
            label_smoothing=config.smoothing,
            num_classes=config.num_classes,
        )
    return build_train_loader(
        dataset,
        data_config,
        world,
        batch_size=config.batch_size,
        seed=config.seed,
        num_classes=config.num_classes,
        workers=config.workers,
        on_bad_image=config.on_bad_image,
        input_img_mode=config.input_img_mode,
        mixup=mixup,
        aug_repeats=config.aug_repeats,
        aug_splits=config.aug_splits,
        balanced=config.balanced_sampler,
        no_aug=config.no_aug,
        re_prob=config.reprob,
        re_mode=config.remode,
        re_count=config.recount,
        re_split=config.resplit,
        train_crop_mode=config.train_crop_mode,
        scale=config.scale,
        ratio=config.ratio,
        hflip=config.hflip,
        vflip=config.vflip,
        color_jitter=config.color_jitter,
        color_jitter_prob=config.color_jitter_prob,
        grayscale_prob=config.grayscale_prob,
        gaussian_blur_prob=config.gaussian_blur_prob,
        auto_augment=config.aa,
        interpolation=data_config['interpolation'] if config.no_aug else config.train_interpolation,
    )


def _check_cutmix(config: TrainConfig, input_size: Sequence[int]) -> None:
    """Raise ``ValueError`` if images are too small for the sides that ``--cutmix-minmax`` asks for."""
    for side in input_size[1:] if config.cutmix_minmax else ():
        smallest, largest = (int(share * side) for share in config.cutmix_minmax)
        if smallest == largest:
            raise ValueError(
                f'--cutmix-minmax must leave a choice of sides in whole pixels, got {list(config.cutmix_minmax)} for '
                f'images of {side} pixels.')
