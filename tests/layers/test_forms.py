"""What activations compute as they stand, and modules that start as what is in their place."""
import copy
import functools
import re

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from timm.layers import create_act_layer
from timm.layers.pool2d_same import MaxPool2dSame
from torch import nn

from timm_dyacts.layers import (
    BELU,
    BSELU,
    Bipolar,
    BipolarMaxPool2d,
    BLeakyReLU,
    BPReLU,
    BReLU,
    DyReLU,
    DyReLUA,
    DyReLUB,
    DyReLUC,
    SoftPool1d,
    SoftPool2d,
    SoftPool2dSame,
    SoftPool3d,
)
from timm_dyacts.layers.forms import PLAIN_ACTIVATIONS, Form, Place, plain_part, static_form
from timm_dyacts.operators import OPERATORS
from timm_dyacts.ops.backends import current_backend

MEMBERS = (BReLU, BELU, BSELU, BLeakyReLU, BPReLU)


def name_of(value):
    """The same in every process, where ``repr`` of a function tells its address."""
    return re.sub(' at 0x[0-9a-f]+', '', repr(value))


def place_of(module, channels=4, channel_dim=1, dtype=torch.float32):
    return Place(module, channels, channel_dim, torch.device('cpu'), dtype)


def prelu(*slopes):
    module = nn.PReLU(len(slopes))
    with torch.no_grad():
        module.weight.copy_(torch.tensor(slopes))
    return module


def trained(module):
    """The module with all its parameters moved from where they start."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1)
    return module


class TestStaticForm:
    @pytest.mark.parametrize('module, kind, options', [
        (nn.ReLU(), 'relu', dict(max_value=None)),
        (nn.ReLU(inplace=True), 'relu', dict(max_value=None)),
        (nn.ReLU6(), 'relu', dict(max_value=6.0)),
        (nn.Hardtanh(0, 20), 'relu', dict(max_value=20.0)),
        (nn.Hardtanh(-2, 2), 'Hardtanh', dict(min_val=-2, max_val=2)),
        (nn.LeakyReLU(0.2), 'leaky_relu', dict(negative_slope=0.2)),
        (nn.ELU(0.7), 'elu', dict(alpha=0.7)),
        (nn.SELU(), 'selu', {}),
        (nn.CELU(0.5), 'CELU', dict(alpha=0.5)),
        (nn.GELU('tanh'), 'GELU', dict(approximate='tanh')),
        (nn.SiLU(inplace=True), 'SiLU', {}),
        (nn.Mish(), 'Mish', {}),
        (nn.Hardswish(), 'Hardswish', {}),
        (nn.Softplus(2, 10), 'Softplus', dict(beta=2, threshold=10)),
        (nn.Softsign(), 'Softsign', {}),
        (nn.RReLU(0.1, 0.2), 'RReLU', dict(lower=0.1, upper=0.2)),
        (timm.layers.activations.Swish(inplace=True), 'Swish', {}),
        (timm.layers.activations.GELU(), 'GELU', {}),
        (timm.layers.activations.GELUTanh(), 'GELUTanh', {}),
        (timm.layers.activations_me.HardSwishMe(), 'HardSwishMe', {}),
    ], ids=name_of)
    def test_plain(self, module, kind, options):
        assert static_form(module) == Form(kind, options)

    @pytest.mark.parametrize('cls', [nn.PReLU, timm.layers.PReLU])
    def test_prelu(self, cls):
        module = cls(3)
        form = static_form(module)
        assert form.kind == 'prelu' and form.options['weight'] is module.weight and form.layout is None

    @pytest.mark.parametrize('cls', dict.fromkeys(PLAIN_ACTIVATIONS), ids=str)
    def test_every_plain_activation_is_itself_and_no_other(self, cls):
        form = static_form(cls())
        assert form.layout is None and form.same_function(static_form(cls()))
        same = {other for other in PLAIN_ACTIVATIONS if form.same_function(static_form(other()))}
        # timm has names of its own for some of torch's classes.
        assert {other.__name__ for other in same} == {cls.__name__}

    @pytest.mark.parametrize('module, form', [
        (BReLU(), Form('relu', dict(max_value=None), 'interleaved')),
        (BReLU(max_value=6, layout='halves'), Form('relu', dict(max_value=6.0), 'halves')),
        (BELU(0.5), Form('elu', dict(alpha=0.5), 'interleaved')),
        (BSELU(layout='halves'), Form('selu', {}, 'halves')),
        (BLeakyReLU(0.3), Form('leaky_relu', dict(negative_slope=0.3), 'interleaved')),
        (Bipolar(nn.SiLU(), 'halves'), Form('SiLU', {}, 'halves')),
        (Bipolar(nn.ReLU6()), Form('relu', dict(max_value=6.0), 'interleaved')),
        (Bipolar(F.silu), Form('function', dict(function=F.silu), 'interleaved')),
        (Bipolar(DyReLUB(4)), Form('relu', dict(max_value=None), 'interleaved')),
    ], ids=name_of)
    def test_bipolar(self, module, form):
        assert static_form(module) == form

    def test_bprelu(self):
        module = trained(BPReLU(4, layout='halves'))
        form = static_form(module)
        assert form == Form('prelu', dict(weight=module.weight), 'halves')

    @pytest.mark.parametrize('cls', [DyReLUA, DyReLUB, DyReLUC, DyReLU])
    @pytest.mark.parametrize('kwargs, form', [
        ({}, Form('relu', dict(max_value=None))),
        (dict(max_value=6), Form('relu', dict(max_value=6.0))),
        (dict(alpha=(1, 0.2)), Form('leaky_relu', dict(negative_slope=0.2))),
        (dict(alpha=(1, 0.2, 0.2), k=3), Form('leaky_relu', dict(negative_slope=0.2))),
        (dict(alpha=(1, 0.2, 0.1), k=3), Form('dynamic', {})),
        (dict(alpha=(1, 2)), Form('dynamic', {})),
        (dict(beta=(0, 0.1)), Form('dynamic', {})),
    ], ids=str)
    def test_dynamic_relu(self, cls, kwargs, form):
        assert static_form(cls(4, **kwargs)) == form
        assert static_form(trained(cls(4, **kwargs))) == Form('dynamic', {})
        assert static_form(cls(**kwargs)) == form  # lazy

    def test_every_operator_has_one(self):
        for name, operator in OPERATORS.items():
            if operator.replaces == 'act' and name != 'bipolar':
                module = create_act_layer(name, **(dict(channels=4) if operator.has_width else {}))
                form = static_form(module)
                assert form.kind == (operator.plain or 'relu')
                assert (form.layout is not None) == (operator.plain is not None)


class TestSameFunction:
    @pytest.mark.parametrize('a, b', [
        (nn.ReLU(), BReLU()),
        (nn.ReLU(inplace=True), DyReLUB(4)),
        (nn.ReLU6(), BReLU(max_value=6)),
        (nn.Hardtanh(0, 6), nn.ReLU6()),
        (nn.ELU(1), BELU(1.0)),
        (nn.LeakyReLU(0.25), nn.PReLU(1, init=0.25)),
        (nn.PReLU(1), BPReLU(1)),
        (prelu(0.1, 0.2), Bipolar(prelu(0.1, 0.2))),
        (prelu(0.1, 0.2), prelu(0.1, 0.2).double().requires_grad_(False)),
        (nn.PReLU(4, device='meta'), nn.PReLU(4)),
        (nn.PReLU(4), nn.PReLU(4, device='meta')),
        (nn.SiLU(), Bipolar(nn.SiLU(inplace=True))),
        (Bipolar(F.silu), Bipolar(F.silu)),
        (nn.CELU(0.5), nn.CELU(0.5)),
    ], ids=name_of)
    def test_same(self, a, b):
        assert static_form(a).same_function(static_form(b))
        assert static_form(b).same_function(static_form(a))

    @pytest.mark.parametrize('a, b', [
        (nn.ReLU(), nn.ReLU6()),
        (nn.ReLU(), nn.LeakyReLU(0.01)),
        (nn.ELU(0.5), BELU(1.0)),
        (nn.LeakyReLU(0.2), nn.PReLU(1, init=0.25)),
        (prelu(0.1, 0.2), prelu(0.2, 0.1)),
        (prelu(0.2, 0.2), prelu(0.2)),
        (nn.PReLU(4, device='meta'), nn.PReLU(3)),
        (nn.GELU(), nn.GELU('tanh')),
        (nn.GELU(), timm.layers.activations.GELU()),
        (nn.CELU(0.5), nn.CELU(1.0)),
        (nn.Softplus(1), nn.Softplus(2)),
        (nn.Hardtanh(-1, 1), nn.Hardtanh(-2, 2)),
        (Bipolar(F.silu), Bipolar(F.mish)),
        (Bipolar(F.silu), nn.SiLU()),
        (trained(DyReLUB(4)), trained(DyReLUB(4))),
        (nn.ReLU(), trained(DyReLUB(4))),
    ], ids=name_of)
    def test_another(self, a, b):
        assert not static_form(a).same_function(static_form(b))
        assert not static_form(b).same_function(static_form(a))

    def test_slopes_of_another_precision(self):
        """What rounding has changed is another function."""
        slopes, rounded = prelu(0.1, 0.2), prelu(0.1, 0.2).bfloat16()
        assert not static_form(slopes).same_function(static_form(rounded))
        assert not static_form(rounded).same_function(static_form(slopes))
        assert static_form(prelu(0.25, 0.5)).same_function(static_form(prelu(0.25, 0.5).bfloat16()))


# Activations, of each kind that an operator can start as.
STARTS = {
    'relu': nn.ReLU(),
    'relu6': nn.ReLU6(inplace=True),
    'relu20': nn.Hardtanh(0, 20),
    'leaky_relu': nn.LeakyReLU(0.2, inplace=True),
    'prelu of one slope': trained(nn.PReLU()),
    'prelu': prelu(0.1, 0.2, 0.3, 0.4),
    'elu': nn.ELU(0.7),
    'selu': nn.SELU(inplace=True),
    'silu': nn.SiLU(inplace=True),
    'hardswish': nn.Hardswish(),
    'gelu': timm.layers.activations.GELU(),
    'celu': nn.CELU(0.5),
    'bipolar relu6': BReLU(max_value=6, layout='halves'),
    'bipolar prelu': trained(BPReLU(4)),
    'bipolar silu': Bipolar(nn.SiLU(inplace=True)),
    'bipolar function': Bipolar(F.mish),
}
# ... exactly
EXACT = {
    BReLU: {'relu', 'relu6', 'relu20', 'bipolar relu6'},
    BELU: {'elu'},
    BSELU: {'selu'},
    BLeakyReLU: {'leaky_relu'},
    BPReLU: {'prelu of one slope', 'prelu', 'bipolar prelu'},
    Bipolar: set(STARTS),
    **dict.fromkeys((DyReLUA, DyReLUB, DyReLUC), {
        'relu', 'relu6', 'relu20', 'leaky_relu', 'prelu of one slope', 'bipolar relu6'}),
}


class TestStartingAs:
    @pytest.mark.parametrize('name', STARTS)
    @pytest.mark.parametrize('cls', EXACT)
    def test_round_trip(self, cls, name):
        old = copy.deepcopy(STARTS[name])
        form, place = static_form(old), place_of(old)
        new = cls.starting_as(form, place)
        assert static_form(new).same_function(form) == (name in EXACT[cls])

    @pytest.mark.parametrize('name', STARTS)
    @pytest.mark.parametrize('cls', EXACT)
    def test_the_same_function_gives_the_same_numbers(self, cls, name):
        if name not in EXACT[cls]:
            return
        x = 8 * torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
        old = copy.deepcopy(STARTS[name])
        new = cls.starting_as(static_form(old), place_of(old))
        plain = plain_part(old) if isinstance(old, Bipolar) else _unmirrored(old)
        expected = plain(x.clone())
        if cls in (DyReLUA, DyReLUB, DyReLUC):
            assert torch.equal(new(x), expected)
        else:
            signs = torch.tensor([1.0, -1, 1, -1])[:, None]
            # Native kernels and PyTorch may round exponentials in different ways.
            tolerance = 1e-6 if name in ('elu', 'selu') and current_backend() != 'cpu' else 0
            torch.testing.assert_close(signs * new(signs * x), expected, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize('name, cls', [
        ('relu', BReLU), ('relu6', BReLU), ('elu', BELU), ('selu', BSELU), ('leaky_relu', BLeakyReLU),
        ('prelu', BPReLU), ('silu', Bipolar), ('gelu', Bipolar), ('bipolar relu6', BReLU), ('bipolar silu', Bipolar),
    ])
    def test_each_activation_has_its_own_bipolar_form(self, name, cls):
        old = STARTS[name]
        new = Bipolar.starting_as(static_form(old), place_of(old, channel_dim=-1), layout='halves')
        assert type(new) is cls and new.layout == 'halves' and new.channel_dim == -1
        if cls is Bipolar:
            assert new.f is plain_part(old)

    @pytest.mark.parametrize('cls', MEMBERS)
    def test_a_member_starts_as_its_own_where_it_cannot(self, cls):
        old = nn.SiLU(inplace=True)
        new = cls.starting_as(static_form(old), place_of(old))
        assert str(static_form(new)) == str(static_form(cls())) and new.inplace

    def test_what_the_place_says(self):
        for cls, old in ((BReLU, nn.ReLU(inplace=True)), (BLeakyReLU, Bipolar(nn.LeakyReLU(inplace=True))),
                         (BPReLU, nn.ReLU(inplace=True))):
            new = cls.starting_as(static_form(old), place_of(old, channel_dim=-1))
            assert new.inplace and new.channel_dim == -1 and new.layout == 'interleaved'
        assert not BReLU.starting_as(static_form(nn.ReLU()), place_of(nn.ReLU())).inplace
        for old in (nn.ReLU(), prelu(0.1, 0.2)):
            new = BPReLU.starting_as(static_form(old), place_of(old, dtype=torch.float64))
            assert new.weight.dtype == torch.float64
        new = DyReLUB.starting_as(static_form(nn.ReLU()), place_of(nn.ReLU(), 6, -1, torch.float64))
        assert (new.channels, new.channel_dim, new.fc1_weight.dtype) == (6, -1, torch.float64)

    @pytest.mark.parametrize('cls, old, kwargs', [
        (BReLU, nn.ReLU6(), dict(max_value=2.0, inplace=True, channel_dim=-1)),
        (BELU, nn.ELU(0.5), dict(alpha=2.0)),
        (BLeakyReLU, nn.LeakyReLU(0.5), dict(negative_slope=0.1)),
        (BPReLU, nn.ReLU(), dict(num_parameters=4, init=0.5)),
        (Bipolar, nn.SiLU(), dict(channel_dim=-1, inplace=True)),
        (Bipolar, nn.SiLU(), dict(f=F.mish)),
        (Bipolar, nn.ELU(0.5), dict(alpha=2.0)),
        (DyReLUB, nn.ReLU6(), dict(max_value=2.0, reduction=2)),
    ], ids=name_of)
    def test_arguments_win(self, cls, old, kwargs):
        new = cls.starting_as(static_form(old), place_of(old), **kwargs)
        assert {name: getattr(new, name) for name in kwargs} == kwargs

    def test_slopes_are_a_copy(self):
        old = prelu(0.1, 0.2)
        new = BPReLU.starting_as(static_form(old), place_of(old, 2))
        assert new.weight is not old.weight and torch.equal(new.weight, old.weight)
        assert new.weight.requires_grad and new.num_parameters == 2

    def test_on_the_meta_device(self):
        old = nn.PReLU(4, device='meta')
        place = place_of(old)._replace(device=torch.device('meta'))
        assert BPReLU.starting_as(static_form(old), place).weight.is_meta


def _unmirrored(module):
    """The plain activation that a module is or is the bipolar form of."""
    if isinstance(module, BReLU):
        return functools.partial(F.hardtanh, min_val=0.0, max_val=module.max_value)
    return prelu(*module.weight.tolist()) if isinstance(module, BPReLU) else module


class TestPlace:
    @pytest.mark.parametrize('module, inplace', [
        (nn.ReLU(), False), (nn.ReLU(inplace=True), True), (nn.PReLU(), False), (nn.GELU(), False),
        (Bipolar(nn.SiLU(inplace=True)), True), (Bipolar(nn.SiLU(), inplace=True), False), (Bipolar(F.mish), False),
        (BReLU(inplace=True), True), (BELU(), False),
    ], ids=name_of)
    def test_inplace(self, module, inplace):
        assert place_of(module).inplace is inplace

    def test_plain_part(self):
        silu = nn.SiLU()
        assert plain_part(silu) is plain_part(Bipolar(silu)) is silu
        assert plain_part(Bipolar(F.mish)) is F.mish
        relu = BReLU()
        assert plain_part(relu) is relu
        other = nn.ReLU()
        other.f = 'not what a Bipolar has'
        assert plain_part(other) is other


class TestInPlaceOf:
    @pytest.mark.parametrize('arguments', [
        dict(kernel_size=3, stride=2, padding=1), dict(kernel_size=2), dict(kernel_size=2, stride=2, ceil_mode=True),
        dict(kernel_size=(3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    ], ids=str)
    def test_output_shape_of_the_max_pool(self, arguments):
        x = torch.randn(1, 2, 9, 8)
        pool = nn.MaxPool2d(**arguments)
        for new in (SoftPool2d.in_place_of(pool), BipolarMaxPool2d.in_place_of(pool),
                    BipolarMaxPool2d.in_place_of(BipolarMaxPool2d.in_place_of(pool, layout='halves'))):
            assert new(x).shape == pool(x).shape
        assert type(SoftPool2d.in_place_of(pool)) is SoftPool2d
        torch.testing.assert_close(SoftPool2d.in_place_of(pool, beta=1e6)(x), pool(x))
        signs = torch.tensor([1.0, -1]).reshape(2, 1, 1)
        assert torch.equal(signs * BipolarMaxPool2d.in_place_of(pool)(signs * x), pool(x))

    @pytest.mark.parametrize('size', [(9, 8), (7, 7), (4, 5)], ids=str)
    def test_same_padding(self, size):
        x = torch.randn(1, 2, *size)
        pool = MaxPool2dSame(3, 2)
        new = SoftPool2d.in_place_of(pool, beta=1e6)
        assert type(new) is SoftPool2dSame
        torch.testing.assert_close(new(x), pool(x))

    @pytest.mark.parametrize('cls, pool, shape', [
        (SoftPool1d, nn.MaxPool1d(3, 2, 1), (2, 3, 9)), (SoftPool3d, nn.MaxPool3d(2, ceil_mode=True), (2, 3, 5, 4, 7)),
    ], ids=name_of)
    def test_other_ranks(self, cls, pool, shape):
        x = torch.randn(shape)
        torch.testing.assert_close(cls.in_place_of(pool, beta=1e6)(x), pool(x))

    def test_arguments_win(self):
        new = SoftPool2d.in_place_of(nn.MaxPool2d(3, 2, 1), kernel_size=2, padding=0, beta=2.0)
        assert (new.kernel_size, new.stride, new.padding, new.beta) == ((2, 2), (2, 2), (0, 0), 2.0)
        assert BipolarMaxPool2d.in_place_of(nn.MaxPool2d(2), layout='halves').layout == 'halves'

    def test_every_pool_of_the_table(self):
        for operator in OPERATORS.values():
            if operator.replaces == 'pool':
                assert isinstance(operator.build_pool(nn.MaxPool2d(2)), operator.module)
