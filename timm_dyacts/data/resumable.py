"""Batches that are a pure function of (seed, epoch, position), so that a run can stop and go on anywhere.

timm's loader draws order and augmentation from global random generators, of which each worker process has its own; what
a batch holds then depends on all batches before and on the number of workers. Here the sampler hands out whole batches
with the epoch that they belong to, and each image is augmented under a seed made of (seed, epoch, index). A batch is
the same whenever, wherever and by however many processes it is made.
"""
import hashlib
import random
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..messages import one_line
from ..rng import isolated_rng
from .errors import UNREADABLE, DataError
from .mixing import EpochMixup

__all__ = [
    'BalancedBatches',
    'Batch',
    'BatchDataset',
    'EvalBatches',
    'RepeatedBatches',
    'ResumableLoader',
    'SeededErasing',
    'StreamLoader',
    'TrainBatches',
    'without_worker_trace',
]

# The first word of a seed says what is drawn, so that no two purposes ever share one.
_ORDER, _SAMPLE, _MIXUP, _ERASING = range(4)
_MAX_REPLACEMENTS = 10


class Batch(NamedTuple):
    """Which batch to make: its samples, and its place in the run.

    Attributes:
        epoch: Epoch, counted from 0.
        number: Position in the epoch, counted from 0.
        indices: Indices of the samples.
        places: The place of each in the order of the epoch, where a sample comes more than once; else empty.
    """
    epoch: int
    number: int
    indices: list[int]
    places: Sequence[int] = ()

    def keys(self) -> list[tuple[int, ...]]:
        """Give what each sample is drawn under: epoch and index, and where it comes more than once, its place."""
        keys = [(self.epoch, index) for index in self.indices]
        return [(*key, place) for key, place in zip(keys, self.places, strict=True)] if self.places else keys


def _derive_seeds(*key: int) -> tuple[int, ...]:
    """Derive four seeds of 32 bits by a hash, so that neighbouring keys do not give neighbouring seeds."""
    digest = hashlib.blake2b(struct.pack(f'<{len(key)}Q', *key), digest_size=16).digest()
    return struct.unpack('<4I', digest)


def _seed_rng(*key: int, device: torch.device | None = None) -> None:
    seeds = _derive_seeds(*key)
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    # Not torch.manual_seed: in a worker process it would queue a call for a GPU that is never touched there.
    torch.default_generator.manual_seed(seeds[2])
    if device is not None and device.type == 'cuda':
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seeds[3])


class TrainBatches(Sampler[Batch]):
    """Full batches in an order that is shuffled anew in every epoch: those of one process.

    All processes together train on consecutive stretches of ``batch_size * world_size`` samples of one order, so that
    two processes see in a step what one process with the doubled batch sees.

    Args:
        size: Number of samples.
        batch_size: Number of samples in a batch of one process.
        seed: Of the order.
        rank: Number of this process.
        world_size: Number of processes.
    """

    def __init__(self, size: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return self.size // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator()
        generator.manual_seed(_derive_seeds(_ORDER, self.seed, self.epoch)[0])
        order = self._draw_order(generator)
        for number in range(self.start, len(self)):
            first = (number * self.world_size + self.rank) * self.batch_size
            mine = range(first, first + self.batch_size)
            yield Batch(self.epoch, number, [order[i] for i in mine], mine if self._repeats_samples else ())

    _repeats_samples = False

    def _draw_order(self, generator: torch.Generator) -> list[int]:
        """Draw the samples of an epoch."""
        return torch.randperm(self.size, generator=generator).tolist()


class BalancedBatches(TrainBatches):
    """Full batches in which each class comes up equally often, in an order that is drawn anew in every epoch.

    An epoch has as many samples as there are, the same number of each class but for one. The samples of a class take
    turns: those of a small one come up several times in an epoch, each time augmented otherwise; of a large one other
    samples are left out in every epoch.

    Args:
        labels: The label of each sample.
        **kwargs: Arguments of ``TrainBatches`` but ``size``.
    """

    _repeats_samples = True

    def __init__(self, labels: Sequence[int], **kwargs: Any) -> None:
        super().__init__(size=len(labels), **kwargs)
        labels = torch.tensor(labels)
        self.classes: list[Tensor] = [(labels == label).nonzero().flatten() for label in labels.unique()]

    def _draw_order(self, generator: torch.Generator) -> list[int]:
        share, rest = divmod(self.size, len(self.classes))
        with_one_more = set(torch.randperm(len(self.classes), generator=generator)[:rest].tolist())
        drawn = []
        for number, members in enumerate(self.classes):
            count = share + (number in with_one_more)
            turns = [torch.randperm(len(members), generator=generator) for _ in range(-(-count // len(members)))]
            drawn += [members[turn] for turn in turns[:-1]]
            if turns:
                drawn.append(members[turns[-1]][:count - len(members) * (len(turns) - 1)])
        order = torch.cat(drawn)
        return order[torch.randperm(len(order), generator=generator)].tolist()


class RepeatedBatches(TrainBatches):
    """Full batches of several views of each image: repeated augmentation, in the order of timm's ``RepeatAugSampler``.

    The views of an image follow each other, shared out among the processes, and an epoch has as many batches as one
    without repeats: it sees fewer images.

    Args:
        repeats: Number of views.
        **kwargs: Arguments of ``TrainBatches``.
    """

    def __init__(self, repeats: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sampler: RepeatAugSampler = RepeatAugSampler(
            range(self.size),
            num_replicas=self.world_size,
            rank=self.rank,
            num_repeats=repeats,
            selected_round=256 if self.size >= 256 else 0,  # timm before 1.0.31 would leave nothing of small data sets
        )

    def __len__(self) -> int:
        return len(self.sampler) // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        self.sampler.set_epoch(_derive_seeds(_ORDER, self.seed, self.epoch)[0])  # timm takes it for the seed
        order = list(self.sampler)
        for number in range(self.start, len(self)):
            mine = range(number * self.batch_size, (number + 1) * self.batch_size)
            places = [i * self.world_size + self.rank for i in mine]
            yield Batch(self.epoch, number, [order[i] for i in mine], places)


class EvalBatches(Sampler[Batch]):
    """All samples in their order, each exactly once and without padding; every ``world_size``-th is of this process.

    Args:
        size: Number of samples.
        batch_size: Number of samples in a batch; the last one may have fewer.
        rank: Number of this process.
        world_size: Number of processes.
    """

    def __init__(self, size: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.indices: range = range(rank, size, world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for number in range(len(self)):
            first = number * self.batch_size
            yield Batch(0, number, list(self.indices[first:first + self.batch_size]))


class BatchDataset(Dataset):
    """A data set of which each item is a whole batch, made under seeds of its own.

    Args:
        dataset: (image, label) pairs, transformed.
        collate_fn: Makes a batch of a list of them.
        input_size: Channels, height and width of the images.
        seed: Of the augmentation.
        rank: Number of this process; tells mixup of different processes apart.
        is_training: Whether an image that cannot be read gives its place to the next one (a training batch must be
            full) or is left out (an evaluation must not count another one twice).
        on_bad_image: What to do with an image that cannot be read, ``'skip'`` or ``'error'``.
        num_classes: Number of classes that labels must stay below.

    Attributes:
        unreadable: Which samples could not be read so far, shape (N,), bool, shared with the workers.
    """

    def __init__(
            self,
            dataset: Dataset[Any],
            collate_fn: Callable[[list[Any]], tuple[Tensor, Tensor]],
            input_size: tuple[int, int, int],
            seed: int = 0,
            rank: int = 0,
            is_training: bool = False,
            on_bad_image: str = 'skip',
            num_classes: int | None = None,
    ) -> None:
        self.dataset = dataset
        self.collate_fn = collate_fn
        self.input_size = input_size
        self.seed = seed
        self.rank = rank
        self.is_training = is_training
        self.on_bad_image = on_bad_image
        self.num_classes = num_classes
        self.unreadable: Tensor = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()

    def __getitem__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        with isolated_rng():
            samples = [sample for key in batch.keys() if (sample := self._load(*key)) is not None]
            if not samples:
                return torch.empty(0, *self.input_size, dtype=torch.uint8), torch.empty(0, dtype=torch.long)
            _seed_rng(_MIXUP, self.seed, batch.epoch, batch.number, self.rank)
            return self.collate_fn(samples)

    def _load(self, epoch: int, index: int, *place: int) -> tuple[Any, int] | None:
        for shift in range(_MAX_REPLACEMENTS if self.is_training else 1):
            candidate = (index + shift) % len(self.dataset)
            _seed_rng(_SAMPLE, self.seed, epoch, candidate, *place)
            try:
                image, label = self.dataset[candidate]
            except UNREADABLE as e:
                reason = e
                if self.on_bad_image == 'error':
                    raise DataError(
                        f'{self.name(candidate)} cannot be read ({one_line(e)}); --on-bad-image skip leaves it out.'
                    ) from e
                self.unreadable[candidate] = True
                continue
            if self.num_classes is not None and not 0 <= int(label) < self.num_classes:
                raise DataError(
                    f'{self.name(candidate)} has label {int(label)}, beyond --num-classes {self.num_classes}.')
            return image, label
        if not self.is_training:
            return None
        raise DataError(
            f'{_MAX_REPLACEMENTS} images in a row cannot be read, the last one {self.name(candidate)} '
            f'({one_line(reason)}).')

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        """Give what to call a sample in a message."""
        filename = getattr(self.dataset, 'filename', None)
        if filename:
            return one_line(filename(index, absolute=True))
        samples = getattr(self.dataset, 'samples', None)  # of torchvision's folders
        return one_line(samples[index][0]) if samples else f'sample {index}'


class SeededErasing:
    """``timm.data.random_erasing.RandomErasing`` with a seed for each image, in place of the global generators.

    Where a batch shows its samples several times, one split after the other, each time has a seed of its own.

    Args:
        erasing: Erases a part of an image (C, H, W). If its ``num_splits`` is 2 or more, it is kept away from the first
            of so many parts of a batch.
        batches: The batches that will come, in their order.
        device: Device of the images.
    """

    def __init__(self, erasing: RandomErasing, batches: TrainBatches, device: torch.device) -> None:
        self.erasing = erasing
        self.batches = batches
        self.device = device
        self.expected: Iterator[Batch] = iter(())

    def start_epoch(self) -> None:
        """Expect the first batch of the epoch that ``batches`` stands at."""
        self.expected = iter(self.batches)

    def __call__(self, images: Tensor) -> Tensor:
        keys = next(self.expected).keys()
        spared = len(images) // self.erasing.num_splits if self.erasing.num_splits > 1 else 0
        with isolated_rng(self.device):
            for number, image in enumerate(images):
                if number >= spared:
                    split, sample = divmod(number, len(keys))
                    _seed_rng(
                        _ERASING, self.batches.seed, *keys[sample], *([split] if split else []), device=self.device)
                    self.erasing(image)
        return images


class ResumableLoader:
    """The training batches of one epoch, from any position in it on.

    Args:
        loader: Brings the batches to the device (``timm.data.loader.PrefetchLoader``).
        batches: What the loader loads.
        mixup: What mixes its batches, if anything does.
    """

    resumes_within_epoch = True

    def __init__(self, loader: Any, batches: TrainBatches, mixup: EpochMixup | None = None) -> None:
        self.loader = loader
        self.batches = batches
        self.mixup = mixup

    @property
    def samples_per_step(self) -> int:
        """Samples of a step, of all processes together."""
        return self.batches.batch_size * self.batches.world_size

    def set_position(self, epoch: int, samples: int = 0) -> int:
        """Continue in an epoch after some samples.

        Args:
            epoch: Epoch, counted from 0.
            samples: Samples of the epoch that all processes together have trained on.

        Returns:
            The number of the first step to come. Where the samples fill no whole number of steps, as may be when the
            number of processes has changed, the rest of the step that they reach into is left out.
        """
        if self.mixup is not None:
            self.mixup.set_epoch(epoch)
        self.batches.epoch = epoch
        self.batches.start = min(-(-samples // self.samples_per_step), len(self))
        return self.batches.start

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.batches.start == len(self):
            return  # older releases of timm fail on an empty loader
        if self.loader.random_erasing is not None:
            self.loader.random_erasing.start_epoch()
        yield from without_worker_trace(self.loader)


class StreamLoader:
    """The training batches of a data set that can only be read from its beginning. Resumes at the start of an epoch.

    Args:
        loader: As ``timm.data.create_loader`` gives it for an iterable data set.
        samples_per_step: Samples of a step, of all processes together.
        mixup: What mixes its batches, if anything does.
    """

    resumes_within_epoch = False

    def __init__(self, loader: Any, samples_per_step: int, mixup: EpochMixup | None = None) -> None:
        self.loader = loader
        self.samples_per_step = samples_per_step
        self.mixup = mixup
        self.start = 0

    def set_position(self, epoch: int, samples: int = 0) -> int:
        """Go to the start of an epoch, or to its end if ``samples`` is not 0, and give the step to come."""
        if self.mixup is not None:
            self.mixup.set_epoch(epoch)
        self.loader.dataset.set_epoch(epoch)
        self.start = len(self) if samples else 0
        return self.start

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.start == 0:
            yield from without_worker_trace(self.loader)


def without_worker_trace(loader: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate, and shorten the ``DataError`` of a worker process to its message."""
    try:
        yield from loader
    except DataError as e:
        raise DataError(str(e).strip().splitlines()[-1].rpartition('DataError: ')[2]) from None
