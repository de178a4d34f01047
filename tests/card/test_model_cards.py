"""model_cards/ is what ``timm-dyacts cards`` would render from the zoo as it is now."""
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
from timm_dyacts.card import family as cards
from timm_dyacts.card.size import Size, measure_size
from timm_dyacts.card.zoo_table import zoo_table
from timm_dyacts.cli.cards import main
from timm_dyacts.operators import OPERATORS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / 'model_cards'


@pytest.fixture(scope='module')
def sizes():
    return cards.read_sizes(FOLDER)


def test_nothing_is_stale(sizes):
    """Renders every card, and measures a sample of the models."""
    assert cards.find_problems(FOLDER, cards.render_cards(sizes), sizes) == []


def test_every_variant_and_base_has_a_size(sizes):
    aliased = {variant.name for variant in zoo.variants()} - set(zoo.ALIASES)
    assert sizes.keys() == aliased | {variant.base for variant in zoo.variants()}


def test_a_stale_card_is_found(sizes, monkeypatch):
    rendered = cards.render_cards(sizes)
    monkeypatch.setattr(cards, 'SAMPLE', ())
    for change in (
            {'resnet.md': rendered['resnet.md'].replace('exact', 'perfect')},
            {'unheard_of.md': '# A family that has no card yet'},
    ):
        assert cards.find_problems(FOLDER, rendered | change, sizes) == [
            f'{next(iter(change))} is not what would be rendered']
    del rendered['vgg.md']
    assert cards.find_problems(FOLDER, rendered, sizes) == ['vgg.md is not what would be rendered']


def test_a_stale_size_is_found(sizes, monkeypatch):
    monkeypatch.setattr(cards, 'SAMPLE', ('resnet18',))
    wrong = sizes | {'resnet18': replace(sizes['resnet18'], params=1)}
    problems = cards.find_problems(FOLDER, cards.render_cards(sizes), wrong)
    assert len(problems) == 1 and 'resnet18' in problems[0] and '11689512' in problems[0]


def test_the_script(monkeypatch, tmp_path):
    """A new model without a size is an error that says what to do; --check fails where something is stale."""
    monkeypatch.setattr(cards, 'SAMPLE', ())

    def run_script(*options):
        monkeypatch.setattr(sys, 'argv', ['model_cards.py', '--folder', str(tmp_path), *options])
        runpy.run_path(str(ROOT / 'scripts' / 'model_cards.py'), run_name='__main__')

    with pytest.raises(SystemExit, match='^model_cards.py: error: sizes.json lacks .*; run it with --measure'):
        run_script('--check')
    (tmp_path / 'sizes.json').write_bytes((FOLDER / 'sizes.json').read_bytes())
    with pytest.raises(SystemExit, match='resnet.md is not what would be rendered'):
        run_script('--check')
    run_script()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in FOLDER.iterdir() if path.is_file()}  # the studies lie beside them
    run_script('--check')


def test_the_command_measures_what_is_missing(monkeypatch, tmp_path, sizes, capsys):
    monkeypatch.setattr(cards, 'SAMPLE', ())
    cards.write_sizes(tmp_path, {name: size for name, size in sizes.items() if name != 'vgg11_brelu'})
    (tmp_path / 'gone.md').write_text('A family that is not there any more')
    main(['--folder', str(tmp_path), '--measure'])
    assert cards.read_sizes(tmp_path) == sizes
    assert not (tmp_path / 'gone.md').exists()
    assert capsys.readouterr().out == f'17 files in {tmp_path.name}/\n'
    with pytest.raises(SystemExit, match="^timm-dyacts cards: error: --folder must be a folder, got 'no_such'"):
        main(['--folder', 'no_such'])


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


def test_a_card_speaks_of_the_operators_of_its_family_only():
    card = (FOLDER / 'inception_v3.md').read_text()
    assert 'SoftPool averages' in card and 'Dynamic ReLU puts' in card and 'A bipolar activation' not in card
    card = (FOLDER / 'res2net.md').read_text()
    assert '| warm start of dyrelu, brelu |' in card and 'always approximate with `softpool` and `belu`' in card


def test_warm_starts_that_differ_between_the_operators_of_a_base(monkeypatch):
    monkeypatch.setitem(OPERATORS, 'brelu', replace(OPERATORS['brelu'], exact_for=frozenset({'GELU'})))
    variants = [zoo.parse(f'resnet18_{operator}') for operator in ('dyrelu_a', 'dyrelu_b', 'softpool', 'brelu')]
    assert cards.describe_warm_start(variants) == 'exact: dyrelu; approximate: brelu'
    assert cards.describe_warm_start(variants[:2]) == 'exact'
    assert cards.describe_warm_start(variants[2:3]) == ''


def test_brelu_and_belu_cost_nothing(sizes):
    """What the guide to the variants says of all of them, on the figures of all of them."""
    for variant in zoo.variants():
        if variant.operator in ('brelu', 'belu') and not variant.nobn and variant.name in sizes:
            assert sizes[variant.name] == sizes[variant.base], variant.name


def test_the_size_file_is_read_back_as_it_was_written(sizes, tmp_path):
    cards.write_sizes(tmp_path, sizes)
    assert (tmp_path / 'sizes.json').read_bytes() == (FOLDER / 'sizes.json').read_bytes()
    assert json.loads((tmp_path / 'sizes.json').read_text())['resnet18'] == [11689512, 1814073344, [3, 224, 224]]


def test_a_model_is_measured_without_memory():
    assert cards.measure_by_name('resnet18') == Size(11689512, 1814073344, (3, 224, 224))
    assert torch.get_default_device().type == 'cpu'


def test_measuring_leaves_frozen_modules_in_eval_mode():
    with torch.device('meta'):
        model = timm.create_model('resnet18').train()
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    measure_size(model)
    assert [module.training for module in model.modules()] == modes


def test_the_table_of_the_zoo_has_the_sizes_of_the_cards(monkeypatch, sizes):
    """Of all bases, with what costs something; the cell of a variant that does not exist is empty."""
    monkeypatch.setattr(zoo, 'FAMILIES', tuple(
        family for family in zoo.FAMILIES if family.bases.split()[0] in ('res2net50_26w_4s', 'resnet18'))[::-1])
    monkeypatch.setattr('timm_dyacts.card.zoo_table.measure_by_name', sizes.__getitem__)
    head, rule, *rows = zoo_table(every_base=True)
    assert {len(row) for row in (head, rule, *rows)} == {len(head)}
    table = {row[0].strip('`'): row for row in rows}
    assert table['res2net50d'][3:] == ['25.72 / 4.49', '', '28.23 / 4.50', '', '25.72 / 4.49', '', 'exact']
    assert table['resnet18'][3:] == [
        '11.69 / 1.81', '11.87 / 1.81', '12.58 / 1.81', '12.58 / 1.81', '11.69 / 1.81', '11.68', 'exact']
    assert 'res2net50d' not in {row[0].strip('`') for row in zoo_table()}


def test_other_files_are_not_taken_for_old_cards(tmp_path):
    (tmp_path / 'README.md').write_text('mine')
    for options in ([], ['--measure'], ['--check']):
        with pytest.raises(SystemExit, match=r'--folder must be a folder of cards, or have no \*\.md, got '):
            main(['--folder', str(tmp_path), *options])
    assert (tmp_path / 'README.md').read_text() == 'mine'
