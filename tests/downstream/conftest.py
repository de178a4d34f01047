"""What the tests with other libraries share: some images, and weights as if trained."""
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from PIL import Image
from support.trained_like import trained_like


@pytest.fixture(scope='session')
def write_photos():
    """Write dark and light images, in folders for the splits and the classes."""
    def write(root: Path) -> Path:
        random = np.random.default_rng(0)
        for split, count in (('train', 8), ('validation', 4)):
            for name, level in (('dark', 60), ('light', 190)):
                folder = root / split / name
                folder.mkdir(parents=True)
                for i in range(count):
                    pixels = random.normal(level, 30, (64, 64, 3)).clip(0, 255)
                    Image.fromarray(pixels.astype(np.uint8)).save(folder / f'{i}.png')
        return root
    return write


@pytest.fixture(scope='session')
def weights(tmp_path_factory):
    """Write the file of a checkpoint of timm's, by architecture, and give the arguments that load it from there."""
    folder = tmp_path_factory.mktemp('weights')

    def write(name: str) -> dict[str, dict[str, str]]:
        path = folder / f'{name}.safetensors'
        if not path.exists():
            state = trained_like(name).state_dict()
            safetensors.torch.save_file({key: value.contiguous() for key, value in state.items()}, path)
        return dict(pretrained_cfg_overlay=dict(file=str(path)))
    return write
