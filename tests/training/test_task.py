"""The training loss that options ask for, against its definition."""
import pytest
import torch
import torch.nn.functional as F

import timm_dyacts  # noqa: F401
from timm_dyacts.training import TrainConfig
from timm_dyacts.training.task import build_criterion

LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])
MIXED = torch.softmax(3 * torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), 1)


def loss(targets, **options):
    return build_criterion(TrainConfig(data_dir='x', **options))(LOGITS, targets)


def smoothed(smoothing):
    return F.one_hot(LABELS, 4) * (1 - smoothing) + smoothing / 4


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_binary_cross_entropy(smoothing):
    targets = smoothed(smoothing)
    options = dict(bce_loss=True, smoothing=smoothing)
    expected = F.binary_cross_entropy_with_logits(LOGITS, targets)
    torch.testing.assert_close(loss(LABELS, **options), expected)
    torch.testing.assert_close(loss(LABELS, **options, bce_sum=True), 4 * expected)
    weighted = F.binary_cross_entropy_with_logits(LOGITS, targets, pos_weight=torch.tensor(3.0))
    torch.testing.assert_close(loss(LABELS, **options, bce_pos_weight=3), weighted)
    hard = F.binary_cross_entropy_with_logits(LOGITS, smoothed(0.0))
    torch.testing.assert_close(loss(LABELS, **options, bce_target_thresh=0.2), hard)


def test_binary_cross_entropy_of_mixed_images():
    """Their targets are smoothed already."""
    options = dict(bce_loss=True, mixup=0.2, smoothing=0.5)
    torch.testing.assert_close(loss(MIXED, **options), F.binary_cross_entropy_with_logits(LOGITS, MIXED))
    hard = F.binary_cross_entropy_with_logits(LOGITS, (MIXED > 0.2).float())
    torch.testing.assert_close(loss(MIXED, **options, bce_target_thresh=0.2), hard)


@pytest.mark.parametrize('options', [dict(mixup=0.2), dict(cutmix=1.0), dict(cutmix_minmax=(0.2, 0.8))], ids=str)
def test_cross_entropy_of_mixed_images(options):
    torch.testing.assert_close(loss(MIXED, **options), F.cross_entropy(LOGITS, MIXED))


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_divergence_of_splits(smoothing):
    labels = LABELS[:2].repeat(3)
    splits = F.softmax(LOGITS, 1).split(2)
    mixture = torch.stack(splits).mean(0).log()
    divergence = sum(F.kl_div(mixture, split, reduction='batchmean') for split in splits) / 3
    expected = F.cross_entropy(LOGITS[:2], labels[:2], label_smoothing=smoothing) + 12 * divergence
    torch.testing.assert_close(loss(labels, jsd_loss=True, aug_splits=3, smoothing=smoothing), expected)
