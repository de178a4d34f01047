"""Labels from a CSV or Parquet file: what it may hold, and that train, validate and compare take it."""
import csv
import importlib
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from support.photos import write_photos
from support.small_run import train_small

import timm_dyacts  # noqa: F401
from timm_dyacts.data import class_names, create_dataset
from timm_dyacts.data.loaders import check_splits
from timm_dyacts.data.subsets import labels_of
from timm_dyacts.evaluation import ValidateConfig, validate
from timm_dyacts.training import TrainConfig


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """An image folder, to compare with."""
    return write_photos(tmp_path_factory.mktemp('folders'))


@pytest.fixture(scope='module')
def listed(folders, tmp_path_factory):
    """The same images in one folder, and a file of their labels and splits."""
    root = tmp_path_factory.mktemp('listed')
    (root / 'images').mkdir()
    rows = []
    for path in sorted(folders.glob('*/*/*.png')):
        split, label, name = path.relative_to(folders).parts
        name = f'images/{split}-{label}-{name}'
        shutil.copy(path, root / name)
        rows.append((label, name, split, 'a note, to be passed over'))
    with open(root / 'labels.csv', 'w', newline='') as file:
        csv.writer(file).writerows([('label', 'file', 'split', 'note'), *rows])
    return root


def read(root, text, split='train', **kwargs):
    (root / 'other.csv').write_text(text)
    return create_dataset('', root=str(root), split=split, labels='other.csv', **kwargs)


def test_images_labels_and_classes(listed):
    train, validation = (
        create_dataset('', root=str(listed), split=split, labels=str(listed / 'labels.csv'))
        for split in ('train', 'validation'))
    assert (len(train), len(validation)) == (24, 12)
    assert class_names(train) == class_names(validation) == ['blue', 'green', 'red']
    image, label = train[9]
    assert image.size == (40, 36) and label == 1
    assert train.filename(9) == 'images/train-green-1.png'
    assert labels_of(train, '') == [label for label in range(3) for _ in range(8)]
    check_splits(train, validation)


def test_names_of_splits_that_mean_the_same(listed):
    text = 'file,label,split\nimages/train-red-0.png,r,training\nimages/train-blue-0.png,b,val\n'
    assert len(read(listed, text, 'train')) == len(read(listed, text, 'validation')) == 1
    assert len(read(listed, text + 'images/train-blue-1.png,b,valid\nimages/train-red-1.png,r,val\n', 'val')) == 2
    assert class_names(read(listed, text, 'validation')) == ['b', 'r'], 'those of all splits'


def test_without_splits_all_images_are_of_each(listed):
    text = '\ufefffile,label\nimages/train-red-0.png,10\nimages/train-red-1.png,9\n\n'
    train, validation = (read(listed, text, split) for split in ('train', 'test'))
    assert len(train) == len(validation) == 2
    assert class_names(train) == ['9', '10'], 'in natural order, as timm has it'
    with pytest.raises(ValueError, match='other.csv: without a column split, all splits share 2 images, such as .*0.p'):
        check_splits(train, validation)


def test_a_class_map(listed):
    (listed / 'map.txt').write_text('red\nblue\n')
    dataset = create_dataset('', root=str(listed), split='train', labels='labels.csv', class_map='map.txt')
    assert class_names(dataset) == ['red', 'blue'] and len(dataset) == 16


@pytest.mark.parametrize('text, message', [
    ('name,label\na.png,1\n', r'must have the columns file, label and, if need be, split; .* has no file among'),
    ('', 'no file and no label among none'),
    ('file,label\n', 'must list at least one image'),
    ('file,label\nimages/train-red-0.png\n', 'row 2 has 1 cells under 2 columns'),
    ('file,label\nimages/none.png,1\nimages/nil.png,1\n', r'lists .*none.png and 1 other images, not to be found'),
    ('file,label\nimages/train-red-0.png,1\nimages/../images/train-red-0.png,2\n', 'has .*train-red-0.png twice'),
    ('file,label,split\nimages/train-red-0.png,1,test\n', "split must be one of those of .*, test, got 'train'"),
    ('file,label,split\n', "which has none, got 'train'"),
    ('file,label\n"images/train-red-0.png,1\n', 'must be a CSV file in UTF-8'),
])
def test_what_is_refused(listed, text, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read(listed, text)


def test_splits_that_share_an_image(listed):
    text = 'file,label,split\n' + ''.join(f'images/train-red-{i}.png,{i % 2},{s}\n' for i in range(2) for s in 'ab')
    with pytest.raises(ValueError, match='its splits share 2 images'):
        check_splits(read(listed, text, 'a'), read(listed, text, 'b'))


@pytest.mark.parametrize('options', [dict(labels='x.csv'), dict(labels='x.csv', data_dir='x', dataset='torch/cifar10')])
def test_what_it_needs(options):
    for cls in (TrainConfig, ValidateConfig):
        with pytest.raises(ValueError, match='--labels needs --data-dir, the folder of the images, and no --dataset'):
            cls(**options, **dict(model=('x',)) if cls is ValidateConfig else {})


def test_no_such_file(listed):
    with pytest.raises(FileNotFoundError, match=r"labels \(--labels\) must be a CSV or Parquet file, got '.*none.csv'"):
        create_dataset('', root=str(listed), labels='none.csv')


def test_parquet(listed):
    pyarrow = pytest.importorskip('pyarrow')
    parquet = importlib.import_module('pyarrow.parquet')
    with open(listed / 'labels.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    table = {name: [row[name] for row in rows] for name in rows[0]}
    parquet.write_table(pyarrow.table(table), listed / 'labels.parquet')
    ours = create_dataset('', root=str(listed), split='train', labels='labels.parquet')
    theirs = create_dataset('', root=str(listed), split='train', labels='labels.csv')
    assert ours.reader.samples == theirs.reader.samples
    parquet.write_table(pyarrow.table(dict(name=['a'])), listed / 'other.parquet')
    with pytest.raises(ValueError, match='no file and no label among name'):
        create_dataset('', root=str(listed), labels='other.parquet')
    (listed / 'other.parquet').write_text('x')
    with pytest.raises(ValueError, match='other.parquet cannot be read'):
        create_dataset('', root=str(listed), labels='other.parquet')


def test_parquet_without_a_library(listed, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    monkeypatch.setitem(sys.modules, 'pyarrow.parquet', None)
    (listed / 'none.parquet').touch()
    with pytest.raises(ImportError, match='is read with pyarrow: pip install pyarrow, or give a CSV file'):
        create_dataset('', root=str(listed), labels='none.parquet')


def test_a_run_is_that_on_folders(folders, listed, tmp_path, without_pictures):
    options = '--val-fraction', 0.25, '--balanced-sampler', '--class-weights', 'balanced'
    ours, theirs = (train_small(*where, *options) for where in (
        (listed, tmp_path / 'a', '--labels', 'labels.csv'), (folders, tmp_path / 'b')))
    assert ours.best == theirs.best
    a, b = (load_file(f'{result.folder}/model.safetensors') for result in (ours, theirs))
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    record = validate(ValidateConfig(model=ours.folder, workers=0))
    assert record['top1'] == pytest.approx(ours.best['top1'], abs=1e-4)
    elsewhere = ValidateConfig(model=ours.folder, data_dir=listed, labels='labels.csv', split='train', workers=0)
    assert 0 <= validate(elsewhere)['top1'] <= 100
