"""The probe batch, and the comparison of outputs."""
import math

import pytest
import timm
import torch
from torch import nn

from timm_dyacts import ConversionError
from timm_dyacts.convert.probe import compare_outputs, dry_run, input_sizes, probe_batch


@pytest.mark.parametrize('name, at_least, sizes', [
    ('resnet18', 64, [(3, 64, 64), (3, 224, 224)]),
    ('resnet18', 96, [(3, 96, 96), (3, 224, 224)]),
    ('resnet18', 512, [(3, 224, 224)]),
    ('vit_tiny_patch16_224', 64, [(3, 224, 224)]),  # takes no other
    ('test_resnet', 160, [(3, 160, 160)]),
])
def test_sizes_of_timm_models(name, at_least, sizes):
    assert input_sizes(timm.create_model(name), at_least) == sizes


@pytest.mark.parametrize('size', [96, (64, 128)])
def test_the_size_is_the_one_that_a_transformer_is_built_for(size):
    model = timm.create_model('test_vit_dyrelu_b', img_size=size, num_classes=3).eval()
    height, width = (size, size) if isinstance(size, int) else size
    assert input_sizes(model) == [(3, height, width)]
    assert model(torch.zeros(1, 3, height, width)).shape == (1, 3)
    assert model.conversion.replaced


def test_the_channels_are_those_of_the_model():
    assert input_sizes(timm.create_model('resnet18', in_chans=1)) == [(1, 64, 64), (1, 224, 224)]
    assert input_sizes(nn.Sequential(nn.Conv2d(5, 4, 3)))[0] == (5, 64, 64)


@pytest.mark.parametrize('layer, first', [
    (nn.Conv1d(2, 4, 3), (2, 64)),
    (nn.Conv2d(2, 4, 3), (2, 64, 64)),
    (nn.Conv3d(2, 4, 3), (2, 32, 32, 32)),
    (nn.Linear(7, 4), (7,)),
    (nn.ReLU(), (3, 64, 64)),
])
def test_the_rank_is_that_of_the_first_convolution(layer, first):
    net = nn.Sequential(layer, nn.ReLU())
    assert input_sizes(net)[0] == first
    assert dry_run(net).input.shape == (2, *first)


def test_larger_inputs_are_tried():
    assert dry_run(nn.Sequential(nn.Conv1d(1, 4, 80, stride=4), nn.Conv1d(4, 4, 3))).input.shape == (2, 1, 1024)
    assert dry_run(timm.create_model('levit_128s')).input.shape == (2, 3, 224, 224)


@pytest.mark.parametrize('size', [(5,), (2, 6, 5), (4, 3, 2, 5)])
def test_sizes_of_any_rank_can_be_given(size):
    assert dry_run(nn.Linear(5, 2), size).input.shape == (2, *size)


@pytest.mark.parametrize('size', [(), (3, 0, 4), (3, 2.5)])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match='input_size must be a positive'):
        dry_run(nn.Linear(5, 2), size)


def test_an_input_that_the_model_does_not_take():
    with pytest.raises(ConversionError, match=r'input_size must be .*that the model takes, got \(3, 8\) \(RuntimeErr'):
        dry_run(nn.Conv2d(3, 2, 1), (3, 8))

    class TwoInputs(nn.Module):
        def forward(self, x, y):
            return x + y

    with pytest.raises(ConversionError, match=r'takes no probe batch of size \(3, 64, 64\) or .*pass input_size'):
        dry_run(TwoInputs())


def test_the_batch_is_always_the_same_and_spares_the_random_state():
    net = nn.Conv2d(3, 2, 1).double()
    state = torch.get_rng_state()
    x = probe_batch(net, (3, 8, 8))
    assert x.dtype == torch.float64 and x.shape == (2, 3, 8, 8)
    assert torch.equal(x, probe_batch(net, (3, 8, 8)))
    assert torch.equal(torch.get_rng_state(), state)


# The comparison


def test_a_difference_and_what_rounding_explains():
    before = torch.tensor([1.0, -4.0])
    difference = compare_outputs(before, torch.tensor([1.0, -3.5]))
    assert (difference.largest, difference.scale) == (0.5, 4.0) and not difference.is_rounding
    assert compare_outputs(before, before * (1 + 1e-5)).is_rounding
    assert not compare_outputs(before.double(), before.double() * (1 + 1e-5)).is_rounding
    assert compare_outputs(before, before).largest == 0


@pytest.mark.parametrize('nested', [
    lambda a, b: (a, b), lambda a, b: [b, {'x': a}], lambda a, b: {'y': (b,), 'x': a}])
def test_every_tensor_is_compared(nested):
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([[1e-3]])
    assert compare_outputs(nested(a, b), nested(a, b)).is_rounding
    for moved in (nested(a + 1, b), nested(a, b + 1e-4)):
        assert not compare_outputs(nested(a, b), moved).is_rounding
    difference = compare_outputs(nested(a, b), nested(a + 1e-6, b * 2))
    assert difference.scale == pytest.approx(1e-3), 'the tensor that moved most for its size'


def test_signs_of_outputs():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    signs = [torch.tensor([1, -1]), None]
    assert compare_outputs((a, b), (torch.tensor([1.0, -2.0]), b), signs).largest == 0
    assert compare_outputs((a, b), (a, b), signs).largest == 4


def test_what_is_not_finite():
    a = torch.tensor([1.0, math.inf])
    assert compare_outputs(a, a).largest == 0
    assert not compare_outputs(a, a * math.nan).is_rounding
    assert not compare_outputs((a, a[:1]), (a, a[:1] * math.nan)).is_rounding


@pytest.mark.parametrize('before, after', [
    (torch.ones(2), torch.ones(3)),
    ((torch.ones(2), torch.ones(2)), (torch.ones(2),)),
])
def test_other_shapes_differ(before, after):
    difference = compare_outputs(before, after)
    assert difference.largest == math.inf and not difference.is_rounding


def test_integers_and_complex_numbers():
    assert compare_outputs(torch.tensor([1, 2]), torch.tensor([1, 2])).is_rounding
    assert not compare_outputs(torch.tensor([1, 2]), torch.tensor([1, 3])).is_rounding
    assert not compare_outputs(torch.tensor([1 + 1j]), torch.tensor([1 + 2j])).is_rounding


def test_nothing_to_compare():
    assert compare_outputs('text', 'text') is None
    assert compare_outputs(torch.empty(0, 3), torch.empty(0, 3)) is None
