"""The endpoints that take something in."""
import base64
import json
from urllib.parse import quote

from .cards import check_card
from .repos import LFS_SUFFIXES, Blob, HubError, belongs_in_lfs
from .routing import route
from .store import Store
from .wire import Request, Response, json_response, refuse_token


@route('POST', '/api/repos/create')
def _create_repo(hub: Store, request: Request) -> Response:
    payload = request.json()
    user = hub.login(request)
    if payload.get('type', 'model') != 'model':
        raise HubError(400, f"LoopbackHub has models only, not the type {payload['type']!r}")
    namespace = payload.get('organization') or user
    if namespace != user:
        raise HubError(403, f"You don't have the rights to create a model under the namespace {namespace!r}")
    repo_id = f"{namespace}/{payload['name']}"
    url = f'{hub.url}/{repo_id}'
    if repo_id in hub.repos:
        # ``create_repo(exist_ok=True)`` reads the URL from this refusal.
        return json_response({'error': 'You already created this model repo', 'url': url}, 409)
    # Version 1 of the client sends ``private``, version 2 sends ``visibility``.
    private = payload.get('private') or payload.get('visibility') == 'private'
    attributes = ''.join(f'*{suffix} filter=lfs diff=lfs merge=lfs -text\n' for suffix in LFS_SUFFIXES)
    hub.add_repo(repo_id, {'.gitattributes': attributes.encode()}, private=bool(private))
    return json_response({'url': url, 'name': repo_id})


@route('POST', '/api/models/{repo}/branch/{branch}')
def _create_branch(hub: Store, request: Request, repo: str, branch: str) -> Response:
    return _create_ref(hub, request, repo, f'refs/heads/{branch}', request.json().get('startingPoint', 'main'))


@route('POST', '/api/models/{repo}/tag/{revision}')
def _create_tag(hub: Store, request: Request, repo: str, revision: str) -> Response:
    return _create_ref(hub, request, repo, f"refs/tags/{request.json()['tag']}", revision)


def _create_ref(hub: Store, request: Request, repo: str, ref: str, revision: str) -> Response:
    opened = hub.open(request, repo, write=True)
    target = opened.find(revision).sha
    if ref in opened.refs:
        raise HubError(409, f'Reference already exists: {ref}')
    opened.refs[ref] = target
    return json_response({})


@route('POST', '/api/validate-yaml')
def _validate_yaml(hub: Store, request: Request) -> Response:
    errors, warnings = check_card(request.json()['content'])
    return json_response(
        {
            'errors': [{'message': message} for message in errors],
            'warnings': [{'message': message} for message in warnings],
        },
        400 if errors else 200,
    )


@route('POST', '/api/models/{repo}/preupload/{revision}')
def _preupload(hub: Store, request: Request, repo: str, revision: str) -> Response:
    opened = hub.open(request, repo, login=True, write=not request.flag('create_pr'))
    commit = opened.find(revision)
    modes = []
    for file in request.json()['files']:
        path, sample = file['path'], base64.b64decode(file['sample'])
        known = commit.files.get(path)
        modes.append({
            'path': path,
            'uploadMode': 'lfs' if belongs_in_lfs(path, sample, file['size']) else 'regular',
            'shouldIgnore': False,
            'oid': known.etag if known else None,
        })
    return json_response({'files': modes, 'commitOid': commit.sha})


@route('POST', '/{repo}.git/info/lfs/objects/batch')
def _lfs_batch(hub: Store, request: Request, repo: str) -> Response:
    hub.open(request, repo, login=True)
    objects = []
    for item in request.json()['objects']:
        entry = {'oid': item['oid'], 'size': item['size']}
        if hub.stored(item['oid']) is None:
            entry['actions'] = {
                'upload': {'href': f"{hub.storage_url}/storage/{item['oid']}"},
                'verify': {'href': f'{hub.url}/{quote(repo)}.git/info/lfs/objects/verify'},
            }
        objects.append(entry)
    return json_response({'transfer': 'basic', 'objects': objects})


@route('PUT', '/storage/{oid}')
def _upload(hub: Store, request: Request, oid: str) -> Response:
    refuse_token(request)
    blob = Blob(request.body, lfs=True)
    if blob.sha256 != oid:
        raise HubError(400, f'The upload of {oid} has the SHA-256 {blob.sha256}')
    hub.uploads.append(blob)
    return Response()


@route('POST', '/{repo}.git/info/lfs/objects/verify')
def _lfs_verify(hub: Store, request: Request, repo: str) -> Response:
    hub.open(request, repo, login=True)
    hub.uploaded(request.json())
    return json_response({})


@route('POST', '/api/models/{repo}/commit/{revision}')
def _commit(hub: Store, request: Request, repo: str, revision: str) -> Response:
    create_pr = request.flag('create_pr')
    opened = hub.open(request, repo, login=True, write=not create_pr)
    tip = opened.find(revision)
    ref = revision if revision.startswith('refs/') else f'refs/heads/{revision}'
    if ref not in opened.refs:
        raise HubError(400, f'A commit goes to a branch, and {revision} is none')
    title, changes = '', {}
    for line in request.body.splitlines():
        try:
            item = json.loads(line)
        except ValueError as error:
            raise HubError(400, f'A line of the commit is not JSON: {error}') from None
        key, value = item['key'], item['value']
        if key == 'header':
            title = value['summary']
            if value.get('parentCommit', tip.sha) != tip.sha:
                raise HubError(412, 'A commit has happened since. Please refresh and try again.')
        elif key == 'file':
            changes[value['path']] = Blob(base64.b64decode(value['content']))
        elif key == 'lfsFile':
            changes[value['path']] = hub.uploaded(value)
        elif key == 'deletedFile':
            changes[value['path']] = None
        elif key == 'deletedFolder':
            folder = value['path'].rstrip('/') + '/'
            changes |= {path: None for path in tip.files if path.startswith(folder)}
        else:
            raise HubError(400, f'LoopbackHub has no commit operation {key!r}')
    answer = {'success': True}
    if create_pr:
        number = 1 + sum(name.startswith('refs/pr/') for name in opened.refs)
        ref = f'refs/pr/{number}'
        answer['pullRequestUrl'] = f'{hub.url}/{repo}/discussions/{number}'
    commit = opened.commit(changes, revision=ref, title=title, parent=tip.sha)
    answer |= {'commitOid': commit.sha, 'commitUrl': f'{hub.url}/{repo}/commit/{commit.sha}'}
    return json_response(answer)
