"""What a new operator costs: a module, a function and a record in ``OPERATORS``. No other file knows of it.

The operator of this test, a ReLU with learned slopes that start at 0, is there for the tests of this file only.
"""
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import timm
import torch
import torch.nn.functional as F
from support.trained_like import output, probe, trained_like
from timm.layers import create_act, create_act_layer, get_act_fn
from timm.models import _registry
from torch import Tensor, nn

import timm_dyacts
from timm_dyacts import card, convert, zoo
from timm_dyacts.card.family import measure_by_name, render_family_card
from timm_dyacts.card.zoo_table import zoo_table
from timm_dyacts.coverage import default_operations, measure, operations
from timm_dyacts.layers.forms import Form, Place
from timm_dyacts.operators import OPERATORS, Benchmark, Operator, Paper, benchmarks, module_types, operator_parameters

NAME = 'tilted_relu'


def tilted_relu(x: Tensor, slope: float = 0.0, inplace: bool = False) -> Tensor:
    """``max(x, 0) + slope * x``."""
    return F.relu(x) + slope * x


class TiltedReLU(nn.Module):
    """``max(x, 0) + slope * x``, with a slope of each channel's own."""

    def __init__(self, channels: int, slope: float = 0.0, device=None, dtype=None) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.full((channels,), slope, device=device, dtype=dtype))

    def static_form(self) -> Form:
        is_relu = self.slope.is_meta or not self.slope.any()
        return Form('relu', dict(max_value=None)) if is_relu else Form('dynamic', {})

    @classmethod
    def starting_as(cls, form: Form, place: Place, **kwargs) -> 'TiltedReLU':
        return cls(place.channels, device=place.device, dtype=place.dtype, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) + self.slope.view(-1, 1, 1) * x


RECORD = Operator(
    NAME,
    'act',
    TiltedReLU,
    Paper(
        'Tilted ReLU',
        'tilted-relu',
        'Tilted ReLU adds a line to a ReLU.',
        'Tilted ReLU is made for a test.',
        '@misc{nobody2026tilted,\n  title={Tilted ReLU}\n}',
    ),
    function=tilted_relu,
    exact_for=frozenset({'ReLU'}),
    options=frozenset({'where'}),
    has_width=True,
    in_zoo=True,
    in_coverage=True,
    benchmarks=(Benchmark(NAME, TiltedReLU, nn.ReLU, lambda module, x: module(x), 2, 3),),
)


@contextmanager
def registered() -> Iterator[None]:
    """Put the record into the table, and undo at the end what that did to the tables here and in timm."""
    tables = [value for module in (_registry, create_act, zoo.registry) for value in vars(module).values()
              if isinstance(value, (dict, set)) and value is not vars(module)['__builtins__']]
    before = [(table, {key: _copy(table[key]) for key in table} if isinstance(table, dict) else set(table))
              for table in tables]
    attributes, names = set(vars(zoo)), list(zoo.__all__)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(OPERATORS, NAME, RECORD)
        try:
            timm_dyacts.register()
            yield
        finally:
            for table, content in before:
                table.clear()
                table.update(content)
            for attribute in set(vars(zoo)) - attributes:
                delattr(zoo, attribute)
            zoo.__all__[:] = names


def _copy(value):
    return type(value)(value) if type(value) in (list, set) else value


@pytest.fixture(scope='module')
def new_operator():
    with registered():
        yield


@pytest.fixture(scope='module')
def base():
    return trained_like('resnet18')


@pytest.fixture
def variant(new_operator, base, tmp_path):
    """A variant with the weights of its base."""
    torch.save(base.state_dict(), tmp_path / 'base.pth')
    overlay = dict(file=str(tmp_path / 'base.pth'))
    return timm.create_model(f'resnet18_{NAME}', pretrained=True, pretrained_cfg_overlay=overlay)


def test_what_is_undone():
    names = timm.list_models(module='zoo')
    with registered():
        assert set(timm.list_models(module='zoo')) > set(names)
    assert timm.list_models(module='zoo') == names
    assert not timm.list_pretrained(f'*_{NAME}.*') and not hasattr(zoo, f'resnet18_{NAME}')
    assert NAME not in OPERATORS and NAME not in operations()
    with pytest.raises(KeyError):
        create_act_layer(NAME, channels=4)


def test_timms_factories(new_operator):
    assert isinstance(create_act_layer(NAME, channels=4), TiltedReLU)
    assert get_act_fn(NAME) is tilted_relu


def test_convert(new_operator):
    model = convert(trained_like('resnet10t'), act=NAME, act_kwargs=dict(slope=0.0))
    assert model.conversion.function == 'exact'
    assert set(model.conversion.counts) == {'ReLU -> TiltedReLU'}
    assert isinstance(model.act1, TiltedReLU) and len(model.act1.slope) == 64
    assert torch.equal(output(model, probe()), output(trained_like('resnet10t'), probe()))

    inner = convert(timm.create_model('test_resnet'), act=NAME)
    everywhere = convert(timm.create_model('test_resnet'), act=NAME, where='all')
    assert len(inner.conversion.replaced) < len(everywhere.conversion.replaced), 'it has a width'
    with pytest.raises(ValueError, match='layout'):
        convert(timm.create_model('test_resnet'), act=NAME, layout='halves')


def test_and_back(new_operator):
    model = trained_like('resnet10t')
    expected = output(model, probe())
    convert(convert(model, act=NAME), act='relu')
    assert not any(isinstance(m, TiltedReLU) for m in model.modules())
    assert torch.equal(output(model, probe()), expected)


def test_the_grammar_of_the_zoo(new_operator):
    parsed = zoo.parse(f'resnet50_{NAME}_nobn')
    assert (parsed.base, parsed.operator, parsed.nobn) == ('resnet50', NAME, True)
    assert parsed.recipe == dict(act=NAME, norm='none') and parsed.options == {'act_kwargs', 'transition', 'where'}
    assert zoo.parse(f'mobilenetv3_small_100_{NAME}').warm_start == 'approximate'
    assert {f'resnet50_{NAME}', f'resnet50_{NAME}_nobn', f'vgg16_bn_{NAME}'} <= set(timm.list_models(module='zoo'))


def test_a_variant_of_the_zoo(variant, base):
    assert zoo.parse(f'resnet18_{NAME}').warm_start == variant.conversion.function == 'exact'
    assert torch.equal(output(variant, probe()), output(base, probe()))
    tags = [name.partition('.')[2] for name in timm.list_pretrained('resnet18.*')]
    assert [name.partition('.')[2] for name in timm.list_pretrained(f'resnet18_{NAME}.*')] == tags
    with pytest.raises(ValueError, match=f'resnet18_{NAME} takes no layout'):
        timm.create_model(f'resnet18_{NAME}', layout='halves')


def test_the_parameters_for_fine_tuning(variant, base):
    new = set(variant.state_dict()) - set(base.state_dict())
    assert operator_parameters(variant).keys() == new
    assert new and all(name.endswith('.slope') for name in new)
    assert TiltedReLU in module_types('act')


def test_the_card_of_a_family(new_operator):
    variants = [variant for variant in zoo.variants() if variant.base == 'resnet18']
    names = {'resnet18', *(variant.name for variant in variants)}
    text = render_family_card('resnet', variants, {name: measure_by_name(name) for name in names})
    assert f'| `_{NAME}` | `_{NAME}_nobn` |' in text
    assert 'warm start of dyrelu, brelu, tilted' in text and text.count('| exact |') == 1
    for words in (RECORD.paper.change, f'- {RECORD.paper.limit}', RECORD.paper.citation):
        assert words in text


def test_the_card_of_a_checkpoint(variant):
    variant.pretrained_cfg = dict(variant.pretrained_cfg, input_size=(3, 32, 32))
    config = dict(architecture=f'resnet18_{NAME}', pretrained_cfg={})
    text = card.render_model_card('user/digits', variant, config, sha256='ab' * 32, requires={'timm': '>=1.0.31'})
    for words in (f'- {RECORD.paper.tag}\n', RECORD.paper.change, RECORD.paper.limit, RECORD.paper.citation,
                  'TiltedReLU'):
        assert words in text


def test_the_table_of_the_zoo(new_operator, monkeypatch):
    monkeypatch.setattr(zoo, 'FAMILIES', (zoo.Family('resnet18', zoo.ALL, nobn=zoo.ALL, stem=True),))
    head, _, row = zoo_table()
    cells = dict(zip(head, row, strict=True))
    assert cells[f'`_{NAME}`'] == '11.69 / 1.81'
    assert cells['warm start of dyrelu, brelu, tilted'] == 'exact'


def test_the_benchmarks(new_operator):
    assert benchmarks()[NAME] is RECORD.benchmarks[0]


def test_the_coverage_of_timm(new_operator):
    assert operations()[NAME] == dict(act=NAME) and NAME in default_operations()
    row = measure('timm', 'test_resnet', NAME, max_params=60, full_size=False)
    assert (row['contains'], row['result'], row['difference']) == (1, 'exact', '0')
