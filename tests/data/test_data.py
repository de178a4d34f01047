"""The embedded digits and the data set factory."""
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_loader

from timm_dyacts.data import DigitsDataset, class_names, create_dataset

sklearn_datasets = pytest.importorskip('sklearn.datasets')


@pytest.fixture
def image_folder(tmp_path):
    """Two classes, three training and two validation images each."""
    for split, count in (('train', 3), ('val', 2)):
        for name in ('cat', 'dog'):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new('RGB', (8, 8), (i, 0, 0)).save(folder / f'{i}.png')
    return tmp_path


def test_digits_split_is_a_partition():
    digits = sklearn_datasets.load_digits()
    train, test = DigitsDataset('train'), DigitsDataset('test')
    assert (len(train), len(test)) == (1437, 360)

    def images(scans, targets):
        return sorted((int(target), scan.tobytes()) for scan, target in zip(scans, targets, strict=True))

    both = images(np.concatenate([train.scans, test.scans]), train.targets + test.targets)
    assert both == images(np.rint(digits.images * 255 / 16).astype(np.uint8), digits.target)


def test_digits_split_is_disjoint_and_stratified():
    train, test = DigitsDataset('train'), DigitsDataset('test')
    # No two of the 1797 scans are equal, so comparing pixels compares images.
    assert not {scan.tobytes() for scan in train.scans} & {scan.tobytes() for scan in test.scans}
    counts = np.bincount(train.targets) + np.bincount(test.targets)
    assert np.abs(np.bincount(test.targets) - counts / 5).max() <= 1


def test_digits_split_never_moves():
    # The labels of the first test images, in the order of the original files.
    assert DigitsDataset('test').targets[:12] == [0, 2, 4, 7, 1, 6, 8, 9, 5, 3, 0, 2]


@pytest.mark.parametrize('mode, bands', [('RGB', 3), ('L', 1)])
def test_digits_are_images(mode, bands):
    img, label = DigitsDataset('train', input_img_mode=mode)[0]
    assert isinstance(img, Image.Image)
    assert img.size == (32, 32) and len(img.getbands()) == bands
    assert label == DigitsDataset('train').targets[0]


def test_digits_enlarged_keep_their_grey_levels():
    dataset = DigitsDataset('train', input_img_mode='L')
    img, _ = dataset[0]
    small = np.asarray(img.resize((8, 8), Image.Resampling.BOX), dtype=float)
    assert np.corrcoef(small.ravel(), dataset.scans[0].ravel())[0, 1] > 0.98
    assert dataset.scans.min() == 0 and dataset.scans.max() == 255


def test_digits_classes():
    dataset = DigitsDataset('test')
    assert dataset.classes == class_names(dataset) == list('0123456789')
    assert all(dataset.class_to_idx[name] == int(name) for name in dataset.classes)


def test_digits_in_timm_loader():
    loader = create_loader(
        DigitsDataset('test'), input_size=(3, 32, 32), batch_size=100, num_workers=0, persistent_workers=False,
        device=torch.device('cpu'))
    batches = list(loader)
    assert [len(images) for images, _ in batches] == [100, 100, 100, 60]
    assert batches[0][0].shape == (100, 3, 32, 32) and batches[0][0].dtype == torch.float32
    assert torch.cat([labels for _, labels in batches]).tolist() == DigitsDataset('test').targets


def test_digits_unknown_split():
    with pytest.raises(ValueError, match="split must be one of .*'train', 'test'.* got 'holdout'"):
        DigitsDataset('holdout')


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    with pytest.raises(ImportError, match=r"pip install 'timm-dyacts\[demo\]'"):
        DigitsDataset()


@pytest.mark.parametrize('split, count', [('train', 1437), ('training', 1437), ('validation', 360), ('test', 360)])
def test_create_digits(split, count):
    dataset = create_dataset('digits', split=split, class_map=None, download=False, input_img_mode='L')
    assert len(dataset) == count and dataset.input_img_mode == 'L'


def test_create_digits_unknown_split():
    with pytest.raises(ValueError, match="split must be one of .*'validation'.* got 'holdout'"):
        create_dataset('digits', split='holdout')


def test_create_image_folder(image_folder):
    by_root = create_dataset('', root=str(image_folder), split='train')
    by_name = create_dataset(str(image_folder), split='train')
    assert len(by_root) == len(by_name) == 6
    assert len(create_dataset('', root=str(image_folder), split='validation')) == 4
    assert class_names(by_root) == ['cat', 'dog']


def test_create_torch_dataset(image_folder):
    dataset = create_dataset('torch/image_folder', root=str(image_folder), split='train')
    assert len(dataset) == 6 and class_names(dataset) == ['cat', 'dog']


@pytest.mark.parametrize('name, root, error, message', [
    ('cifar10', None, ValueError, "Unknown data set 'cifar10'.*'torch/cifar10'"),
    ('digits', '.', ValueError, "must be None for the digits.*got '.'"),
    ('cifar10', '.', ValueError, "Unknown data set 'cifar10'"),
    ('torch/cifar10', None, ValueError, "must be the folder .* 'torch/cifar10', got None"),
    ('', None, ValueError, 'must be the folder'),
    ('', 'no/such/folder', FileNotFoundError, "must be an existing image folder.*'no/such/folder'"),
])
def test_create_dataset_refuses(name, root, error, message):
    with pytest.raises(error, match=message):
        create_dataset(name, root=root)


def test_class_names_follow_the_labels():
    class Labelled:
        class_to_idx = dict(b=0, a=1)

    class Gap:
        class_to_idx = dict(a=0, b=2)

    assert class_names(Labelled()) == ['b', 'a']
    assert class_names(Gap()) is None
    assert class_names(object()) is None


def test_imports_stay_light():
    """Plotting and the demo data are loaded when used, and importing the package loads neither data nor training."""
    code = (
        'import sys, timm_dyacts\n'
        'assert not {"timm_dyacts.data", "timm_dyacts.training"} & set(sys.modules)\n'
        'import timm_dyacts.data, timm_dyacts.training\n'
        'assert not {"sklearn", "matplotlib"} & set(sys.modules)\n')
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
