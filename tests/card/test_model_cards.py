"""model_cards/ is what scripts/model_cards.py would render from the zoo as it is now."""
import json
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

from timm_dyacts import zoo
from timm_dyacts.card import Size

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / 'model_cards'


@pytest.fixture(scope='module')
def script():
    """The functions of the script."""
    return runpy.run_path(str(ROOT / 'scripts' / 'model_cards.py'))


@pytest.fixture(scope='module')
def sizes(script):
    return script['read_sizes']()


def test_nothing_is_stale(script, sizes):
    """Renders every card, and measures a sample of the models."""
    assert script['check'](script['render_cards'](sizes), sizes) == []


def test_every_variant_and_base_has_a_size(script, sizes):
    aliased = {variant.name for variant in zoo.variants()} - set(zoo.ALIASES)
    assert sizes.keys() == aliased | {variant.base for variant in zoo.variants()}


def test_a_stale_card_is_found(script, sizes, monkeypatch):
    cards = script['render_cards'](sizes)
    monkeypatch.setitem(script['check'].__globals__, 'SAMPLE', ())
    for change in (
            {'resnet.md': cards['resnet.md'].replace('exact', 'perfect')},
            {'unheard_of.md': '# A family that has no card yet'},
    ):
        assert script['check'](cards | change, sizes) == [f'{next(iter(change))} is not what would be rendered']
    del cards['vgg.md']
    assert script['check'](cards, sizes) == ['vgg.md is not what would be rendered']


def test_a_stale_size_is_found(script, sizes, monkeypatch):
    monkeypatch.setitem(script['check'].__globals__, 'SAMPLE', ('resnet18',))
    wrong = sizes | {'resnet18': replace(sizes['resnet18'], params=1)}
    problems = script['check'](script['render_cards'](sizes), wrong)
    assert len(problems) == 1 and 'resnet18' in problems[0] and '11689512' in problems[0]


def test_the_script(monkeypatch, tmp_path):
    """A new model without a size is an error that says what to do; --check fails where something is stale."""
    script = runpy.run_path(str(ROOT / 'scripts' / 'model_cards.py'))
    main = script['main']
    for name, value in dict(FOLDER=tmp_path, SIZES=tmp_path / 'sizes.json', SAMPLE=()).items():
        monkeypatch.setitem(main.__globals__, name, value)

    monkeypatch.setattr(sys, 'argv', ['model_cards.py', '--check'])
    with pytest.raises(SystemExit, match='sizes.json lacks .*; run it with --measure'):
        main()
    (tmp_path / 'sizes.json').write_bytes((FOLDER / 'sizes.json').read_bytes())
    with pytest.raises(SystemExit, match='resnet.md is not what would be rendered'):
        main()
    monkeypatch.setattr(sys, 'argv', ['model_cards.py'])
    main()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in FOLDER.iterdir()}
    monkeypatch.setattr(sys, 'argv', ['model_cards.py', '--check'])
    main()


@pytest.mark.parametrize('family', [path.stem for path in FOLDER.glob('*.md') if path.stem != 'README'])
def test_a_card(family, sizes):
    card = (FOLDER / f'{family}.md').read_text()
    rows = {row.split('`')[1]: row for row in re.findall(r'^\| `.*$', card, re.MULTILINE)}
    for variant in zoo.variants():
        if variant.base in rows and variant.name not in zoo.ALIASES:
            assert str(sizes[variant.name]) in rows[variant.base]
            if variant.operator.startswith(('dyrelu', 'brelu')):
                assert rows[variant.base].endswith(f'{variant.warm_start} |')
    snippets = re.findall(r'```python\n(.*?)```', card, re.DOTALL)
    assert len(snippets) == 3
    for snippet in snippets:
        assert snippet.startswith('import timm_dyacts')
        name = re.search(r"create_model\('([^']*)'", snippet)[1]
        assert timm.is_model(name) and timm.list_pretrained(f'{name}.*')
    for base in rows:
        assert all(f'`{name}`' in card for name in timm.list_pretrained(f'{base}.*')), 'each weight has its licence'


def test_brelu_and_belu_cost_nothing(sizes):
    """What the README says of all of them, on the figures of all of them."""
    for variant in zoo.variants():
        if variant.operator in ('brelu', 'belu') and not variant.nobn and variant.name in sizes:
            assert sizes[variant.name] == sizes[variant.base], variant.name


def test_the_size_file_is_read_back_as_it_was_written(script, sizes, monkeypatch, tmp_path):
    monkeypatch.setitem(script['write_sizes'].__globals__, 'SIZES', tmp_path / 'sizes.json')
    script['write_sizes'](sizes)
    assert (tmp_path / 'sizes.json').read_bytes() == (FOLDER / 'sizes.json').read_bytes()
    assert json.loads((tmp_path / 'sizes.json').read_text())['resnet18'] == [11689512, 1814073344, [3, 224, 224]]


def test_a_model_is_measured_without_memory(script):
    assert script['measure']('resnet18') == Size(11689512, 1814073344, (3, 224, 224))
    assert torch.get_default_device().type == 'cpu'
