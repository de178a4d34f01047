"""The pages in model_cards/guides: their snippets run as written, and what they claim is so."""
import ast
import importlib
import importlib.util
import os
import re
import shlex

import pytest
import timm
import torch
from support.loopback_hub import LoopbackHub, run_python
from support.readme import GUIDES, README, ROOT, blocks, guide, run_command, serve_resnet18
from support.trained_like import trained_like
from torch import nn

import timm_dyacts
from timm_dyacts import zoo
from timm_dyacts.cli import COMMANDS
from timm_dyacts.options import declarations
from timm_dyacts.study.plan import parse_contenders
from timm_dyacts.training import TrainConfig

NAMES = sorted(path.stem for path in GUIDES.glob('*.md'))
# Pages whose snippets other tests run
ELSEWHERE = {
    'other-libraries': 'tests/downstream/test_other_libraries.py',
    'publishing': 'tests/hub/test_round_trip.py',
}
EXAMPLES = GUIDES / 'examples'


# Snippets


def test_all_snippets_are_run():
    """Python by page, below; shell commands one by one, each with a look at what it does."""
    assert all(name in (ROOT / path).read_text() for name, path in ELSEWHERE.items() if name in NAMES)
    commands = {name: len(found) for name in NAMES if name not in ELSEWHERE and (found := blocks('bash', guide(name)))}
    assert commands == {'any-model': 1, 'fine-tuning': 1}


@pytest.mark.parametrize('name', [name for name in NAMES if name not in ELSEWHERE and blocks('python', guide(name))])
def test_python(name, tmp_path):
    """Each page by itself, from top to bottom."""
    code = '\n'.join(blocks('python', guide(name)))
    with LoopbackHub() as hub:
        run_python(
            f'import os; os.chdir({str(tmp_path)!r})\n{code}', hub.env(tmp_path / 'cache'), timeout=300)


def test_the_training_commands(tmp_path):
    [commands] = blocks('bash', guide('fine-tuning'))
    train, validate = commands.replace('\\\n', '').splitlines()
    assert '--resume auto' in train
    run_command(train, tmp_path)
    run_command(validate, tmp_path)
    assert len((tmp_path / 'results.csv').read_text().splitlines()) == 3


def test_the_command_that_converts(tmp_path):
    [command] = blocks('bash', guide('any-model'))
    with serve_resnet18() as hub:
        run_command(command, tmp_path, hub.env(tmp_path / 'cache'))
    model = timm.create_model(f'local-dir:{tmp_path}/{command.split()[-1]}', pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = trained_like('resnet18')(x)
        assert (model(x) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert not any(isinstance(m, (nn.ReLU, nn.BatchNorm2d)) for m in model.modules())


# Commands and options in the text


def commands_in(text):
    """The commands of a page that can be parsed, without the program: those in blocks, and those in a sentence."""
    lines = [line for language in ('sh', 'bash') for block in blocks(language, text)
             for line in block.replace('\\\n', ' ').splitlines()]
    prose = re.sub(r'^```.*?^```', '', text, flags=re.DOTALL | re.MULTILINE)
    lines += [' '.join(code.split()) for code in re.findall(r'`([^`]+)`', prose)]
    for line in lines:
        # An ellipsis, angle brackets and capitals are for the reader to fill in. What follows a script is the script's.
        if line.startswith('timm-dyacts ') and not re.search(r'\.\.\.|[<$|]|COMMAND', line):
            yield shlex.split(re.sub(r'( run \S+).*', r'\1', line))[1:]


@pytest.mark.parametrize('name', ['README', *NAMES])
def test_commands_and_options_are_those_that_there_are(name):
    text = README if name == 'README' else guide(name)
    parsers = {command: importlib.import_module(f'timm_dyacts.cli.{command}').create_parser(command)
               for command in COMMANDS}
    for command, *arguments in commands_in(text):
        if command.startswith('-'):
            assert command in ('--help', '--version')
        elif not arguments or arguments == ['--help']:
            assert command in COMMANDS
        else:
            args = parsers[command].parse_args(arguments)
            if command == 'compare':
                assert not [c for c in parse_contenders(args.models, declarations(TrainConfig)) if c.model_kwargs]
    options = {option for parser in parsers.values() for option in parser._option_string_actions}
    options |= {'--ops', '--shapes', '--dtypes'}  # of subcommands
    options |= {'--sched-on-updates'}  # of timm's train.py, spoken of
    assert set(re.findall(r'`(--[a-z][\w-]*)', text)) <= options


@pytest.mark.parametrize('name', ['README.md', 'CONTRIBUTING.md', 'CHANGELOG.md'])
def test_only_commands_that_there_are_are_spoken_of(name):
    text = (ROOT / name).read_text()
    assert set(re.findall(r'(?:timm-dyacts|-m timm_dyacts) ([a-z]\w*)', text)) <= set(COMMANDS)


def test_all_commands_are_spoken_of():
    text = README + ''.join(map(guide, NAMES))
    named = set(re.findall(r'timm-dyacts (\w+)', text))
    assert {'train', 'validate', 'predict', 'publish', 'convert', 'compare', 'run', 'benchmark', 'coverage', 'lsuv',
            'zoo', 'demo'} <= named


# Claims


def test_the_counts():
    variants = list(zoo.variants())
    counts = f'{len(variants)} variants of {len({v.base for v in variants})} architectures'
    assert f'There are {counts}' in guide('variants')


def test_the_table_is_what_the_command_measures(tmp_path):
    table = guide('variants').split('<!-- zoo table -->\n')[1].split('<!-- end of zoo table -->')[0]
    assert '`timm-dyacts zoo`' in guide('variants')
    assert table == run_command('timm-dyacts zoo', tmp_path)


def texts_of(path):
    """The texts in a module; what an f-string fills in is a NUL."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield ''.join(part.value if isinstance(part, ast.Constant) else '\0' for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_messages_are_those_of_the_package():
    """The parts of each message stand, in this order, in one text of the source."""
    texts = {text for path in (ROOT / 'timm_dyacts').rglob('*.py') for text in texts_of(path)}
    messages = [' '.join(block.split()) for block in blocks('text', guide('troubleshooting'))]
    assert len(messages) > 20
    for message in messages:
        assert len(message.replace('...', '')) >= 15
        pattern = re.compile('.*?'.join(map(re.escape, message.split('...'))), re.DOTALL)
        assert any(pattern.search(text) for text in texts), message


class Flat(nn.Module):
    def forward(self, x):
        assert x.shape[1] == 5
        return x.flatten(1)


@pytest.mark.parametrize('call, error', [
    (lambda: timm.create_model('resnet18_dyrelu_d'), RuntimeError),
    (lambda: timm.create_model('resnet18', act_layer='brelo'), KeyError),
    (lambda: timm.create_model('resnet18_brelu', where='late'), ValueError),
    (lambda: timm_dyacts.convert(nn.Sequential(nn.Conv2d(3, 4, 1)), act='brelu'), ValueError),
    (lambda: timm_dyacts.convert(nn.Sequential(Flat(), nn.Linear(7, 4), nn.ReLU()), act='brelu'), ValueError),
])
def test_messages_are_raised(call, error):
    patterns = ['.*'.join(map(re.escape, ' '.join(block.split()).split('...')))
                for block in blocks('text', guide('troubleshooting'))]
    with pytest.raises(error) as raised:
        call()
    assert any(re.match(pattern, str(raised.value)) for pattern in patterns), raised.value


# The API


@pytest.fixture(scope='module')
def api():
    """The program that writes the page."""
    spec = importlib.util.spec_from_file_location('api_page', ROOT / 'scripts' / 'api.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_api_is_that_of_the_docstrings(api):
    assert guide('api') == api.render(), 'run scripts/api.py'


def test_the_api_has_what_is_public(api):
    listed = {module: [name for names in groups.values() for name in names] for module, groups in api.MODULES.items()}
    for module, names in listed.items():
        public = importlib.import_module(module).__all__
        assert len(names) == len(set(names)) and set(names) <= set(public), module
        if module in ('timm_dyacts', 'timm_dyacts.hub'):
            assert set(names) == set(public), module
        assert all(f'# `{name}`\n' in guide('api') for name in names)


# Examples


@pytest.mark.parametrize('name, pictures', [
    ('convert-your-model', {'after-conversion.png', 'dynamic-relu.png'}),
    ('fine-tune-and-compare', {'curves.png', 'coefficients.png', 'comparison.png'}),
    ('publish-and-load', {'loaded.png'}),
])
def test_an_example(name, pictures, tmp_path):
    code = (EXAMPLES / f'{name}.py').read_text()
    assert code.startswith('# %% [markdown]\n# # ')
    if 'SEEDS = 3' in code:  # the course of it, in less time
        code = code.replace('SEEDS = 3', 'SEEDS = 1')
    # In a file, as functions such as F.relu are replaced in source code that can be read
    (tmp_path / 'example.py').write_text(code)
    with LoopbackHub() as hub:
        env = hub.env(tmp_path / 'cache', token=hub.token) | dict(MPLBACKEND='agg')
        run_command('python example.py', tmp_path, env)
    assert {path.name for path in tmp_path.glob('*.png')} == pictures
    assert all((EXAMPLES / picture).exists() for picture in pictures)


def test_pictures_are_small_and_shown():
    shown = ''.join(map(guide, NAMES))
    pictures = list(EXAMPLES.glob('*.png'))
    assert len(pictures) == 6
    for picture in pictures:
        assert os.path.getsize(picture) < 100_000 and f'](examples/{picture.name})' in shown, picture.name
