"""timm's own factories know our names."""
import importlib

import pytest
import timm
import torch
from timm.layers import SqueezeExcite, blur_pool, create_aa, create_act, create_act_layer, get_act_fn, get_act_layer
from torch import nn

import timm_dyacts
from timm_dyacts import BReLU, DyReLU, SoftPool2d
from timm_dyacts.layers import factory
from timm_dyacts.operators import OPERATORS
from timm_dyacts.version import SUPPORTED

AA_LOOKUP = '_normalize_aa_layer' if hasattr(blur_pool, '_normalize_aa_layer') else 'create_aa'

ACTIVATIONS = {name: operator for name, operator in OPERATORS.items() if operator.replaces == 'act'}


def test_the_names():
    assert set(ACTIVATIONS) >= {
        'dyrelu_a', 'dyrelu_b', 'dyrelu_c', 'bipolar', 'brelu', 'belu', 'bselu', 'bleaky_relu', 'bprelu'}


@pytest.mark.parametrize('name', [n for n in ACTIVATIONS if n != 'bipolar'])
def test_every_name_makes_its_layer(name):
    channels = dict(channels=6) if name.startswith('dyrelu') else {}
    layer = create_act_layer(name, inplace=True, **channels)
    assert type(layer) is ACTIVATIONS[name].module is get_act_layer(name)
    assert layer(torch.randn(2, 6, 4, 4)).shape == (2, 6, 4, 4)


def test_functions():
    x = torch.randn(2, 4, 3, 3)
    functions = {name for name, operator in ACTIVATIONS.items() if operator.function is not None}
    assert functions == {'brelu', 'belu', 'bselu', 'bleaky_relu'}
    for name in functions:
        assert torch.equal(get_act_fn(name)(x), create_act_layer(name)(x))


def test_bipolar_around_any_layer():
    layer = create_act_layer('bipolar', f=nn.SiLU())
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(layer(x)[:, 0], nn.functional.silu(x[:, 0]))
    torch.testing.assert_close(layer(x)[:, 1], -nn.functional.silu(-x[:, 1]))


@pytest.mark.parametrize('name', ['resnet18', 'mobilenetv3_small_050', 'densenet121', 'regnetx_002'])
def test_act_layer_of_a_timm_model(name):
    model = timm.create_model(name, act_layer='brelu', num_classes=3)
    assert any(isinstance(m, BReLU) for m in model.modules())
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 3)


def test_channels_appear_with_the_first_input():
    torch.manual_seed(0)
    lazy = timm.create_model('resnet18', act_layer='dyrelu_b', num_classes=3).eval()
    x = torch.randn(2, 3, 64, 64)
    y = lazy(x)
    layers = [m for m in lazy.modules() if isinstance(m, DyReLU)]
    assert [m.channels for m in layers[:3]] == [64, 64, 64] and layers[-1].channels == 512
    assert sum(p.numel() for p in lazy.parameters()) > 11e6
    # ... and with a state dict
    twin = timm.create_model('resnet18', act_layer='dyrelu_b', num_classes=3).eval()
    twin.load_state_dict(lazy.state_dict())
    assert torch.equal(twin(x), y)


def test_act_layer_of_a_gate():
    assert SqueezeExcite(8, act_layer='brelu')(torch.randn(1, 8, 4, 4)).shape == (1, 8, 4, 4)


def test_aa_layer():
    for aa in (create_aa('softpool', channels=8, stride=2), create_aa('SoftPool2d'), create_aa(SoftPool2d, channels=8)):
        assert isinstance(aa, SoftPool2d)
        assert aa(torch.randn(1, 8, 6, 6)).shape == (1, 8, 3, 3)
    assert create_aa('softpool', stride=2)(torch.randn(1, 8, 7, 7)).shape == (1, 8, 4, 4)
    assert isinstance(create_aa('blur', channels=8), timm.layers.BlurPool2d)
    with pytest.raises(AssertionError, match="softpol.*'softpool'"):
        create_aa('softpol')


@pytest.mark.parametrize('name, aa_layer', [('resnet18', SoftPool2d), ('mobilenetv2_050', 'softpool')])
def test_aa_layer_of_a_timm_model(name, aa_layer):
    model = timm.create_model(name, aa_layer=aa_layer)
    assert any(isinstance(m, SoftPool2d) for m in model.modules())
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 1000)


@pytest.mark.parametrize('factory_function', [get_act_layer, get_act_fn])
def test_a_misspelt_name_gets_the_known_ones(factory_function):
    with pytest.raises(KeyError, match="Unknown activation 'brellu'. Close names: brelu.*Known: .*brelu.*relu"):
        factory_function('brellu')


def test_registering_again_changes_nothing(recwarn):
    tables = create_act._ACT_LAYER_DEFAULT, create_act._ACT_FN_DEFAULT, getattr(blur_pool, AA_LOOKUP)
    models = timm.list_models()
    timm_dyacts.register()
    timm_dyacts.register()
    importlib.reload(timm_dyacts)
    assert tables == (create_act._ACT_LAYER_DEFAULT, create_act._ACT_FN_DEFAULT, getattr(blur_pool, AA_LOOKUP))
    assert create_act._ACT_LAYER_DEFAULT is tables[0]
    assert timm.list_models() == models
    assert not recwarn.list


def test_a_name_that_is_registered_later():
    """It is found without another import, in the tables that timm has by now, beside all that was there before."""
    tables = create_act._ACT_LAYER_DEFAULT, create_act._ACT_FN_DEFAULT
    before = [dict(table) for table in tables]
    for table in tables:
        with pytest.raises(KeyError, match="Unknown activation 'later'"):
            table['later']
    try:
        factory.register({'later': nn.Softsign}, {'later': nn.functional.softsign})
        assert tables[0] is create_act._ACT_LAYER_DEFAULT and tables[1] is create_act._ACT_FN_DEFAULT
        assert type(create_act_layer('later')) is nn.Softsign
        assert get_act_fn('Later') is nn.functional.softsign
    finally:
        for table in tables:
            table.pop('later', None)
    assert [dict(table) for table in tables] == before


def test_tables_of_a_timm_that_nobody_has_added_to(monkeypatch):
    """As at the first import: what timm knows stays, ours comes in, and only then has an error with names."""
    monkeypatch.setattr(create_act, '_ACT_LAYER_DEFAULT', dict(relu=nn.ReLU))
    monkeypatch.setattr(create_act, '_ACT_FN_DEFAULT', dict(relu=nn.functional.relu))
    factory.register({'brelu': BReLU}, {})
    assert create_act._ACT_LAYER_DEFAULT == dict(relu=nn.ReLU, brelu=BReLU)
    assert create_act._ACT_FN_DEFAULT == dict(relu=nn.functional.relu)
    with pytest.raises(factory.UnknownActivation, match="'brelo'. Close names: brelu, relu. Known: brelu, relu"):
        get_act_layer('brelo')


@pytest.mark.parametrize('module, name', [
    (create_act, '_ACT_LAYER_DEFAULT'), (create_act, '_ACT_FN_DEFAULT'), (blur_pool, AA_LOOKUP),
])
@pytest.mark.parametrize('replacement', [None, {}, lambda aa_layer, more: aa_layer], ids=['nothing', 'empty', 'other'])
def test_an_unknown_timm_is_refused(module, name, replacement, monkeypatch):
    if replacement is None:
        monkeypatch.delattr(module, name)
    else:
        monkeypatch.setattr(module, name, replacement)
    with pytest.raises(ImportError, match=f'timm {timm.__version__} .*timm_dyacts .* supports timm>=1') as caught:
        factory.register({}, {})
    assert f"timm{SUPPORTED['timm']}" in str(caught.value)
