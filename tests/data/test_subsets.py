"""Parts of data sets."""
import copy
import pickle
from collections import Counter

import pytest
import torch
from support.photos import write_photos
from torch.utils.data import TensorDataset
from torchvision.datasets import FakeData

from timm_dyacts.data import class_names, create_dataset
from timm_dyacts.data.subsets import Subset, hold_out, pick_per_class


def labels(dataset):
    return [dataset[index][1] for index in range(len(dataset))]


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp('photos'))


@pytest.fixture(params=['digits', 'photos'])
def dataset(request, photos):
    return create_dataset('digits', split='train') if request.param == 'digits' else create_dataset(
        '', root=str(photos), split='train')


def test_as_many_of_each_class(dataset):
    counts = Counter(labels(dataset))
    few = min(counts.values()) - 1
    subset = pick_per_class(dataset, few, seed=3)
    assert Counter(labels(subset)) == dict.fromkeys(counts, few)
    assert len(set(subset.indices)) == len(subset)
    assert subset.indices == pick_per_class(dataset, few, seed=3).indices
    assert subset.indices != pick_per_class(dataset, few, seed=4).indices
    assert class_names(subset) == class_names(dataset)


@pytest.mark.parametrize('fraction', [0.001, 0.3, 0.999])
def test_held_out_images_are_a_share_of_each_class(dataset, fraction):
    counts = Counter(labels(dataset))
    left, held = hold_out(dataset, fraction, seed=0)
    assert sorted(left.indices + held.indices) == list(range(len(dataset)))
    for label, held_of_class in Counter(labels(held)).items():
        assert held_of_class == min(max(round(fraction * counts[label]), 1), counts[label] - 1)
    assert Counter(labels(left)).keys() == Counter(labels(held)).keys() == counts.keys()


def test_more_seeds_take_other_images(dataset):
    chosen = [frozenset(hold_out(dataset, 0.3, seed)[1].indices) for seed in range(5)]
    assert len(set(chosen)) == 5


def test_a_part_of_a_part(dataset):
    few = pick_per_class(dataset, 4, seed=0)
    left, held = hold_out(few, 0.25, seed=0)
    assert sorted(left.indices + held.indices) == few.indices
    assert set(Counter(labels(held)).values()) == {1} and set(Counter(labels(left)).values()) == {3}
    assert left.dataset is not few.dataset and not isinstance(left.dataset, Subset)


def test_transforms_are_independent(dataset):
    left, held = hold_out(dataset, 0.3, seed=0)
    left.transform = lambda image: 'left'
    held.transform = lambda image: 'held'
    assert left[0][0] == 'left' and held[0][0] == 'held' and dataset[0][0] not in ('left', 'held')
    assert left.transform(None) == 'left'


def test_file_names(photos):
    subset = pick_per_class(create_dataset('', root=str(photos), split='train'), 1, seed=1)
    for index, (_, label) in enumerate(subset[i] for i in range(len(subset))):
        assert class_names(subset)[label] in subset.filename(index, absolute=True)
    assert pick_per_class(create_dataset('digits', split='train'), 1, seed=1).filename(0).startswith('sample ')


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda subset: pickle.loads(pickle.dumps(subset))])
def test_copies(duplicate):
    subset = pick_per_class(create_dataset('digits', split='train'), 2, seed=0)
    assert labels(duplicate(subset)) == labels(subset)


def test_too_few():
    digits = create_dataset('digits', split='train')
    with pytest.raises(ValueError, match="at most the number of training images of each class, got 143, and class '0'"):
        pick_per_class(digits, 143, seed=0)
    one_each = pick_per_class(digits, 1, seed=0)
    with pytest.raises(ValueError, match="two training images of each class at least, and class '0' has 1"):
        hold_out(one_each, 0.5, seed=0)


@pytest.mark.parametrize('dataset', [
    pytest.param(TensorDataset(torch.zeros(3, 1)), id='tensors'), pytest.param(FakeData(3), id='fake')])
def test_labels_that_cannot_be_told(dataset):
    with pytest.raises(ValueError, match='--images-per-class needs a data set that tells its labels without reading'):
        pick_per_class(dataset, 1, seed=0)
