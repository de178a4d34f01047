"""Pushing: a run folder becomes a repo in one commit or not at all, and nobody's work is overwritten."""
import json
import runpy
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import timm
import yaml
from support.hub_client import fingerprint, read_folder, serve
from support.loopback_hub import ClientError, Fault, run_python
from support.run_folder import RESULTS, write_run
from support.trained_like import trained_like

from timm_dyacts import cli, hub

ROOT = Path(__file__).parents[2]
FILES = {'README.md', 'args.yaml', 'config.json', 'curves.png', 'model.safetensors', 'summary.csv'}


@pytest.fixture(scope='module')
def finished_run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp('run'), trained_like('test_resnet', num_classes=10, act_layer='brelu'))


@pytest.fixture
def run(finished_run, tmp_path):
    """A run folder of each test's own."""
    return shutil.copytree(finished_run, tmp_path / 'run')


@pytest.fixture(scope='module')
def served(tmp_path_factory):
    with serve(tmp_path_factory.mktemp('client'), token=True) as (server, client):
        yield server, client


def publish(client, run, repo_id, **kwargs):
    options = ''.join(f', {name}={value!r}' for name, value in kwargs.items())
    return client(f'publish({str(run)!r}, {repo_id!r}{options})')


def tree(repo, revision='main'):
    files = repo.find(revision).files
    return {name: blob.content for name, blob in files.items() if name != '.gitattributes'}


def message(error):
    return str(error.value)[str(error.value).rindex('timm_dyacts.hub.errors.'):]


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestPublish:
    def test_everything_arrives_in_one_commit(self, server, client, run, repo_id):
        published = publish(client, run, repo_id)
        repo = server.repos[repo_id]
        commit = repo.find()
        assert repo.commits[commit.parent].parent is None
        assert tree(repo).keys() == FILES == published['files'].keys()
        assert {name: len(content) for name, content in tree(repo).items()} == published['files']
        assert commit.files['model.safetensors'].lfs and not commit.files['config.json'].lfs
        assert published['commit'] == commit.sha and published['url'].endswith(f'{repo_id}/commit/{commit.sha}')
        assert tree(repo)['model.safetensors'] == (run / 'model.safetensors').read_bytes()
        assert tree(repo)['args.yaml'] == (run / 'args.yaml').read_bytes()

    def test_the_config_is_timms_and_a_record(self, server, client, run, repo_id):
        edit(run / 'config.json', pretrained_cfg=dict(
            json.loads((run / 'config.json').read_text())['pretrained_cfg'], file='/home/me/x', hf_hub_id='me/x'))
        publish(client, run, repo_id)
        files = tree(server.repos[repo_id])
        config = json.loads(files['config.json'])
        assert config['architecture'] == 'test_resnet'
        assert config['label_names'] == [str(i) for i in range(10)]
        assert config['pretrained_cfg']['input_size'] == [3, 32, 32]
        assert not {'file', 'hf_hub_id', 'url', 'source'} & config['pretrained_cfg'].keys()
        assert config['timm_dyacts']['requires'] == {'timm': f'>={timm.__version__}', 'timm_dyacts': '>=0.1.0'}
        assert config['timm_dyacts']['sha256'].keys() == FILES - {'config.json'}

    @pytest.mark.parametrize('call', ['hub.load({!r})', "timm.create_model('hf-hub:' + {!r}, pretrained=True)"])
    @pytest.mark.parametrize('weights', ['best', 'ema', 'last'])
    def test_the_weights_that_were_asked_for(self, server, client, run, repo_id, weights, call):
        publish(client, run, repo_id, weights=weights)
        folder = run if weights == 'best' else run / weights
        expected = fingerprint(timm.create_model(f'local-dir:{folder}', pretrained=True))
        assert client(f'fingerprint({call.format(repo_id)})') == expected
        top1 = RESULTS['top1'] - (weights != 'best')
        assert f'{top1:.2f} %' in tree(server.repos[repo_id])['README.md'].decode()

    def test_again_without_a_change(self, server, client, run, repo_id):
        first = publish(client, run, repo_id)
        again = publish(client, run, repo_id)
        assert again['commit'] == first['commit']
        assert len(server.repos[repo_id].commits) == 2

    def test_again_after_another_run(self, server, client, run, repo_id):
        (run / 'confusion.png').write_bytes(b'\x89PNG\0')
        first = publish(client, run, repo_id)
        (run / 'confusion.png').unlink()
        edit(run / 'results.json', top1=99.1234)
        publish(client, run, repo_id, weights='best')
        repo = server.repos[repo_id]
        assert repo.find().parent == first['commit'], 'one commit'
        assert tree(repo).keys() == FILES, 'what an earlier publication left is gone'
        assert '99.12 %' in tree(repo)['README.md'].decode()

    def test_private(self, server, client, run, repo_id):
        publish(client, run, repo_id, private=True)
        assert server.repos[repo_id].private

    def test_never_private_to_public(self, server, client, run, repo_id):
        repo = server.add_repo(repo_id, {})
        with pytest.raises(ClientError, match='private.*was asked for, and the repo is there and public'):
            publish(client, run, repo_id, private=True)
        assert len(repo.commits) == 1

    def test_to_a_branch(self, server, client, run, repo_id):
        publish(client, run, repo_id)
        edit(run / 'results.json', top1=12.3456)
        publish(client, run, repo_id, revision='trial')
        repo = server.repos[repo_id]
        assert b'12.35 %' in tree(repo, 'trial')['README.md'] and b'12.35 %' not in tree(repo)['README.md']
        assert client(f"hub.load('{repo_id}@trial').num_classes") == 10

    def test_as_a_pull_request(self, server, client, run):
        repo = server.add_repo('meta/theirs', {'config.json': b'{}'})
        published = publish(client, run, 'meta/theirs', create_pr=True)
        assert published['url'].endswith('meta/theirs/discussions/1')
        assert tree(repo).keys() == {'config.json'}
        assert tree(repo, 'refs/pr/1').keys() == FILES

    def test_without_results(self, server, client, run, repo_id):
        (run / 'results.json').unlink()
        remark = 'The checkpoint has no results.json, so the card shows no results.'
        assert remark in publish(client, run, repo_id)['remarks']
        card = tree(server.repos[repo_id])['README.md'].decode()
        assert 'no evaluation came with this checkpoint' in card and 'model-index' not in card


class TestOverwrite:
    @pytest.fixture
    def repo(self, server, client, run, repo_id):
        publish(client, run, repo_id)
        return server.repos[repo_id]

    def refused(self, client, run, repo, reason):
        before = repo.find()
        with pytest.raises(ClientError) as error:
            publish(client, run, repo.repo_id)
        assert f"'{repo.repo_id}'" in message(error)
        with pytest.raises(ClientError):
            publish(client, run, repo.repo_id, revision='trial')
        assert repo.refs.keys() == {'refs/heads/main'}, 'no branch either'
        assert reason in message(error) and '--overwrite' in message(error) and 'Nothing was sent' in message(error)
        assert repo.find() == before
        publish(client, run, repo.repo_id, overwrite=True)
        assert tree(repo).keys() == FILES

    def test_another_architecture(self, client, run, repo):
        config = json.loads(tree(repo)['config.json'])
        repo.commit({'config.json': json.dumps(config | dict(architecture='resnet50')).encode()})
        self.refused(client, run, repo, "there is a 'resnet50', and this is a 'test_resnet'")

    def test_an_edited_card(self, client, run, repo):
        repo.commit({'README.md': tree(repo)['README.md'] + b'\nBy hand.\n'})
        self.refused(client, run, repo, 'its card was edited by hand')

    def test_a_repo_of_somebody_elses_making(self, server, client, run, repo_id):
        files = {'README.md': b'# Mine', 'config.json': b'{"architecture": "resnet18"}', 'pytorch_model.bin': b'pickle'}
        repo = server.add_repo(repo_id, files)
        self.refused(client, run, repo, 'was not published from timm_dyacts')

    def test_a_config_that_is_none(self, server, client, run, repo_id):
        self.refused(client, run, server.add_repo(repo_id, {'config.json': b'['}), 'was not published from timm_dyacts')


class TestDryRun:
    def test_leaves_the_very_folder_and_asks_nobody(self, server, client, run, repo_id):
        publish(client, run, repo_id, dry_run=True)
        assert server.requests == []
        assert {path.name for path in run.iterdir()} >= {'publish', 'config.json'}
        publish(client, run, repo_id)
        assert read_folder(run / 'publish') == tree(server.repos[repo_id])

    def test_again(self, run):
        first = hub.publish(run, 'user/name', dry_run=True)
        assert hub.publish(run, 'user/name', dry_run=True) == first
        assert not list(run.glob('.publishing*'))

    def test_does_not_touch_what_is_not_its_own(self, run):
        (run / 'publish').mkdir()
        (run / 'publish' / 'thesis.tex').write_text('Chapter 1')
        with pytest.raises(hub.HubError, match='not from a dry run'):
            hub.publish(run, 'user/name', dry_run=True)
        assert (run / 'publish' / 'thesis.tex').read_text() == 'Chapter 1'

    def test_a_failure_leaves_nothing(self, run):
        before = sorted(run.rglob('*'))
        edit(run / 'config.json', num_classes=10, architecture='test_resnets')
        with pytest.raises(hub.HubError, match='test_resnets'):
            hub.publish(run, 'user/name', dry_run=True)
        assert sorted(run.rglob('*')) == before


def without_results(options):
    """A change of a run folder: nothing but the options tells what the run started from."""
    def spoil(run):
        (run / 'results.json').unlink()
        (run / 'args.yaml').write_text(options)
    return spoil


class TestBadRun:
    @pytest.mark.parametrize('spoil, words', [
        (lambda run: (run / 'config.json').unlink(), 'config.json is missing'),
        (lambda run: (run / 'model.safetensors').rename(run / 'model.bin'), 'Pickled weights are not published'),
        (lambda run: (run / 'model.safetensors').write_bytes(b'half'), 'does not load'),
        (lambda run: (run / 'results.json').write_text('{'), 'cannot be read'),
        (lambda run: (run / 'results.json').write_text('[1]'), 'lacks top1'),
        (lambda run: edit(run / 'results.json', loss=float('nan')), 'has loss = nan'),
        (lambda run: edit(run / 'results.json', top1='good'), 'cannot be read'),
        (lambda run: edit(run / 'results.json', start={}), 'lacks start.model, start.pretrained'),
        (lambda run: (run / 'args.yaml').write_text('{'), 'is not YAML'),
        (lambda run: (run / 'args.yaml').write_text('- 1'), 'does not hold the options'),
        (lambda run: (run / 'results.json').write_text('{"top1": 1}'), 'lacks top5, loss'),
        (lambda run: edit(run / 'config.json', pretrained_cfg=None), 'does not load'),
        (lambda run: edit(run / 'results.json', top1='98.6'), "has top1 = '98.6' instead of a finite.*remove it"),
        (lambda run: edit(run / 'results.json', dataset={'name': 'digits'}), 'has dataset = .* instead of a text'),
        (lambda run: edit(run / 'results.json', preprocessing=None), 'has preprocessing = None instead of named'),
        (lambda run: (run / 'results.json').write_text('[' * 100_000), 'cannot be read: it is not JSON'),
        (lambda run: (run / 'args.yaml').write_text('1: 2'), 'does not hold the options.*remove it'),
        (lambda run: (run / 'config.json').write_text('[' * 100_000), 'does not load'),
        (without_results('pretrained_path: [1]'), r'tell of its start has source = \[1\] instead of a text or null'),
    ], ids=['no config', 'pickle', 'half a file', 'no JSON', 'no dict', 'nan', 'no number', 'no start', 'no YAML',
            'no options', 'less', 'config', 'text', 'name', 'null', 'deep', 'number', 'deep config', 'no text'])
    def test_is_refused(self, run, spoil, words):
        for name in ('ema', 'last'):
            shutil.rmtree(run / name)
        spoil(run)
        with pytest.raises(hub.HubError, match=words) as error:
            hub.publish(run, 'user/name', dry_run=True)
        assert str(run) in str(error.value)

    def test_weights_that_are_not_there(self, run):
        shutil.rmtree(run / 'ema')
        with pytest.raises(hub.HubError, match='The folder has the weights best, last'):
            hub.publish(run, 'user/name', weights='ema', dry_run=True)

    @pytest.mark.parametrize('arguments, words', [
        (dict(weights='worst'), 'must be one of best, ema, last'),
        (dict(repo_id='name'), "must be 'user/name'"),
        (dict(revision='0123abcd' * 5), 'must be a branch'),
        (dict(revision=''), "must be a branch, and no commit, got ''"),
        (dict(revision='a b'), "must be a branch, and no commit, got 'a b'"),
        (dict(revision='../main'), "must be a branch, and no commit, got '../main'"),
        (dict(license=''), r"license \(--license\) must be an id such as 'apache-2.0' or 'other', got ''"),
        (dict(license='mit\nlibrary: other'), 'license .* must be an id'),
        (dict(commit_message=' '), r"commit_message \(--commit-message\) must be a line of text, got ' '"),
        (dict(commit_message='a\nb'), 'must be a line of text'),
        (dict(repo_id='a/b/c'), "'a/b/c'"),
    ])
    def test_arguments(self, run, arguments, words):
        with pytest.raises(ValueError, match=words):
            hub.publish(**dict(run_folder=run, repo_id='user/name', dry_run=True) | arguments)

    def test_logits_that_differ_when_loaded_back(self, run, monkeypatch):
        """Somebody writes to the run folder meanwhile."""
        copy = shutil.copyfile

        def copy_something_else(source, target):
            return copy(run / 'ema' / 'model.safetensors' if source == run / 'model.safetensors' else source, target)

        monkeypatch.setattr(shutil, 'copyfile', copy_something_else)
        with pytest.raises(hub.HubError, match='loaded back, its logits differ by up to .*Nothing was sent'):
            hub.publish(run, 'user/name', dry_run=True)

    @pytest.mark.parametrize('name', ['args.yaml', 'summary.csv'])
    def test_a_token_in_the_run_folder(self, run, name):
        token = 'hf_' + 'AbCd1234' * 4
        with open(run / name, 'a') as f:
            f.write(f'note: {token}\n')
        with pytest.raises(hub.HubError, match=f'{name} of the run folder has a token in it') as error:
            hub.publish(run, 'user/name', dry_run=True)
        assert token not in str(error.value)


class TestTamperedRun:
    """A run folder that somebody sent."""

    @pytest.mark.parametrize('name', ['summary.csv', 'classes.csv', 'curves.png'])
    def test_a_link_out_of_it_is_not_followed(self, run, tmp_path, name):
        private = tmp_path / 'private'
        private.write_text('a secret')
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(private)
        with pytest.raises(hub.HubError, match=f"its {name} is a link to '.*private', which is outside") as error:
            hub.publish(run, 'user/name', dry_run=True)
        assert 'secret' not in str(error.value)

    def test_a_link_within_it_is(self, run):
        (run / 'summary.csv').rename(run / 'rows.csv')
        (run / 'summary.csv').symlink_to('rows.csv')
        hub.publish(run, 'user/name', dry_run=True)
        assert (run / 'publish' / 'summary.csv').read_text() == (run / 'rows.csv').read_text()

    @pytest.mark.parametrize('text', [
        'x\n---\nlicense: mit\n---\n# Another card', '<script>alert(1)</script>', '[x](javascript:alert(1))',
        '![x](http://elsewhere.invalid/x.png)', '`x` | y', '\x1b[2J', '\u202ex', 'http://x><img src=x>',
        'a/b@](javascript:alert(1))', '{{ 7 * 7 }}',
    ])
    def test_what_a_card_quotes_is_text(self, run, text):
        results = json.loads((run / 'results.json').read_text())
        edit(run / 'results.json', split=text, dataset=text, date=text, versions={'torch': text}, start=dict(
            results['start'], source=text, license=text, kd_model=text, model=text))
        options = yaml.safe_load((run / 'args.yaml').read_text())
        (run / 'args.yaml').write_text(yaml.safe_dump(options | dict(opt=text, model=text, aa=text)))
        edit(run / 'config.json', label_names=[text] * 10)
        card = (hub.publish(run, 'user/name', dry_run=True).folder / 'README.md').read_text()
        assert card.replace('\n', '').isprintable()
        metadata, _, body = card.removeprefix('---\n').partition('\n---\n')
        assert yaml.safe_load(metadata)['license'] == 'other'
        for active in ('<script', '<img', '](javascript', '](http://elsewhere', '\n# Another', '| y'):
            assert active not in body.replace(r'\| y', '')

    def test_a_remark_is_one_line_that_moves_no_cursor(self, run, capsys):
        with open(run / 'args.yaml', 'a') as file:
            file.write('"\\e[2J\\nx": 1\n')
        cli.main(['publish', str(run), '--repo-id', 'user/name', '--dry-run'])
        said = capsys.readouterr().out
        assert r'args.yaml is published without \x1b[2J x.' in said and said.replace('\n', '').isprintable()


class TestFaults:
    """Whatever breaks: a clear error, a repo as it was, and the next attempt succeeds."""

    @pytest.mark.parametrize('fault, words', [
        (Fault('/api/repos/create', status=503), 'problem of its own'),
        (Fault('/api/repos/create', status=403), 'may not do that'),
        (Fault('/api/models/*', 'GET', drop=True), 'broke off'),
        (Fault('/api/models/*', 'GET', skip=1, status=500, times=None), 'problem of its own'),
        (Fault('/api/validate-yaml', status=502), 'problem of its own'),
        (Fault('*/preupload/*', status=500, times=None), 'problem of its own'),
        (Fault('*/preupload/*', status=429, times=None), 'limits how often'),
        (Fault('*/objects/batch', status=401), 'no longer valid'),
        (Fault('/storage/*', 'PUT', corrupt=True), 'Error while uploading'),
        (Fault('/storage/*', 'PUT', status=503, times=None), 'problem of its own'),
        (Fault('/storage/*', 'PUT', drop=True, times=None), 'broke off'),
        (Fault('*/objects/verify', status=403), 'may not do that'),
        (Fault('*/commit/*', status=500, times=None), 'problem of its own'),
        (Fault('*/commit/*', status=412), 'Somebody else changed the repo'),
        (Fault('*/commit/*', drop=True), 'broke off'),
    ], ids=lambda value: f'{value.path} {value.method}' if isinstance(value, Fault) else '')
    def test_push(self, server, client, finished_run, repo_id, fault, words):
        fault = server.inject(fault)
        with pytest.raises(ClientError) as error:
            publish(client, finished_run, repo_id)
        assert fault.hits
        assert f"'{repo_id}'" in message(error) and words in message(error)
        assert 'othing was sent' in message(error) or 'nothing of the model in it' in message(error) \
            or 'as it was' in message(error) or 'nothing was sent' in message(error)
        if repo_id in server.repos:
            assert tree(server.repos[repo_id]) == {}

        server.clear_faults()
        publish(client, finished_run, repo_id)
        assert tree(server.repos[repo_id]).keys() == FILES

    @pytest.mark.skipif(huggingface_hub.__version__ < '2', reason='version 1 of the client tries less often')
    @pytest.mark.parametrize('fault', [
        Fault('*/preupload/*', status=503),
        Fault('*/preupload/*', cut_after=3),
        Fault('*/objects/batch', cut_after=3),
        Fault('/storage/*', 'PUT', status=503),
        Fault('/storage/*', 'PUT', drop=True),
        Fault('/storage/*', 'PUT', status=429, headers={'Retry-After': '1'}),
    ], ids=lambda value: f'{value.path} {value.method}')
    def test_the_client_retries(self, server, client, finished_run, repo_id, fault):
        self.succeeds(server, client, finished_run, repo_id, fault)

    @pytest.mark.parametrize('cut_after', [0, 10])
    def test_a_commit_counts_even_if_the_answer_was_lost(self, server, client, finished_run, repo_id, cut_after):
        self.succeeds(server, client, finished_run, repo_id, Fault('*/commit/*', cut_after=cut_after))

    def succeeds(self, server, client, finished_run, repo_id, fault):
        fault = server.inject(fault)
        published = publish(client, finished_run, repo_id)
        assert fault.hits == 1
        assert published['commit'] == server.repos[repo_id].find().sha
        assert tree(server.repos[repo_id]).keys() == FILES

    def test_an_update_that_fails_leaves_the_old_one(self, server, client, run, repo_id):
        publish(client, run, repo_id)
        before = server.repos[repo_id].find()
        edit(run / 'results.json', top1=50.0)
        server.inject(Fault('*/commit/*', status=500, times=None))
        with pytest.raises(ClientError, match='The repo is as it was'):
            publish(client, run, repo_id)
        assert server.repos[repo_id].find() == before

    @pytest.mark.parametrize('how', [dict(status=500), dict(drop=True)], ids=['500', 'drop'])
    def test_at_each_request(self, server, client, run, repo_id, how):
        """From some request on nothing works any more. The branch has the old files or the new ones, all of them."""
        publish(client, run, repo_id)
        repo = server.repos[repo_id]
        before, old = dict(repo.refs), tree(repo)
        edit(run / 'results.json', top1=50.0)
        publish(client, run, repo_id, dry_run=True)
        new = read_folder(run / 'publish')
        server.requests.clear()
        publish(client, run, repo_id, revision='trial')
        requests = list(server.requests)
        assert len(requests) >= 10 and tree(repo, 'trial') == new
        for skip, request in enumerate(requests):
            repo.refs.clear()
            repo.refs.update(before)
            server.inject(Fault(skip=skip, times=None, **how))
            with pytest.raises(ClientError) as error:
                publish(client, run, repo_id, revision='trial')
            server.clear_faults()
            assert f"'{repo_id}'" in message(error) and server.token not in str(error.value), request
            assert tree(repo) == old, request
            if 'refs/heads/trial' in repo.refs:
                assert tree(repo, 'trial') in (old, new), request
        repo.refs.clear()
        repo.refs.update(before)
        publish(client, run, repo_id, revision='trial')
        assert tree(repo, 'trial') == new and tree(repo) == old

    def test_somebody_else_commits_meanwhile(self, server, client, run, repo_id):
        publish(client, run, repo_id)
        repo = server.repos[repo_id]
        edit(run / 'results.json', top1=50.0)
        server.inject(Fault('*/preupload/*', then=lambda: repo.commit({'notes.txt': b'theirs'})))
        with pytest.raises(ClientError, match='of this nothing is there'):
            publish(client, run, repo_id)
        assert b'98.61 %' in tree(repo)['README.md']

    def test_small_files_damaged_on_the_way_are_mended(self, server, client, run, repo_id):
        """The Hub has no hash to compare them with."""
        fault = server.inject(Fault('*/commit/*', corrupt=True))
        published = publish(client, run, repo_id)
        assert fault.hits == 1
        repo = server.repos[repo_id]
        assert published['commit'] == repo.find().sha
        publish(client, run, repo_id, dry_run=True)
        assert tree(repo) == read_folder(run / 'publish')

    def test_what_stays_damaged_is_not_called_published(self, server, client, run, repo_id):
        server.inject(Fault('*/commit/*', corrupt=True, times=None))
        with pytest.raises(ClientError, match='are not what was sent: .*Publish again with overwrite'):
            publish(client, run, repo_id)
        server.clear_faults()
        publish(client, run, repo_id, overwrite=True)
        assert client(f'hub.load({repo_id!r}).num_classes') == 10

    @pytest.mark.parametrize('times', [1, None])
    def test_the_check_of_the_commit_is_patient(self, server, client, run, repo_id, times):
        publish(client, run, repo_id)
        edit(run / 'results.json', top1=50.0)
        server.inject(Fault('*/commit/*', then=lambda: server.inject(Fault('*/revision/*', status=502, times=times))))
        if times == 1:
            publish(client, run, repo_id)
        else:
            with pytest.raises(ClientError, match='took the commit .*, but it could not be checked'):
                publish(client, run, repo_id)

    def test_a_lost_answer_to_a_pull_request(self, server, client, run, repo_id):
        server.add_repo(repo_id, {})
        server.inject(Fault('*/commit/*', cut_after=0))
        with pytest.raises(ClientError, match='see whether the pull request was opened'):
            publish(client, run, repo_id, create_pr=True)


def test_nobody_is_logged_in(server, run, tmp_path):
    process = run_python(
        f"""
        from timm_dyacts import cli, hub
        try:
            hub.publish({str(run)!r}, 'user/name')
        except hub.HubError as e:
            print(e)
        """,
        server.env(tmp_path / 'nobody'),
    )
    assert 'nobody is logged in' in process.stdout and 'hf auth login' in process.stdout
    assert server.requests == []


def test_the_token_is_nowhere(served, server, client, run, repo_id):
    """Not in what was published, the run folder, the cache or the log, nor in an error that quotes the server."""
    publish(client, run, repo_id)
    publish(client, run, repo_id, dry_run=True)
    server.inject(Fault(
        '*/preupload/*', status=400, headers={'X-Error-Message': f'Bad {server.token}'}, times=None))
    with pytest.raises(ClientError, match='Bad <token>') as error:
        publish(client, run, repo_id)
    assert server.token not in str(error.value)
    files = [path for folder in (client.log.parent, run) for path in folder.rglob('*') if path.is_file()]
    assert client.log in files and len(files) > 10
    for content in (*tree(server.repos[repo_id]).values(), *(path.read_bytes() for path in files)):
        assert server.token.encode() not in content


class TestScript:
    """``scripts/publish.py``, and ``timm-dyacts publish``, which is the same under another name."""

    @pytest.fixture(params=['publish.py', 'timm-dyacts publish'])
    def prog(self, request):
        return request.param

    @pytest.fixture
    def script(self, prog, monkeypatch):
        def call(*options):
            if prog == 'publish.py':
                monkeypatch.setattr(sys, 'argv', ['publish.py', *map(str, options)])
                runpy.run_path(str(ROOT / 'scripts' / 'publish.py'), run_name='__main__')
            else:
                cli.main(['publish', *map(str, options)])
        return call

    def test_dry_run_shows_what_would_be_uploaded(self, run, script, capsys):
        script(run, '--repo-id', 'user/name', '--dry-run', '--weights', 'ema')
        lines = capsys.readouterr().out.splitlines()
        assert {line.split()[-1] for line in lines[:-1]} == FILES
        assert f'{(run / "model.safetensors").stat().st_size:,}' in lines[4]
        assert lines[-1] == f'Would be published as user/name: {run / "publish"}'

    def test_images_of_the_data_stay_at_home(self, run, script, capsys):
        for name in ('mistakes.png', 'softpool.png'):
            (run / name).write_bytes(b'\x89PNG\0')
        script(run, '--repo-id', 'user/name', '--dry-run')
        assert {path.name for path in (run / 'publish').iterdir()} == FILES

    def test_says_what_the_card_lacks(self, run, script, capsys):
        (run / 'results.json').unlink()
        (run / 'args.yaml').write_text('pretrained: false\nval_split: validation\n')
        script(run, '--repo-id', 'user/name', '--dry-run')
        assert 'no results.json' in (said := capsys.readouterr().out) and 'no licence' in said
        script(run, '--repo-id', 'user/name', '--dry-run', '--license', 'mit')
        assert 'no licence' not in capsys.readouterr().out

    @pytest.mark.parametrize('options, words', [
        (['no/such/run', '--repo-id', 'user/name'], 'no/such/run'),
        (['no/such/run', '--repo-id', 'user/name', '--dry-run'], 'no/such/run'),
        (['{run}', '--repo-id', 'name'], '--repo-id'),
        (['{run}', '--repo-id', 'user/na me'], 'na me'),
    ])
    def test_bad_input_is_a_clear_error(self, run, script, prog, options, words, monkeypatch):
        monkeypatch.setenv('HF_TOKEN', 'hf_test')
        with pytest.raises(SystemExit) as error:
            script(*(option.format(run=run) for option in options))
        assert error.value.code.startswith(f'{prog}: error: ') and words in error.value.code

    def test_a_misspelt_option_has_a_hint(self, run, script, prog, capsys):
        with pytest.raises(SystemExit) as error:
            script(run, '--repo-id', 'user/name', '--dryrun')
        assert error.value.code == 2
        assert f'{prog}: error: unrecognized arguments: --dryrun. Close names: --dry-run' in capsys.readouterr().err
