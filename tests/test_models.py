"""Every variant is a first-class timm model: whatever timm and PyTorch do with a model, they can do with it.

A sample of the zoo by default, all of it with ``--zoo all``. The parameters are random and the Dynamic ReLUs moved away
from their start, where they would be plain activations. Comparisons are made in double precision wherever the point
is not a lower one: so they can be strict.
"""
import copy
import io
import pickle

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.utils import ModelEmaV3, freeze, unfreeze
from torch import nn
from torch._dynamo.utils import counters
from trained_like import max_diff, output, probe, trained_like_

from timm_dyacts import DyReLU, zoo

# Each operator, each family, both forms of the names; small ones.
SAMPLE = (
    'resnet18_dyrelu_a',
    'resnet18_dyrelu_b_nobn',
    'resnet18_softpool',
    'resnet18_brelu_nobn',
    'seresnet50_brelu',
    'mobilenetv2_050_dyrelu_b',
    'mobilenetv2_050_softpool',
    'mobilenetv2_050_brelu',
    'mobilenetv3_small_100_dyrelu_c',
    'mobilenetv3_small_100_belu',
    'efficientnet_b0_dyrelu_b',
    'densenet121_softpool',
    'vgg16_bn_brelu',
)
INDUCTOR = ('resnet18_dyrelu_b_nobn', 'mobilenetv2_050_brelu')
# Architectures that timm's own tests leave out, too
NO_TORCHSCRIPT = ('densenet', 'dpn', 'hrnet', 'selecsls')

VARIANTS = {variant.name: variant for variant in zoo.variants()}


def pytest_generate_tests(metafunc):
    if 'name' in metafunc.fixturenames:
        names = VARIANTS if metafunc.config.getoption('zoo') == 'all' else SAMPLE
        metafunc.parametrize('name', names, scope='module')


def size_of(name):
    cfg = timm.get_pretrained_cfg(name)
    return cfg.input_size[-1] if cfg.fixed_input_size else 96


@torch.no_grad()
def create(name, **kwargs):
    """The variant, as if trained from its warm start."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **kwargs)
    for module in model.modules():
        if isinstance(module, DyReLU):
            for p in module.parameters():
                if not p.any():
                    p.normal_(std=0.1)
    return trained_like_(model, size=size_of(name))


@pytest.fixture(scope='module')
def trained(name):
    """The variant in eval mode. Shared by the tests: those that change it take a copy."""
    return create(name)


@pytest.fixture
def model(trained):
    return copy.deepcopy(trained)


@pytest.fixture(scope='module')
def x(name):
    return probe(size_of(name))


def gradients(model, x):
    model.zero_grad()
    model(x).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_close(actual, expected, tolerance=1e-9):
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        scale = max(value.abs().max() for value in expected.values())
        worst = max(expected, key=lambda key: (actual[key] - expected[key]).abs().max())
        assert (actual[worst] - expected[worst]).abs().max() <= tolerance * scale, worst
    else:
        assert max_diff(actual, expected) <= tolerance


# Training


def test_every_parameter_has_a_gradient(name, model, x):
    grads = gradients(model.train(), x)
    for key, grad in grads.items():
        assert grad is not None, key
        assert grad.isfinite().all(), key
    for module_name, module in model.named_modules():
        if isinstance(module, DyReLU):
            assert all(p.grad.any() for p in module.parameters()), module_name


def test_set_grad_checkpointing(name, model, x):
    model, x = model.double(), x.double()
    expected = gradients(model, x)
    model.set_grad_checkpointing()
    assert_close(gradients(model, x), expected)


def test_group_matcher_puts_new_parameters_with_their_neighbours(name, trained):
    """Layer-wise learning rates take an operator's parameters for a part of the block that it is in."""
    base = timm.create_model(VARIANTS[name].base)
    for coarse in (False, True):
        old = group_parameters(base, base.group_matcher(coarse), reverse=True)
        new = group_parameters(trained, trained.group_matcher(coarse), reverse=True)
        assert new.keys() == {key for key, _ in trained.named_parameters()}
        same = [key for key in new if key in old]
        order = {group: new[key] for key, group in sorted(old.items(), key=lambda item: item[1]) if key in new}
        assert all(new[key] == order[old[key]] for key in same)
        low = 0
        for position, key in enumerate(new):
            pass


def test_freeze(name, model, x):
    block = next(child for child, module in model.named_children() if any(True for _ in module.parameters()))
    freeze(model, block)
    frozen = [key for key, p in model.named_parameters() if not p.requires_grad]
    assert frozen and all(key.startswith(f'{block}.') for key in frozen)
    freeze(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()(x)
    assert not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    unfreeze(model)
    assert all(p.requires_grad for p in model.parameters())


def test_ema(name, model, x):
    ema = ModelEmaV3(model, decay=0.5)
    before = output(ema.module, x)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    ema.update(model)
    assert not torch.equal(output(ema.module, x), before)
    for key, value in ema.module.state_dict().items():
        assert value.dtype == model.state_dict()[key].dtype
    for _ in range(60):
        ema.update(model)
    assert_close(output(ema.module, x), output(model, x), 1e-4)
