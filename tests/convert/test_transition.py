"""``convert(transition=True)``: an exact start for every operator, and the converted model at its end."""
import copy
import dataclasses
import functools

import pytest
import timm
import torch
from support.trained_like import max_diff, output, probe, trained_like_
from timm.layers import Conv2dSame, MixedConv2d, create_conv2d
from timm.layers.pool2d_same import MaxPool2dSame
from timm.models.densenet import DenseNet
from torch import nn
from torch._dynamo.utils import counters

from timm_dyacts import (
    BELU,
    BPReLU,
    BReLU,
    ConversionError,
    DyReLU,
    DyReLUB,
    SoftPool2d,
    SoftPool2dSame,
    Transition,
    convert,
    finish_transition,
    get_transition,
    set_transition,
)
from timm_dyacts.convert.transition import idle_parameters, subsampling_of, transitions
from timm_dyacts.layers import Subsample


class SmallNet(nn.Module):
    """A network with a given activation and pool, of odd or even sizes."""

    def __init__(self, act=nn.ReLU, pool=None, channels=8):
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = act()
        self.pool = pool or nn.Identity()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.act2 = act()
        self.fc = nn.Linear(channels, 5)

    def forward(self, x):
        x = self.pool(self.act1(self.bn1(self.conv1(x))))
        return self.fc(self.act2(self.conv2(x)).mean((2, 3)))


class Block(nn.Module):
    """A strided convolution, and behind it a slot as timm's blocks have it."""

    def __init__(self, conv, norm, act=nn.ReLU):
        super().__init__()
        self.conv = conv
        self.bn = norm
        self.act = act()
        self.aa = nn.Identity()

    def forward(self, x):
        return self.aa(self.act(self.bn(self.conv(x))))


def strided(conv, norm=nn.BatchNorm2d, act=nn.ReLU):
    """A network that pools by one strided convolution, as if trained."""
    block = Block(conv, norm(conv.out_channels), act)
    net = nn.Sequential(nn.Conv2d(3, conv.in_channels, 1), block, nn.Conv2d(conv.out_channels, 4, 1))
    return trained(net, size=12)


def trained(net, size=32):
    torch.manual_seed(0)
    for module in net.modules():
        if hasattr(module, 'reset_parameters'):
            module.reset_parameters()
    return trained_like_(net, size=size)


NETWORKS = dict(
    # a max pool with another window than the zoo's SoftPool
    resnet18=lambda: timm.create_model('resnet18', num_classes=10),
    densenet=lambda: DenseNet(growth_rate=8, block_config=(2, 2, 2), num_classes=10),
    # strided convolutions with symmetric padding, hard-swish, gates
    mobilenetv3=lambda: timm.create_model('mobilenetv3_small_050', num_classes=10),
    # TensorFlow's padding, kernels of several sizes at once, SiLU
    tf_mixnet=lambda: timm.create_model('tf_mixnet_s', num_classes=10),
    # GELU behind LayerNorm, channels last
    convnext=lambda: timm.create_model('test_convnext', num_classes=10),
)
STEPS = {
    'softpool': dict(pool='softpool'),
    'stem': dict(pool='softpool', pool_kwargs=dict(kernel_size=2, stride=2, padding=0, ceil_mode=True)),
    'belu': dict(act='belu'),
    'bselu_halves': dict(act='bselu', layout='halves'),
    'dyrelu_b_all': dict(act='dyrelu_b', where='all', act_kwargs=dict(reduction=4)),
    'dyrelu_a_k3': dict(act='dyrelu_a', start='fit', act_kwargs=dict(k=3)),
    'dyrelu_b_softpool_nobn': dict(act='dyrelu_b', pool='softpool', norm='none', pool_kwargs=dict(beta=2.0)),
    'belu_softpool': dict(act='belu', pool='softpool'),
    'silu': dict(act='silu'),
}


@functools.lru_cache(maxsize=1)
def network(name):
    torch.manual_seed(0)
    return trained_like_(NETWORKS[name]())


def cases():
    skipped = {
        ('resnet18', 'belu_softpool'), ('densenet', 'belu_softpool'),  # bipolar max pools stay
        ('convnext', 'softpool'), ('convnext', 'stem'), ('convnext', 'belu_softpool'),  # nothing to pool
        ('convnext', 'dyrelu_b_softpool_nobn'), ('mobilenetv3', 'stem'), ('tf_mixnet', 'stem'),
        ('tf_mixnet', 'silu'), ('tf_mixnet', 'bselu_halves'), ('tf_mixnet', 'dyrelu_a_k3'),  # they take their time
        ('densenet', 'bselu_halves'),
    }
    return [(name, step) for name in NETWORKS for step in STEPS if (name, step) not in skipped]


@pytest.mark.parametrize('name, step', cases())
def test_it_starts_as_what_was_there_and_ends_as_what_is_converted_directly(name, step):
    model, steps = network(name), STEPS[step]
    converted = convert(copy.deepcopy(model), **steps, transition=True)
    report = converted.conversion
    assert report.function == 'exact' and all(r.exact for r in report.replaced)
    assert report.max_diff <= (1e-5 * report.scale if 'norm' in steps else 0)
    direct = convert(copy.deepcopy(model), **(dict(start='fit') if 'dyrelu' in step else {}) | steps)
    sizes = (64, 79)
    for size in sizes:
        x = probe(size)
        difference = max_diff(output(converted, x), output(model, x))
        assert difference <= (1e-5 if 'norm' in steps else 0), size
    if direct.conversion.function == 'exact':
        assert get_transition(converted) is None
        assert report.notes[0].startswith('transition=True changes nothing')
        return
    assert get_transition(converted) == 0
    assert f'exact by transition: {len([r for r in report.replaced if r.transition])} of ' in str(report)

    set_transition(converted, 1)
    assert all(torch.equal(output(converted, probe(size)), output(direct, probe(size))) for size in sizes)
    set_transition(converted, 0.5)
    assert not torch.equal(output(converted, probe()), output(direct, probe()))
    assert finish_transition(converted) is converted
    assert list(converted.state_dict()) == list(direct.state_dict())
    assert [(n, type(m), m.extra_repr()) for n, m in converted.named_modules()] \
        == [(n, type(m), m.extra_repr()) for n, m in direct.named_modules()]
    assert torch.equal(output(converted, probe(79)), output(direct, probe(79)))
    ours, theirs = converted.conversion, direct.conversion
    assert (ours.replaced, ours.new_keys, ours.function) == (theirs.replaced, theirs.new_keys, theirs.function)
    assert ours.max_diff is None and ours.notes[-1] == 'the transitions are finished'


@pytest.mark.parametrize('act', [nn.ReLU, lambda: nn.PReLU(8), nn.GELU, lambda: nn.ReLU(inplace=True), BReLU,
                                 lambda: BReLU(layout='halves'), BELU, lambda: BPReLU(8), lambda: nn.ELU(0.5)],
                         ids='relu prelu gelu inplace brelu brelu_halves belu bprelu elu'.split())
@pytest.mark.parametrize('target', [dict(act='belu'), dict(act='bleaky_relu', layout='halves'), dict(act='relu'),
                                    dict(act='dyrelu_b'), dict(act='bprelu')], ids=lambda t: t['act'])
def test_from_any_activation_to_any_other(act, target):
    """Whether plain or bipolar, of one layout or the other, with parameters or in place."""
    model = trained(SmallNet(act))
    x = probe(15)
    expected = output(model, x)
    converted = convert(copy.deepcopy(model), **target, transition=True)
    assert converted.conversion.function == 'exact'
    assert max_diff(output(converted, x), expected) < 1e-6
    direct = convert(copy.deepcopy(model), **(dict(start='fit') if 'dyrelu' in target['act'] else {}) | target)
    if get_transition(converted) is not None:
        finish_transition(converted)
        assert converted.conversion.new_keys == direct.conversion.new_keys
    assert list(converted.state_dict()) == list(direct.state_dict())
    assert torch.equal(output(converted, x), output(direct, x))


def test_from_a_dynamic_relu_that_has_learned_something():
    model = convert(trained(SmallNet()), act='dyrelu_b')
    with torch.no_grad():
        model.act1.fc2_weight.normal_()
        model.act2.fc2_bias.normal_()
    for act in ('relu', 'brelu', 'belu', 'dyrelu_a'):
        converted = convert(copy.deepcopy(model), act=act, transition=True)
        assert get_transition(converted) == 0
        assert max_diff(output(converted, probe(15)), output(model, probe(15))) < 1e-6


# Strided convolutions


def outputs_of(conv, x):
    """What a strided convolution gives, and what its subsampling takes from its output with stride 1."""
    convs = list(conv.children()) if isinstance(conv, MixedConv2d) else [conv]
    subsample = subsampling_of(convs)
    expected = conv(x)
    for part in convs:
        part.stride = (1, 1)
    return subsample(conv(x)), expected


@torch.no_grad()
@pytest.mark.parametrize('kernel', range(1, 8))
@pytest.mark.parametrize('padding', ['', 'same', 'valid', 0, 1, 2])
@pytest.mark.parametrize('stride, dilation', [(2, 1), (2, 2), (3, 1), ((1, 2), 1)], ids=str)
def test_every_padding_kernel_stride_and_size(kernel, padding, stride, dilation):
    if padding == 'same' and stride == (1, 2):
        make = functools.partial(Conv2dSame, 4, 4, kernel, bias=False)
    else:
        make = functools.partial(create_conv2d, 4, 4, kernel, padding=padding)
    for height in range(13, 19):
        conv = make(stride=stride, dilation=dilation)
        torch.nn.init.normal_(conv.weight)
        ours, expected = outputs_of(conv, torch.randn(1, 4, height, 31 - height))
        torch.testing.assert_close(ours, expected)


@torch.no_grad()
@pytest.mark.parametrize('kernels', [[3, 5, 7], [1, 3], [2, 3], [4, 6], [1, 2, 3, 4, 5, 6, 7]], ids=str)
@pytest.mark.parametrize('padding', ['', 'same'])
def test_groups_of_channels_with_kernels_of_their_own(kernels, padding):
    for size in (12, 13):
        conv = create_conv2d(16, 16, kernels, stride=2, padding=padding, depthwise=True)
        x = torch.randn(2, 16, size, size + 1)
        try:
            conv(x)
        except RuntimeError:  # the groups do not fit together at this size, whoever runs it
            continue
        ours, expected = outputs_of(conv, x)
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize('kernel', [2, 3, 5])
@pytest.mark.parametrize('padding', ['', 'same'])
def test_the_rows_of_tensorflow_depend_on_the_size(kernel, padding):
    model = strided(create_conv2d(6, 6, kernel, stride=2, padding=padding, depthwise=True))
    converted = convert(copy.deepcopy(model), pool='softpool', transition=True)
    direct = convert(copy.deepcopy(model), pool='softpool')
    for size in (12, 13, 16, 17):
        x = torch.randn(2, 3, size, size + 1)
        torch.testing.assert_close(output(converted, x), output(model, x), rtol=1e-5, atol=1e-6)
        assert max_diff(output(direct, x), output(model, x)) > 0.01
    subsample = converted[1].aa.old
    assert isinstance(subsample, Subsample) and converted[1].conv.stride == (1, 1)
    assert subsample.rows == ([[1, 0]] if padding == 'same' and kernel % 2 else [[0, 0]])


def test_what_looks_at_several_positions_in_between_is_refused():
    for norm, act, name in (
            (lambda c: nn.GroupNorm(2, c), nn.ReLU, 'native_group_norm'),
            (nn.InstanceNorm2d, nn.ReLU, r'\w+'),
            (lambda c: nn.BatchNorm2d(c, track_running_stats=False), nn.ReLU, 'native_batch_norm'),
            (nn.BatchNorm2d, lambda: nn.AvgPool2d(3, 1, 1), 'avg_pool2d')):
        model = strided(create_conv2d(6, 6, 3, stride=2), norm, act)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ConversionError, match=f'1.aa .Identity.: no transition: {name}, between it and the str'):
            convert(model, pool='softpool', transition=True)
        assert model[1].conv.stride == (2, 2)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        convert(model, pool='softpool')


def test_a_dynamic_relu_in_between_may_be_fresh_but_not_trained():
    model = convert(strided(create_conv2d(6, 6, 3, stride=2)), act='dyrelu_b')
    converted = convert(copy.deepcopy(model), pool='softpool', transition=True)
    torch.testing.assert_close(output(converted, probe(15)), output(model, probe(15)))
    with torch.no_grad():
        model[1].act.fc2_weight.normal_()
    with pytest.raises(ConversionError, match='looks at several positions'):
        convert(model, pool='softpool', transition=True)


@pytest.mark.parametrize('channels_last', [False, True])
def test_training_at_t_0_reaches_all_old_weights(channels_last):
    model = convert(strided(create_conv2d(6, 6, 3, stride=2, padding='same')), pool='softpool', transition=True)
    x = probe(12).requires_grad_()
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.detach().to(memory_format=torch.channels_last)
        assert model[1](model[0](x)).is_contiguous(memory_format=torch.channels_last)
    model.train()(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# Max pools


@pytest.mark.parametrize('pool', [
    nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2), nn.MaxPool2d(3, 2, ceil_mode=True), nn.MaxPool2d(2, 1, dilation=2),
    MaxPool2dSame(3, 2), MaxPool2dSame(2, 2),
], ids=str)
def test_max_pools(pool):
    model = trained(SmallNet(pool=pool))
    converted = convert(copy.deepcopy(model), pool='softpool', transition=True)
    same = isinstance(pool, MaxPool2dSame)
    assert type(converted.pool.new) is (SoftPool2dSame if same else SoftPool2d)
    for size in (15, 16):
        assert torch.equal(output(converted, probe(size)), output(model, probe(size)))
        set_transition(converted, 0.5)
        assert output(converted, probe(size)).isfinite().all()
        set_transition(converted, 0)


@pytest.mark.parametrize('kwargs', [
    dict(kernel_size=2, stride=2, padding=0), dict(stride=1), dict(kernel_size=5)], ids=str)
def test_a_window_that_gives_another_size_is_refused(kwargs):
    """Even if only for sizes of the other parity than the probe's."""
    model = trained(SmallNet(pool=nn.MaxPool2d(3, 2, 1)))
    with pytest.raises(ConversionError, match="No transition leads to the new pool in 'pool': for an input of "):
        convert(model, pool='softpool', pool_kwargs=kwargs, transition=True)
    assert isinstance(model.pool, nn.MaxPool2d)


# The model


def test_arguments():
    model = SmallNet()
    for wrong in (1, 'yes', None):
        with pytest.raises(ValueError, match='transition must be True or False, got'):
            convert(model, act='belu', transition=wrong)
    with pytest.raises(ValueError, match='transition must be left out without act and pool'):
        convert(model, norm='none', transition=True)
    for call in (finish_transition, lambda m: set_transition(m, 0.5)):
        with pytest.raises(ValueError, match='The model has no unfinished transitions'):
            call(model)
    assert get_transition(model) is None
    convert(model, act='belu', transition=True)
    for t in (-0.1, 1.01, float('nan'), '1', None):
        with pytest.raises(ValueError, match='t must be a number from 0 to 1'):
            set_transition(model, t)
    assert get_transition(model) == 0
    assert get_transition(set_transition(model, 0.3)) == 0.3
    model.act1.set(0.2)
    assert get_transition(model) == 0.2, 'the one that is behind'
    with pytest.raises(ValueError, match='is itself a Transition'):
        finish_transition(model.act1)


@pytest.mark.parametrize('t', [0, 0.5, 1])
def test_a_model_with_unfinished_transitions_is_not_converted(t):
    model = set_transition(convert(trained(SmallNet()), act='belu', transition=True), t)
    before = copy.deepcopy(model.state_dict())
    for steps in (dict(act='relu'), dict(norm='none'), dict(pool='softpool', transition=True)):
        with pytest.raises(ConversionError, match=r'unfinished transitions .t = .*: call finish_transition'):
            convert(model, **steps)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and get_transition(model) == t
    convert(finish_transition(model), act='relu')


def test_a_shared_pool_is_finished_everywhere():
    pool = nn.MaxPool2d(2)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), pool, nn.Conv2d(4, 4, 1), pool)
    convert(model, pool='softpool', transition=True)
    assert len(transitions(model)) >= 1
    finish_transition(model)
    assert isinstance(model[1], SoftPool2d) and isinstance(model[3], SoftPool2d)


def test_state_dict_and_copies_keep_t():
    model = set_transition(convert(trained(SmallNet(nn.SiLU)), act='dyrelu_b', transition=True), 0.25)
    other = convert(SmallNet(nn.SiLU), act='dyrelu_b', transition=True)
    other.load_state_dict(model.state_dict())
    twin = copy.deepcopy(model)
    assert get_transition(other) == get_transition(twin) == 0.25
    assert torch.equal(output(other, probe(15)), output(model, probe(15)))
    finish_transition(twin)
    assert get_transition(model) == 0.25 and twin.conversion != model.conversion


def test_idle_parameters():
    model = convert(trained(SmallNet(lambda: nn.PReLU(8))), act='dyrelu_b', transition=True)
    names = {id(p): name for name, p in model.named_parameters()}
    idle = {t: {names[id(p)].split('.')[1] for p in idle_parameters(set_transition(model, t))} for t in (0, 0.5, 1)}
    assert idle == {0: {'new'}, 0.5: set(), 1: {'old'}}
    assert not idle_parameters(model.requires_grad_(False))


def test_on_the_meta_device():
    with torch.device('meta'):
        model = convert(timm.create_model('mobilenetv3_small_050'), act='dyrelu_b', pool='softpool', transition=True)
    assert len(transitions(model)) == 22
    loaded = convert(timm.create_model('mobilenetv3_small_050'), act='dyrelu_b', pool='softpool', transition=True)
    set_transition(loaded, 0.5)
    model.load_state_dict(loaded.state_dict(), assign=True)
    assert torch.equal(output(model, probe()), output(loaded, probe()))


def test_options_of_the_new_activations():
    model = convert(
        copy.deepcopy(network('convnext')), act='dyrelu_b', act_kwargs=dict(reduction=2), transition=True)
    dynamic = [m for m in model.modules() if isinstance(m, DyReLU)]
    assert dynamic and all(m.reduction == 2 and any(m.beta) for m in dynamic), 'it starts from the fitted lines'
    relu = convert(copy.deepcopy(network('convnext')), act='dyrelu_b', start='relu', transition=True)
    assert not any(any(m.beta) for m in relu.modules() if isinstance(m, DyReLUB))


def test_the_report_as_json_and_text():
    report = convert(trained(SmallNet(nn.SiLU)), act='dyrelu_b', transition=True).conversion
    assert report.counts == {'SiLU -> DyReLUB (transition)': 2}
    assert all(r['transition'] and r['exact'] for r in report.to_dict()['replaced'])
    assert 'exact by transition: 2 of 2, at t = 0' in str(report)
    assert dataclasses.replace(report.replaced[0], transition=False).kind == 'SiLU -> DyReLUB'


def test_compiled_without_a_recompilation_per_step():
    model = convert(strided(create_conv2d(6, 6, 3, stride=2, padding='same'), act=nn.SiLU),
                    act='dyrelu_b', pool='softpool', transition=True).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    for t in (0, 0, 0.1, 0.3, 0.6, 0.9, 1, 1):
        set_transition(compiled, t)
        compiled(probe(13)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counters['stats']['unique_graphs'] == 3
    model.eval()
    finish_transition(compiled)
    torch.testing.assert_close(compiled(probe(13)), model(probe(13)))
    assert not [m for m in compiled.modules() if isinstance(m, Transition)]
    x = probe(13)
    expected = output(model, x)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), expected)
