"""The README's snippets run as written, and what it claims is so. What stands beside it agrees with the package."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import yaml
from support.loopback_hub import LoopbackHub, run_python
from support.readme import README, ROOT, blocks
from support.trained_like import trained_like
from torch import nn

from timm_dyacts import __version__, zoo
from timm_dyacts.cli import COMMANDS
from timm_dyacts.operators import papers


@pytest.fixture(scope='module')
def workspace(tmp_path_factory):
    """A folder for the README's relative paths."""
    return tmp_path_factory.mktemp('workspace')


def run(command: str, folder: Path, env: dict[str, str] | None = None) -> str:
    env = dict(os.environ if env is None else env)
    env['PATH'] = os.pathsep.join([os.path.dirname(sys.executable), env['PATH']])
    done = subprocess.run(command, shell=True, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f'{command}\n{done.stdout}\n{done.stderr}'
    return done.stdout


def test_the_main_job_learns_the_digits(workspace):
    """Installation itself is what the run of continuous integration begins with."""
    install, main_job = blocks('bash')[0].splitlines()
    assert install == "pip install -e '.[demo]'"
    top1 = re.search(r'top1\D*([\d.]+)', run(main_job, workspace).splitlines()[-1])
    assert float(top1.group(1)) >= 98


def test_the_test_command_is_the_one_of_ci():
    install, test = blocks('bash')[1].splitlines()
    ci = (ROOT / '.ci' / 'run').read_text()
    assert install.replace('pip install', 'pip install --quiet') in ci
    assert test in ci


@pytest.fixture(scope='module')
def hub():
    """A Hub with the one checkpoint of timm's that the README speaks of."""
    base = trained_like('resnet18')
    weights = safetensors.torch.save({k: v.contiguous() for k, v in base.state_dict().items()})
    with LoopbackHub() as hub:
        hub.add_repo('timm/resnet18.a1_in1k', {'model.safetensors': weights, 'config.json': b'{}'})
        yield hub


def test_the_tour(workspace, hub, tmp_path):
    train, validate = blocks('bash')[2].splitlines()
    run(train, workspace)
    result = run(validate, workspace)
    assert json.loads(result.split('--result')[1])['top1'] > 50

    tour = '\n'.join(blocks('python'))
    assert tour.count('import timm_dyacts') == 1
    done = run_python(f'import os; os.chdir({str(workspace)!r})\n{tour}', hub.env(tmp_path))
    for comment in re.findall(r'^# (\{.*\})$', tour, re.MULTILINE):
        assert comment in done.stdout
    assert "['0', '1', '2'" in done.stdout or "['zero', 'one'" in done.stdout


def test_the_training_commands(workspace):
    [section] = [block for block in blocks('bash') if '--resume auto' in block]
    train, validate = section.splitlines()
    run(train, workspace)
    run(validate, workspace)
    assert len((workspace / 'results.csv').read_text().splitlines()) == 3


def test_the_counts():
    variants = list(zoo.variants())
    assert f'There are {len(variants)} variants of {len({v.base for v in variants})} architectures' in README


def test_the_table_is_what_the_command_measures(workspace):
    table = README.split('<!-- zoo table -->\n')[1].split('<!-- end of zoo table -->')[0]
    assert '`timm-dyacts zoo`' in README
    assert table == run('timm-dyacts zoo', workspace)


def test_the_command_that_converts(workspace, hub, tmp_path):
    [command] = [block for block in blocks('bash') if 'timm-dyacts convert' in block]
    run(command, workspace, hub.env(tmp_path))
    model = timm.create_model(f'local-dir:{workspace}/{command.split()[-1]}', pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = trained_like('resnet18')(x)
        assert (model(x) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert not any(isinstance(m, (nn.ReLU, nn.BatchNorm2d)) for m in model.modules())


def test_only_commands_that_there_are_are_spoken_of():
    files = {name: (ROOT / name).read_text() for name in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md')}
    for name, text in files.items():
        named = set(re.findall(r'(?:timm-dyacts|-m timm_dyacts) ([a-z]\w*)', text))
        assert named <= set(COMMANDS), name
    assert {'train', 'validate', 'predict', 'publish', 'convert', 'run', 'benchmark', 'coverage', 'lsuv', 'zoo'} <= set(
        re.findall(r'timm-dyacts (\w+)', files['README.md']))


# What stands beside it


@pytest.mark.parametrize('name', ['README.md', 'CONTRIBUTING.md', 'SECURITY.md', 'CHANGELOG.md'])
def test_links_and_paths_lead_somewhere(name):
    text = (ROOT / name).read_text()
    links = {link for link in re.findall(r'\]\(([^)]+)\)', text) if '://' not in link}
    anchors = {'#' + re.sub(r'[^\w -]', '', title.lower()).replace(' ', '-')
               for title in re.findall('^#+ (.*)$', text, re.MULTILINE)}
    assert {link for link in links if link.startswith('#')} <= anchors
    links -= anchors
    paths = set(re.findall(r'`((?:timm_dyacts|tests|scripts|model_cards)/[^`\s]*)`', text))
    # What is in angle brackets is for the reader to fill in. The changelog also names what is gone.
    paths = {path for path in paths if '<' not in path and name != 'CHANGELOG.md'}
    assert not [path for path in links | paths if not (ROOT / path).exists()]


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
