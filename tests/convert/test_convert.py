"""convert() on built models: what it replaces, what it keeps, what it reports, and how it gives up."""
import copy
import re
import sys

import pytest
import timm
import torch
from support.trained_like import max_diff, output, probe, trained_like, trained_like_
from timm.layers import create_act_layer
from timm.layers.pool2d_same import MaxPool2dSame
from timm.models import group_parameters
from torch import nn
from torch.utils._pytree import tree_leaves

from timm_dyacts import (
    BELU,
    Bipolar,
    BipolarMaxPool2d,
    BPReLU,
    BReLU,
    ConversionError,
    DyReLU,
    DyReLUB,
    SoftPool2d,
    SoftPool2dSame,
    convert,
)
from timm_dyacts.layers import ChannelAffine
from timm_dyacts.layers.forms import static_form
from timm_dyacts.operators import operator_parameters
from timm_dyacts.piecewise_fit import fit_pieces

RELU_NETS = ('resnet18', 'resnet26', 'resnext50_32x4d', 'seresnet50', 'densenet121', 'mobilenetv2_050')
OTHER_NETS = ('mobilenetv3_small_100', 'efficientnet_b0')


def pair(name, **kwargs):
    """A model as if trained, and a converted copy of it."""
    model = trained_like(name)
    return model, convert(copy.deepcopy(model), **kwargs)


@pytest.mark.parametrize('act', ['dyrelu_a', 'dyrelu_b', 'dyrelu_c', 'brelu', 'bipolar'])
@pytest.mark.parametrize('name', RELU_NETS)
def test_trained_relu_nets_keep_their_function_to_the_last_bit(name, act):
    model, converted = pair(name, act=act)
    assert converted.conversion.function == 'exact'
    assert converted.conversion.max_diff == 0
    assert any(isinstance(m, (DyReLU, BReLU)) for m in converted.modules())
    assert torch.equal(output(converted, probe(80)), output(model, probe(80)))


@pytest.mark.parametrize('name', OTHER_NETS)
def test_bipolar_is_exact_for_every_activation(name):
    model, converted = pair(name, act='bipolar')
    assert converted.conversion.function == 'exact'
    assert max_diff(output(converted, probe(80)), output(model, probe(80))) < 1e-5


@pytest.mark.parametrize('act', ['dyrelu_b', 'brelu', 'belu'])
@pytest.mark.parametrize('name', OTHER_NETS)
def test_another_activation_is_reported_as_approximate(name, act):
    _, converted = pair(name, act=act)
    assert converted.conversion.function == 'approximate'
    assert converted.conversion.max_diff > 0


def test_vgg_head_and_pools():
    model, converted = pair('vgg11_bn', act='brelu')
    assert torch.equal(output(converted, probe(96)), output(model, probe(96)))
    assert sum(isinstance(m, BipolarMaxPool2d) for m in converted.modules()) == 5
    assert not any(type(m) in (nn.ReLU, nn.MaxPool2d) for m in converted.modules())

    _, dynamic = pair('vgg11_bn', act='dyrelu_a')
    assert {s.reason for s in dynamic.conversion.skipped} == {'in the classifier head'}


@pytest.mark.parametrize('layout', ['interleaved', 'halves'])
def test_bipolar_training_is_plain_training_in_other_coordinates(layout):
    """Losses and, up to sign, all weights stay bit for bit equal through steps of SGD with weight decay."""
    plain, bipolar = pair('resnet18', act='brelu', layout=layout)
    x, target = probe(64, batch=4), torch.tensor([1, 2, 3, 4])
    losses = []
    for model in (plain, bipolar):
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-2)
        losses.append([])
        for _ in range(3):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 3
    state, flipped = plain.state_dict(), bipolar.state_dict()
    assert all(torch.equal(state[k].abs(), flipped[k].abs()) for k in state)
    assert any(not torch.equal(state[k], flipped[k]) for k in state)


@pytest.mark.parametrize('act', ['dyrelu_b', 'brelu', 'bipolar'])
def test_back_to_the_plain_network(act):
    model, converted = pair('seresnet50', act=act)
    convert(converted, act='relu')
    assert converted.conversion.function == 'exact'
    state, back = model.state_dict(), converted.state_dict()
    assert state.keys() == back.keys()
    assert all(torch.equal(state[k], back[k]) for k in state)
    assert [type(m) for m in converted.modules()] == [type(m) for m in model.modules()]


def test_bounded_relu_keeps_its_bound_there_and_back():
    model, converted = pair('mobilenetv2_050', act='brelu')
    assert {m.max_value for m in converted.modules() if isinstance(m, BReLU)} == {6.0}
    convert(converted, act='dyrelu_b')
    assert converted.conversion.function == 'exact'
    convert(converted, act='relu')
    assert [type(m) for m in converted.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(output(converted, probe()), output(model, probe()))


def test_converting_twice_changes_nothing():
    _, converted = pair('resnet18', act='brelu', norm='none')
    state, modules = copy.deepcopy(converted.state_dict()), list(converted.modules())
    convert(converted, act='brelu')
    assert converted.conversion.replaced == []
    assert list(converted.modules()) == modules
    assert all(torch.equal(state[k], v) for k, v in converted.state_dict().items())


def test_between_layouts_and_members():
    model, converted = pair('resnet18', act='brelu')
    convert(converted, act='brelu', layout='halves')
    assert converted.conversion.function == 'exact'
    assert torch.equal(output(converted, probe()), output(model, probe()))
    convert(converted, act='belu')
    assert converted.conversion.function == 'approximate'
    assert any(isinstance(m, BELU) for m in converted.modules())


def test_trained_dyrelu_has_no_static_form():
    _, converted = pair('resnet18', act='dyrelu_b')
    with torch.no_grad():
        next(m for m in converted.modules() if isinstance(m, DyReLU)).fc2_bias.add_(1.)
    convert(converted, act='relu')
    assert converted.conversion.function == 'approximate'


class Net(nn.Module):
    """Two convolutions around whatever is to be tried."""

    def __init__(self, middle, channels=8):
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3)
        self.middle = middle
        self.conv2 = nn.Conv2d(channels, channels, 3, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()
        self.fc = nn.Linear(channels, 5)

    def forward(self, x):
        x = self.act(self.bn(self.conv2(self.middle(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize('middle, act, new', [
    (nn.LeakyReLU(0.2), 'dyrelu_b', DyReLUB),
    (nn.PReLU(init=0.3), 'dyrelu_b', DyReLUB),
    (nn.PReLU(8), 'bipolar', BPReLU),
    (nn.ELU(0.7), 'bipolar', BELU),
    (nn.ELU(0.7), 'belu', BELU),
])
def test_parameters_of_the_activation_are_kept(middle, act, new):
    net = trained_like_(Net(copy.deepcopy(middle)), 32)
    net.middle.load_state_dict(middle.state_dict())
    expected = output(net, probe(32))
    convert(net, act=act)
    assert type(net.middle) is new
    assert not [r for r in net.conversion.replaced if r.name == 'middle' and not r.exact]
    if net.conversion.function == 'exact':
        assert max_diff(output(net, probe(32)), expected) < 1e-6


def test_per_channel_prelu_is_not_claimed_for_dyrelu():
    net = convert(trained_like_(Net(nn.PReLU(8)), 32), act='dyrelu_b')
    assert not next(r for r in net.conversion.replaced if r.name == 'middle').exact


class Mixer(nn.Module):
    """Adds up all channels of an activation: no sign flip fits."""

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x):
        x = self.act(x)
        return x * torch.sigmoid(x.mean(1, keepdim=True))


def test_a_model_that_does_not_fit_is_left_as_it_was():
    net = trained_like_(Net(Mixer()), 32)
    state, modules = copy.deepcopy(net.state_dict()), list(net.modules())
    with pytest.raises(ConversionError, match="'middle'.*mean runs over channels"):
        convert(net, act='brelu')
    assert list(net.modules()) == modules
    assert net.state_dict().keys() == state.keys()
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    assert not hasattr(net, 'conversion')


def test_a_failed_check_is_taken_back(monkeypatch):
    net = trained_like('resnet18')
    state, modules = copy.deepcopy(net.state_dict()), [type(m) for m in net.modules()]
    monkeypatch.setattr(BipolarMaxPool2d, 'forward', lambda self, x: nn.functional.max_pool2d(x, 3, 2, 1))
    with pytest.raises(ConversionError, match='though every step should be exact'):
        convert(net, act='brelu', norm='none')
    assert [type(m) for m in net.modules()] == modules
    assert net.state_dict().keys() == state.keys()
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())


def test_amplified_rounding_is_not_taken_for_an_error():
    """A norm that takes a large mean away leaves the rounding of what was large; folded, the mean is gone before."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).eval()
    with torch.no_grad():
        net[0].bias.fill_(1e6)
        net[1].running_mean.fill_(1e6)
    converted = convert(copy.deepcopy(net), norm='none')
    report = converted.conversion
    assert report.function == 'exact'
    assert report.max_diff > 1e-3 * report.scale
    assert 'the difference is rounding' in str(report)
    assert max_diff(output(converted, probe(8)), output(copy.deepcopy(net).double(), probe(8).double())) < 1e-5


def test_functional_calls_are_reported():
    def functions(x):  # not in a method, where they could become modules
        return nn.functional.max_pool2d(nn.functional.relu(x), 2)

    class Functional(nn.Module):
        def forward(self, x):
            return functions(x)

    net = convert(trained_like_(Net(Functional()), 32), act='dyrelu_b')
    assert [(s.name, s.kind) for s in net.conversion.skipped] == [('middle', 'relu')]
    with pytest.raises(ConversionError, match='max_pool2d_with_indices.*a function call'):
        convert(net, pool='softpool')


def test_gates_keep_their_activations():
    converted = convert(timm.create_model('seresnet18'), act='dyrelu_b')
    gates = [n for n, m in converted.named_modules() if isinstance(m, nn.ReLU)]
    assert gates and all('.se.' in n for n in gates)
    assert {s.reason for s in converted.conversion.skipped} == {'inside a gate'}


def test_where():
    inner = convert(timm.create_model('resnet50'), act='dyrelu_b')
    everywhere = convert(timm.create_model('resnet50'), act='dyrelu_b', where='all')
    assert sum(isinstance(m, DyReLU) for m in inner.modules()) == 33
    assert sum(isinstance(m, DyReLU) for m in everywhere.modules()) == 49
    assert all(s.name.endswith('act3') for s in inner.conversion.skipped)


def test_softpool_takes_the_shape_of_the_pool_that_it_replaces():
    model, converted = pair('densenet121', pool='softpool')
    assert converted.conversion.counts == {'MaxPool2d -> SoftPool2d': 1}
    assert converted.conversion.function == 'approximate'
    assert converted.conversion.new_keys == ()
    for size in (64, 75):
        assert converted.forward_features(probe(size)).shape == model.forward_features(probe(size)).shape


def test_large_beta_approaches_max_pooling():
    model, converted = pair('resnet18', pool='softpool', pool_kwargs=dict(beta=1e4))
    assert max_diff(output(converted, probe()), output(model, probe())) < 1e-4


@pytest.mark.parametrize('name', ['mobilenetv2_050', 'mobilenetv3_small_100', 'mixnet_s'])
def test_softpool_downsamples_where_strided_convs_did(name):
    model, converted = pair(name, pool='softpool')
    pools = [n for n, m in converted.named_modules() if isinstance(m, SoftPool2d)]
    assert len(pools) >= 3 and all(n.endswith('.aa') for n in pools)
    assert model.state_dict().keys() == converted.state_dict().keys()
    for size in (64, 97):
        expected = [t.shape for t in model.forward_intermediates(probe(size), intermediates_only=True)]
        assert [t.shape for t in converted.forward_intermediates(probe(size), intermediates_only=True)] == expected
    same = timm.create_model(name, aa_layer='softpool')
    assert [(n, type(m)) for n, m in same.named_modules()] == [(n, type(m)) for n, m in converted.named_modules()]


@pytest.mark.parametrize('name', ['resnet18', 'resnext50_32x4d', 'seresnet50'])
def test_batchnorm_folds_away(name):
    model, converted = pair(name, norm='none')
    assert not any(isinstance(m, nn.BatchNorm2d) for m in converted.modules())
    assert max_diff(output(converted, probe(96)), output(model, probe(96))) < 1e-4


def test_batchnorm_without_a_layer_before_it_leaves_a_scale_and_shift():
    model, converted = pair('densenet121', norm='none')
    assert not any(isinstance(m, nn.BatchNorm2d) for m in converted.modules())
    left = sum(isinstance(m, ChannelAffine) for m in converted.modules())
    assert converted.conversion.notes == [
        f'{left} norms follow no layer that could take them in: what is left of them is a scale and shift']
    assert max_diff(output(converted, probe(64)), output(model, probe(64))) < 1e-4


def test_batchnorm_folds_into_linear_layers_through_views():
    model = trained_like_(timm.create_model('levit_128s'), 224)
    converted = convert(copy.deepcopy(model), norm='none')
    assert converted.conversion.notes[0].startswith('2 norms follow no layer')  # those before the classifiers
    assert not any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in converted.modules())
    assert max_diff(output(converted, probe(224)), output(model, probe(224))) < 1e-4


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'convnext_tiny', 'mixer_s32_224'])
def test_tokens_have_their_channels_last(name):
    model = trained_like_(timm.create_model(name), 224)
    nn.init.normal_(model.get_classifier().weight)
    expected = output(model, probe(224))
    convert(model, act='bipolar')
    assert model.conversion.function == 'exact'
    assert max_diff(output(model, probe(224)), expected) < 1e-5
    assert {m.channel_dim for m in model.modules() if isinstance(m, Bipolar)} == {-1}
    convert(model, act='dyrelu_b')
    hidden = [m for m in model.modules() if isinstance(m, DyReLU)]
    assert hidden and all(m.channel_dim == -1 and m.channels % 4 == 0 for m in hidden)


@pytest.mark.parametrize('size', [16, 17])
def test_pools_with_tensorflow_padding(size):
    net = trained_like_(Net(nn.Sequential(nn.ReLU(), MaxPool2dSame(3, 2))), 32)
    x = probe(size)
    expected, shape = output(net, x), net.middle(net.conv1(x)).shape
    soft = convert(copy.deepcopy(net), pool='softpool', input_size=(3, 16, 16))
    assert isinstance(soft.middle[1], SoftPool2dSame)
    assert soft.middle(soft.conv1(x)).shape == shape
    convert(net, act='brelu', input_size=(3, 16, 16))
    assert torch.equal(output(net, x), expected)
    convert(net, act='relu', input_size=(3, 16, 16))
    assert type(net.middle[1]) is MaxPool2dSame


def test_all_at_once_and_in_training_mode():
    model = trained_like('resnet18').train()
    expected = output(copy.deepcopy(model), probe())
    random_state = torch.get_rng_state()
    convert(model, act='brelu', norm='none')
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(m.training for m in model.modules())
    assert max_diff(output(model, probe()), expected) < 1e-4


def test_frozen_parameters_stay_frozen():
    model = timm.create_model('resnet18').requires_grad_(False)
    convert(model, act='brelu', norm='none')
    assert not any(p.requires_grad for p in model.parameters())


def test_what_runs_in_training_only_is_reported():
    class Auxiliary(Net):
        def __init__(self):
            super().__init__(nn.ReLU())
            self.auxiliary = nn.Linear(8, 5)

        def forward(self, x):
            y = super().forward(x)
            return (y, self.auxiliary(self.conv1(x).mean((2, 3)))) if self.training else y

    net = convert(Auxiliary(), act='brelu', input_size=(3, 16, 16))
    assert net.conversion.notes == [
        'not read in eval mode, so not part of the flip and not exact in training: auxiliary.weight, auxiliary.bias']


def test_models_without_a_classifier_end_in_flipped_channels():
    model = trained_like('resnet18', num_classes=0)
    expected = output(model, probe())
    convert(model, act='brelu')
    y = output(model, probe())
    assert torch.equal(y[:, ::2], expected[:, ::2])
    assert torch.equal(y[:, 1::2], -expected[:, 1::2])
    assert model.conversion.flipped_output
    assert 'odd output channels' in model.conversion.notes[0]


def test_on_the_meta_device():
    with torch.device('meta'):
        model = timm.create_model('resnet18')
    convert(model, act='brelu', norm='none')
    assert all(p.is_meta for p in model.parameters())
    assert model.conversion.counts['ReLU -> BReLU'] == 17
    real = trained_like('resnet18_brelu_nobn')
    model.to_empty(device='cpu').load_state_dict(real.state_dict())
    assert torch.equal(output(model, probe()), output(real, probe()))


@pytest.mark.parametrize('name', ['resnet10t_dyrelu_b', 'seresnext26d_32x4d_brelu_nobn', 'efficientnet_b0_softpool'])
def test_in_inference_mode(name):
    with torch.inference_mode():
        report = timm.create_model(name).conversion
    expected = timm.create_model(name).conversion
    assert (report.replaced, report.skipped) == (expected.replaced, expected.skipped)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    model = trained_like('resnet18').to(dtype)
    expected = output(model, probe().to(dtype))
    for act in ('brelu', 'dyrelu_c'):
        converted = convert(copy.deepcopy(model), act=act)
        assert {p.dtype for p in converted.parameters()} == {dtype}
        assert torch.equal(output(converted, probe().to(dtype)), expected)


def test_arguments_of_the_new_modules():
    wide = convert(timm.create_model('resnet18'), act='dyrelu_b', act_kwargs=dict(reduction=4))
    assert {m.reduction for m in wide.modules() if isinstance(m, DyReLU)} == {4}


@pytest.mark.parametrize('kwargs, message', [
    (dict(), 'act, pool and norm are all None'),
    (dict(act='dyrelu_d'), 'dyrelu_b'),
    (dict(act=nn.ReLU), 'act must be the name'),
    (dict(pool='softpol'), "pool must be one of None, 'softpool', got 'softpol'"),
    (dict(norm='batch'), "norm must be one of None, 'none', got 'batch'"),
    (dict(act='brelu', where='outer'), "where must be one of 'inner', 'all', 'late', or a wildcard .*, got 'outer'"),
    (dict(act='brelu', layout='thirds'), "layout must be one of 'interleaved', 'halves', got 'thirds'"),
    (dict(act='brelu', input_size=(3, 64)), 'input_size must be a positive'),
    # what cannot have an effect
    (dict(act='brelu', where='all'), "where must be left out for act='brelu'.*It is for act='dyrelu_a', 'dyrelu_b', '"),
    (dict(act='brelu', where='inner'), "where must be left out for act='brelu'.*got 'inner'"),
    (dict(act='relu', start='fit'), "start must be left out for act='relu'.*got 'fit'"),
    (dict(pool='softpool', where='all'), 'where must be left out for act=None'),
    (dict(act='dyrelu_b', layout='halves'), "layout must be left out for act='dyrelu_b'.*It is for act='brelu', 'be"),
    (dict(norm='none', layout='halves'), 'layout must be left out for act=None'),
    (dict(norm='none', act_kwargs=dict(reduction=4)), "act_kwargs must be left out without act, got {'reduction': 4}"),
    (dict(act='brelu', pool_kwargs=dict(beta=2.0)), "pool_kwargs must be left out without pool, got {'beta': 2.0}"),
    (dict(act='dyrelu_b', act_kwargs=dict(reducton=4)),
     "act_kwargs must hold arguments of act='dyrelu_b', got 'reducton'; its arguments are reduction, k, lambda_a, la"),
    (dict(act='brelu', act_kwargs=dict(alpha=1.0, layout='halves')), "got 'alpha', 'layout'; .* inplace, max_value"),
    (dict(act='dyrelu_b', act_kwargs=dict(mode='c')), "act_kwargs must .* got 'mode'"),
    (dict(act='dyrelu_b', act_kwargs=dict(channels=64)), "act_kwargs must .* got 'channels'"),
    (dict(act='leaky_relu', act_kwargs=dict(slope=0.1)), "got 'slope'; its arguments are negative_slope, inplace"),
    (dict(pool='softpool', pool_kwargs=dict(temperature=2.0)),
     "pool_kwargs must hold arguments of pool='softpool', got 'temperature'; its arguments are kernel_size, .*beta"),
])
def test_bad_arguments(kwargs, message):
    model = timm.create_model('resnet18')
    modules = list(model.modules())
    with pytest.raises(ValueError, match=message):
        convert(model, **kwargs)
    assert list(model.modules()) == modules


def test_options_may_be_given_their_default():
    by_default = convert(trained_like('resnet26'), act='dyrelu_b')
    spelt_out = convert(trained_like('resnet26'), act='dyrelu_b', where='inner', start='relu', act_kwargs={})
    assert spelt_out.conversion.counts == by_default.conversion.counts
    assert convert(trained_like('resnet18'), act='brelu', layout='interleaved').layer1[0].act1.layout == 'interleaved'


@pytest.mark.parametrize('first, again', [
    (dict(act='dyrelu_b'), dict(act='dyrelu_b', act_kwargs=dict(reduction=4))),
    (dict(act='brelu'), dict(act='brelu', act_kwargs=dict(inplace=True))),
    (dict(pool='softpool'), dict(pool='softpool', pool_kwargs=dict(beta=2.0))),
])
def test_arguments_of_what_is_there_already_are_refused(first, again):
    model = convert(timm.create_model('resnet18'), **first)
    name = next(key for key in again if key.endswith('kwargs'))
    with pytest.raises(ConversionError, match=f'{name}=.*has no effect: .* already'):
        convert(model, **again)


def test_act_kwargs_that_change_what_is_there_are_taken():
    model = convert(timm.create_model('resnet18'), act='brelu')
    convert(model, act='brelu', act_kwargs=dict(max_value=6.0))
    assert {m.max_value for m in model.modules() if isinstance(m, BReLU)} == {6.0}
    assert model.conversion.function == 'approximate'


def test_nothing_to_replace():
    with pytest.raises(ConversionError, match="Nothing in this model can be replaced for pool='softpool'"):
        convert(nn.Sequential(nn.Conv2d(3, 4, 3), create_act_layer('relu')), pool='softpool', input_size=(3, 8, 8))


def test_the_report_reads_well():
    converted = convert(timm.create_model('seresnet18'), act='brelu')
    text = str(converted.conversion)
    assert '17 x ReLU -> BReLU' in text
    assert '1 x MaxPool2d -> BipolarMaxPool2d' in text
    assert 'function: exact (largest difference 0' in text
    assert 'left alone: layer1.0.se.act (ReLU): inside a gate' in text


# Parameter groups


@pytest.mark.parametrize('act', ['dyrelu_b', 'bprelu'])
def test_the_parameters_of_operators_have_a_group(act):
    """Those of the stem, too, which no pattern of a ResNet matches."""
    model = convert(timm.create_model('resnet18'), act=act)
    own = operator_parameters(model)
    assert any(name.startswith('act1.') for name in own)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert layers['act1.fc1_weight' if act == 'dyrelu_b' else 'act1.weight'] == layers['conv1.weight']
    assert len(own) > 1 and own.keys() <= layers.keys()


@pytest.mark.parametrize('act', ['dyrelu_b', 'bprelu'])
def test_converting_back_removes_what_was_put_in(act):
    model = timm.create_model('resnet18')
    before = set(vars(model)), list(model.state_dict()), model.group_matcher()
    convert(model, act=act)
    assert 'group_matcher' in vars(model)
    convert(model, act='relu')
    assert 'group_matcher' not in vars(model)
    assert vars(model).keys() - {'conversion'} == before[0]
    assert list(model.state_dict()) == before[1]
    assert model.group_matcher() == before[2]


def test_a_group_matcher_of_the_users_own_stays():
    model = timm.create_model('resnet18')
    model.group_matcher = own = lambda coarse=False: dict(everything='.')
    convert(model, act='dyrelu_b')
    convert(model, act='relu')
    assert model.group_matcher is own


def test_undo_restores_the_group_matcher(monkeypatch):
    model = timm.create_model('resnet18')
    monkeypatch.setattr(DyReLU, 'forward', lambda self, x: x)
    with pytest.raises(ConversionError, match='though every step should be exact'):
        convert(model, act='dyrelu_b')
    assert 'group_matcher' not in vars(model)
    monkeypatch.undo()
    convert(model, act='dyrelu_b')
    matcher = model.group_matcher
    monkeypatch.setattr(nn.ReLU, 'forward', lambda self, x: x)
    with pytest.raises(ConversionError, match='though every step should be exact'):
        convert(model, act='relu')
    assert model.group_matcher is matcher


# Signals and volumes


def signals(conv, norm, pool, average):
    return nn.Sequential(
        conv(2, 8, 3, padding=1), norm(8), nn.ReLU(), pool(2), conv(8, 8, 3, padding=1, groups=2), norm(8), nn.ReLU(),
        average(1), nn.Flatten(), nn.Linear(8, 5))


RANKS = {
    1: (nn.Conv1d, nn.BatchNorm1d, nn.MaxPool1d, nn.AdaptiveAvgPool1d),
    3: (nn.Conv3d, nn.BatchNorm3d, nn.MaxPool3d, nn.AdaptiveAvgPool3d),
}


@torch.no_grad()
def trained_signals(rank):
    torch.manual_seed(0)
    net = signals(*RANKS[rank])
    for norm in (net[1], net[5]):
        norm.weight.uniform_(-1, 1)
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return net.eval()


@pytest.mark.parametrize('kwargs', [dict(act='dyrelu_b'), dict(act='brelu'), dict(norm='none')])
@pytest.mark.parametrize('rank', RANKS)
def test_networks_of_other_ranks(rank, kwargs):
    net = trained_signals(rank)
    x = torch.randn(3, 2, *[12] * rank)
    expected = output(net, x)
    for size in (None, (2, *[10] * rank)):
        converted = convert(copy.deepcopy(net), **kwargs, input_size=size)
        assert converted.conversion.function == 'exact' and converted.conversion.max_diff is not None
        assert max_diff(output(converted, x), expected) < 1e-5
        assert len(converted.conversion.replaced) >= 2


def test_linear_networks():
    net = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(4, 7)
    expected = output(net, x)
    assert torch.equal(output(convert(net, act='brelu'), x), expected)


def test_what_the_probe_cannot_guess_is_said():
    class Sum(nn.Module):
        def forward(self, x, y):
            return torch.relu(x + y)

    with pytest.raises(ConversionError, match='pass input_size, the size of its input without the batch dimension'):
        convert(Sum(), act='brelu')


# Outputs other than one tensor


class Outputs(nn.Module):
    """Two heads and a feature map, as ``form`` arranges them."""

    def __init__(self, form):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 4)
        self.form = form

    def forward(self, x):
        stem = self.stem(x)
        body = self.body(stem)
        return self.form(self.head(body.mean((2, 3))), stem, body)


FORMS = dict(
    logits_twice=lambda y, a, b: (y, y * 2),
    features=lambda y, a, b: dict(logits=y, features=[a, b]),
    features_only=lambda y, a, b: [a, b.mean((2, 3))],
)


@pytest.mark.parametrize('form', FORMS)
def test_every_tensor_of_the_output_is_compared(form):
    net = trained_like_(Outputs(FORMS[form]), 16)
    with torch.no_grad():
        expected = tree_leaves(net(probe(16)))
    report = convert(net, act='brelu', input_size=(3, 16, 16)).conversion
    assert report.function == 'exact' and report.max_diff == 0
    assert report.flipped_output == (form != 'logits_twice')
    with torch.no_grad():
        outputs = tree_leaves(net(probe(16)))
    for y, z in zip(outputs, expected, strict=True):
        assert torch.equal(y.abs(), z.abs())
        if z.shape[1] == 4 or form == 'logits_twice':
            assert torch.equal(y, z)
        else:  # the flip follows the channels of features
            signs = torch.tensor([1, -1] * 4).view(1, 8, *[1] * (z.ndim - 2))
            assert torch.equal(y, z * signs)


@pytest.mark.parametrize('broken', [0, 1])
def test_a_difference_in_any_tensor_is_noticed(broken):
    class Broken(Outputs):
        def forward(self, x):
            outputs = list(super().forward(x))
            outputs[broken] = outputs[broken] + isinstance(self.body[2], BReLU)
            return outputs

    net = trained_like_(Broken(FORMS['logits_twice']), 16)
    state = copy.deepcopy(net.state_dict())
    with pytest.raises(ConversionError, match='though every step should be exact'):
        convert(net, act='brelu', input_size=(3, 16, 16))
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def test_an_output_without_tensors_is_not_called_compared():
    class Text(nn.Sequential):
        def forward(self, x):
            super().forward(x)
            return 'done'

    net = convert(Text(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), norm='none')
    assert net.conversion.max_diff is None and net.conversion.function == 'unchecked'
    assert net.conversion.notes == ['the output holds no tensor that could be compared']


def test_dynamic_relu_is_in_place_where_the_activation_was():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.ReLU())
    convert(net, act='dyrelu_b')
    assert [net[1].inplace, net[3].inplace] == [True, False]
    assert 'inplace=True' in repr(net[1]) and 'inplace' not in repr(net[3])
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True))
    convert(net, act='dyrelu_b', act_kwargs=dict(inplace=False))
    assert not net[1].inplace


# What costs too much to be computed


@pytest.mark.parametrize('name, options', [
    ('test_resnet', dict(act='brelu')),
    ('test_resnet', dict(act='dyrelu_b', norm='none')),
    ('test_resnet', dict(act='dyrelu_b', pool='softpool', transition=True)),
    ('test_efficientnet', dict(act='dyrelu_b', transition=True)),
    ('test_vit', dict(act='belu', transition=True)),
    ('mobilenetv3_small_050', dict(act='dyrelu_b')),
    ('hrnet_w18_small', dict(act='brelu')),
])
def test_a_costly_model_is_converted_without_a_pass(name, options, monkeypatch):
    net = trained_like_(timm.create_model(name, num_classes=7), 64)
    twin, forced, x = copy.deepcopy(net), copy.deepcopy(net), torch.randn(2, 3, 160, 160)
    torch.manual_seed(0)
    expected = convert(net, **options)
    monkeypatch.setattr(sys.modules[convert.__module__], '_MOST_FLOPS', 1e6)
    computed = []
    twin.register_forward_hook(lambda m, args, y: computed.append(y) if not y.is_meta else None)
    torch.manual_seed(0)
    report = convert(twin, **options).conversion
    assert not computed and report.max_diff is None
    assert (report.replaced, report.skipped) == (expected.conversion.replaced, expected.conversion.skipped)
    function = expected.conversion.function
    assert report.function == ('unchecked' if function == 'exact' else function)
    assert any(re.search(r'not compared, as one pass takes [\d.]+ TFLOPs: check=True', note) for note in report.notes)
    with torch.no_grad():
        assert torch.equal(net.eval()(x), twin.eval()(x))
    assert convert(forced, **options, check=True).conversion.max_diff == expected.conversion.max_diff


def test_a_costly_model_whose_way_depends_on_values_is_computed(monkeypatch):
    class Branching(nn.Sequential):
        def forward(self, x):
            return super().forward(x if x.mean() < 1e3 else -x)

    monkeypatch.setattr(sys.modules[convert.__module__], '_MOST_FLOPS', 0)
    net = convert(Branching(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)), act='dyrelu_b')
    assert net.conversion.function == 'exact' and net.conversion.max_diff == 0


# What counts as the same function


def test_bounds_make_another_function():
    net = Net(nn.Hardtanh(-1.0, 1.0))
    convert(net, act='bipolar', input_size=(3, 16, 16))
    assert isinstance(net.middle, Bipolar) and net.conversion.function == 'exact'
    assert not static_form(nn.Hardtanh(-1, 1)).same_function(static_form(nn.Hardtanh(-2, 2)))
    assert static_form(nn.Hardtanh(-2, 2)).same_function(static_form(nn.Hardtanh(-2, 2)))
    assert not static_form(nn.Hardtanh(0, 6)).same_function(static_form(nn.Hardtanh(0, 4)))
    assert static_form(nn.Hardtanh(0, 6)).same_function(static_form(nn.ReLU6()))
    for bounds, exact in (((0.0, 6.0), True), ((-1.0, 6.0), False)):
        net = Net(nn.Hardtanh(*bounds))
        convert(net, act='brelu', input_size=(3, 16, 16))
        assert next(r for r in net.conversion.replaced if r.name == 'middle').exact == exact


@pytest.mark.parametrize('act', ['belu', 'bselu'])
def test_a_start_fitted_to_a_bipolar_activation(act):
    model = convert(timm.create_model('resnet18', act_layer='elu' if act == 'belu' else 'selu'), act=act)
    convert(model, act='dyrelu_b', start='fit')
    fitted = fit_pieces(nn.ELU() if act == 'belu' else nn.SELU())
    assert {tuple(m.alpha) for m in model.modules() if isinstance(m, DyReLU)} == {tuple(fitted[0])}


def test_new_plain_parameters_have_the_dtype_of_the_model():
    model = convert(timm.create_model('resnet18').double(), act='prelu')
    assert {p.dtype for p in model.parameters()} == {torch.float64}
