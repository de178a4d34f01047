"""Variants outside the table: timm knows them when it is asked for them, and lists none of them."""
import copy
import pickle
import re
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch
from support.loopback_hub import LoopbackHub, run_python
from support.trained_like import max_diff, output, probe, trained_like
from timm.models import (
    _registry,
    get_arch_pretrained_cfgs,
    get_pretrained_cfg,
    is_model_pretrained,
    model_entrypoint,
    register_model,
    save_for_hf,
)

import timm_dyacts
from timm_dyacts import ConversionError, convert, zoo
from timm_dyacts.version import SUPPORTED
from timm_dyacts.zoo import lookup, registry

_SUPPORTS = re.escape(f'supports timm{SUPPORTED["timm"]}')

TABLES = ('_model_entrypoints', '_model_default_cfgs', '_model_pretrained_cfgs', '_model_with_tags',
          '_model_has_pretrained')
NAMES = ('convnext_tiny_dyrelu_b', 'vit_small_patch16_224_brelu', 'test_resnet_softpool_nobn', 'resnet33ts_belu')


def held():
    """What timm lists, and what its tables hold."""
    tables = {name: sorted(getattr(_registry, name)) for name in TABLES}
    return timm.list_models(), timm.list_pretrained(), timm.models.list_modules(), tables


# What timm answers


@pytest.mark.parametrize('name', NAMES)
def test_timm_knows_it_as_if_it_were_registered(name):
    base = zoo.parse(name).base
    assert timm.is_model(name) and timm.is_model(f'{name}.any_tag')
    assert model_entrypoint(name) is model_entrypoint(f'{name}.any_tag') is getattr(zoo, name)
    assert model_entrypoint(name).__name__ == name
    theirs, ours = get_arch_pretrained_cfgs(base), get_arch_pretrained_cfgs(name)
    assert [key.partition('.')[2] for key in ours] == [key.partition('.')[2] for key in theirs]
    for source, cfg in theirs.items():
        key = f'{name}.{cfg.tag}'
        mine = get_pretrained_cfg(key)
        assert mine == ours[key] and mine is not ours[key]
        assert (mine.architecture, mine.tag, mine.hf_hub_id) == (name, cfg.tag, cfg.hf_hub_id)
        assert (mine.license, mine.input_size, mine.url) == (cfg.license, cfg.input_size, cfg.url)
        assert is_model_pretrained(key) == is_model_pretrained(source)
    assert get_pretrained_cfg(name).tag == get_pretrained_cfg(base).tag
    assert is_model_pretrained(name) == is_model_pretrained(base)


def test_nothing_that_timm_lists_changes():
    before = held()
    for name in NAMES:
        assert timm.is_model(name) and get_arch_pretrained_cfgs(name) and get_pretrained_cfg(name)
    with torch.device('meta'):
        timm.create_model('test_resnet_dyrelu_a', features_only=True)
    assert held() == before
    assert not timm.list_models('test_resnet_dyrelu*') and not timm.list_pretrained('convnext_tiny_dyrelu_b*')


@pytest.mark.parametrize('name', [
    'test_resnet', 'test_resnet_dyrelu', 'test_resnet_bselu', 'test_resnet_dyrelu_b_softpool',
    'test_resnet_brelu_nobn_nobn', 'no_such_net_brelu', '_brelu', '', 'brelu', 'tv_resnet50_dyrelu_b',
])
def test_what_is_no_name_of_a_variant(name):
    assert registry.find_entry(name) is None
    assert timm.is_model(name) == (name == 'test_resnet')
    assert not hasattr(zoo, name)
    if name not in ('test_resnet', ''):
        assert get_pretrained_cfg(name) is None and get_arch_pretrained_cfgs(name) == {}
        with pytest.raises(KeyError, match=name):
            model_entrypoint(name)


def test_an_invalid_tag_is_timms_error():
    with pytest.raises(RuntimeError, match=r'Invalid pretrained tag \(no_tag\) for convnext_tiny_dyrelu_b'):
        get_pretrained_cfg('convnext_tiny_dyrelu_b.no_tag')


@pytest.mark.parametrize('name, expected', [
    ('convnext_tiny_dyrelub', 'Close names: convnext_tiny_dyrelu_b, '),
    ('dpn68_softpol_nobn', 'Close names: dpn68_softpool_nobn, '),
    ('resnet18_dyrelub.a1_in1k', 'Close names: resnet18_dyrelu_b, '),
    ('resnett18', 'Close names: resnet18, '),
    ('tv_resnet50_dyrelu_b_nobn', "timm's tv_resnet50 is deprecated, use resnet50_dyrelu_b_nobn.tv_in1k for "),
])
def test_a_misspelt_name_gets_timms_error_with_close_names(name, expected):
    with pytest.raises(RuntimeError) as error:
        timm.create_model(name)
    assert str(error.value).startswith(f'Unknown model ({name.partition(".")[0]}). {expected}')


def test_without_a_close_name_the_error_is_timms():
    with pytest.raises(RuntimeError) as error:
        timm.create_model('qqqqqqqq')
    assert str(error.value) == 'Unknown model (qqqqqqqq)'


@pytest.mark.parametrize('name, reason', [
    ('test_vit_softpool', "for pool='softpool'. It has no max pool, and no strided convolution with a slot for "),
    ('resnet50_gn_dyrelu_b_nobn', "for norm='none'. It has no BatchNorm."),
])
def test_where_nothing_can_be_replaced_the_error_says_why(name, reason):
    assert timm.is_model(name)
    with torch.device('meta'), pytest.raises(ConversionError) as error:
        timm.create_model(name)
    assert reason in str(error.value)


# Models


@pytest.mark.parametrize('base', [
    'test_byobnet', 'test_convnext', 'test_convnext2', 'test_efficientnet', 'test_efficientnet_ln', 'test_mambaout',
    'test_nfnet', 'test_resnet', 'test_vit', 'test_vit2',
])
@pytest.mark.parametrize('suffix', ['dyrelu_c', 'brelu', 'belu_nobn', 'softpool'])
def test_weights_of_the_base_give_the_converted_base(base, suffix, tmp_path):
    model = trained_like(base)
    safetensors.torch.save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / 'w.safetensors')
    variant = zoo.parse(f'{base}_{suffix}')
    arguments = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'w.safetensors')))
    try:
        expected = convert(copy.deepcopy(model), **variant.recipe)
    except ConversionError as e:
        with pytest.raises(ConversionError) as error:
            timm.create_model(variant.name, **arguments)
        assert str(error.value).split('.')[0] == str(e).split('.')[0]
        return
    made = timm.create_model(variant.name, **arguments)
    assert made.conversion.function == expected.conversion.function
    assert made.conversion.counts == expected.conversion.counts
    x = probe(160)
    if suffix == 'dyrelu_c':  # `fc1` starts at random, and is multiplied by zero
        assert max_diff(output(made, x), output(expected, x)) < 1e-6
    else:
        assert torch.equal(output(made, x), output(expected, x))
    assert made.pretrained_cfg['architecture'] == variant.name


def test_a_checkpoint_of_its_own_comes_back(tmp_path):
    model = trained_like('test_vit_dyrelu_b', num_classes=10, act_kwargs=dict(max_hidden=4), where='late')
    save_for_hf(model, tmp_path, safe_serialization=True, model_args=dict(act_kwargs=dict(max_hidden=4), where='late'))
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert torch.equal(output(loaded, probe(160)), output(model, probe(160)))
    assert loaded.conversion.counts == model.conversion.counts


def test_weights_in_a_format_of_their_own_are_refused(tmp_path):
    overlay = dict(file=str(tmp_path / 'w.npz'), custom_load=True)
    with pytest.raises(ValueError, match='test_vit_brelu takes no weights in a format of their own .custom_load='):
        timm.create_model('test_vit_brelu', pretrained=True, pretrained_cfg_overlay=overlay)


def test_pickles(tmp_path):
    entrypoint = model_entrypoint('test_resnet_belu')
    assert pickle.loads(pickle.dumps(entrypoint)) is entrypoint
    model = entrypoint().eval()
    torch.save(model, tmp_path / 'model.pt')
    code = ('import sys, torch, timm_dyacts; model = torch.load(sys.argv[1], weights_only=False);'
            'print(type(model).__name__, len(model.conversion.replaced))')
    done = subprocess.run(
        [sys.executable, '-c', code, str(tmp_path / 'model.pt')], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [type(model).__name__, str(len(model.conversion.replaced))]


def test_from_the_hub_in_a_fresh_process(tmp_path):
    """Weights of the base by a tag, and a checkpoint that somebody published: by timm, and by our own ``load``."""
    base = trained_like('test_resnet')
    variant = trained_like('test_resnet_dyrelu_b', num_classes=7)
    save_for_hf(variant, tmp_path / 'folder', safe_serialization=True)
    files = {path.name: path.read_bytes() for path in (tmp_path / 'folder').iterdir()}
    x = probe(96)
    torch.save((x, output(base, x), output(variant, x)), tmp_path / 'expected.pt')
    code = """
import sys, timm, timm_dyacts, torch
x, of_base, of_variant = torch.load(sys.argv[1])
names = ('test_resnet_dyrelu_b.r160_in1k', 'test_resnet_brelu', 'hf-hub:user/mine')
models = [timm.create_model(name, pretrained=True).eval() for name in names]
with torch.no_grad():
    assert torch.equal(models[0](x), of_base) and torch.equal(models[1](x), of_base)
    assert torch.equal(models[2](x), of_variant)
    assert torch.equal(timm_dyacts.hub.load('user/mine').eval()(x), of_variant)
assert not timm.list_models('test_resnet_*')
"""
    weights = safetensors.torch.save({k: v.contiguous() for k, v in base.state_dict().items()})
    with LoopbackHub() as hub:
        hub.add_repo('timm/test_resnet.r160_in1k', {'model.safetensors': weights, 'config.json': b'{}'})
        hub.add_repo('user/mine', files)
        run_python(code, hub.env(tmp_path / 'cache'), tmp_path / 'expected.pt')


# timm's tables


@pytest.fixture
def tables():
    """Put the tables back that a test replaces or fills."""
    before = {name: getattr(_registry, name) for name in TABLES}
    contents = {name: dict(table) if isinstance(table, dict) else set(table) for name, table in before.items()}
    others = {name: copy.deepcopy(getattr(_registry, name)) for name in ('_model_to_module', '_module_to_models')}
    yield before
    vars(_registry).update(before | others)
    for name, table in before.items():
        table.clear()
        table.update(contents[name])


def test_registering_again_changes_nothing(tables):
    lists = held()
    timm_dyacts.register()
    assert all(getattr(_registry, name) is table for name, table in tables.items())
    assert held() == lists


def test_a_model_that_somebody_registers_wins_and_has_variants(tables):
    def test_resnet_brelu(pretrained=False, **kwargs):
        return timm.create_model('test_resnet2', **kwargs)

    def somebodys_net(pretrained=False, **kwargs):
        return timm.create_model('test_resnet', **kwargs)

    assert registry.find_entry('test_resnet_brelu') and not registry.find_entry('somebodys_net_dyrelu_b')
    with pytest.warns(UserWarning, match='Overwriting test_resnet_brelu'):
        register_model(test_resnet_brelu)
    assert model_entrypoint('test_resnet_brelu') is test_resnet_brelu
    assert get_pretrained_cfg('test_resnet_brelu') is None
    assert registry.find_entry('test_resnet_brelu') is None and 'test_resnet_brelu' in timm.list_models()
    register_model(somebodys_net)
    with torch.device('meta'):
        assert timm.create_model('somebodys_net_dyrelu_b').conversion.function == 'exact'
    assert get_pretrained_cfg('somebodys_net_dyrelu_b') is None, 'as the base, it has none'


@pytest.mark.parametrize('copy_of', [copy.deepcopy, copy.copy])
def test_who_copies_the_tables_and_puts_the_copies_back_loses_nothing(tables, monkeypatch, copy_of):
    lists = held()
    for name, table in tables.items():
        monkeypatch.setattr(_registry, name, copy_of(table))
    assert held() == lists
    name = 'convnext_tiny_dyrelu_b'
    assert timm.is_model(name) and get_arch_pretrained_cfgs(name) and get_pretrained_cfg(name).has_weights
    assert is_model_pretrained(name) and not is_model_pretrained('convnext_tiny_dyrelub')
    assert name not in dict(_registry._model_entrypoints) and name not in set(_registry._model_has_pretrained)
    if copy_of is copy.deepcopy:
        _registry._model_with_tags['resnet18'].append('x')
        assert 'x' not in tables['_model_with_tags']['resnet18']


def test_tables_of_another_kind_are_refused(tables, monkeypatch):
    plain = {name: dict(table) if isinstance(table, dict) else set(table) for name, table in tables.items()}
    plain['_model_with_tags'] = tables['_model_with_tags']
    for name, value in (('_model_has_pretrained', []), ('_deprecated_models', None)):
        with monkeypatch.context() as patch:
            for key, table in (plain | {name: value}).items():
                patch.setattr(_registry, key, table)
            with pytest.raises(ImportError, match=f"lacks the registry's tables of models.*{_SUPPORTS}"):
                lookup.install(registry.find_entry, 'convnext_tiny_dyrelu_b')
            assert all(getattr(_registry, key) is plain[key] for key in TABLES if key != name)


def test_functions_that_look_elsewhere_are_refused(tables, monkeypatch):
    plain = {name: dict(table) for name, table in tables.items() if name != '_model_has_pretrained'}
    plain['_model_has_pretrained'] = set(tables['_model_has_pretrained'])
    plain['_model_with_tags'] = tables['_model_with_tags']
    for key, table in plain.items():
        monkeypatch.setattr(_registry, key, table)
    monkeypatch.setattr(lookup, 'is_model', lambda name: name in timm.list_models())
    with pytest.raises(ImportError, match="lacks the registry's tables of models"):
        lookup.install(registry.find_entry, 'convnext_tiny_dyrelu_b')
    assert all(getattr(_registry, key) is table for key, table in plain.items())


def test_while_models_are_registered_the_tables_know_what_they_hold():
    with lookup.registered_only():
        assert not timm.is_model('convnext_tiny_dyrelu_b') and timm.is_model('resnet18_dyrelu_b')
    assert timm.is_model('convnext_tiny_dyrelu_b')
