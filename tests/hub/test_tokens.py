"""The token of the Hub is nowhere but where its owner has put it, whichever way that was."""
import json
from pathlib import Path

import pytest
from support.hub_client import read_folder, serve
from support.loopback_hub import Client, Fault
from support.photos import write_photos
from support.run_folder import write_run
from support.trained_like import trained_like

from timm_dyacts import hub

# Runs in the client: all that a command says, and the command lines of what it starts
COMMAND = """
import contextlib, io, sys, logging
from timm_dyacts import cli

started = []
logging.basicConfig(level=logging.INFO, stream=sys.stderr)

def watch(event, args):
    if event in ('subprocess.Popen', 'os.posix_spawn', 'os.exec', 'os.system'):
        started.append(repr(args[:2]))

sys.addaudithook(watch)

def command(*argv):
    said, code = io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            cli.main(list(argv))
        except SystemExit as e:
            code = e.code
    return dict(code=code, said=said.getvalue(), started=started,
                itself=open('/proc/self/cmdline').read().split('\\\\0')[-2:])
"""


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """What a run publishes."""
    run = write_run(tmp_path_factory.mktemp('run'), trained_like('test_resnet_brelu', num_classes=10))
    return read_folder(hub.publish(run, 'user/model', dry_run=True).folder)


@pytest.fixture(scope='module', params=['HF_TOKEN', 'file'])
def served(request, tmp_path_factory):
    """A Hub, and a client that is logged in by the environment or, as ``hf auth login`` does, by a file."""
    folder = tmp_path_factory.mktemp('client')
    with serve(folder) as (server, _):
        env = server.env(folder / 'cache', token=server.token if request.param == 'HF_TOKEN' else None)
        if request.param == 'file':
            Path(env['HF_HOME']).mkdir(exist_ok=True)
            Path(env['HF_HOME'], 'token').write_text(server.token)
        (folder / 'tmp').mkdir()
        with Client(env | dict(TMPDIR=str(folder / 'tmp')), COMMAND, folder / 'log-of-commands') as client:
            yield server, client


@pytest.fixture
def command(served):
    """Run a command, and look for the token in what it says."""
    server, client = served

    def call(*argv):
        done = client(f'command(*{list(map(str, argv))!r})')
        assert server.token not in json.dumps(done)
        return done
    return call


@pytest.fixture
def check_files(served, tmp_path):
    """Look for the token in all that is written: the cache, the log, what is left for bug reports, the run folder."""
    server, client = served

    def check():
        paths = [path for folder in (client.log.parent, tmp_path) for path in folder.rglob('*') if path.is_file()]
        assert len(paths) > 10 and client.log in paths
        for path in paths:
            if path != client.log.parent / 'cache' / 'token':  # the owner's own
                assert server.token.encode() not in path.read_bytes(), path
    return check


def test_a_run_of_a_private_model(server, command, check_files, files, repo_id, tmp_path):
    """Trained, predicted, converted, published: nothing of it has the token, nor what is sent."""
    server.add_repo(repo_id, files, private=True)
    model = f'hf-hub:{repo_id}'
    photos = write_photos(tmp_path / 'photos', train=2, validation=1)
    data = ['--data-dir', photos, '--device', 'cpu', '--batch-size', '2']
    commands = [
        ['train', '--model', model, '--pretrained', *data, '--workers', '1', '--epochs', '1', '--warmup-epochs', '0',
         '--output', tmp_path, '--experiment', 'run'],
        ['validate', '--verify', '--model', model, *data, '--workers', '0'],
        ['predict', '--model', model, photos / 'train', '--device', 'cpu', '--workers', '1',
         '--results-file', tmp_path / 'predictions.csv', '--results-format', 'csv'],
        ['convert', model, '--act', 'relu', '--output', tmp_path / 'converted'],
        ['publish', tmp_path / 'run', '--repo-id', f'{repo_id}-2', '--dry-run'],
        ['publish', tmp_path / 'run', '--repo-id', f'{repo_id}-2'],
    ]
    for argv in commands:
        done = command(*argv)
        assert done['code'] == 0, done
    check_files()
    sent = server.repos[f'{repo_id}-2'].find().files
    assert 'README.md' in sent
    for name, blob in sent.items():
        assert server.token.encode() not in blob.content, name


@pytest.mark.parametrize('argv', [
    ['validate', '--verify', '--model', '{model}'],
    ['predict', '--model', '{model}', '{folder}'],
    ['train', '--model', '{model}', '--dataset', 'digits', '--output', '{folder}'],
    ['convert', '{model}', '--act', 'relu', '--output', '{folder}/new'],
    ['publish', '{folder}/run', '--repo-id', '{repo_id}'],
], ids=lambda argv: argv[0])
@pytest.mark.parametrize('how', [[], ['--traceback']], ids=['line', 'traceback'])
def test_a_server_that_repeats_it(server, command, check_files, files, repo_id, tmp_path, argv, how):
    server.add_repo(repo_id, files, private=True)
    server.inject(Fault('*', status=400, headers={'X-Error-Message': f'no {server.token}'}, times=None))
    write_photos(tmp_path)
    write_run(tmp_path / 'run', trained_like('test_resnet_brelu', num_classes=10))
    named = dict(model=f'hf-hub:{repo_id}', folder=tmp_path, repo_id=repo_id)
    done = command(*(text.format(**named) for text in argv), *how)
    assert '<token>' in done['code'] and ('Traceback' in done['said']) == bool(how), done
    check_files()
