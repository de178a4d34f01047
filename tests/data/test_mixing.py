"""Mixup and cutmix that end with some epoch, and several views of each image."""
import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset

from timm_dyacts.data.mixing import EpochMixup, SplitDataset


class Numbers(Dataset):
    """Images of one shade each, and their class."""

    def __getitem__(self, index):
        return torch.full((3, 4, 4), 10 * index, dtype=torch.uint8), index % 2

    def __len__(self):
        return 8


@pytest.mark.parametrize('workers', [0, 1])
def test_mixup_ends_in_worker_processes_too(workers):
    mixup = EpochMixup(1, mixup_alpha=1.0, num_classes=2, label_smoothing=0.0)
    loader = DataLoader(
        Numbers(), batch_size=8, collate_fn=mixup, num_workers=workers, persistent_workers=workers > 0)
    labels = []
    for epoch in range(3):
        mixup.set_epoch(epoch)
        [(images, targets)] = loader
        assert targets.shape == (8, 2), 'labels stay distributions'
        labels.append(targets)
    assert ((labels[0] > 0) & (labels[0] < 1)).any()
    for unmixed in labels[1:]:
        assert unmixed[:, 1].tolist() == [0, 1] * 4
    assert images[:, 0, 0, 0].tolist() == [10 * i for i in range(8)]


def test_without_an_end():
    mixup = EpochMixup(mixup_alpha=1.0)
    mixup.set_epoch(10 ** 6)
    assert mixup.mixup_enabled


def test_views_of_an_image():
    class Photos(Dataset):
        transform = None

        def __getitem__(self, index):
            noise = np.random.default_rng(index).integers(0, 256, (20, 20, 3))
            return self.transform(Image.fromarray(noise.astype(np.uint8))), index

        def __len__(self):
            return 4

    dataset = SplitDataset(Photos(), 3)
    dataset.transform = create_transform(
        (3, 16, 16), is_training=True, auto_augment='augmix-m5-w2', use_prefetcher=True, separate=True)
    views, label = dataset[2]
    assert len(views) == 3 and label == 2 and views[0].shape == (3, 16, 16)
    assert not np.array_equal(views[1], views[2])
    assert dataset.filename(2) == 'sample 2'
    Photos.filename = lambda self, index, absolute=False: f'{"/photos/" if absolute else ""}{index}.png'
    assert dataset.filename(2, absolute=True) == '/photos/2.png'
