"""Batches that do not depend on the past: the same for any number of workers and processes, from any position."""
import random

import numpy as np
import pytest
import torch
from timm.data import FastCollateMixup, create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.loader import fast_collate
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader

from timm_dyacts.data import resumable
from timm_dyacts.data.resumable import (
    BalancedBatches,
    Batch,
    BatchDataset,
    DataError,
    EvalBatches,
    RepeatedBatches,
    ResumableLoader,
    SeededErasing,
    StreamLoader,
    TrainBatches,
)
from timm_dyacts.rng import isolated_rng

pytest.importorskip('sklearn.datasets')


def digits(collate_fn=fast_collate, **kwargs):
    """The digits with the strongest augmentation there is, as batches."""
    from timm_dyacts.data import DigitsDataset
    dataset = DigitsDataset('train')
    dataset.transform = create_transform(
        (3, 32, 32), is_training=True, use_prefetcher=True, auto_augment='rand-m9-mstd0.5', color_jitter=0.4, vflip=0.5)
    return BatchDataset(dataset, collate_fn, (3, 32, 32), seed=1, is_training=True, **kwargs)


def load(dataset, batches, workers=0):
    return list(DataLoader(dataset, batch_size=None, sampler=batches, num_workers=workers))


def assert_same(ours, theirs):
    for (images, labels), (other_images, other_labels) in zip(ours, theirs, strict=True):
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)


@pytest.mark.parametrize('size, batch_size, world_size', [(10, 3, 1), (64, 8, 2), (100, 7, 3)])
def test_an_epoch_shows_each_sample_at_most_once(size, batch_size, world_size):
    shares = [TrainBatches(size, batch_size, seed=0, rank=r, world_size=world_size) for r in range(world_size)]
    seen = [index for share in shares for batch in share for index in batch.indices]
    assert len(seen) == len(set(seen)) == size // (batch_size * world_size) * batch_size * world_size
    assert {len(share) for share in shares} == {size // (batch_size * world_size)}


def test_two_processes_train_on_the_batches_of_one():
    one = [batch.indices for batch in TrainBatches(70, 8, seed=3)]
    two = [[batch.indices for batch in TrainBatches(70, 4, seed=3, rank=rank, world_size=2)] for rank in range(2)]
    assert one == [first + second for first, second in zip(*two, strict=True)]


@pytest.mark.parametrize('repeats', [3, 1.5, 1])
@pytest.mark.parametrize('size', [40, 600])
def test_repeats_are_in_the_order_of_timm(size, repeats):
    """Which takes its epoch for a seed, and rounds large data sets down to multiples of 256 samples."""
    for rank in range(2):
        batches = RepeatedBatches(repeats, size=size, batch_size=8, seed=3, rank=rank, world_size=2)
        batches.epoch = 5
        sampler = RepeatAugSampler(
            range(size), num_replicas=2, rank=rank, num_repeats=repeats, selected_round=256 if size > 256 else 0)
        sampler.set_epoch(resumable._derive_seeds(resumable._ORDER, 3, 5)[0])
        order = list(sampler)
        given = [index for batch in batches for index in batch.indices]
        assert given == order[:len(order) // 8 * 8]
        assert len(batches) == len(order) // 8 == {40: 2, 600: 32}[size]


def test_repeats_are_shared_out_and_each_is_another_view():
    def keys(batch_size, world_size, start=0):
        shares = [RepeatedBatches(3, size=60, batch_size=batch_size, seed=3, rank=rank, world_size=world_size)
                  for rank in range(world_size)]
        for share in shares:
            share.start = start
        return [sorted(key for batch in step for key in batch.keys()) for step in zip(*shares, strict=True)]

    assert keys(12, 1) == keys(6, 2) == keys(4, 3), 'processes see in a step what one sees'
    assert keys(6, 2)[3:] == keys(6, 2, start=3)
    [first, *_] = keys(6, 2)
    assert len(set(first)) == 12 and len({index for _, index, _ in first}) == 4

    dataset = digits()
    views = [image for image in dataset[Batch(0, 0, [7, 7, 7], [0, 1, 2])][0]]
    assert not any(torch.equal(a, b) for a, b in zip(views, views[1:], strict=False))
    assert torch.equal(dataset[Batch(0, 4, [7], [2])][0][0], views[2]), 'the same place shows the same view'


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        batches = TrainBatches(50, 10, seed)
        batches.epoch = epoch
        torch.manual_seed(random.randrange(1000))
        return [index for batch in batches for index in batch.indices]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 1) != order(1, 0)


# Of class 0 there are 3 samples, of class 4 (there is no class 2) 30, and so on
LABELS = [label for label, count in ((0, 3), (1, 12), (3, 7), (4, 30)) for _ in range(count)]


def balanced(epoch=0, **kwargs):
    batches = BalancedBatches(LABELS, **dict(batch_size=4, seed=0) | kwargs)
    batches.epoch = epoch
    return batches


@pytest.mark.parametrize('epoch', range(3))
def test_each_class_comes_up_equally_often(epoch):
    order = [index for batch in balanced(epoch) for index in batch.indices]
    assert [sum(LABELS[index] == label for index in order) for label in (0, 1, 3, 4)] == [13] * 4
    times = [order.count(index) for index in range(len(LABELS))]
    for label in (0, 1, 3, 4):
        of_class = [count for count, its in zip(times, LABELS, strict=True) if its == label]
        assert max(of_class) - min(of_class) <= 1, 'they take turns'


def test_over_the_epochs_all_samples_come_up():
    seen = {index for epoch in range(12) for batch in balanced(epoch) for index in batch.indices}
    assert seen == set(range(len(LABELS)))
    assert [list(balanced(0))] != [list(balanced(1))]


def test_balanced_batches_do_not_depend_on_processes_or_on_the_past():
    one = [(batch.indices, [*batch.places]) for batch in balanced(1, batch_size=8)]
    two = [[(batch.indices, [*batch.places]) for batch in balanced(1, rank=rank, world_size=2)] for rank in range(2)]
    assert one == [(a + b, c + d) for (a, c), (b, d) in zip(*two, strict=True)]
    later = balanced(1, batch_size=8)
    later.start = 3
    assert [batch.indices for batch in later] == [indices for indices, _ in one[3:]]


def test_a_sample_that_comes_up_again_is_augmented_otherwise():
    batches = BalancedBatches([0, *[1] * 63], batch_size=32, seed=0)
    dataset = digits()
    images = [image for batch in batches for index, image in zip(batch.indices, dataset[batch][0], strict=True)
              if index == 0]
    assert len(images) == 32
    assert len({image.numpy().tobytes() for image in images}) == 32


@pytest.mark.parametrize('size, batch_size, world_size', [(10, 4, 1), (11, 4, 2), (2, 4, 3)])
def test_evaluation_sees_each_sample_once(size, batch_size, world_size):
    shares = [EvalBatches(size, batch_size, rank, world_size) for rank in range(world_size)]
    assert sorted(index for share in shares for batch in share for index in batch.indices) == list(range(size))
    assert all(len(list(share)) == len(share) for share in shares)


@pytest.mark.parametrize('mixup', [False, True])
def test_a_batch_is_the_same_for_any_workers_and_any_past(mixup):
    collate_fn = FastCollateMixup(0.2, 1.0, num_classes=10) if mixup else fast_collate
    batches = TrainBatches(1437, 16, seed=1)
    batches.start = len(batches) - 5
    expected = load(digits(collate_fn), batches)
    assert len(expected) == 5
    assert_same(expected, load(digits(collate_fn), batches, workers=2))
    np.random.seed(5), torch.manual_seed(5), random.seed(5)
    batches.start += 3
    assert_same(expected[3:], load(digits(collate_fn), batches))


def test_a_sample_is_augmented_anew_in_each_epoch():
    dataset = digits()
    (first, _), (same, _), (other, _) = (dataset[Batch(epoch, 0, [7])] for epoch in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_loading_leaves_the_global_generators_alone():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = draw()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    digits()[Batch(0, 0, [1, 2, 3])]
    with isolated_rng():
        draw()
    assert draw() == expected


def test_erasing_is_per_image_and_resumes():
    def erase(start, batch_size=8):
        batches = TrainBatches(32, batch_size, seed=0)
        batches.start = start
        erasing = SeededErasing(
            RandomErasing(probability=0.9, mode='pixel', device='cpu'), batches, torch.device('cpu'))
        erasing.start_epoch()
        images = [erasing(torch.zeros(batch_size, 3, 16, 16)) for _ in range(start, len(batches))]
        return torch.cat(images)

    whole = erase(0)
    assert 0.05 < (whole != 0).float().mean() < 0.6
    assert torch.equal(whole[16:], erase(2))
    assert torch.equal(whole, erase(0, batch_size=16)), 'independent of how the order is cut into batches'


def test_erasing_spares_the_first_split():
    batches = TrainBatches(8, 4, seed=0)
    erasing = RandomErasing(probability=1, mode='pixel', device='cpu', num_splits=3)
    seeded = SeededErasing(erasing, batches, torch.device('cpu'))
    seeded.start_epoch()
    first, second, third = seeded(torch.zeros(12, 3, 16, 16)).chunk(3)
    assert not first.any() and all(image.any() for image in (*second, *third))
    assert not any(torch.equal(a, b) for a, b in zip(second, third, strict=True)), 'each split is erased by itself'
    seeded.start_epoch()
    assert torch.equal(seeded(torch.zeros(12, 3, 16, 16)), torch.cat([first, second, third]))


def test_position_in_an_epoch():
    def first_step(samples, batch_size, world_size=1):
        loader = ResumableLoader(None, TrainBatches(100, batch_size, seed=0, world_size=world_size))
        return loader.set_position(2, samples)

    assert first_step(0, 8) == 0
    assert first_step(24, 8) == 3
    assert first_step(32, 8, world_size=2) == 2
    assert first_step(24, 8, world_size=2) == 2, 'the rest of a step that has been begun is left out'
    assert first_step(96, 8) == 12 == 100 // 8


def test_a_stream_resumes_between_epochs_only():
    class Stream(list):
        epoch = None
        dataset = property(lambda self: self)

        def set_epoch(self, epoch):
            self.epoch = epoch

    stream = Stream([1, 2, 3])
    loader = StreamLoader(stream, samples_per_step=8)
    assert not loader.resumes_within_epoch
    assert (loader.set_position(2), list(loader), stream.epoch) == (0, [1, 2, 3], 2)
    assert (loader.set_position(2, samples=24), list(loader)) == (3, []), 'trained, and to be evaluated'


class Broken(torch.utils.data.Dataset):
    """Ten samples, of which some cannot be read."""

    def __init__(self, *broken):
        self.broken = broken

    def __getitem__(self, index):
        if index in self.broken:
            raise OSError('cannot identify image file')
        return torch.full((1, 2, 2), index, dtype=torch.uint8), index

    def __len__(self):
        return 10


@pytest.mark.parametrize('workers', [0, 1])
def test_unreadable_images_are_replaced_in_training_and_left_out_of_evaluation(workers):
    for is_training, expected in ((True, [3, 4, 3]), (False, [3])):
        dataset = BatchDataset(Broken(2, 9, 0, 1), fast_collate, (1, 2, 2), is_training=is_training)
        [(_, labels)] = load(dataset, [Batch(0, 0, [3, 4, 2] if is_training else [9, 3, 2])], workers)
        assert labels.tolist() == expected
        assert dataset.unreadable.nonzero().flatten().tolist() == ([2] if is_training else [2, 9])


def test_a_batch_without_a_readable_image_is_empty():
    images, labels = BatchDataset(Broken(1, 2), fast_collate, (1, 2, 2))[Batch(0, 0, [1, 2])]
    assert images.shape == (0, 1, 2, 2) and labels.shape == (0,)


def test_unreadable_images_can_be_an_error():
    with pytest.raises(DataError, match='sample 1 cannot be read .*cannot identify.*--on-bad-image skip'):
        BatchDataset(Broken(1), fast_collate, (1, 2, 2), on_bad_image='error')[Batch(0, 0, [0, 1])]
    with pytest.raises(DataError, match='10 images in a row cannot be read'):
        BatchDataset(Broken(*range(10)), fast_collate, (1, 2, 2), is_training=True)[Batch(0, 0, [0])]


def test_labels_beyond_the_classes():
    with pytest.raises(DataError, match='sample 7 has label 7, beyond --num-classes 5'):
        BatchDataset(Broken(), fast_collate, (1, 2, 2), num_classes=5)[Batch(0, 0, [1, 7])]
