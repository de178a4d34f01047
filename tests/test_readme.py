"""The README is one page, its snippets run as written, and what stands beside it agrees with the package."""
import json
import os
import re
import shutil

import pytest
import yaml
from support.loopback_hub import run_python
from support.readme import GUIDES, README, ROOT, blocks, run_command, serve_resnet18

from timm_dyacts import __version__
from timm_dyacts.operators import papers


def test_it_is_one_page_that_leads_to_all_others():
    assert len(README.splitlines()) <= 150
    assert README.index('```python') < README.index('\n## ')
    missing = [path.name for path in GUIDES.rglob('*') if path.suffix in ('.md', '.py')
               and f'({path.relative_to(ROOT)})' not in README]
    assert not missing


def test_all_of_its_snippets_are_run_below():
    assert len(blocks('bash')) == 3


def test_the_main_job_learns_the_digits(tmp_path):
    """Installation itself is what the run of continuous integration begins with."""
    install, main_job = blocks('bash')[0].splitlines()
    assert install == "pip install -e '.[demo]'"
    top1 = re.search(r'top1\D*([\d.]+)', run_command(main_job, tmp_path).splitlines()[-1])
    assert float(top1.group(1)) >= 98


def test_the_test_command_is_the_one_of_ci():
    install, test = blocks('bash')[1].splitlines()
    ci = (ROOT / '.ci' / 'run').read_text()
    assert install.replace('pip install', 'pip install --quiet') in ci
    assert test in ci


def test_the_tour(tmp_path):
    train, validate = blocks('bash')[2].splitlines()
    run_command(train, tmp_path)
    result = run_command(validate, tmp_path)
    assert json.loads(result.split('--result')[1])['top1'] > 50

    tour = '\n'.join(blocks('python'))
    assert tour.count('import timm_dyacts') == 1
    with serve_resnet18() as hub:
        done = run_python(f'import os; os.chdir({str(tmp_path)!r})\n{tour}', hub.env(tmp_path / 'cache'))
    for comment in re.findall(r'^# (\{.*\})$', tour, re.MULTILINE):
        assert comment in done.stdout
    assert "['0', '1', '2'" in done.stdout


# What stands beside it


PAGES = ['README.md', 'CONTRIBUTING.md', 'SECURITY.md', 'CHANGELOG.md',
         *sorted(str(path.relative_to(ROOT)) for path in (ROOT / 'model_cards').rglob('*.md'))]


def anchors(text):
    """The anchors that GitHub gives the headings of a page; of equals, the later ones are numbered."""
    text = re.sub(r'^```.*?^```', '', text, flags=re.DOTALL | re.MULTILINE)
    found = []
    for title in re.findall('^#+ (.*)$', text, re.MULTILINE):
        title = re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', title)
        slug = re.sub(r'[^\w -]', '', title.lower()).replace(' ', '-')
        earlier = sum(re.fullmatch(rf'{re.escape(slug)}(-\d+)?', other) is not None for other in found)
        found.append(f'{slug}-{earlier}' if slug in found else slug)
    return set(found)


@pytest.mark.parametrize('name', PAGES)
def test_links_and_paths_lead_somewhere(name):
    page = ROOT / name
    text = page.read_text()
    links = {link for link in re.findall(r'\]\(([^()\s]+)\)', text) if '://' not in link}
    for link in links:
        path, _, anchor = link.partition('#')
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link
    paths = set(re.findall(r'`((?:timm_dyacts|tests|scripts|model_cards)/[^`\s]*)`', text))
    # What is in angle brackets is for the reader to fill in. The changelog also names what is gone.
    paths = {path for path in paths if '<' not in path and name != 'CHANGELOG.md'}
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_the_recipe_of_an_operator(tmp_path):
    """Its files as CONTRIBUTING.md has them, without a further edit, make an operator that all rooms know."""
    shutil.copytree(ROOT / 'timm_dyacts', tmp_path / 'timm_dyacts')
    operators = tmp_path / 'timm_dyacts' / 'operators.py'
    table = operators.read_text()
    blocks_of_files = re.findall(
        r'^   ```python\n   # (\S+?)(, in OPERATORS)?\n(.*?)^   ```', (ROOT / 'CONTRIBUTING.md').read_text(),
        re.DOTALL | re.MULTILINE)
    for name, in_table, block in blocks_of_files:
        code = re.sub('^   ', '', block, flags=re.MULTILINE)
        path = tmp_path / name
        if in_table:
            before, end, after = table.rpartition('\n)}\n')
            table = f'{before}\n{code.rstrip()}{end}{after}'
        elif path == operators:
            table = table.replace('\n__all__ = [', f'{code}\n__all__ = [', 1)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(code)
    operators.write_text(table)

    done = run_python("""
        import os
        import sys

        os.chdir(sys.argv[1])
        import timm
        import timm_dyacts
        import torch
        from timm.layers import create_act_layer, get_act_fn
        from timm_dyacts import zoo
        from timm_dyacts.cli.benchmark import create_parser
        from timm_dyacts.operators import benchmarks, papers

        x = torch.randn(2, 4, 5, 5)
        assert torch.equal(create_act_layer('squared_relu')(x), x.clamp(min=0) ** 2)
        assert torch.equal(get_act_fn('squared_relu')(x), x.clamp(min=0) ** 2)
        assert torch.equal(benchmarks()['squared_relu'].literal(None, x), x.clamp(min=0) ** 2)
        assert create_parser('').parse_args(['ops', '--ops', 'squared_relu']).ops == ['squared_relu']
        assert 'Squared ReLU' in [paper.title for paper, _ in papers()]

        model = timm_dyacts.convert(timm.create_model('resnet18'), act='squared_relu')
        assert model.conversion.counts == {'ReLU -> SquaredReLU': 17}
        variant = timm.create_model('resnet18_squared_relu')
        assert [type(m) for m in variant.modules()] == [type(m) for m in model.modules()]
        assert 'resnet18_squared_relu' in {v.name for v in zoo.variants()}
        print('done')
    """, dict(os.environ, PYTHONPATH=str(tmp_path)), str(tmp_path))
    assert done.stdout == 'done\n'


def test_the_citation_names_this_version_and_the_papers():
    """In the Citation File Format, https://citation-file-format.github.io."""
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert citation['cff-version'] == '1.2.0'
    assert {'message', 'title', 'authors', 'type', 'license', 'version', 'references'} <= set(citation)
    assert (citation['title'], citation['type'], citation['license']) == ('timm_dyacts', 'software', 'Apache-2.0')
    assert citation['version'] == __version__
    cited = {re.findall(r'url=\{(.*)\}', paper.citation)[0]: paper.citation for paper, _ in papers()}
    assert len(citation['references']) == 3
    for reference in citation['references']:
        bibtex = cited[reference['url']]
        assert f'title={{{reference["title"]}}}' in bibtex
        assert f'year={{{reference["year"]}}}' in bibtex
        [authors] = re.findall(r'author=\{(.*)\},', bibtex)
        names = [f'{author["family-names"]}, {author["given-names"]}' for author in reference['authors']]
        assert names == authors.replace('{\\o}', 'ø').split(' and ')


def test_the_changelog_begins_with_what_is_not_released():
    headings = re.findall(r'^## (.*)$', (ROOT / 'CHANGELOG.md').read_text(), re.MULTILINE)
    assert headings[0] == '[Unreleased]'
    assert headings[1].startswith(f'[{__version__}]')
