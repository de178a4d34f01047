"""``act=``, ``pool=`` and ``norm=`` together are the same as in turn, or refused; and a refusal leaves no trace."""
import copy
import functools
import random

import numpy as np
import pytest
import timm
import torch
from support.trained_like import output, probe, trained_like_
from timm.models.convmixer import ConvMixer
from timm.models.densenet import DenseNet
from torch import nn

from timm_dyacts import BipolarMaxPool2d, ConversionError, convert
from timm_dyacts.convert import api

NETWORKS = dict(
    # a max pool, and free slots for anti-aliasing that are not for SoftPool then
    resnet18=lambda: timm.create_model('resnet18', num_classes=10),
    # SoftPool in such slots
    mobilenetv2_050=lambda: timm.create_model('mobilenetv2_050', num_classes=10),
    # BatchNorm that nothing can take in
    densenet=lambda: DenseNet(growth_rate=8, block_config=(2, 2, 2), num_classes=10),
    # gates, and strided convolutions without slots
    regnety_002=lambda: timm.create_model('regnety_002', num_classes=10),
    # convolutions with biases, max pools all over, activations in the head
    vgg11_bn=lambda: timm.create_model('vgg11_bn', num_classes=10, mlp_ratio=1 / 16),
    # nothing to pool
    convmixer=lambda: ConvMixer(dim=32, depth=3, kernel_size=5, patch_size=4, num_classes=10, act_layer=nn.ReLU),
)
ACTS = ('dyrelu_b', 'brelu', 'belu', 'bipolar')
OTHERS = (dict(pool='softpool'), dict(norm='none'), dict(pool='softpool', norm='none'))


@functools.lru_cache(maxsize=1)
def trained(name):
    torch.manual_seed(0)
    return trained_like_(NETWORKS[name]())


def record(model):
    """All that a refusal has to leave as it was."""
    return dict(
        state={key: value.clone() for key, value in model.state_dict().items()},
        parameters={name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        buffers={name: id(b) for name, b in model.named_buffers()},
        modules={name: (id(m), m.training, m.extra_repr()) for name, m in model.named_modules()},
        attributes={key for m in model.modules() for key in vars(m)},
        own={key: id(value) for key, value in vars(model).items()},
        hooks=[(*m._forward_hooks, *m._forward_pre_hooks) for m in model.modules()],
        random=(torch.get_rng_state(), np.random.get_state()[1], random.getstate()),
    )


def assert_same_record(after, before):
    for key in before:
        if key == 'state':
            assert list(after[key]) == list(before[key])
            assert all(torch.equal(value, before[key][name]) for name, value in after[key].items())
        elif key == 'random':
            assert torch.equal(after[key][0], before[key][0])
            assert (after[key][1] == before[key][1]).all() and after[key][2] == before[key][2]
        else:
            assert after[key] == before[key], key


def in_turn(model, steps):
    for name, value in steps.items():
        model = convert(model, **{name: value})
    return model


def attempt(converted):
    torch.manual_seed(3)
    try:
        return converted()
    except ConversionError as e:
        return e


def assert_together_is_in_turn(model, steps):
    """Returns the model, or the error that both ways end with."""
    twin = copy.deepcopy(model)
    torch.manual_seed(3)
    before = record(twin)
    together = attempt(lambda: convert(twin, **steps))
    after = record(twin)
    turned = attempt(lambda: in_turn(copy.deepcopy(model), steps))
    assert type(together) is type(turned), (together, turned)
    if isinstance(together, ConversionError):
        assert str(together) == str(turned)
        assert_same_record(after, before)
        return together
    assert [(n, type(m)) for n, m in together.named_modules()] == [(n, type(m)) for n, m in turned.named_modules()]
    state, others = together.state_dict(), turned.state_dict()
    assert list(state) == list(others)
    assert all(torch.equal(state[key], others[key]) for key in state)
    assert torch.equal(output(together, probe()), output(turned, probe()))
    return together


@pytest.mark.parametrize('others', OTHERS, ids=lambda steps: '_'.join(steps))
@pytest.mark.parametrize('act', ACTS)
@pytest.mark.parametrize('name', NETWORKS)
def test_pairs_and_the_triple(name, act, others):
    assert_together_is_in_turn(trained(name), dict(act=act, **others))


@pytest.mark.parametrize('name', NETWORKS)
def test_without_an_activation(name):
    assert_together_is_in_turn(trained(name), dict(pool='softpool', norm='none'))


def test_the_max_pool_that_an_activation_made_bipolar_stays_one():
    """Nor do strided convolutions make room for SoftPool in its stead."""
    error = assert_together_is_in_turn(trained('resnet18'), dict(act='brelu', pool='softpool'))
    assert "Nothing in this model can be replaced for pool='softpool'" in str(error)
    assert 'maxpool (BipolarMaxPool2d): bipolar: SoftPool does not commute with the channel signs' in str(error)
    converted = convert(copy.deepcopy(trained('resnet18')), act='brelu')
    assert isinstance(converted.maxpool, BipolarMaxPool2d)
    with pytest.raises(ConversionError, match="pool='softpool'"):
        convert(converted, pool='softpool')


def test_where_activation_and_pool_fit_both_are_there():
    model = assert_together_is_in_turn(trained('resnet18'), dict(act='dyrelu_b', pool='softpool', norm='none'))
    assert model.conversion.counts == {
        'ReLU -> DyReLUB': 17, 'MaxPool2d -> SoftPool2d': 1, 'BatchNorm2d -> Identity': 20}
    assert model.conversion.function == 'approximate'
    assert model.conversion.max_diff > 0
    assert all(conv.stride in ((1, 1), (2, 2)) for conv in model.modules() if isinstance(conv, nn.Conv2d))
    assert model.layer2[0].conv1.stride == (2, 2)


@pytest.mark.parametrize('name', ['resnet18', 'mobilenetv2_050', 'densenet', 'vgg11_bn'])
def test_softpool_twice_is_softpool_once(name):
    once = convert(copy.deepcopy(trained(name)), pool='softpool')
    modules, expected = list(once.modules()), output(once, probe())
    strides = [m.stride for m in once.modules() if isinstance(m, nn.Conv2d)]
    convert(once, pool='softpool')
    assert once.conversion.replaced == []
    assert list(once.modules()) == modules
    assert [m.stride for m in once.modules() if isinstance(m, nn.Conv2d)] == strides
    assert torch.equal(output(once, probe()), expected)


def test_function_calls_of_max_pooling_count_as_max_pools():
    """A network that pools by a function call keeps its strided convolutions."""
    class Stem(nn.Module):
        def forward(self, x):
            return nn.functional.max_pool2d(x, 2)

    model = copy.deepcopy(trained('mobilenetv2_050'))
    model.bn1.act = nn.Sequential(model.bn1.act, Stem())
    convert(model, pool='softpool')
    assert [(r.name, r.old, r.new) for r in model.conversion.replaced] == [
        ('bn1.act.1.max_pool2d', 'max_pool2d()', 'SoftPool2d')]
    assert model.blocks[1][0].conv_dw.stride == (2, 2)


def test_a_later_step_that_fails_takes_back_the_earlier_ones():
    model = copy.deepcopy(trained('vgg11_bn'))
    convert(model, norm='none')
    report, before = model.conversion, record(model)
    with pytest.raises(ConversionError, match="Nothing in this model can be replaced for norm='none'"):
        convert(model, act='brelu', norm='none')
    assert_same_record(record(model), before)
    assert model.conversion is report


def test_a_refusal_leaves_the_random_state(monkeypatch):
    """Dynamic ReLUs have drawn their first weights when the check fails."""
    model = copy.deepcopy(trained('resnet18'))
    monkeypatch.setattr('timm_dyacts.DyReLU.forward', lambda self, x: x)
    before = record(model)
    with pytest.raises(ConversionError, match='though every step should be exact'):
        convert(model, act='dyrelu_b', norm='none')
    assert_same_record(record(model), before)


def test_amplified_rounding_draws_the_same_weights(monkeypatch):
    """The step is done again after the comparison in double precision, as if for the first time."""
    expected = attempt(lambda: convert(copy.deepcopy(trained('resnet18')), act='dyrelu_b')).state_dict()
    real, count = api.compare_outputs, []

    def compare(*args):
        count.append(0)
        difference = real(*args)
        return difference._replace(largest=1.0) if len(count) == 1 else difference

    monkeypatch.setattr(api, 'compare_outputs', compare)
    model = attempt(lambda: convert(copy.deepcopy(trained('resnet18')), act='dyrelu_b'))
    assert 'the difference is rounding' in str(model.conversion)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
