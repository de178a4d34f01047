"""Handwritten digits: the data set that needs no download.

scikit-learn ships 1797 real digits, written by 13 people and scanned to 8x8 pixels with 17 grey levels (Alpaydin &
Kaynak 1998, https://archive.ics.uci.edu/dataset/80). With them any timm model can be fine-tuned offline, in a minute.
"""
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ..ops.checks import check_choice

__all__ = ['DigitsDataset']

_SPLITS = ('train', 'test')
_MAX_GREY = 16  # grey levels run from 0 to 16, both included


class DigitsDataset(Dataset):
    """The handwritten digits of scikit-learn as images, 1437 to train on and 360 to test on.

    The split is fixed, disjoint and stratified. It depends on the order of the images alone, not on a random generator,
    so it is the same on every machine and with every version of scikit-learn.

    Args:
        split: ``'train'`` or ``'test'``.
        transform: Applied to each PIL image. ``timm.data.create_loader`` sets it.
        img_size: Height and width of the images. The 8x8 scans are enlarged here (bicubic) rather than in the
            transform, so that a random crop can move by less than one pixel of the scan.
        input_img_mode: Mode of the PIL images, ``'RGB'`` or ``'L'``.

    Attributes:
        classes: Class names, ``'0'`` to ``'9'``.
        class_to_idx: Class name to label.
        targets: Label of each image.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: An unknown split.
    """

    def __init__(
            self,
            split: str = 'train',
            transform: Callable[[Image.Image], Any] | None = None,
            img_size: int = 32,
            input_img_mode: str = 'RGB',
    ):
        check_choice('split', split, _SPLITS)
        try:
            from sklearn.datasets import load_digits
        except ImportError as e:
            raise ImportError("The digits come with scikit-learn: pip install 'timm-dyacts[demo]'.") from e

        digits = load_digits()
        # Every fifth image of the ones sorted by class: a fifth of each class, up to rounding.
        by_class = np.argsort(digits.target, kind='stable')
        is_test = np.zeros(len(by_class), dtype=bool)
        is_test[by_class[::5]] = True
        chosen = is_test if split == 'test' else ~is_test

        self.split = split
        self.transform = transform
        self.img_size = img_size
        self.input_img_mode = input_img_mode
        self.scans: np.ndarray = np.rint(digits.images[chosen] * (255 / _MAX_GREY)).astype(np.uint8)
        self.targets: list[int] = digits.target[chosen].tolist()
        self.classes: list[str] = [str(name) for name in digits.target_names]
        self.class_to_idx: dict[str, int] = {name: idx for idx, name in enumerate(self.classes)}

    def __getitem__(self, index: int) -> tuple[Any, int]:
        size = (self.img_size, self.img_size)
        img = Image.fromarray(self.scans[index]).resize(size, Image.Resampling.BICUBIC).convert(self.input_img_mode)
        if self.transform is not None:
            img = self.transform(img)
        return img, self.targets[index]

    def __len__(self) -> int:
        return len(self.targets)
