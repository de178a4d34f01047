"""Several images in one: mixup and cutmix that end with some epoch, and several views of each image in a batch."""
from typing import Any

import torch
from timm.data import AugMixDataset, FastCollateMixup
from torch import Tensor

__all__ = ['EpochMixup', 'SplitDataset']


class EpochMixup(FastCollateMixup):
    """timm's mixup and cutmix of a batch, up to some epoch.

    Worker processes that outlive an epoch learn of its end, too: timm's own switch does not reach them.

    Args:
        off_epoch: First epoch without them, 0 if there is none. Labels stay distributions.
        **kwargs: Arguments of ``timm.data.FastCollateMixup``.
    """

    def __init__(self, off_epoch: int = 0, **kwargs: Any) -> None:
        self._enabled: Tensor = torch.ones(1, dtype=torch.bool).share_memory_()
        super().__init__(**kwargs)
        self.off_epoch = off_epoch

    @property
    def mixup_enabled(self) -> bool:
        """Whether batches are mixed."""
        return bool(self._enabled)

    @mixup_enabled.setter
    def mixup_enabled(self, value: bool) -> None:
        self._enabled.fill_(value)

    def set_epoch(self, epoch: int) -> None:
        """Mix the batches of an epoch, counted from 0, or do not."""
        self.mixup_enabled = not self.off_epoch or epoch < self.off_epoch


class SplitDataset(AugMixDataset):
    """timm's several views of each image, which tells the files of its images."""

    def filename(self, index: int, **kwargs: Any) -> str:
        """Give the file of a sample, or what else it can be told by."""
        filename = getattr(self.dataset, 'filename', None)
        return filename(index, **kwargs) if filename else f'sample {index}'
