"""The sign solver on the ways in which networks join their tensors."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from support.trained_like import max_diff, output, probe, trained_like, trained_like_
from timm.layers import EcaModule
from torch import nn

from timm_dyacts import Bipolar, BipolarMaxPool2d, BReLU, ConversionError, convert


class Joined(nn.Module):
    """Two branches of a stem, joined by the function under test, then a classifier."""

    def __init__(self, join, width=8, out=8, **modules):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.a = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.join = join
        self.extra = nn.ModuleDict(modules)
        self.head = nn.Sequential(nn.Conv2d(out, 6, 1), nn.ReLU())
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x)
        x = self.join(self, x, self.a(x), self.b(x))
        return self.fc(self.head(x).mean((2, 3)))


def gate(net, x, a, b):
    return a * torch.sigmoid(net.extra['gate'](b.mean((2, 3), keepdim=True)))


def shuffle(net, x, a, b):
    n, c, h, w = a.shape
    return net.extra['mix'](torch.cat([a, b], 1).view(n, 2, c, h, w).transpose(1, 2).reshape(n, 2 * c, h, w))


def split(net, x, a, b):
    first, second = a.chunk(2, 1)
    return torch.cat([first + b[:, :4], second + b[:, 4:]], 1)


def attend(net, x, a, b):
    """A weighted sum of branches, as in selective kernels."""
    both = torch.stack([a, b], 1)
    weights = net.extra['gate'](both.sum(1).mean((2, 3), keepdim=True))
    weights = weights.view(-1, 2, 8, 1, 1).softmax(1)
    return (both * weights).sum(1)


def attend_to_positions(net, x, a, b):
    """Attention with the channels in the rows, as in single-head networks."""
    tokens = net.extra['conv1'](x).flatten(2)
    weights = (tokens.transpose(1, 2) @ tokens).softmax(-1)
    return (a.flatten(2) @ weights).view(a.shape) + b


def shared(net, x, a, b):
    return net.extra['conv'](a) + net.extra['conv'](b)


JOINS = dict(
    add=lambda net, x, a, b: a + b,
    add_in_place=lambda net, x, a, b: a.add_(b),
    three=lambda net, x, a, b: x + a + b,
    concat=lambda net, x, a, b: net.extra['mix'](torch.cat([a, b], 1)),
    shuffle=shuffle,
    split=split,
    gate=gate,
    attend=attend,
    attend_to_positions=attend_to_positions,
    shared=shared,
    view_in_place=lambda net, x, a, b: net.extra['mix'](torch.cat([a, b], 1)[:, :16].mul_(2)),
    sum_from_zero=lambda net, x, a, b: sum([a, b], 0.0),
    layer_scale=lambda net, x, a, b: x + a * net.extra['norm'].weight.view(1, -1, 1, 1),
    average=lambda net, x, a, b: F.avg_pool2d(a, 3, 2, 1) + F.adaptive_avg_pool2d(b, a.shape[-1] // 2),
    pool_of_channels_last=lambda net, x, a, b: b + F.adaptive_avg_pool2d(a.to(memory_format=torch.channels_last), 1),
    upsample=lambda net, x, a, b: a + F.interpolate(F.avg_pool2d(b, 2), scale_factor=2, mode='bilinear'),
    zero_pad=lambda net, x, a, b: net.extra['mix'](torch.cat([a, b], 1) + F.pad(x, (0, 0, 0, 0, 0, 8))),
    zeros=lambda net, x, a, b: net.extra['mix'](torch.cat([a + b, torch.zeros_like(a)], 1) + torch.cat([x, b], 1)),
    # the sign of the activation passes on to the other factor, which is free to take it away
    gated_linear_unit=lambda net, x, a, b: net.extra['norm1'](a * net.extra['conv1'](x)),
    transposed=lambda net, x, a, b: net.extra['up'](a) + F.interpolate(b, scale_factor=2),
    depthwise=lambda net, x, a, b: net.extra['depthwise'](a) + b,
    product=lambda net, x, a, b: a * b,
    square=lambda net, x, a, b: a ** 2 + b * b * a.abs().mean() + a.norm(dim=(2, 3), keepdim=True),
    tanh=lambda net, x, a, b: torch.tanh(a) - b,
    plain_function=lambda net, x, a, b: F.gelu(net.extra['conv'](a)),
    odd_order=lambda net, x, a, b: net.extra['mix7'](torch.cat([b[:, :3], a[:, :4]], 1)),
)


def extras():
    return dict(
        gate=nn.Conv2d(8, 16, 1), mix=nn.Conv2d(16, 8, 1), mix7=nn.Conv2d(7, 8, 1), conv=nn.Conv2d(8, 8, 3),
        up=nn.ConvTranspose2d(8, 8, 2, 2), norm1=nn.GroupNorm(1, 8), conv1=nn.Conv2d(8, 8, 1),
        depthwise=nn.Conv2d(8, 8, 3, padding=1, groups=8), norm=nn.BatchNorm2d(8),
    )


# Here the second branch only controls a gate, or does not reach the output at all.
B_UNUSED = ('gate', 'layer_scale', 'plain_function', 'gated_linear_unit')


@pytest.mark.parametrize('layout', ['interleaved', 'halves'])
@pytest.mark.parametrize('name', JOINS)
def test_the_flip_follows_every_join(name, layout):
    modules = extras()
    if name == 'gate':
        modules['gate'] = nn.Conv2d(8, 8, 1)
    net = trained_like_(Joined(JOINS[name], **modules), 16)
    expected = output(net, probe(16))
    convert(net, act='brelu', layout=layout, input_size=(3, 16, 16))
    assert net.conversion.function == 'exact'
    assert isinstance(net.a[2], BReLU) and isinstance(net.head[1], BReLU)
    assert isinstance(net.b[2], nn.ReLU) == (name in B_UNUSED)
    assert max_diff(output(net, probe(16)), expected) < 1e-5


@pytest.mark.parametrize('name, join, where', [
    ('odd shift', lambda net, x, a, b: a + b.roll(1, 1), 'the summands have different signs'),
    ('channel mean', lambda net, x, a, b: a + b.mean(1, keepdim=True), 'mean runs over channels'),
    ('constant', lambda net, x, a, b: a + 1, 'add needs its input unchanged'),
    ('functional pool', lambda net, x, a, b: F.max_pool2d(a, 2), 'max_pool2d_with_indices needs its input unchanged'),
    ('write into zeros', lambda net, x, a, b: torch.zeros_like(a).copy_(a) + b, 'copy needs its input unchanged'),
])
def test_what_does_not_fit_names_the_place(name, join, where):
    net = trained_like_(Joined(join), 16)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ConversionError, match=f"'the model': {where}"):
        convert(net, act='brelu', input_size=(3, 16, 16))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


class Standardised(nn.Conv2d):
    """Weight standardisation subtracts a mean over inputs: it does not commute with their signs."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, padding=1)


def test_a_layer_that_computes_its_weight_is_wrapped():
    net = Joined(lambda net, x, a, b: a + b)
    net.a[0] = Standardised(8, 8, 3, padding=1)
    net = trained_like_(net, 16)
    weight, expected = net.a[0].weight.clone(), output(net, probe(16))
    convert(net, act='brelu', input_size=(3, 16, 16))
    assert isinstance(net.a[0], Bipolar) and torch.equal(net.a[0].f.weight, weight)
    assert max_diff(output(net, probe(16)), expected) < 1e-5
    convert(net, act='relu', input_size=(3, 16, 16))
    assert isinstance(net.a[0], Standardised)


def test_one_shift_for_all_channels_is_wrapped():
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.shift = nn.Parameter(torch.tensor([0.7])), nn.Parameter(torch.tensor([0.3]))

        def forward(self, x):
            return self.scale * x + self.shift

    net = trained_like_(Joined(lambda net, x, a, b: net.extra['shift'](a) + b, shift=Shift()), 16)
    expected = output(net, probe(16))
    convert(net, act='brelu', input_size=(3, 16, 16))
    assert isinstance(net.extra['shift'], Bipolar)
    assert max_diff(output(net, probe(16)), expected) < 1e-6


def test_what_holds_a_replaced_activation_is_not_wrapped():
    class ScaledCube(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.act = nn.Parameter(torch.tensor([0.7])), nn.ReLU()

        def forward(self, x):
            return self.scale * self.act(x) ** 3

    net = trained_like_(Joined(lambda net, x, a, b: net.extra['cube'](a) + b, cube=ScaledCube()), 16)
    with pytest.raises(ConversionError, match='pow needs its input unchanged'):
        convert(net, act='brelu', input_size=(3, 16, 16))


def test_a_gate_that_mixes_channels_is_wrapped():
    net = trained_like_(Joined(lambda net, x, a, b: net.extra['eca'](a) + b, eca=EcaModule(8)), 16)
    expected = output(net, probe(16))
    convert(net, act='brelu', input_size=(3, 16, 16))
    assert isinstance(net.extra['eca'], Bipolar)
    assert torch.equal(output(net, probe(16)), expected)


def test_the_rows_of_a_computed_weight_are():
    net = Joined(lambda net, x, a, b: a + b)
    net.stem[0] = Standardised(3, 8, 3, padding=1)
    net = trained_like_(net, 16)
    expected = output(net, probe(16))
    convert(net, act='brelu', input_size=(3, 16, 16))
    assert max_diff(output(net, probe(16)), expected) < 1e-5


def test_parameters_that_are_added():
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.rand(8, 1, 1))
            self.shift = nn.Parameter(torch.randn(8, 1, 1))

        def forward(self, x):
            return x * self.scale + self.shift

    net = trained_like_(Joined(lambda net, x, a, b: net.extra['shift'](a) + b, shift=Shift()), 16)
    expected = output(net, probe(16))
    convert(net, act='brelu', input_size=(3, 16, 16))
    assert max_diff(output(net, probe(16)), expected) < 1e-5


def test_max_pools_follow_their_input():
    net = Joined(lambda net, x, a, b: net.extra['inner'](a) + net.extra['inner'](b),
                 inner=nn.MaxPool2d(2), plain=nn.MaxPool2d(2))
    net.stem.insert(0, nn.MaxPool2d(2))  # before any activation
    net = trained_like_(net, 32)
    expected = output(net, probe(32))
    convert(net, act='brelu', input_size=(3, 32, 32))
    assert isinstance(net.extra['inner'], BipolarMaxPool2d)
    assert type(net.stem[0]) is nn.MaxPool2d
    assert torch.equal(output(net, probe(32)), expected)


def test_pre_activation_networks():
    """Here the scale of a BatchNorm may have to take a sign, since no convolution stands before it."""
    model = trained_like('densenet121')
    expected = output(model, probe(96))
    convert(model, act='brelu', layout='halves')
    assert torch.equal(output(model, probe(96)), expected)


@pytest.mark.parametrize('name', ['resnet18', 'mobilenetv2_050'])
def test_scales_of_norms_stay_positive_where_they_can(name):
    model = timm.create_model(name)
    convert(model, act='brelu')
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all((m.weight >= 0).all() for m in norms)
