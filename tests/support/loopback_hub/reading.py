"""The endpoints that give something out."""
import hashlib
from typing import Any

from .repos import HubError
from .routing import route
from .store import Store
from .wire import Request, Response, content_response, json_response, refuse_token


@route('GET', '/{repo}/resolve/{revision}/{path}')
def _resolve(hub: Store, request: Request, repo: str, revision: str, path: str) -> Response:
    commit = hub.open(request, repo, content=True).find(revision)
    headers = {'X-Repo-Commit': commit.sha}
    blob = commit.files.get(path)
    if blob is None:
        raise HubError(404, 'Entry not found', code='EntryNotFound', headers=headers)
    if not blob.lfs:
        return content_response(request, blob, headers)
    headers |= {
        'Location': f'{hub.storage_url}/storage/{blob.sha256}',
        'X-Linked-ETag': f'"{blob.etag}"',
        'X-Linked-Size': str(len(blob.content)),
    }
    return Response(status=302, headers=headers)


@route('GET', '/storage/{oid}')
def _download(hub: Store, request: Request, oid: str) -> Response:
    refuse_token(request)
    blob = hub.stored(oid)
    if blob is None:
        raise HubError(404, f'No object {oid} in storage')
    return content_response(request, blob)


@route('GET', '/api/models/{repo}/revision/{revision}')
@route('GET', '/api/models/{repo}')
def _model_info(hub: Store, request: Request, repo: str, revision: str = 'main') -> Response:
    opened = hub.open(request, repo)
    commit = opened.find(revision)
    siblings = []
    for path, blob in sorted(commit.files.items()):
        sibling: dict[str, Any] = {'rfilename': path}
        if request.flag('blobs'):
            sibling |= {'blobId': blob.oid, 'size': len(blob.content)}
            if blob.lfs:
                sibling['lfs'] = {
                    'sha256': blob.sha256,
                    'size': len(blob.content),
                    'pointerSize': len(blob.in_git),
                }
        siblings.append(sibling)
    return json_response({
        'id': repo,
        'modelId': repo,
        'author': repo.rpartition('/')[0],
        'sha': commit.sha,
        'private': opened.private,
        'gated': 'manual' if opened.gated else False,
        'disabled': False,
        'downloads': 0,
        'likes': 0,
        'tags': [],
        'siblings': siblings,
    })


@route('GET', '/api/models/{repo}/tree/{revision}')
@route('GET', '/api/models/{repo}/tree/{revision}/{path}')
def _tree(hub: Store, request: Request, repo: str, revision: str, path: str = '') -> Response:
    files = hub.open(request, repo).find(revision).files
    prefix = f'{path}/' if path else ''
    entries: dict[str, dict[str, Any]] = {}
    for name, blob in sorted(files.items()):
        if not name.startswith(prefix):
            continue
        *folders, _ = name[len(prefix):].split('/')
        for depth in range(1, len(folders) + 1):
            folder = prefix + '/'.join(folders[:depth])
            oid = hashlib.sha1(folder.encode()).hexdigest()
            entries[folder] = {'type': 'directory', 'oid': oid, 'size': 0, 'path': folder}
        entries[name] = {'type': 'file', 'oid': blob.oid, 'size': len(blob.content), 'path': name}
        if blob.lfs:
            entries[name]['lfs'] = {
                'oid': blob.sha256,
                'size': len(blob.content),
                'pointerSize': len(blob.in_git),
            }
    if path and not entries:
        raise HubError(404, f'{path} does not exist on {revision}', code='EntryNotFound')
    if not request.flag('recursive'):
        entries = {name: entry for name, entry in entries.items() if '/' not in name[len(prefix):]}
    return json_response(list(entries.values()))


@route('GET', '/api/models/{repo}/refs')
def _refs(hub: Store, request: Request, repo: str) -> Response:
    refs = hub.open(request, repo).refs
    kinds = {
        'branches': 'refs/heads/',
        'converts': 'refs/convert/',
        'pullRequests': 'refs/pr/',
        'tags': 'refs/tags/',
    }
    return json_response({
        kind: [
            {'name': ref.removeprefix(prefix), 'ref': ref, 'targetCommit': sha}
            for ref, sha in refs.items() if ref.startswith(prefix)
        ]
        for kind, prefix in kinds.items()
    })


@route('GET', '/api/whoami-v2')
def _whoami(hub: Store, request: Request) -> Response:
    user = hub.login(request)
    return json_response({'type': 'user', 'name': user, 'orgs': [], 'auth': {'accessToken': {'role': 'write'}}})
