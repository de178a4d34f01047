"""The loopback Hub does to the real ``huggingface_hub`` client what the Hub does."""
import json
from contextlib import closing
from http.client import HTTPConnection, IncompleteRead
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save
from support.loopback_hub import Client, ClientError, Fault, LoopbackHub, run_python

WEIGHTS = bytes(range(256)) * 400
FILES = {
    'README.md': b'---\nlicense: apache-2.0\n---\n# A model\n',
    'config.json': b'{"architecture": "resnet18"}',
    'logs/run 1/summary.csv': b'epoch,loss\n0,2.3\n',
    'model.safetensors': WEIGHTS,
}
DOWNLOAD = """
    import sys
    from huggingface_hub import hf_hub_download
    print(hf_hub_download("user/model", *sys.argv[1:]), end="")
"""
UPLOAD = """
    import sys
    from huggingface_hub import HfApi
    api = HfApi()
    api.create_repo("user/model", exist_ok=True)
    print(api.upload_folder(repo_id="user/model", folder_path=sys.argv[1]).oid, end="")
"""


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def folder(tmp_path):
    """What a user publishes: the FILES on disk."""
    folder = tmp_path / 'folder'
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def read_tree(folder):
    """The files under a folder as ``{path: content}``."""
    folder = Path(folder)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def evaluate(expressions, env):
    """The values of expressions about the client's ``api``; for one that raises, the name of the exception."""
    process = run_python(
        """
        import json, sys
        from huggingface_hub import HfApi
        api, values = HfApi(), []
        for expression in sys.argv[1:]:
            try:
                values.append(eval(expression))
            except Exception as error:
                values.append(type(error).__name__)
        print(json.dumps(values))
        """,
        env,
        *expressions,
    )
    return json.loads(process.stdout)


def get_weights(hub, headers=None, timeout=10.0):
    """Ask the storage of a Hub for WEIGHTS, without a client that would know better: ``(response, body)``."""
    weights = hub.add_repo('user/model', FILES).find().files['model.safetensors']
    with closing(HTTPConnection(hub.storage_url.removeprefix('http://'), timeout=timeout)) as connection:
        connection.request('GET', f'/storage/{weights.sha256}', headers=headers or {})
        response = connection.getresponse()
        return response, response.read()


def test_snapshot_is_byte_identical(hub, tmp_path):
    hub.add_repo('user/model', FILES)
    process = run_python(
        "import huggingface_hub as hf; print(hf.snapshot_download('user/model'), end='')",
        hub.env(tmp_path / 'cache'),
    )
    assert read_tree(process.stdout) == FILES
    # Small text comes from the Hub itself, weights from its storage.
    downloads = [path for method, path in hub.requests if method == 'GET' and '/api/' not in path]
    assert sum(path.startswith('/storage/') for path in downloads) == 1
    assert sum('/resolve/' in path for path in downloads) == len(FILES) - 1


def test_listings_and_metadata(hub, tmp_path):
    repo = hub.add_repo('user/model', FILES)
    weights = repo.find().files['model.safetensors']
    assert evaluate(
        [
            "api.list_repo_files('user/model')",
            "[entry.path for entry in api.list_repo_tree('user/model')]",
            "[entry.path for entry in api.list_repo_tree('user/model', 'logs', recursive=True)]",
            "[entry.lfs.sha256 for entry in api.list_repo_tree('user/model') if getattr(entry, 'lfs', None)]",
            "api.file_exists('user/model', 'config.json')",
            "api.file_exists('user/model', 'absent.json')",
            "api.repo_exists('user/absent')",
            "api.model_info('user/model').sha",
            "[file.size for file in api.model_info('user/model', files_metadata=True).siblings]",
        ],
        hub.env(tmp_path),
    ) == [
        sorted(FILES),
        ['README.md', 'config.json', 'logs', 'model.safetensors'],
        ['logs/run 1', 'logs/run 1/summary.csv'],
        [weights.sha256],
        True,
        False,
        False,
        repo.find().sha,
        [len(FILES[name]) for name in sorted(FILES)],
    ]


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors'])
def test_second_download_comes_from_the_cache(hub, tmp_path, name):
    hub.add_repo('user/model', FILES)
    env = hub.env(tmp_path)
    first = run_python(DOWNLOAD, env, name).stdout
    assert any(method == 'GET' for method, _ in hub.requests)

    hub.requests.clear()
    assert run_python(DOWNLOAD, env, name).stdout == first
    assert hub.requests == [('HEAD', f'/user/model/resolve/main/{name}')]
    assert Path(first).read_bytes() == FILES[name]


def test_cache_outlives_the_hub(tmp_path):
    with LoopbackHub() as hub:
        hub.add_repo('user/model', FILES)
        first = run_python(DOWNLOAD, hub.env(tmp_path), 'model.safetensors').stdout
        hub.requests.clear()
        assert run_python(DOWNLOAD, hub.env(tmp_path, offline=True), 'model.safetensors').stdout == first
        assert hub.requests == []
    assert run_python(DOWNLOAD, hub.env(tmp_path), 'model.safetensors').stdout == first
    assert Path(first).read_bytes() == WEIGHTS


def test_environment_knows_no_other_hub(hub, tmp_path, monkeypatch):
    for name in ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'HF_HUB_CACHE', 'https_proxy', 'ALL_PROXY'):
        monkeypatch.setenv(name, 'stray')
    assert 'stray' not in hub.env(tmp_path).values()
    assert evaluate(['api.endpoint', "__import__('huggingface_hub').get_token()"], hub.env(tmp_path)) == [hub.url, None]


def test_revisions(hub, tmp_path):
    repo = hub.add_repo('user/model', {'config.json': b'old'})
    old = repo.find().sha
    repo.commit({'config.json': b'new'})
    env = hub.env(tmp_path, token=hub.token)
    read = "open(api.hf_hub_download('user/model', 'config.json', revision={!r})).read()"
    assert evaluate(
        [
            f"api.create_tag('user/model', tag='v1', revision={old!r})",
            f"api.create_branch('user/model', branch='fix/config', revision={old!r})",
            "api.create_branch('user/model', branch='fix/config', exist_ok=True)",
            "[ref.name for ref in api.list_repo_refs('user/model').branches]",
            *(read.format(revision) for revision in ('main', 'v1', 'fix/config', old, 'v2')),
        ],
        env,
    ) == [None, None, None, ['main', 'fix/config'], 'new', 'old', 'old', 'old', 'RevisionNotFoundError']


def test_refusals_are_the_clients_own_exceptions(hub, tmp_path):
    hub.add_repo('user/model', FILES)
    hub.add_repo('user/secret', FILES, private=True)
    hub.add_repo('meta/gated', FILES, gated=True)
    hub.add_repo('meta/secret', FILES, private=True)
    expressions = [
        "api.hf_hub_download('user/absent', 'config.json')",
        "api.hf_hub_download('user/model', 'absent.json')",
        "api.hf_hub_download('user/model', 'config.json', revision='absent')",
        "api.hf_hub_download('meta/gated', 'config.json')",
        "api.hf_hub_download('meta/secret', 'config.json')",
        "api.snapshot_download('user/absent')",
        "api.list_repo_files('user/model', revision='absent')",
        "api.model_info('user/absent')",
        "len(api.list_repo_files('user/secret'))",
        "api.create_repo('meta/model').repo_id",
        "api.whoami()['name']",
        "api.upload_file(path_or_fileobj=b'', path_in_repo='x', repo_id='meta/gated')",
    ]
    refused = [
        'RepositoryNotFoundError',
        'RemoteEntryNotFoundError',
        'RevisionNotFoundError',
        'GatedRepoError',
        'RepositoryNotFoundError',
        'RepositoryNotFoundError',
        'RevisionNotFoundError',
        'RepositoryNotFoundError',
    ]
    anonymous = ['RepositoryNotFoundError', 'HfHubHTTPError', 'LocalTokenNotFoundError', 'HfHubHTTPError']
    owner = [len(FILES), 'HfHubHTTPError', hub.user, 'HfHubHTTPError']
    assert evaluate(expressions, hub.env(tmp_path / 'anonymous')) == refused + anonymous
    assert evaluate(expressions, hub.env(tmp_path / 'owner', token=hub.token)) == refused + owner
    with_bad_token = ["api.hf_hub_download('user/model', 'config.json')", "api.model_info('user/model')"]
    assert evaluate(with_bad_token, hub.env(tmp_path / 'stranger', token='hf_revoked')) == ['HfHubHTTPError'] * 2


def test_token_opens_a_private_repo_and_stays_on_the_hub(hub, tmp_path):
    response, _ = get_weights(hub, {'Authorization': f'Bearer {hub.token}'})
    assert response.status == 400, 'the storage refuses whoever brings a token'
    hub.add_repo('user/model', FILES, private=True)
    path = run_python(DOWNLOAD, hub.env(tmp_path, token=hub.token), 'model.safetensors').stdout
    assert Path(path).read_bytes() == WEIGHTS


def test_upload_folder_round_trip(hub, tmp_path, folder):
    env = hub.env(tmp_path / 'publisher', token=hub.token)
    sha = run_python(UPLOAD, env, str(folder)).stdout
    repo = hub.repos['user/model']
    assert repo.find().sha == sha
    assert repo.commits[repo.find().parent].parent is None, 'the folder arrives in one commit after the initial one'
    assert {path: blob.lfs for path, blob in repo.find().files.items()} == {
        '.gitattributes': False,
        'README.md': False,
        'config.json': False,
        'logs/run 1/summary.csv': False,
        'model.safetensors': True,
    }

    process = run_python(
        "import huggingface_hub as hf; print(hf.snapshot_download('user/model', ignore_patterns='.git*'), end='')",
        hub.env(tmp_path / 'reader'),
    )
    assert read_tree(process.stdout) == FILES

    # A second time nothing is new, then only what changed travels.
    hub.requests.clear()
    assert run_python(UPLOAD, env, str(folder)).stdout == sha
    assert not any(method == 'PUT' or '/commit/' in path for method, path in hub.requests)
    (folder / 'config.json').write_bytes(b'{}')
    assert run_python(UPLOAD, env, str(folder)).stdout == repo.find().sha != sha
    assert repo.find().files['config.json'].content == b'{}'
    assert not any(method == 'PUT' for method, _ in hub.requests)


def test_commit_edits_the_tree(hub, tmp_path):
    repo = hub.add_repo('user/model', FILES)
    first = repo.find()
    repo.refs['refs/tags/v1'] = first.sha
    upload = "api.upload_file(path_or_fileobj=b'new', path_in_repo='x', repo_id='user/model', {})"
    assert evaluate(
        [
            "api.delete_folder('logs', 'user/model').commit_message != ''",
            "api.delete_file('config.json', 'user/model').commit_message != ''",
            "api.delete_file('absent.json', 'user/model')",
            upload.format(f'parent_commit={first.sha!r}'),
            upload.format("revision='v1'"),
            upload.format('create_pr=True') + '.pr_revision',
        ],
        hub.env(tmp_path, token=hub.token),
    ) == [True, True, 'RemoteEntryNotFoundError', 'HfHubHTTPError', 'BadRequestError', 'refs/pr/1']
    assert sorted(repo.find().files) == ['README.md', 'model.safetensors']
    assert repo.find('refs/pr/1').files['x'].content == b'new'
    assert first.files.keys() == FILES.keys(), 'the past does not change'


@pytest.mark.parametrize(
    ('metadata', 'complaint'),
    [
        ('license: [', 'Invalid YAML'),
        ('- license', 'metadata must be a mapping'),
        ('tags: {timm: 1}', '"tags" must be a string or a list of strings'),
        ('base_model_relation: child', '"base_model_relation" must be one of'),
        (
            'model-index: [{name: m, results: [{task: {type: t}, dataset: {name: d}, metrics: []}]}]',
            '"model-index[0].results[0].dataset.type" is required',
        ),
    ],
)
def test_invalid_card_is_refused_before_anything_is_sent(hub, tmp_path, folder, metadata, complaint):
    repo = hub.add_repo('user/model', {'config.json': b'{}'})
    (folder / 'README.md').write_text(f'---\n{metadata}\n---\n')
    with pytest.raises(AssertionError) as failure:
        run_python(UPLOAD, hub.env(tmp_path, token=hub.token), str(folder))
    assert 'ValueError: Invalid metadata in README.md' in str(failure.value)
    assert complaint in str(failure.value)
    assert len(repo.commits) == 1
    assert hub.requests[-1] == ('POST', '/api/validate-yaml')


def test_valid_card_is_accepted(hub, tmp_path, folder):
    (folder / 'README.md').write_text("""---
library_name: timm
license: apache-2.0
tags: [image-classification, timm]
base_model: timm/resnet18.a1_in1k
base_model_relation: finetune
model-index:
- name: model
  results:
  - task: {type: image-classification}
    dataset: {name: digits, type: digits}
    metrics: [{type: accuracy, value: 98.6}]
---
""")
    run_python(UPLOAD, hub.env(tmp_path, token=hub.token), str(folder))
    assert 'README.md' in hub.repos['user/model'].find().files


@pytest.mark.parametrize(
    ('wanted', 'status', 'content'),
    [
        ('bytes=70000-', 206, WEIGHTS[70000:]),
        ('bytes=10-19', 206, WEIGHTS[10:20]),
        ('bytes=10-999999999', 206, WEIGHTS[10:]),
        ('bytes=102400-', 416, None),
    ],
)
def test_part_of_a_file(hub, wanted, status, content):
    response, body = get_weights(hub, {'Range': wanted})
    assert response.status == status
    assert content is None or body == content


def test_cut_answer(hub):
    cut = hub.inject(Fault('/storage/*', cut_after=70_000))
    with pytest.raises(IncompleteRead) as failure:
        get_weights(hub)
    assert failure.value.partial == WEIGHTS[:70_000]
    assert cut.hits == 1
    assert get_weights(hub)[1] == WEIGHTS, 'only once, as told'


def test_slow_answer(hub):
    slow = hub.inject(Fault('/storage/*', delay=60.0))
    with pytest.raises(TimeoutError):
        get_weights(hub, timeout=0.2)
    assert slow.hits == 1


def test_only_whole_files(hub):
    hub.inject(Fault('/storage/*', no_resume=True))
    response, body = get_weights(hub, {'Range': 'bytes=70000-'})
    assert (response.status, body) == (200, WEIGHTS)


def test_other_headers(hub):
    hub.inject(Fault('/storage/*', answer_headers={'ETag': '"other"'}))
    response, body = get_weights(hub)
    assert (response.headers['ETag'], body) == ('"other"', WEIGHTS)


def test_what_happens_next(hub):
    hub.inject(Fault('/storage/*', then=hub.reset))
    assert get_weights(hub)[1] == WEIGHTS
    assert hub.repos == {} and hub.requests == []


def test_rate_limit_is_waited_out(hub, tmp_path):
    hub.add_repo('user/model', FILES)
    limit = hub.inject(Fault('/storage/*', status=429, headers={'Retry-After': '0'}))
    path = run_python(DOWNLOAD, hub.env(tmp_path), 'model.safetensors').stdout
    assert limit.hits == 1
    assert Path(path).read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    ('fault', 'error'),
    [
        (Fault('/storage/*', status=503), '503'),
        (Fault('*/resolve/*', 'HEAD', status=403), 'LocalEntryNotFoundError'),
    ],
    ids=['server error', 'forbidden'],
)
def test_failed_download_leaves_no_file(hub, tmp_path, fault, error):
    hub.add_repo('user/model', FILES)
    fault = hub.inject(fault)
    with pytest.raises(AssertionError, match=error):
        run_python(DOWNLOAD, hub.env(tmp_path), 'model.safetensors')
    assert fault.hits == 1
    assert not list(tmp_path.rglob('model.safetensors'))


def test_corruption_is_unseen_by_the_client(hub, tmp_path):
    """The client compares sizes, not hashes: who needs to know that the content is right has to check it."""
    hub.add_repo('user/model', FILES)
    corruption = hub.inject(Fault('/storage/*', corrupt=True))
    content = Path(run_python(DOWNLOAD, hub.env(tmp_path), 'model.safetensors').stdout).read_bytes()
    assert corruption.hits == 1
    assert content != WEIGHTS
    assert len(content) == len(WEIGHTS)


@pytest.mark.parametrize(
    'fault',
    [
        Fault('/storage/*', 'PUT', corrupt=True),
        Fault('*/lfs/objects/verify', status=403),
        Fault('*/commit/*', status=500),
        Fault('*/commit/*', drop=True),
    ],
    ids=['corrupt', 'not verified', 'server error', 'hang-up'],
)
def test_failed_upload_changes_nothing(hub, tmp_path, folder, fault):
    repo = hub.add_repo('user/model', {'config.json': b'{}'})
    fault = hub.inject(fault)
    with pytest.raises(AssertionError, match='Error'):
        run_python(UPLOAD, hub.env(tmp_path, token=hub.token), str(folder))
    assert fault.hits == 1
    assert len(repo.commits) == 1


def test_commit_may_succeed_unseen(hub, tmp_path, folder):
    repo = hub.add_repo('user/model', {'config.json': b'{}'})
    cut = hub.inject(Fault('*/commit/*', cut_after=0))
    with pytest.raises(AssertionError, match='RemoteProtocolError'):
        run_python(UPLOAD, hub.env(tmp_path, token=hub.token), str(folder))
    assert cut.hits == 1
    assert repo.find().files.keys() == FILES.keys()


def test_fault_strikes_where_it_is_told_to():
    fault = Fault('/storage/*', 'GET', skip=1, times=2)
    asked = [('GET', '/storage/1'), ('HEAD', '/storage/1'), ('GET', '/api/models/a/b'), *[('GET', '/storage/2')] * 3]
    assert [fault.strikes(*request) for request in asked] == [False, False, False, True, True, False]
    assert fault.hits == 2


def test_client_in_a_loop_comes_to_an_end(tmp_path):
    with LoopbackHub(request_limit=3) as hub:
        hub.add_repo('user/model', FILES)
        values = evaluate(["api.model_info('user/model').id"] * 5, hub.env(tmp_path))
    assert values == ['user/model'] * 3 + ['HfHubHTTPError'] * 2


def test_a_client_that_stays(hub, tmp_path):
    with Client(hub.env(tmp_path), 'import sys; total = 40', tmp_path / 'log') as client:
        assert client('total + 2') == 42
        with pytest.raises(ClientError, match='ZeroDivisionError'):
            client('total / 0')
        with pytest.raises(ClientError, match='not JSON serializable'):
            client('sys')
        assert client("print('heard', file=sys.stderr)") is None
        assert client.log.read_text() == 'heard\n'
        with pytest.raises(AssertionError, match='The client has ended(?s:.)*heard'):
            client('sys.exit()')


def test_failed_program_shows_what_it_printed(hub, tmp_path):
    env = hub.env(tmp_path)
    with pytest.raises(AssertionError, match=r'status 1(?s:.)*half a result(?s:.)*ValueError: no more'):
        run_python("print('half a result')\nraise ValueError('no more')", env)
    with pytest.raises(AssertionError, match='killed after 0.5 s'):
        run_python('import time; time.sleep(60)', env, timeout=0.5)


def test_timm_loads_pretrained_weights(hub, tmp_path):
    trained = timm.create_model('test_resnet.r160_in1k', pretrained=False).state_dict()
    hub.add_repo('timm/test_resnet.r160_in1k', {'model.safetensors': save(trained)})
    run_python(
        """
        import sys
        import timm
        from safetensors.torch import save_file
        save_file(timm.create_model("test_resnet.r160_in1k", pretrained=True).state_dict(), sys.argv[1])
        """,
        hub.env(tmp_path / 'cache'),
        str(tmp_path / 'loaded.safetensors'),
    )
    loaded = load_file(tmp_path / 'loaded.safetensors')
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in trained.items())
