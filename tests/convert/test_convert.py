"""convert() on built models: what it replaces, what it keeps, what it reports, and how it gives up."""
import copy

import pytest
import timm
import torch
from support.trained_like import max_diff, output, probe, trained_like, trained_like_
from timm.layers import create_act_layer
from timm.layers.pool2d_same import MaxPool2dSame
from torch import nn

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
    class Functional(nn.Module):
        def forward(self, x):
            return nn.functional.max_pool2d(nn.functional.relu(x), 2)

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
    (dict(act='brelu', where='outer'), "where must be one of 'inner', 'all', got 'outer'"),
    (dict(act='brelu', layout='thirds'), "layout must be one of 'interleaved', 'halves', got 'thirds'"),
    (dict(act='brelu', input_size=(3, 64)), 'input_size must be a positive'),
])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        convert(timm.create_model('resnet18'), **kwargs)


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
