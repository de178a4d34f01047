"""The sign solver on the ways in which networks join their tensors."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from support.trained_like import max_diff, output, probe, trained_like, trained_like_
from timm.layers import EcaModule
from timm.layers.grn import GlobalResponseNorm
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
    response_norm=lambda net, x, a, b: x + net.extra['grn'](a) + b,
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
        grn=GlobalResponseNorm(8, channels_last=False),
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


def stage(ins, outs, act=nn.ReLU, stride=1):
    return nn.Sequential(nn.Conv2d(ins, outs, 3, stride, 1, bias=False), nn.BatchNorm2d(outs), act())


class SlidingDetector(nn.Module):
    """A one-stage detector as YOLO: two scales, anchors from their shapes, and distances as means of distributions."""

    bins = 4

    def __init__(self, act=nn.ReLU, classes=3):
        super().__init__()
        self.stem, self.down = stage(3, 8, act, 4), stage(8, 16, act, 2)
        self.narrow = nn.Sequential(nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8), act())
        self.pool = nn.MaxPool2d(5, 1, 2)
        self.mix, self.up, self.merge = stage(32, 16, act), nn.Upsample(scale_factor=2), stage(24, 8, act)
        self.boxes = nn.ModuleList(
            nn.Sequential(stage(c, 8, act), nn.Conv2d(8, 4 * self.bins, 1)) for c in (8, 16))
        self.scores = nn.ModuleList(nn.Sequential(stage(c, 8, act), nn.Conv2d(8, classes, 1)) for c in (8, 16))
        self.mean = nn.Conv2d(self.bins, 1, 1, bias=False).requires_grad_(False)
        self.mean.weight.data[:] = torch.arange(self.bins).view(1, -1, 1, 1)
        self.classes = classes

    def features(self, x):
        fine = self.stem(x)
        coarse = self.down(fine)
        first, *rest = self.narrow(coarse).chunk(1, 1)
        pooled = [first, *rest]
        for _ in range(3):
            pooled.append(self.pool(pooled[-1]))
        coarse = self.mix(torch.cat(pooled, 1))
        return self.merge(torch.cat([self.up(coarse), fine], 1)), coarse

    def anchors(self, maps):
        centres, strides = [], []
        for x, stride in zip(maps, (4, 8), strict=True):
            h, w = x.shape[2:]
            ys, xs = torch.meshgrid(
                torch.arange(h, device=x.device, dtype=x.dtype) + 0.5, x.new_ones(w).cumsum(0) - 0.5, indexing='ij')
            centres.append(torch.stack([xs, ys], -1).view(-1, 2))
            strides.append(x.new_full((h * w, 1), stride))
        return torch.cat(centres).transpose(0, 1), torch.cat(strides).transpose(0, 1)

    def forward(self, x):
        maps = self.features(x)
        found = [torch.cat([box(m), score(m)], 1) for m, box, score in zip(maps, self.boxes, self.scores, strict=True)]
        found = torch.cat([f.view(f.shape[0], 4 * self.bins + self.classes, -1) for f in found], 2)
        box, score = found.split((4 * self.bins, self.classes), 1)
        n, _, count = box.shape
        sides = self.mean(box.view(n, 4, self.bins, count).transpose(2, 1).softmax(1)).view(n, 4, count)
        low, high = sides.chunk(2, 1)
        centres, strides = self.anchors(maps)
        low, high = centres - low, centres + high
        boxes = torch.cat([(low + high) / 2, high - low], 1) * strides
        score = score.sigmoid()
        best, places = score.amax(1).topk(5)
        return boxes.gather(2, places[:, None].expand(-1, 4, -1)), best, torch.cat([boxes, score], 1)


@pytest.mark.parametrize('size', [64, 96])
@pytest.mark.parametrize('act, kind', [('brelu', nn.ReLU), ('bipolar', nn.SiLU)])
def test_a_sliding_detector(act, kind, size):
    torch.manual_seed(0)
    net = trained_like_(SlidingDetector(kind), 64)
    net.mean.weight.data[:] = torch.arange(net.bins).view(1, -1, 1, 1)
    expected = output(net, probe(size))
    convert(net, act=act, input_size=(3, 64, 64))
    assert net.conversion.function == 'exact'
    left = [name for name, m in net.named_modules() if isinstance(m, kind) and not name.endswith('.f')]
    assert {name.partition('.')[0] for name in left} <= {'boxes', 'scores'}, 'before the gates at the end'
    assert torch.equal(net.mean.weight.flatten(), torch.arange(float(net.bins))), 'its input is as it was'
    for a, b in zip(output(net, probe(size)), expected, strict=True):
        assert max_diff(a, b) < 1e-5


class TwoStageDetector(nn.Module):
    """Boxes where the scores are high, features from there, and heads for each box: none, if no score is high."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(stage(3, 8, stride=2), stage(8, 8, stride=2))
        self.score, self.shape = nn.Conv2d(8, 1, 1), nn.Sequential(nn.Conv2d(8, 4, 1), nn.Sigmoid())
        self.box = nn.Sequential(
            nn.Flatten(1), nn.Linear(8 * 9, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 5))
        self.mask = nn.Sequential(
            stage(8, 8), stage(8, 6), nn.ConvTranspose2d(6, 6, 2, 2), nn.ReLU(), nn.Conv2d(6, 2, 1))
        self.threshold = 0.

    def forward(self, x):
        x = self.body(x)
        image, row, column = torch.where(self.score(x)[:, 0] > self.threshold)
        features, sides = x[image, :, row, column], self.shape(x)[image, :, row, column]
        centres = torch.stack([column, row], 1)
        boxes = torch.cat([image[:, None], centres - 4 * sides[:, :2], centres + 4 * sides[:, 2:]], 1)
        inside = torchvision.ops.roi_align(x, boxes, 3, aligned=True)
        kept = torchvision.ops.nms(boxes[:, 1:], sides[:, 0], 0.7)
        masks = self.mask(inside)[torch.arange(len(boxes)), (sides[:, 0] > 0.5).long()]
        return self.box(inside + features[:, :, None, None])[kept], masks[kept]


@pytest.mark.parametrize('seen', ['boxes', 'no boxes'])
def test_a_detector_of_two_stages_whether_or_not_the_probe_shows_boxes(seen):
    torch.manual_seed(0)
    net = trained_like_(TwoStageDetector(), 32)
    expected = output(net, probe(48))
    assert all(len(t) > 3 for t in expected)
    net.threshold = 0. if seen == 'boxes' else 1e9
    convert(net, act='brelu', input_size=(3, 32, 32))
    net.threshold = 0.
    assert net.conversion.function == ('exact' if seen == 'boxes' else 'unchecked')
    assert len(net.conversion.replaced) == 7
    for a, b in zip(output(net, probe(48)), expected, strict=True):
        assert a.shape == b.shape and max_diff(a, b) < 1e-5


@pytest.mark.parametrize('join', [
    lambda net, x, a, b: a + b.index_select(1, b.mean((0, 2, 3)).argsort()),
    lambda net, x, a, b: a + b.gather(1, b.argsort(1)),
    lambda net, x, a, b: a[:, a.mean((0, 2, 3)) > 0.3].mean(1, keepdim=True) + b,
], ids=['channels in order', 'elements in order', 'some channels'])
def test_channels_that_are_chosen_by_what_they_hold_do_not_pass(join):
    net = trained_like_(Joined(join), 16)
    with pytest.raises(ConversionError, match='needs its input unchanged|of different signs'):
        convert(net, act='brelu', input_size=(3, 16, 16))


class Reshaped(nn.Module):
    """Tokens viewed as channels without a transposition. Four tokens, at 64 pixels, leave two groups of channels."""

    def __init__(self):
        super().__init__()
        self.stage = nn.Sequential(nn.Conv2d(3, 8, 32, 32), nn.BatchNorm2d(8), nn.ReLU())
        self.inner = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stage(x)
        x = x + self.inner(x).flatten(2).transpose(1, 2).reshape(x.shape)
        return self.fc(x.mean((2, 3)))


def test_signs_that_fit_one_size_only():
    net = trained_like_(Reshaped(), 96)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ConversionError, match=r'fits inputs of \(3, 64, 64\) does not fit those of \(3, 96, 96\)'):
        convert(net, act='brelu')
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert convert(net, act='brelu', input_size=(3, 64, 64)).conversion.function == 'exact'


def in_space(dims):
    """A network over signals or volumes, with what torch has for them."""
    conv, norm, pool, mean, transposed = (getattr(nn, f'{kind}{dims}d') for kind in (
        'Conv', 'BatchNorm', 'MaxPool', 'AdaptiveAvgPool', 'ConvTranspose'))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Sequential(
                conv(2, 6, 3, padding=1, padding_mode='replicate'), norm(6), nn.ReLU(), pool(2, padding=1))
            self.inner = nn.Sequential(conv(6, 6, 3, padding=1, groups=2), norm(6), nn.ReLU())
            self.up = nn.Sequential(transposed(6, 6, 2, 2), nn.ReLU())
            self.pad = getattr(nn, f'ReflectionPad{dims}d')(1)
            self.mean, self.fc = mean(1), nn.Linear(6, 3)

        def forward(self, x):
            x = self.down(x)
            up = F.interpolate(self.inner(x), scale_factor=2, mode=('linear', 'bilinear', 'trilinear')[dims - 1])
            up = self.up(x) + up + F.interpolate(x, scale_factor=2)
            return self.fc(self.mean(self.pad(up)).flatten(1))

    return Network()


@pytest.mark.parametrize('size', [8, 9])
@pytest.mark.parametrize('dims', [1, 2, 3])
def test_signals_and_volumes(dims, size):
    torch.manual_seed(0)
    net, x = in_space(dims), torch.randn(2, 2, *[size] * dims)
    net.train()(x)
    expected = output(net, x)
    convert(net, act='brelu', input_size=(2, *[size] * dims))
    assert net.conversion.function == 'exact' and len(net.conversion.replaced) >= 3
    assert max_diff(output(net, x), expected) < 1e-5


def test_a_segmentation_network_of_torchvision():
    class Logits(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x)['out']

    torch.manual_seed(0)
    net = torchvision.models.get_model('deeplabv3_resnet50', weights=None, weights_backbone=None)
    net = trained_like_(Logits(net), 64)
    expected = output(net, probe(72))
    convert(net, act='brelu', input_size=(3, 64, 64))
    assert net.conversion.function == 'exact'
    assert max_diff(output(net, probe(72)), expected) < 1e-5


class Distances(nn.Module):
    """As the detectors of torchvision end: places, and distances from them, which are positive."""

    def __init__(self, module):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU())
        self.sides, self.scores, self.act = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 2, 1), nn.ReLU() if module else None

    def forward(self, x):
        x = self.body(x)
        sides = self.sides(x)
        sides = self.act(sides) if self.act else F.relu(sides)
        places = torch.arange(sides.shape[-1], dtype=x.dtype)
        return torch.cat([places - sides[:, :2], places + sides[:, 2:], self.scores(x)], 1)


@pytest.mark.parametrize('module', [True, False])
def test_an_activation_behind_the_last_weights_keeps_its_sign(module):
    torch.manual_seed(0)
    model = trained_like_(Distances(module))
    expected = output(model, probe())
    converted = convert(copy.deepcopy(model), act='brelu')
    report = converted.conversion
    assert report.function == 'exact' and torch.equal(output(converted, probe()), expected)
    assert [type(m) for m in converted.body] == [nn.Conv2d, nn.BatchNorm2d, BReLU, nn.Conv2d, BReLU]
    skip, = report.skipped
    assert (skip.name, skip.kind) == (('act', 'ReLU') if module else ('', 'relu'))
    assert skip.reason == 'behind the last weights, and what is computed from it needs its sign'
    assert type(converted) is Distances and converted.state_dict().keys() - model.state_dict().keys() == {'bipolar'}
    again = convert(converted, act='brelu')
    assert torch.equal(output(again, probe()), expected) and again.conversion.replaced == []
    back = convert(again, act='relu')
    assert torch.equal(output(back, probe()), expected) and back.state_dict().keys() == model.state_dict().keys()


def test_a_conflict_before_the_last_weights_is_refused_still():
    class Rectified(Distances):
        def forward(self, x):
            return super().forward(x) + self.scores(self.body(x) + torch.arange(8.0).view(8, 1, 1)).sum()

    torch.manual_seed(0)
    with pytest.raises(ConversionError, match='the summands have different signs'):
        convert(trained_like_(Rectified(True)), act='brelu')


@pytest.mark.parametrize('norm', [nn.GroupNorm(1, 8), nn.GroupNorm(4, 8)], ids=['1', '4'])
def test_norms_that_mix_channels_behind_an_activation(norm):
    torch.manual_seed(0)
    model = trained_like_(Joined(lambda net, x, a, b: net.extra['norm'](a) + x, norm=norm))
    converted = convert(copy.deepcopy(model), act='brelu')
    assert converted.conversion.function == 'exact' and isinstance(converted.extra['norm'], Bipolar)
    assert torch.equal(output(converted, probe()), output(model, probe()))


@pytest.mark.parametrize('depends', [False, True])
def test_a_placeholder_without_channels(depends):
    def join(net, x, a, b):
        empty = x[:, :0] * 2 if depends else torch.empty(len(x), 0, *x.shape[2:])
        return torch.cat([empty, a, x], 1)

    torch.manual_seed(0)
    model = trained_like_(Joined(join, out=16))
    if depends:  # it may hold something the next time
        with pytest.raises(ConversionError, match='needs its input unchanged'):
            convert(model, act='brelu')
        return
    converted = convert(copy.deepcopy(model), act='brelu')
    assert converted.conversion.function == 'exact'
    assert torch.equal(output(converted, probe()), output(model, probe()))
