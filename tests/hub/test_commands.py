"""Commands that are given the name of a repo take it as ``hub.load`` does: checked, or not at all."""
import csv
import io
import json

import pytest
import safetensors.torch
import torch
from support.hub_client import read_folder, serve
from support.photos import write_photos
from support.run_folder import write_run
from support.trained_like import trained_like

from timm_dyacts import hub
from timm_dyacts.loading import resolve_model_name

ARCHITECTURE = 'test_resnet_brelu'
# Runs in the client
COMMAND = """
import contextlib, io
from timm_dyacts import cli

def command(*argv):
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(list(argv))
        except SystemExit as e:
            code = e.code
    return dict(code=code, out=out.getvalue(), err=err.getvalue())
"""


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """What a run publishes."""
    run = write_run(tmp_path_factory.mktemp('run'), trained_like(ARCHITECTURE, num_classes=10))
    return read_folder(hub.publish(run, 'user/model', dry_run=True).folder)


@pytest.fixture(scope='module')
def served(tmp_path_factory):
    with serve(tmp_path_factory.mktemp('client')) as (server, client):
        client(f'exec({COMMAND!r}, globals())')
        yield server, client


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp('photos'), train=2, validation=2)


@pytest.fixture
def run(client, photos, tmp_path, repo_id):
    """Run a command with the repo of the test in the place of its model."""
    data = ['--data-dir', str(photos), '--batch-size', '2']
    quick = ['--device', 'cpu', '--workers', '0']
    training = ['--epochs', '1', '--warmup-epochs', '0', '--output', str(tmp_path), '--experiment', 'run']
    digits = ['--dataset', 'digits', '--batch-size', '256', '--img-size', '32']
    commands = dict(
        predict=['predict', str(photos / 'validation' / 'red' / '0.png'), *quick, '--model'],
        validate=['validate', *data, *quick, '--model'],
        verify=['validate', '--verify', *data, *quick, '--model'],
        convert=['convert', '--act', 'relu', '--output', str(tmp_path / 'new')],
        train=['train', *data, *quick, *training, '--pretrained', '--model'],
        untrained=['train', *data, *quick, *training, '--model'],
        teacher=['train', '--model', 'test_resnet', *digits, *quick, *training, '--kd-model'],
        lsuv=['lsuv', *data, '--model'],
        benchmark=['benchmark', 'models', '--repeats', '1', '--batch-size', '2', '--img-size', '32', '--device', 'cpu',
                   '--output', str(tmp_path / 'models.csv'), '--models'],
    )

    def call(name, *options, prefix='hf-hub:'):
        command = commands[name]
        place = 1 if name == 'convert' else len(command)
        argv = [*command[:place], f'{prefix}{repo_id}', *command[place:], *options]
        return client(f'command(*{argv!r})')
    return call


COMMANDS = (
    'predict', 'validate', 'verify', 'convert', 'train', 'untrained', 'teacher', 'lsuv', 'benchmark')


def with_config(files, **changes):
    return files | {'config.json': json.dumps(json.loads(files['config.json']) | changes).encode()}


def with_weights(files, **changes):
    weights = safetensors.torch.load(files['model.safetensors']) | changes
    return with_config(files, timm_dyacts={}) | {'model.safetensors': safetensors.torch.save(weights)}


@pytest.mark.parametrize('prefix', ['hf-hub:', 'HF-HUB:', 'hf_hub:'])
def test_all_spellings_of_the_prefix_are_one(prefix):
    assert resolve_model_name(f'{prefix}user/name@v1') == 'hf-hub:user/name@v1'


@pytest.mark.parametrize('name', COMMANDS)
def test_weights_are_verified(server, run, files, repo_id, name):
    server.add_repo(repo_id, files | {'model.safetensors': files['model.safetensors'][:-1] + b'x'})
    code = run(name)['code']
    assert f"model.safetensors of '{repo_id}' is not what was published" in code and '\n' not in code


@pytest.mark.parametrize('prefix', ['hf-hub:', 'HF-HUB:'])
@pytest.mark.parametrize('name', COMMANDS)
def test_a_config_only_describes_a_model(server, run, files, repo_id, name, prefix):
    server.add_repo(repo_id, with_config(files, model_args=dict(checkpoint_path='weights.pth')))
    code = run(name, prefix=prefix)['code']
    assert "has 'model_args.checkpoint_path' = 'weights.pth'; accepted is none" in code and '\n' not in code


@pytest.mark.parametrize('name', COMMANDS)
def test_a_whole_repo(server, run, files, repo_id, name, tmp_path):
    commit = server.add_repo(repo_id, files).find().sha
    done = run(name)
    assert done['code'] == 0, done
    if name == 'train':
        start = json.loads((tmp_path / 'run' / 'results.json').read_text())['start']
        assert start['source'] == f'{repo_id}@{commit}' and start['pretrained']


def test_what_an_architecture_does_not_take_is_still_said_by_option(server, run, files, repo_id):
    server.add_repo(repo_id, files)
    assert '--bn-momentum needs a model that takes it' in run('train', '--bn-momentum', '0.1')['code']


@pytest.mark.parametrize('local', [False, True], ids=['repo', 'folder'])
def test_a_file_goes_before_the_weights_of_a_repo_or_folder(server, run, files, repo_id, tmp_path, local):
    """With ``--pretrained-path``: of what it starts from, nothing is learnt."""
    given = {key: value * 2 for key, value in safetensors.torch.load(files['model.safetensors']).items()}
    safetensors.torch.save_file(given, tmp_path / 'given.safetensors')
    if local:
        folder = tmp_path / repo_id
        folder.mkdir(parents=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
    else:
        server.add_repo(repo_id, files)
    done = run(
        'untrained', '--pretrained-path', str(tmp_path / 'given.safetensors'), '--lr', '1e-30', '--warmup-lr', '0',
        prefix=f'local-dir:{tmp_path}/' if local else 'hf-hub:')
    assert done['code'] == 0, done
    trained = safetensors.torch.load_file(tmp_path / 'run' / 'model.safetensors')
    assert torch.equal(trained['layer1.0.conv1.weight'], given['layer1.0.conv1.weight'])


def test_names_of_classes_do_not_reach_the_terminal_as_they_are(server, run, files, repo_id):
    names = [f'\x1b[2J{label}\n\u202e' for label in range(10)]
    server.add_repo(repo_id, with_config(files, label_names=names, timm_dyacts={}))
    shown = {rf'\x1b[2J{label} \u202e' for label in range(10)}
    for results_format in ('table', 'csv'):
        out = run('predict', '--results-format', results_format)['out']
        assert out.replace('\n', '').isprintable()
    assert {row['class'] for row in csv.DictReader(io.StringIO(out))} < shown
    out = run('predict', '--results-format', 'json')['out']
    assert out.replace('\n', '').isprintable() and {p['class'] for p in json.loads(out)[0]['predictions']} < set(names)
    said = run('validate')
    assert said['code'] == 0 and said['err'].count('\n') == said['err'].count('The classes differ') == 1
    assert said['err'].replace('\n', '').isprintable()


def test_names_by_label(server, run, files, repo_id):
    """As timm has them where there are gaps."""
    server.add_repo(repo_id, with_config(files, label_names={'3': 'three', '12': 'twelve'}, timm_dyacts={}))
    [record] = json.loads(run('predict', '--topk', '10', '--results-format', 'json')['out'])
    assert {p['label']: p['class'] for p in record['predictions']} == {
        label: 'three' if label == 3 else str(label) for label in range(10)}


@pytest.mark.parametrize('cfg, words', [
    (dict(interpolation='<b>\x1b[2J'), r"interpolation = '<b>\x1b[2J'; accepted is a name such as 'bicubic'"),
    (dict(interpolation=7), 'interpolation'),
    (dict(crop_pct=-1), 'crop_pct = -1; accepted is a number from 0.01 to 100. --crop-pct replaces it'),
    (dict(crop_pct=1e308), 'crop_pct'),
    (dict(crop_pct='1'), 'crop_pct'),
    (dict(std=[0, 0, 0]), 'std = [0, 0, 0]; accepted is a list of numbers above 0'),
    (dict(std=5), 'std'),
    (dict(mean=['a'] * 3), 'mean'),
    (dict(input_size=[3, 0, 0]), 'input_size = (3, 0, 0); accepted is channels, height and width'),
    (dict(input_size=[3, 32]), 'input_size'),
], ids=['name', 'number', 'negative', 'huge', 'text', 'zeros', 'scalar', 'texts', 'empty', 'two'])
@pytest.mark.parametrize('name', ['predict', 'validate', 'train', 'lsuv'])
def test_a_preprocessing_that_is_none(server, run, files, repo_id, name, cfg, words):
    config = json.loads(files['config.json'])
    if name == 'lsuv' and cfg.keys() & {'crop_pct', 'input_size'}:
        pytest.skip('it has its own')
    changed = with_config(files, pretrained_cfg=config['pretrained_cfg'] | cfg, timm_dyacts={})
    server.add_repo(repo_id, changed)
    code = run(name)['code']
    assert words in code and 'bug' not in code and code.isprintable()
