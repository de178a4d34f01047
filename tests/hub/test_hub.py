"""Pulling: what comes from the Hub is what was published, or there is a clear error and nothing half-written."""
import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from packaging.version import Version
from support.hub_client import fingerprint, read_folder, serve
from support.loopback_hub import ClientError, Fault, run_python
from support.run_folder import write_checkpoint, write_run
from support.trained_like import trained_like

from timm_dyacts import hub

ARCHITECTURE = 'resnet10t_dyrelu_b'


@pytest.fixture(scope='module')
def model():
    return trained_like(ARCHITECTURE, num_classes=10)


@pytest.fixture(scope='module')
def folder(model, tmp_path_factory):
    """A published folder, as a dry run leaves it."""
    run = write_run(tmp_path_factory.mktemp('run'), model)
    return hub.publish(run, 'user/model', dry_run=True).folder


@pytest.fixture(scope='module')
def files(folder):
    return read_folder(folder)


@pytest.fixture(scope='module')
def served(tmp_path_factory):
    with serve(tmp_path_factory.mktemp('client')) as (server, client):
        yield server, client


def cached(served, repo_id):
    """The content of a repo's files in the client's cache, complete or not, by name."""
    cache = served[1].log.parent / 'cache' / 'hub' / f'models--{repo_id.replace("/", "--")}'
    return {path.name: path.read_bytes() for path in cache.glob('[bs]*/**/*') if path.is_file()}


def with_config(files, **changes):
    return files | {'config.json': json.dumps(json.loads(files['config.json']) | changes).encode()}


def with_another_classifier(files):
    weights = safetensors.torch.load(files['model.safetensors'])
    weights |= {'fc.weight': torch.zeros(11, 512), 'fc.bias': torch.zeros(11)}
    return files | {'model.safetensors': safetensors.torch.save(weights)}


def with_entry(files, key, change):
    weights = safetensors.torch.load(files['model.safetensors'])
    weights[key] = change(weights.get(key))
    return with_config(files, timm_dyacts={}) | {'model.safetensors': safetensors.torch.save(weights)}


def message(error):
    """The last of a traceback, from our error on: what a user reads."""
    return str(error.value)[str(error.value).rindex('timm_dyacts.hub.errors.'):]


@pytest.mark.parametrize('call', ['hub.load({!r})', "timm.create_model('hf-hub:' + {!r}, pretrained=True)"])
def test_same_logits_bit_for_bit(server, client, files, folder, repo_id, call):
    server.add_repo(repo_id, files)
    expected = fingerprint(timm.create_model(f'local-dir:{folder}', pretrained=True))
    assert client(f'fingerprint({call.format(repo_id)})') == expected


def test_names_and_preprocessing_come_along(server, client, files, repo_id):
    commit = server.add_repo(repo_id, files).find()
    cfg = client(f'hub.load({repo_id!r}).pretrained_cfg')
    assert cfg['label_names'] == [str(i) for i in range(10)]
    assert (cfg['input_size'], cfg['crop_pct']) == ([3, 32, 32], 1.0)
    assert cfg['hf_hub_id'] == f'{repo_id}@{commit.sha}'
    assert client(f'hub.load({repo_id!r}, num_classes=3).num_classes') == 3
    assert client(f'len(hub.load({repo_id!r}, features_only=True).feature_info)') == 5


def test_pinned_revision(server, client, files, repo_id):
    repo = server.add_repo(repo_id, files)
    old = repo.find().sha
    repo.refs['refs/tags/v1'] = old
    repo.commit({'config.json': b'{}'})
    for name in (f'{repo_id!r}, revision={old!r}', f"'{repo_id}@{old}'", f"'{repo_id}@v1'", f"'hf-hub:{repo_id}@v1'"):
        assert old in client(f"hub.load({name}).pretrained_cfg['hf_hub_id']")
    with pytest.raises(ClientError, match='revision must be given once'):
        client(f"hub.load('{repo_id}@v1', revision='main')")


def test_config_and_weights_are_of_one_commit(server, client, files, repo_id):
    """Somebody publishes between the two downloads."""
    repo = server.add_repo(repo_id, files)
    first = repo.find().sha
    server.inject(Fault('*/config.json', 'GET', then=lambda: repo.commit({'model.safetensors': b'of another model'})))
    assert first in client(f"hub.load({repo_id!r}).pretrained_cfg['hf_hub_id']")
    assert repo.find().sha != first


def test_from_cache_when_offline(served, server, client, files, repo_id):
    server.add_repo(repo_id, files)
    expected = client(f'fingerprint(hub.load({repo_id!r}))')
    server.requests.clear()
    process = run_python(
        f"""
        import sys
        import timm
        from timm_dyacts import hub
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        from support.hub_client import fingerprint
        print(fingerprint(hub.load({repo_id!r})))
        print(fingerprint(timm.create_model('hf-hub:{repo_id}', pretrained=True)))
        try:
            hub.load('user/never-loaded')
        except hub.HubError as e:
            print(e)
        """,
        server.env(client.log.parent / 'cache', offline=True),
    )
    ours, timms, error = process.stdout.split('\n', maxsplit=2)
    assert ours == timms == expected
    assert "Could not load 'user/never-loaded'" in error and 'HF_HUB_OFFLINE is set' in error
    assert server.requests == []


def test_private_repo_needs_the_token(server, client, files, repo_id):
    server.add_repo(repo_id, files, private=True)
    with pytest.raises(ClientError) as error:
        client(f'hub.load({repo_id!r})')
    assert f"'{repo_id}'" in message(error) and 'hf auth login' in message(error)
    assert client(f'hub.load({repo_id!r}, token={server.token!r}).num_classes') == 10


def without(name):
    return lambda files: {k: v for k, v in files.items() if k != name}


@pytest.mark.parametrize('change, words', [
    (lambda files: with_config(files, architecture='resnet10t_dyrelu_z'),
     ['resnet10t_dyrelu_z', 'pip install --upgrade']),
    (lambda files: with_config(files, timm_dyacts=dict(requires=dict(timm_dyacts='>=99.1'))),
     ['needs timm_dyacts >=99.1', "pip install --upgrade 'timm_dyacts>=99.1'"]),
    (lambda files: with_config(files, timm_dyacts=dict(requires=dict(timm='newest'))),
     ["'newest'", 'no version specifier']),
    (lambda files: files | {'config.json': b'{"model_type": "bert"}'}, ["not one of timm's"]),
    (lambda files: files | {'config.json': b'not JSON'}, ['config.json', 'not JSON']),
    (without('config.json'), ['config.json', 'another library']),
    (without('model.safetensors'), ['model.safetensors', 'allow_pickle=True']),
    (lambda files: with_config(files, pretrained_cfg=None), ["not one of timm's"]),
    (lambda files: with_config(files, num_classes=11), ['contradicts itself', 'num_classes is 11', ' is 10']),
    (lambda files: with_config(files, model_args=dict(num_classes=11)),
     ['contradicts itself', 'model_args.num_classes is 11']),
    (lambda files: with_config(files, num_classes=[11]), ['contradicts itself', 'num_classes is [11]']),
    (lambda files: with_config(files, timm_dyacts=dict(requires=dict(timm=['>=1']))), ['no version specifier']),
    (lambda files: files | {'config.json': b'[' * 100_000}, ['config.json', 'not JSON']),
    (lambda files: with_config(with_another_classifier(files), timm_dyacts={}), ['size mismatch for fc', 'same model']),
    (lambda files: with_config(files, model_args=dict(no_such_argument=1)), ['no_such_argument', 'same model']),
    (lambda files: with_config(files | {'model.safetensors': files['model.safetensors'][:-9]}, timm_dyacts={}),
     ['truncated or damaged', 'removed from the cache']),
    (lambda files: files | {'model.safetensors': files['model.safetensors'][:-1] + b'x'},
     ['it was changed there', 'removed from the cache']),
    (lambda files: with_config(files, architecture=f'{ARCHITECTURE}.\x1b[2J'), ['known neither to timm', r'\x1b[2J']),
    (lambda files: with_config(files, timm_dyacts=dict(sha256={'model.safetensors': '\u202eff'})),
     [r"'\u202eff' as the SHA-256 of model.safetensors", '64 digits']),
    (lambda files: with_config(files, label_names='0123456789'), ["'label_names' = '0123456789'", 'a list of texts']),
    (lambda files: with_config(files, label_names=[None] * 10), ["'label_names' = [None, ", 'a list of texts']),
    (lambda files: with_config(files, model_args=dict(drop_rate=[0.5])),
     ["'model_args.drop_rate' = [0.5]", 'a number from 0 to 1']),
    (lambda files: with_entry(files, 'layer1.0.conv1.weight', lambda value: value.fill_(torch.nan)),
     ["'layer1.0.conv1.weight' has NaN or infinity in it"]),
    (lambda files: with_entry(files, 'layer1.0.conv1.weight', lambda value: value.to(torch.int8)),
     ["'layer1.0.conv1.weight' is torch.int8"]),
    (lambda files: with_entry(files, 'layer1.0.conv1.weight', lambda value: value.bool()), ['is torch.bool']),
    (lambda files: with_entry(files, 'x\x1b[2J', lambda _: torch.zeros(1)), [r"an entry 'x\x1b[2J'"]),
], ids=['architecture', 'newer', 'specifier', 'foreign', 'not JSON', 'no config', 'no weights', 'no cfg', 'classes',
        'argument', 'list', 'specifier list', 'deep', 'shape', 'model_args', 'truncated', 'tampered', 'escapes',
        'sha256', 'names', 'no names', 'rate', 'nan', 'int8', 'bool', 'entry'])
def test_bad_repos_have_clear_errors(served, server, client, files, repo_id, change, words):
    server.add_repo(repo_id, change(files))
    with pytest.raises(ClientError) as error:
        client(f'hub.load({repo_id!r})')
    for word in [f"'{repo_id}'", *words]:
        assert word in message(error)
    if 'removed from the cache' in words:
        assert 'model.safetensors' not in cached(served, repo_id)


def test_counters_that_an_average_of_checkpoints_made_numbers(server, client, files, repo_id):
    server.add_repo(repo_id, with_entry(files, 'bn1.num_batches_tracked', lambda value: value.float()))
    assert client(f'hub.load({repo_id!r}).num_classes') == 10


@pytest.fixture(scope='module')
def lacking(tmp_path_factory):
    """A repo whose weights lack a layer, of an architecture that timm does not load strictly."""
    folder = tmp_path_factory.mktemp('lacking')
    write_checkpoint(folder, timm.create_model('dla46x_c', num_classes=10))
    files = read_folder(folder)
    weights = safetensors.torch.load(files['model.safetensors'])
    del weights['level2.tree1.conv1.weight']
    return files | {'model.safetensors': safetensors.torch.save(weights)}


def test_weights_that_lack_a_part_are_no_model(server, client, lacking, repo_id):
    server.add_repo(repo_id, lacking)
    with pytest.raises(ClientError, match="model.safetensors lacks 'level2.tree1.conv1.weight'"):
        client(f'hub.load({repo_id!r})')
    assert client(f'hub.load({repo_id!r}, num_classes=3).num_classes') == 3, 'which may start anew'
    said = client.log.read_text()
    assert 'are not in it and start anew: level2.tree1.conv1.weight' in said


def test_without_the_weights(server, client, files, repo_id):
    """They are verified all the same: what is built is bounded by their size."""
    server.add_repo(repo_id, files)
    ours, theirs = (client(f'fingerprint(hub.load({repo_id!r}, pretrained={value}))') for value in (True, False))
    assert ours != theirs
    tampered = files['model.safetensors'][:-1] + b'x'
    server.add_repo(f'{repo_id}-tampered', files | {'model.safetensors': tampered})
    with pytest.raises(ClientError, match='is not what was published'):
        client(f"hub.load('{repo_id}-tampered', pretrained=False)")


def test_the_number_of_classes_of_the_source(server, client, files, repo_id):
    """Older releases of timm leave it in ``pretrained_cfg``, and read the one beside."""
    cfg = json.loads(files['config.json'])['pretrained_cfg'] | dict(num_classes=1000)
    server.add_repo(repo_id, with_config(files, pretrained_cfg=cfg))
    assert client(f'hub.load({repo_id!r}).get_classifier().out_features') == 10


@pytest.mark.parametrize('name, words', [
    ('user/absent', ['user/absent', 'Check the spelling']),
    ('meta/gated', ['Ask for access at', 'hf auth login']),
    ('meta/gated@nowhere', ['meta/gated@nowhere']),
    ('a/b/c', ["Give the repo as 'user/name'"]),
])
def test_names_of_repos_that_cannot_be_read(server, client, files, name, words):
    server.add_repo('meta/gated', files, gated=True)
    with pytest.raises(ClientError) as error:
        client(f'hub.load({name!r})')
    assert all(word in message(error) for word in words)


@pytest.mark.parametrize('fault, words', [
    (Fault('/storage/*', corrupt=True), ['damaged on the way', 'Load again']),
    (Fault('*/config.json', 'GET', cut_after=99, times=None, no_resume=True), ['broke off', 'HF_ENDPOINT']),
    (Fault('/storage/*', status=503), ['problem of its own']),
    (Fault('/storage/*', status=429, times=None), ['limits how often']),
    (Fault('*/model.safetensors', 'HEAD', status=401), ['The token is missing or no longer valid']),
    (Fault('*/model.safetensors', 'HEAD', status=403), ['The token may not do that']),
    (Fault('*/config.json', 'HEAD', drop=True), ['broke off', 'HF_ENDPOINT']),
    (Fault('/storage/*', cut_after=5000, times=None, no_resume=True), ['broke off', 'HF_ENDPOINT']),
], ids=['corrupt weights', 'cut config', '5xx', '429', '401', '403', 'hang-up', 'cut'])
def test_failed_downloads_are_explained_and_leave_nothing(served, server, client, files, repo_id, fault, words):
    server.add_repo(repo_id, files)
    fault = server.inject(fault)
    with pytest.raises(ClientError) as error:
        client(f'hub.load({repo_id!r})')
    assert fault.hits
    for word in [f"'{repo_id}'", *words]:
        assert word in message(error)
    left = cached(served, repo_id)
    assert not [name for name in left if name == 'model.safetensors']
    assert all(content in files.values() for name, content in left.items() if not name.endswith('.incomplete'))

    server.clear_faults()
    assert client(f'hub.load({repo_id!r}).num_classes') == 10


@pytest.mark.parametrize('how', [dict(status=500), dict(drop=True)], ids=['500', 'drop'])
def test_a_failure_at_each_request(served, server, client, files, repo_id, how):
    """From some request on nothing works any more: an error, nothing half-written, and the next attempt succeeds."""
    server.add_repo(repo_id, files)
    assert client(f'hub.load({repo_id!r}).num_classes') == 10
    requests = list(server.requests)
    assert len(requests) >= 4
    for skip in range(len(requests)):
        again = f'{repo_id}-{skip}'
        server.add_repo(again, files)
        server.inject(Fault(skip=skip, times=None, **how))
        with pytest.raises(ClientError) as error:
            client(f'hub.load({again!r})')
        server.clear_faults()
        assert f"'{again}'" in message(error)
        whole = {name: content for name, content in cached(served, again).items() if not name.endswith('.incomplete')}
        assert all(content in files.values() for content in whole.values())
        assert client(f'hub.load({again!r}).num_classes') == 10


@pytest.mark.parametrize('fault', [
    Fault('/storage/*', cut_after=5000),
    Fault('/storage/*', status=429, headers={'Retry-After': '1'}),
    Fault('*/config.json', 'HEAD', status=500),
], ids=['cut', '429', '5xx'])
@pytest.mark.skipif(huggingface_hub.__version__ < '2', reason='version 1 of the client tries less often')
def test_the_client_retries(server, client, files, repo_id, fault):
    server.add_repo(repo_id, files)
    fault = server.inject(fault)
    assert client(f'hub.load({repo_id!r}).num_classes') == 10
    assert fault.hits == 1


def test_a_damaged_config_is_downloaded_again(served, server, client, files, repo_id):
    server.add_repo(repo_id, files)
    fault = server.inject(Fault('*/config.json', 'GET', corrupt=True))
    assert client(f'hub.load({repo_id!r}).num_classes') == 10
    assert fault.hits == 1
    assert cached(served, repo_id)['config.json'] == files['config.json']


def test_etags_that_are_no_hashes(server, client, files, repo_id):
    """Not every mirror of the Hub has its ETags."""
    server.add_repo(repo_id, files)
    for name, etag in (('config.json', 'c0ffee' * 6 + 'cafe'), ('model.safetensors', 'v1')):
        header = 'X-Linked-ETag' if name == 'model.safetensors' else 'ETag'
        server.inject(Fault(f'*/{name}', answer_headers={header: f'"{etag}"'}, times=None))
    assert client(f'hub.load({repo_id!r}).num_classes') == 10


def test_a_repo_of_others_is_checked_against_the_hub(server, client, files, repo_id):
    server.add_repo(repo_id, with_config(files, timm_dyacts=None))
    fault = server.inject(Fault('/storage/*', corrupt=True, times=2))
    with pytest.raises(ClientError, match='ChecksumError'):
        client(f'hub.load({repo_id!r})')
    assert client(f'hub.load({repo_id!r}, verify=False).num_classes') == 10
    assert fault.hits == 2
    with pytest.raises(ClientError, match='ChecksumError'):
        client(f"hub.verify('hf-hub:{repo_id}')")
    assert client(f'hub.load({repo_id!r}).num_classes') == 10


def test_nothing_to_verify_with(server, client, files, repo_id):
    server.add_repo(repo_id, with_config(files, timm_dyacts={}))
    server.inject(Fault('*/model.safetensors', answer_headers={'X-Linked-ETag': '"v1"'}, times=None))
    assert client(f'hub.load({repo_id!r}).num_classes') == 10
    assert f"There is no checksum to verify the weights of '{repo_id}' with" in client.log.read_text()
    with pytest.raises(ClientError, match='neither its config.json nor the cache has a checksum'):
        client(f"hub.verify('hf-hub:{repo_id}')")


def test_pickled_weights_only_when_asked_for(server, client, files, model, repo_id, tmp_path):
    torch.save(model.state_dict(), tmp_path / 'pytorch_model.bin')
    pickled = without('model.safetensors')(files) | read_folder(tmp_path)
    server.add_repo(repo_id, pickled)
    with pytest.raises(ClientError, match='allow_pickle=True'):
        client(f'hub.load({repo_id!r})')
    if Version(torch.__version__) >= Version('2.6'):
        assert client(f'hub.load({repo_id!r}, allow_pickle=True).num_classes') == 10
    version = client('torch.__version__ + ""')
    try:
        client('setattr(torch, "__version__", "2.5.1")')
        with pytest.raises(ClientError, match='allow_pickle=True needs torch>=2.6, got torch 2.5.1'):
            client(f'hub.load({repo_id!r}, allow_pickle=True)')
    finally:
        client(f'setattr(torch, "__version__", {version!r})')


class Evil:
    """What makes a folder where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.skipif(Version(torch.__version__) < Version('2.6'), reason='allow_pickle=True needs PyTorch 2.6')
def test_a_pickle_runs_nothing_even_where_it_is_asked_for(server, client, files, model, repo_id, tmp_path):
    for made in (model.state_dict() | dict(other=Evil(tmp_path / 'made')), Evil(tmp_path / 'made')):
        torch.save(made, tmp_path / 'pytorch_model.bin')
        server.add_repo(repo_id, without('model.safetensors')(files) | {
            'pytorch_model.bin': (tmp_path / 'pytorch_model.bin').read_bytes()})
        with pytest.raises(ClientError) as error:
            client(f'hub.load({repo_id!r}, allow_pickle=True)')
        assert 'Python objects beside tensors, which may run code' in message(error)
        assert not (tmp_path / 'made').exists()


def test_verify(server, client, files, folder, repo_id, tmp_path):
    checksum = json.loads(files['config.json'])['timm_dyacts']['sha256']['model.safetensors']
    server.add_repo(repo_id, files)
    assert client(f"hub.verify('hf-hub:{repo_id}')") == checksum
    assert hub.verify(f'local-dir:{folder}') == hub.verify(str(folder)) == checksum

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / 'model.safetensors').write_bytes(files['model.safetensors'] + b'x')
    with pytest.raises(hub.ChecksumError, match='is not what was published'):
        hub.verify(str(tmp_path))
    (tmp_path / 'config.json').write_bytes(with_config(files, timm_dyacts={})['config.json'])
    with pytest.raises(hub.ChecksumError, match='records no SHA-256'):
        hub.verify(str(tmp_path))
    with pytest.raises(hub.HubError, match='it has no config.json'):
        hub.verify(str(tmp_path / 'absent'))


def test_validate_verifies_first(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    with open(tmp_path / 'model.safetensors', 'ab') as f:
        f.write(b'x')
    script = Path(__file__).parents[2] / 'scripts' / 'validate.py'
    monkeypatch.setattr(sys, 'argv', ['validate.py', '--verify', '--model', str(tmp_path)])
    with pytest.raises(SystemExit, match='validate.py: error: model.safetensors of .* is not what was published'):
        runpy.run_path(str(script), run_name='__main__')


@pytest.mark.parametrize('token', ['hf_two words', 'hf_two\nlines', 'hf_ü'])
def test_an_impossible_token_is_refused_unseen(token):
    """The HTTP library would quote it."""
    with pytest.raises(ValueError, match='token must be a token') as error:
        hub.load('user/model', token=token)
    assert token not in str(error.value)


def test_a_server_that_repeats_the_token(server, client, files, repo_id):
    server.add_repo(repo_id, files, private=True)
    server.inject(Fault('*/config.json', status=403, headers={'X-Error-Message': f'no {server.token}'}, times=None))
    with pytest.raises(ClientError, match='<token>') as error:
        client(f'hub.load({repo_id!r}, token={server.token!r})')
    assert server.token not in str(error.value).replace(f'token={server.token!r}', '')
