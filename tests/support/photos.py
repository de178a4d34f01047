"""A tiny image folder to train on."""
from pathlib import Path

import numpy as np
from PIL import Image

COLORS = dict(blue=(30, 30, 200), green=(30, 200, 30), red=(200, 30, 30))


def write_photos(root: Path, train: int = 8, validation: int = 4) -> Path:
    """Write coloured noise, some images per class and split, 40 x 36 pixels."""
    generator = np.random.default_rng(0)
    for split, count in (('train', train), ('validation', validation)):
        for name, color in COLORS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = generator.integers(-30, 31, (36, 40, 3))
                Image.fromarray((np.array(color) + noise).clip(0, 255).astype(np.uint8)).save(folder / f'{i}.png')
    return root
