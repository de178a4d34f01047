"""What names would give, found out on the meta device."""
import pytest
import timm
from timm.models import get_pretrained_cfg

from timm_dyacts import ConversionError, get_transition, zoo
from timm_dyacts.convert import pools, transition
from timm_dyacts.zoo import preview, resolve_warm_start, select_names


@pytest.mark.parametrize('base', ['test_resnet', 'test_convnext', 'test_efficientnet', 'test_vit', 'resnet18'])
def test_it_is_what_the_model_becomes(base):
    names = [f'{base}_{suffix}' for suffix in ('dyrelu_b', 'softpool', 'brelu', 'belu', 'brelu_nobn')]
    found = list(preview(names))
    assert [p.name for p in found] == names and {p.base for p in found} == {base}
    assert {p.base_params for p in found} == {sum(p.numel() for p in timm.create_model(base).parameters())}
    for p in found:
        try:
            model, leading = timm.create_model(p.name), timm.create_model(p.name, transition=True)
        except ConversionError as e:
            assert (p.start, p.params, p.replaced) == ('refused', None, {}) and p.reason == ' '.join(str(e).split())
            continue
        report = model.conversion
        start = report.function if get_transition(leading) is None else 'exact by transition'
        assert start != 'approximate' and leading.conversion.function == 'exact'
        assert (p.start, p.replaced, p.skipped, p.reason) == (start, report.counts, len(report.skipped), '')
        assert p.params == sum(p.numel() for p in model.parameters())


@pytest.fixture
def builds(monkeypatch):
    """The options that variants are built with, in order."""
    calls, create = [], timm.create_model

    def create_and_note(name, **kwargs):
        if zoo.find_variant(name) is not None:
            calls.append(kwargs)
        return create(name, **kwargs)

    monkeypatch.setattr(timm, 'create_model', create_and_note)
    return calls


@pytest.mark.parametrize('name, start', [
    ('test_resnet_dyrelu_b', 'exact'), ('test_resnet_softpool', 'exact by transition'),
    ('test_vit_softpool', 'refused'),
    ('test_convnext_dyrelu_b', 'exact by transition'), ('resnet18_belu_nobn', 'exact by transition'),
    ('resnet18_softpool', 'exact by transition')])
def test_one_conversion_tells(name, start, builds):
    found, = preview([name])
    assert found.start == start and builds == [dict(transition=True)]
    for kind in found.replaced:
        assert 'transition' not in kind


@pytest.mark.parametrize('name, kwargs, replaced', [
    ('resnet10t_softpool', dict(kernel_size=5), {'MaxPool2d -> SoftPool2d': 1}),  # of another output size
    ('efficientnet_b0_gn_softpool', {}, {'strided Conv2d -> SoftPool2d': 4}),  # behind a norm over all positions
])
def test_where_no_transition_leads_there(name, kwargs, replaced, builds):
    found, = preview([name], pool_kwargs=kwargs)
    assert (found.start, found.reason, found.replaced) == ('approximate', '', replaced)
    assert found.params == found.base_params and len(builds) == 2
    assert resolve_warm_start(name) == 'approximate'


def test_a_transition_for_some_of_the_places_is_not_one_to_the_variant(monkeypatch):
    """It would end in a model with fewer replacements."""
    whole, = preview(['mobilenetv3_small_100_softpool'])
    reason = transition.reason_against_subsampling
    monkeypatch.setattr(pools, 'reason_against_subsampling', lambda step, convs, call: (
        f'{transition.REFUSED}: for the test' if convs[0].kernel_size == (5, 5) else reason(step, convs, call)))
    found, = preview(['mobilenetv3_small_100_softpool'])
    assert whole.start == 'exact by transition' and found.start == 'approximate'
    assert found.replaced == whole.replaced and found.skipped == whole.skipped


def test_a_transition_can_be_asked_for_or_not(builds):
    for name, asked, start in (
            ('test_resnet_belu', False, 'approximate'), ('test_resnet_belu', True, 'exact by transition'),
            ('test_resnet_belu', None, 'exact by transition'), ('test_resnet_brelu', False, 'exact'),
            ('test_resnet_brelu', True, 'exact')):
        found, = preview([name], transition=asked)
        assert found.start == start, (name, asked)
    assert len(builds) == 5
    found, = preview(['resnet10t_softpool'], pool_kwargs=dict(kernel_size=5), transition=True)
    assert found.start == 'refused' and found.reason.startswith('No transition leads to the new pool in')


def test_options_are_those_of_the_variant():
    plain, = preview(['resnet18_dyrelu_b'])
    capped, = preview(['resnet18_dyrelu_b'], act_kwargs=dict(max_hidden=8))
    late, = preview(['resnet18_dyrelu_b'], where='late')
    assert plain.replaced == capped.replaced and capped.params < plain.params
    assert late.replaced['ReLU -> DyReLUB'] < plain.replaced['ReLU -> DyReLUB']
    with pytest.raises(ValueError, match='resnet18_softpool takes no where'):
        next(preview(['resnet18_softpool'], where='late'))
    with pytest.raises(ValueError, match='is not <timm architecture>_<operator>'):
        next(preview(['resnet18']))


@pytest.mark.parametrize('patterns, expected', [
    (['test_resnet'], ['test_resnet_brelu', 'test_resnet_softpool']),
    (['test_conv'], [f'test_convnext{n}_{op}' for n in ('', '2', '3') for op in ('brelu', 'softpool')]),
    (['test_convnext?', 'test_resnet'], [
        f'test_{base}_{op}' for base in ('convnext2', 'convnext3', 'resnet') for op in ('brelu', 'softpool')]),
    (['test_resnet_dyrelu_c_nobn'], ['test_resnet_dyrelu_c_nobn']),
    (['test_resnet', 'test_resnet_dyrelu_c'], ['test_resnet_brelu', 'test_resnet_softpool', 'test_resnet_dyrelu_c']),
    (['resnet10t', 'resnet10t'], ['resnet10t_brelu', 'resnet10t_softpool']),
])
def test_names_are_selected_and_sorted(patterns, expected):
    assert select_names(patterns, ['brelu', 'softpool']) == expected


def test_a_pattern_without_a_match_gets_close_names():
    with pytest.raises(ValueError, match=r"timm matches 'convnextt_tiny'\. Close names: convnext_tiny"):
        select_names(['test_vit', 'convnextt_tiny'], ['brelu'])
    with pytest.raises(ValueError, match=r"No architecture of timm matches 'qqqq\*'\.$"):
        select_names(['qqqq*'], ['brelu'])


@pytest.mark.parametrize('name, expected', [
    ('resnet18_brelu', 'exact'),
    ('resnet18_belu', 'approximate'),
    ('test_resnet_dyrelu_b', 'exact'),
    ('test_vit_dyrelu_b', 'approximate'),
    ('test_vit_softpool', None),
    ('convmixer_768_32_softpool', None),
    ('test_vit', None),
    ('no_such_net', None),
])
def test_the_warm_start_is_the_tables_or_worked_out(name, expected):
    assert resolve_warm_start(name) == expected


@pytest.mark.parametrize('name', ['test_resnet_dyrelu_b', 'convmixer_768_32_softpool', 'convnext_tiny_brelu'])
def test_nothing_is_claimed_where_the_table_says_nothing(name):
    assert zoo.parse(name).warm_start is None
    note = get_pretrained_cfg(name).notes[-1]
    assert note.endswith('converted on load; whether the warm start is exact, the conversion of the model tells')
