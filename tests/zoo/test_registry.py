"""The grammar of names, the options of variants, and what is assumed of timm's registry."""
import dataclasses
import re

import pytest
import timm
import torch
from timm.models import get_arch_pretrained_cfgs

from timm_dyacts import DyReLUB, zoo
from timm_dyacts.operators import OPERATORS, zoo_operators
from timm_dyacts.version import SUPPORTED
from timm_dyacts.zoo import registry

_SUPPORTS = re.escape(f'supports timm{SUPPORTED["timm"]}')


def test_each_name_of_the_zoo_is_read_back():
    for variant in zoo.variants():
        assert zoo.parse(variant.name) == variant


def test_a_pretrained_tag_is_left_out():
    assert zoo.parse('resnet50_dyrelu_b.a1_in1k') == zoo.parse('resnet50_dyrelu_b')


def test_an_architecture_outside_the_table_follows_the_grammar():
    variant = zoo.parse('resnet50_gn_dyrelu_c_nobn')
    assert (variant.base, variant.operator, variant.nobn) == ('resnet50_gn', 'dyrelu_c', True)
    assert variant.recipe == dict(act='dyrelu_c', norm='none')
    assert variant.family is None and variant.warm_start is None
    assert timm.is_model(variant.name) and variant.name not in timm.list_models()


@pytest.mark.parametrize('name', [
    'resnet18', 'resnet18_bselu', 'resnet18_nobn', 'no_such_net_brelu', '_brelu', 'resnet18_brelu_softpool',
    'resnet18_brelu_nobn_nobn',
])
def test_what_is_no_name_of_a_variant(name):
    with pytest.raises(ValueError, match=f"'{name}' is not <timm architecture>_<operator>.*dyrelu_a, dyrelu_b"):
        zoo.parse(name)


def test_a_misspelt_name_gets_close_ones():
    with pytest.raises(ValueError, match=r'Close names: .*resnet18_dyrelu_b'):
        zoo.parse('resnet18_dyrelub')


def test_the_recipe_comes_from_the_record():
    assert zoo.parse('resnet18_dyrelu_b').recipe == dict(act='dyrelu_b')
    stem = OPERATORS['softpool'].stem_kwargs
    assert zoo.parse('resnet18_softpool_nobn').recipe == dict(pool='softpool', pool_kwargs=stem, norm='none')
    assert zoo.parse('vgg11_softpool').recipe == dict(pool='softpool')


def test_all_means_every_operator_of_the_table(monkeypatch):
    names = {operator for _, operator, _ in zoo.Family('resnet18', zoo.ALL).members()}
    assert names == set(zoo_operators())
    monkeypatch.setitem(OPERATORS, 'new', dataclasses.replace(OPERATORS['brelu'], name='new'))
    members = list(zoo.Family('resnet18', zoo.ALL, nobn=zoo.ALL).members())
    assert members[-2:] == [('resnet18', 'new', False), ('resnet18', 'new', True)]


# Options


@pytest.mark.parametrize('name, options', [
    ('resnet18_dyrelu_b', dict(pool_kwargs=dict(beta=2.0))),
    ('resnet18_dyrelu_b', dict(layout='halves')),
    ('resnet18_dyrelu_c_nobn', dict(layout='interleaved')),
    ('resnet18_softpool', dict(act_kwargs=dict(reduction=16))),
    ('resnet18_softpool', dict(act_kwargs=dict(nonsense=1))),
    ('resnet18_softpool', dict(where='all')),
    ('mobilenetv2_050_softpool', dict(start='fit')),
    ('resnet18_softpool', dict(layout='halves')),
    ('resnet18_brelu', dict(where='all')),
    ('resnet18_brelu_nobn', dict(start='fit')),
    ('resnet18_belu', dict(pool_kwargs=dict(beta=2.0))),
])
def test_an_option_that_cannot_apply_is_refused(name, options):
    (option, value), = options.items()
    accepted = ', '.join(sorted(zoo.parse(name).options))
    with pytest.raises(ValueError) as error:
        timm.create_model(name, **options)
    assert str(error.value) == f'{name} takes no {option}, got {value!r}: its options are {accepted}.'


def test_the_options_that_apply():
    assert zoo.parse('resnet18_dyrelu_b').options == {'act_kwargs', 'start', 'transition', 'where'}
    assert zoo.parse('resnet18_softpool').options == {'pool_kwargs', 'transition'}
    assert zoo.parse('resnet18_brelu').options == {'act_kwargs', 'layout', 'transition'}
    with torch.device('meta'):
        model = timm.create_model('resnet18_dyrelu_b', act_kwargs=dict(reduction=16), where='all', start='fit')
        assert {m.reduction for m in model.modules() if isinstance(m, DyReLUB)} == {16}
        assert timm.create_model('resnet18_belu', layout='halves', act_kwargs=dict(alpha=2.0)).act1.layout == 'halves'


@pytest.mark.parametrize('name, options', [
    ('resnet18_dyrelu_b', dict(act_kwargs=dict(nonsense=1))),
    ('resnet18_dyrelu_b', dict(where='nonsense')),
    ('resnet18_softpool', dict(pool_kwargs=dict(nonsense=1))),
    ('mobilenetv2_050_softpool', dict(pool_kwargs=dict(nonsense=1))),
    ('resnet18_brelu', dict(layout='nonsense')),
    ('resnet18_belu_nobn', dict(act_kwargs=dict(nonsense=1))),
])
def test_an_option_with_nonsense_names_variant_and_option(name, options):
    (option, value), = options.items()
    with pytest.raises(ValueError, match='nonsense') as error:
        timm.create_model(name, **options)
    assert str(error.value).startswith(f'{name} with {option}={value!r}: ')


def test_an_error_of_the_base_is_left_as_it_is():
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        timm.create_model('resnet18_dyrelu_b', nonsense=1)


# What is assumed of timm


def test_a_registry_unlike_timms_is_refused(monkeypatch):
    cfg = next(iter(get_arch_pretrained_cfgs('resnet18').values()))
    monkeypatch.setattr(registry, 'get_arch_pretrained_cfgs', lambda name: {'a1_in1k': cfg})
    with pytest.raises(ImportError, match=f"registry's pretrained configs by tag.*{_SUPPORTS}"):
        registry.register()


def test_other_default_configs_are_refused(monkeypatch):
    other = dataclasses.make_dataclass('DefaultCfg', ['tags', 'configs'])
    monkeypatch.setattr(registry, 'DefaultCfg', other)
    with pytest.raises(ImportError, match=f"registry's pretrained configs by tag.*{_SUPPORTS}"):
        registry.register()


def test_registering_again_changes_nothing(recwarn):
    entrypoints = [timm.models.model_entrypoint(name) for name in timm.list_models(module='zoo')]
    zoo.register()
    assert [timm.models.model_entrypoint(name) for name in timm.list_models(module='zoo')] == entrypoints
    assert not recwarn.list
