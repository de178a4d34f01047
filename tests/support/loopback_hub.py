"""A Hugging Face Hub on the loopback interface: the tests drive the real `huggingface_hub` client without internet.

The server keeps its repos in memory and speaks the part of the Hub's protocol that publishing and loading a model
needs: resolving files (ETags, commits, ranges, the redirect of large files to another origin), repo and tree listings,
creating repos, branches and tags, validating a card, and commits of regular and LFS files, as pull requests too. It
refuses with the Hub's own status and error codes, and misbehaves on demand (`Fault`). Xet storage and multipart uploads
are not offered.

Access follows ownership, as on the Hub: there is one user with one token, who owns the namespace of that name. In other
namespaces the user may write nothing, sees no private repo and reads no file of a gated one.

`huggingface_hub` reads its endpoint and cache folder when it is imported, so a client runs in a process of its own:

    with LoopbackHub() as hub:
        hub.add_repo("timm/resnet18.a1_in1k", {"model.safetensors": weights})
        run_python("import timm; timm.create_model('resnet18.a1_in1k', pretrained=True)", hub.env(tmp_path))
"""
import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote

import yaml

# Files that the Hub stores as LFS objects: those of its default `.gitattributes` that matter here, and large ones.
LFS_SUFFIXES = ('.bin', '.npz', '.onnx', '.pkl', '.pt', '.pth', '.safetensors', '.zip')
LFS_MIN_SIZE = 10 * 2 ** 20


def run_python(code: str, env: Mapping[str, str], *args: str, timeout: float = 120.0) -> subprocess.CompletedProcess:
    """Run a piece of Python in a fresh interpreter.

    Args:
        code: Program text; common indentation is removed.
        env: Complete environment of the process, as made by `LoopbackHub.env`.
        *args: What the program finds in `sys.argv[1:]`.
        timeout: Seconds after which the process is killed.

    Returns:
        The finished process, with `stdout` and `stderr` as text.

    Raises:
        AssertionError: The program failed or ran out of time; the message holds all that it printed.
    """
    code = textwrap.dedent(code)
    command = [sys.executable, '-c', code, *args]
    failure = None
    try:
        process = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout)
        if process.returncode != 0:
            failure = f'exited with status {process.returncode}'
    except subprocess.TimeoutExpired as error:
        process = error
        failure = f'was killed after {timeout} s'
    stdout, stderr = ((output or b'').decode() for output in (process.stdout, process.stderr))
    if failure is not None:
        raise AssertionError(f'Python {failure}\n--- code\n{code}\n--- stdout\n{stdout}\n--- stderr\n{stderr}')
    return subprocess.CompletedProcess(command, 0, stdout, stderr)


class ClientError(Exception):
    """An exception of a `Client`, as text: what a user sees."""


class Client:
    """A Python process that stays, for many small questions: starting one takes seconds. A context manager.

    Args:
        env: Complete environment of the process, as made by `LoopbackHub.env`.
        setup: Program text that runs first; common indentation is removed.
        log: Where the process's stderr goes.
    """

    _SERVE = textwrap.dedent("""
        import json, sys, traceback
        namespace, answers = {}, sys.stdout
        sys.stdout = sys.stderr
        exec(sys.argv[1], namespace)
        for line in sys.stdin:
            try:
                answer = json.dumps(dict(value=eval(json.loads(line), namespace)))
            except Exception:
                answer = json.dumps(dict(error=traceback.format_exc()))
            print(answer, file=answers, flush=True)
    """)

    def __init__(self, env: Mapping[str, str], setup: str, log: Path):
        self.log = log
        with open(log, 'w') as stderr:
            self._process = subprocess.Popen(
                [sys.executable, '-c', self._SERVE, textwrap.dedent(setup)],
                env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True)

    def __enter__(self) -> 'Client':
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def __call__(self, expression: str) -> Any:
        """The value of an expression, if it is JSON.

        Raises:
            ClientError: It raised; the message is the whole traceback.
        """
        self._process.stdin.write(json.dumps(expression) + '\n')
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise AssertionError(f'The client has ended.\n{self.log.read_text()}')
        answer = json.loads(line)
        if 'error' in answer:
            raise ClientError(answer['error'])
        return answer['value']


@dataclass(frozen=True)
class Blob:
    """The content of one file, kept in git itself or, where `lfs`, in the large file storage."""

    content: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def in_git(self) -> bytes:
        """What git stores: the content, or the pointer that stands for it (https://git-lfs.com)."""
        if not self.lfs:
            return self.content
        return (
            'version https://git-lfs.github.com/spec/v1\n'
            f'oid sha256:{self.sha256}\n'
            f'size {len(self.content)}\n'
        ).encode()

    @cached_property
    def oid(self) -> str:
        return hashlib.sha1(b'blob %d\0' % len(self.in_git) + self.in_git).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """One immutable state of a repo."""

    sha: str
    title: str
    parent: str | None
    files: Mapping[str, Blob]


class Repo:
    """A model repo: commits, and the refs (`refs/heads/main`, `refs/tags/v1`, `refs/pr/1`) that name some of them."""

    def __init__(self, repo_id: str, *, private: bool = False, gated: bool = False):
        self.repo_id = repo_id
        self.private = private
        self.gated = gated
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}

    def find(self, revision: str = 'main') -> Commit:
        """Look up a commit.

        Args:
            revision: A branch, a tag, a full ref or a commit's sha.

        Raises:
            HubError: `RevisionNotFound`.
        """
        for ref in (f'refs/heads/{revision}', f'refs/tags/{revision}', revision):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        if revision in self.commits:
            return self.commits[revision]
        raise HubError(404, f'Invalid rev id: {revision}', code='RevisionNotFound')

    def commit(
            self,
            changes: Mapping[str, bytes | Blob | None],
            *,
            revision: str = 'main',
            title: str = 'Update',
            parent: str | None = None,
    ) -> Commit:
        """Add a commit, all of it or nothing.

        Args:
            changes: New content per path; None removes the path.
            revision: The branch, or full ref, that moves to the new commit.
            title: First line of the commit's message.
            parent: Sha of the commit to build on; the tip of `revision` where None.

        Returns:
            The new commit.

        Raises:
            HubError: `EntryNotFound` for a removed path that does not exist.
        """
        ref = revision if revision.startswith('refs/') else f'refs/heads/{revision}'
        parent = parent or self.refs.get(ref)
        files = dict(self.commits[parent].files) if parent else {}
        for path, content in changes.items():
            if content is not None:
                files[path] = content if isinstance(content, Blob) else Blob(content, _belongs_in_lfs(path, content))
            elif files.pop(path, None) is None:
                raise HubError(404, f"A file with this name doesn't exist: {path}", code='EntryNotFound')
        listing = sorted((path, blob.oid) for path, blob in files.items())
        sha = hashlib.sha1(repr((parent, title, listing)).encode()).hexdigest()
        self.commits[sha] = Commit(sha, title, parent, files)
        self.refs[ref] = sha
        return self.commits[sha]


@dataclass
class Fault:
    """A misbehaviour of the server, applied to the requests that match.

    Args:
        path: Shell-style pattern of the path, unquoted and without query; `*` also crosses slashes.
        method: Pattern of the method.
        skip: How many matching requests pass unharmed first.
        times: How many are harmed after that; None for all.
        status: Answer with this status, and do nothing else.
        headers: Headers added to the answer, say `{"Retry-After": "0"}`.
        delay: Seconds to wait before the request has its effect and is answered.
        drop: Hang up before the request is read, so that it has no effect.
        cut_after: Hang up after this many bytes of the answer's body; the request has had its effect.
        corrupt: Flip one bit of the body in transit, of the request's if it has one, else of the answer's.
        answer_headers: Headers in place of those of an answer that is given as always.
        no_resume: Ignore that only the rest of a file is asked for.
        then: Called when the request has had its effect, before the answer leaves.

    Attributes:
        hits: How many requests were harmed: a test that injects a fault checks that it was met.
    """

    path: str = '*'
    method: str = '*'
    skip: int = 0
    times: int | None = 1
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    drop: bool = False
    cut_after: int | None = None
    corrupt: bool = False
    answer_headers: Mapping[str, str] = field(default_factory=dict)
    no_resume: bool = False
    then: Callable[[], object] | None = None
    hits: int = field(default=0, init=False)

    def strikes(self, method: str, path: str) -> bool:
        """Count a request, and say whether it is one to be harmed."""
        if self.hits == self.times or not (fnmatchcase(method, self.method) and fnmatchcase(path, self.path)):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.hits += 1
        return True


class HubError(Exception):
    """A refusal, in the Hub's terms: a status, a message and, for the client to choose its exception by, a code."""

    def __init__(self, status: int, message: str, *, code: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers or {}


@dataclass(frozen=True)
class Request:
    """A request as the routes see it."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise HubError(400, f"The request's body is not JSON: {error}") from None

    def flag(self, name: str) -> bool:
        return self.query.get(name, '').lower() in ('1', 'true')


@dataclass(frozen=True)
class Response:
    """An answer as the routes give it."""

    body: bytes = b''
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


_ROUTES: list[tuple[str, re.Pattern, Callable[..., Response]]] = []


def _route(method: str, template: str) -> Callable:
    """Have a method of `LoopbackHub` answer a method and path; the template's fields become its arguments, unquoted."""
    fields = {'repo': r'(?P<repo>[^/]+(?:/[^/]+)?)', 'path': r'(?P<path>.+)'}
    parts = re.split(r'\{(\w+)\}', template)
    parts[::2] = [re.escape(part) for part in parts[::2]]
    parts[1::2] = [fields.get(name, f'(?P<{name}>[^/]+)') for name in parts[1::2]]
    pattern = re.compile(''.join(parts))

    def register(answer: Callable[..., Response]) -> Callable[..., Response]:
        _ROUTES.append((method, pattern, answer))
        return answer

    return register


class LoopbackHub:
    """The server; a context manager, listening while it is open.

    Args:
        request_limit: Requests answered before everything is refused, so that a client in a loop comes to an end.

    Attributes:
        user: The one user.
        token: The user's token.
        repos: The repos by id.
        requests: What was asked so far, as `(method, path)`, the path unquoted and without query. Large files have
            paths that begin with `/storage/`.
    """

    user = 'user'
    token = 'hf_loopback'

    def __init__(self, *, request_limit: int = 1000):
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self._request_limit = request_limit
        self._faults: list[Fault] = []
        self._uploads: list[Blob] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        # Large files come from an origin of their own, as from the Hub's CDN: whatever may not leave the Hub, a token
        # above all, shows when it does.
        self._hub_server, self._storage_server = _Server(self), _Server(self)
        self.url, self.storage_url = self._hub_server.url, self._storage_server.url

    def __enter__(self) -> 'LoopbackHub':
        for server in (self._hub_server, self._storage_server):
            threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.05), daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._closing.set()
        for server in (self._hub_server, self._storage_server):
            server.shutdown()
            server.server_close()

    def add_repo(
            self,
            repo_id: str,
            files: Mapping[str, bytes],
            *,
            private: bool = False,
            gated: bool = False,
    ) -> Repo:
        """Put a repo on the Hub, with all its files in one commit on `main`.

        Args:
            repo_id: `namespace/name`.
            files: Content per path; weights and other large or binary files become LFS files, as on the Hub.
            private: Only the owner of the namespace knows of the repo.
            gated: Only the owner of the namespace may read the files.

        Returns:
            The repo, for further commits.
        """
        repo = self.repos[repo_id] = Repo(repo_id, private=private, gated=gated)
        repo.commit(files, title='initial commit')
        return repo

    def inject(self, fault: Fault) -> Fault:
        """Have the server misbehave from now on; of several faults, the first that strikes a request is applied.

        Args:
            fault: What to do to which requests. It is copied, so that it can be used for many tests.

        Returns:
            The copy in force, which counts its hits.
        """
        self._faults.append(replace(fault))
        return self._faults[-1]

    def reset(self) -> None:
        """Forget the repos, uploads, requests and faults."""
        with self._lock:
            for memory in (self.repos, self._uploads, self.requests, self._faults):
                memory.clear()

    def clear_faults(self) -> None:
        """Behave again."""
        self._faults.clear()

    def env(self, cache_dir: str | Path, *, token: str | None = None, offline: bool = False) -> dict[str, str]:
        """Make the environment of a client that knows this Hub and no other.

        Args:
            cache_dir: Home of everything that the client and `torch.hub` store.
            token: The token that the client is logged in with.
            offline: Whether the client must do without the network.

        Returns:
            This process's environment without its proxies, tokens and Hugging Face settings.
        """
        foreign = re.compile(r'HF_|HUGGING|TRANSFORMERS_|.*_PROXY$', re.IGNORECASE)
        env = {name: value for name, value in os.environ.items() if not foreign.match(name)}
        env |= {
            'HF_ENDPOINT': self.url,
            'HF_HOME': str(cache_dir),
            'HF_HUB_CACHE': str(Path(cache_dir, 'hub')),
            'HF_HUB_DISABLE_PROGRESS_BARS': '1',
            'HF_HUB_DISABLE_TELEMETRY': '1',
            'HF_HUB_DISABLE_XET': '1',
            'HF_HUB_OFFLINE': str(int(offline)),
            'TORCH_HOME': str(Path(cache_dir, 'torch')),
        }
        if token is not None:
            env['HF_TOKEN'] = token
        return env

    def admit(self, method: str, path: str) -> Fault:
        """Note a request, and find the fault to apply to it, if only the one that does nothing."""
        with self._lock:
            self.requests.append((method, path))
            if len(self.requests) > self._request_limit:
                # No client retries this status.
                return Fault(status=508)
            return next((fault for fault in self._faults if fault.strikes(method, path)), Fault())

    def answer(self, request: Request, fault: Fault) -> Response:
        """Answer a request, or fail it in the way of the fault."""
        self._closing.wait(fault.delay)
        try:
            if fault.status is not None:
                raise HubError(fault.status, 'Refused by a fault that a test injected', headers=fault.headers)
            with self._lock:
                return self._dispatch(request)
        except HubError as error:
            headers = {'X-Error-Message': str(error).encode('ascii', 'replace').decode(), **error.headers}
            if error.code is not None:
                headers['X-Error-Code'] = error.code
            return _json({'error': str(error)}, error.status, headers)
        except Exception:
            # Shown by the client as part of its own error; a 500 would only make it try again.
            return Response(traceback.format_exc().encode(), 501, {'Content-Type': 'text/plain'})

    def _dispatch(self, request: Request) -> Response:
        method = 'GET' if request.method == 'HEAD' else request.method
        for route_method, pattern, answer in _ROUTES:
            if method == route_method and (match := pattern.fullmatch(request.path)):
                return answer(self, request, **{name: unquote(value) for name, value in match.groupdict().items()})
        raise HubError(404, f'LoopbackHub has no endpoint {request.method} {request.path}')

    def _user_of(self, request: Request) -> str | None:
        authorization = request.headers.get('Authorization')
        if authorization not in (None, f'Bearer {self.token}'):
            raise HubError(401, 'Invalid credentials in Authorization header')
        return self.user if authorization else None

    def _login(self, request: Request) -> str:
        user = self._user_of(request)
        if user is None:
            raise HubError(401, 'Invalid username or password.')
        return user

    def _open(
            self,
            request: Request,
            repo_id: str,
            *,
            content: bool = False,
            login: bool = False,
            write: bool = False,
    ) -> Repo:
        """Find a repo, or refuse: to show that it exists, to give out its content, to the anonymous, to write to it."""
        user = self._user_of(request)
        owner = user is not None and repo_id.startswith(f'{user}/')
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and not owner):
            # Nobody is told that another's private repo exists, and the anonymous are asked to log in first.
            raise HubError(404 if user else 401, 'Repository not found', code='RepoNotFound')
        if content and repo.gated and not owner:
            raise HubError(403 if user else 401, f'Access to {repo_id} is restricted', code='GatedRepo')
        if login or write:
            self._login(request)
        if write and not owner:
            raise HubError(403, f"You don't have the rights to write to {repo_id}")
        return repo

    @_route('GET', '/{repo}/resolve/{revision}/{path}')
    def _resolve(self, request: Request, repo: str, revision: str, path: str) -> Response:
        commit = self._open(request, repo, content=True).find(revision)
        headers = {'X-Repo-Commit': commit.sha}
        blob = commit.files.get(path)
        if blob is None:
            raise HubError(404, 'Entry not found', code='EntryNotFound', headers=headers)
        if not blob.lfs:
            return _content(request, blob, headers)
        headers |= {
            'Location': f'{self.storage_url}/storage/{blob.sha256}',
            'X-Linked-ETag': f'"{blob.etag}"',
            'X-Linked-Size': str(len(blob.content)),
        }
        return Response(status=302, headers=headers)

    @_route('GET', '/storage/{oid}')
    def _download(self, request: Request, oid: str) -> Response:
        _refuse_token(request)
        blob = self._stored(oid)
        if blob is None:
            raise HubError(404, f'No object {oid} in storage')
        return _content(request, blob)

    @_route('PUT', '/storage/{oid}')
    def _upload(self, request: Request, oid: str) -> Response:
        _refuse_token(request)
        blob = Blob(request.body, lfs=True)
        if blob.sha256 != oid:
            raise HubError(400, f'The upload of {oid} has the SHA-256 {blob.sha256}')
        self._uploads.append(blob)
        return Response()

    def _stored(self, oid: str) -> Blob | None:
        commits = (commit for repo in self.repos.values() for commit in repo.commits.values())
        committed = (blob for commit in commits for blob in commit.files.values() if blob.lfs)
        return next((blob for blob in (*self._uploads, *committed) if blob.sha256 == oid), None)

    @_route('GET', '/api/models/{repo}/revision/{revision}')
    @_route('GET', '/api/models/{repo}')
    def _model_info(self, request: Request, repo: str, revision: str = 'main') -> Response:
        opened = self._open(request, repo)
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
        return _json({
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

    @_route('GET', '/api/models/{repo}/tree/{revision}')
    @_route('GET', '/api/models/{repo}/tree/{revision}/{path}')
    def _tree(self, request: Request, repo: str, revision: str, path: str = '') -> Response:
        files = self._open(request, repo).find(revision).files
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
        return _json(list(entries.values()))

    @_route('GET', '/api/models/{repo}/refs')
    def _refs(self, request: Request, repo: str) -> Response:
        refs = self._open(request, repo).refs
        kinds = {
            'branches': 'refs/heads/',
            'converts': 'refs/convert/',
            'pullRequests': 'refs/pr/',
            'tags': 'refs/tags/',
        }
        return _json({
            kind: [
                {'name': ref.removeprefix(prefix), 'ref': ref, 'targetCommit': sha}
                for ref, sha in refs.items() if ref.startswith(prefix)
            ]
            for kind, prefix in kinds.items()
        })

    @_route('GET', '/api/whoami-v2')
    def _whoami(self, request: Request) -> Response:
        user = self._login(request)
        return _json({'type': 'user', 'name': user, 'orgs': [], 'auth': {'accessToken': {'role': 'write'}}})

    @_route('POST', '/api/repos/create')
    def _create_repo(self, request: Request) -> Response:
        payload = request.json()
        user = self._login(request)
        if payload.get('type', 'model') != 'model':
            raise HubError(400, f"LoopbackHub has models only, not the type {payload['type']!r}")
        namespace = payload.get('organization') or user
        if namespace != user:
            raise HubError(403, f"You don't have the rights to create a model under the namespace {namespace!r}")
        repo_id = f"{namespace}/{payload['name']}"
        url = f'{self.url}/{repo_id}'
        if repo_id in self.repos:
            # `create_repo(exist_ok=True)` reads the URL from this refusal.
            return _json({'error': 'You already created this model repo', 'url': url}, 409)
        # Version 1 of the client sends `private`, version 2 sends `visibility`.
        private = payload.get('private') or payload.get('visibility') == 'private'
        attributes = ''.join(f'*{suffix} filter=lfs diff=lfs merge=lfs -text\n' for suffix in LFS_SUFFIXES)
        self.add_repo(repo_id, {'.gitattributes': attributes.encode()}, private=bool(private))
        return _json({'url': url, 'name': repo_id})

    @_route('POST', '/api/models/{repo}/branch/{branch}')
    def _create_branch(self, request: Request, repo: str, branch: str) -> Response:
        return self._create_ref(request, repo, f'refs/heads/{branch}', request.json().get('startingPoint', 'main'))

    @_route('POST', '/api/models/{repo}/tag/{revision}')
    def _create_tag(self, request: Request, repo: str, revision: str) -> Response:
        return self._create_ref(request, repo, f"refs/tags/{request.json()['tag']}", revision)

    def _create_ref(self, request: Request, repo: str, ref: str, revision: str) -> Response:
        opened = self._open(request, repo, write=True)
        target = opened.find(revision).sha
        if ref in opened.refs:
            raise HubError(409, f'Reference already exists: {ref}')
        opened.refs[ref] = target
        return _json({})

    @_route('POST', '/api/validate-yaml')
    def _validate_yaml(self, request: Request) -> Response:
        errors, warnings = check_card(request.json()['content'])
        return _json(
            {
                'errors': [{'message': message} for message in errors],
                'warnings': [{'message': message} for message in warnings],
            },
            400 if errors else 200,
        )

    @_route('POST', '/api/models/{repo}/preupload/{revision}')
    def _preupload(self, request: Request, repo: str, revision: str) -> Response:
        opened = self._open(request, repo, login=True, write=not request.flag('create_pr'))
        commit = opened.find(revision)
        modes = []
        for file in request.json()['files']:
            path, sample = file['path'], base64.b64decode(file['sample'])
            known = commit.files.get(path)
            modes.append({
                'path': path,
                'uploadMode': 'lfs' if _belongs_in_lfs(path, sample, file['size']) else 'regular',
                'shouldIgnore': False,
                'oid': known.etag if known else None,
            })
        return _json({'files': modes, 'commitOid': commit.sha})

    @_route('POST', '/{repo}.git/info/lfs/objects/batch')
    def _lfs_batch(self, request: Request, repo: str) -> Response:
        self._open(request, repo, login=True)
        objects = []
        for item in request.json()['objects']:
            entry = {'oid': item['oid'], 'size': item['size']}
            if self._stored(item['oid']) is None:
                entry['actions'] = {
                    'upload': {'href': f"{self.storage_url}/storage/{item['oid']}"},
                    'verify': {'href': f'{self.url}/{quote(repo)}.git/info/lfs/objects/verify'},
                }
            objects.append(entry)
        return _json({'transfer': 'basic', 'objects': objects})

    @_route('POST', '/{repo}.git/info/lfs/objects/verify')
    def _lfs_verify(self, request: Request, repo: str) -> Response:
        self._open(request, repo, login=True)
        self._uploaded(request.json())
        return _json({})

    def _uploaded(self, pointer: Mapping[str, Any]) -> Blob:
        blob = self._stored(pointer['oid'])
        if blob is None or len(blob.content) != pointer['size']:
            raise HubError(400, f"No LFS object of {pointer['size']} bytes was uploaded as {pointer['oid']}")
        return blob

    @_route('POST', '/api/models/{repo}/commit/{revision}')
    def _commit(self, request: Request, repo: str, revision: str) -> Response:
        create_pr = request.flag('create_pr')
        opened = self._open(request, repo, login=True, write=not create_pr)
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
                changes[value['path']] = self._uploaded(value)
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
            answer['pullRequestUrl'] = f'{self.url}/{repo}/discussions/{number}'
        commit = opened.commit(changes, revision=ref, title=title, parent=tip.sha)
        answer |= {'commitOid': commit.sha, 'commitUrl': f'{self.url}/{repo}/commit/{commit.sha}'}
        return _json(answer)


class _Server(ThreadingHTTPServer):
    """One origin of the Hub, on a free port of the loopback interface."""

    def __init__(self, hub: LoopbackHub):
        super().__init__(('127.0.0.1', 0), _Handler)
        self.hub = hub
        self.url = f'http://127.0.0.1:{self.server_port}'

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that hangs up is no error of the server's: tests kill clients, and clients time out.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Carries requests and answers over the wire, and does there what a fault asks for."""

    protocol_version = 'HTTP/1.1'
    # Otherwise an answer's body waits for the client to acknowledge its headers: 40 ms each.
    disable_nagle_algorithm = True
    timeout = 60
    server: _Server

    def _serve(self) -> None:
        hub = self.server.hub
        path, _, query = self.path.partition('?')
        fault = hub.admit(self.command, unquote(path))
        if fault.drop:
            self.close_connection = True
            return
        if fault.no_resume:
            del self.headers['Range']
        sent = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        request = Request(
            self.command,
            path,
            dict(parse_qsl(query)),
            self.headers,
            _flip_bit(sent) if fault.corrupt else sent,
        )
        response = hub.answer(request, fault)
        if fault.then is not None:
            fault.then()
        body = _flip_bit(response.body) if fault.corrupt and not sent else response.body
        self.send_response(response.status)
        for name, value in {'Content-Length': str(len(body)), **response.headers, **fault.answer_headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body[:fault.cut_after])
        if fault.cut_after is not None:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: the log is `LoopbackHub.requests`."""


def _json(data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(data).encode(), status, {'Content-Type': 'application/json', **(headers or {})})


def _content(request: Request, blob: Blob, headers: Mapping[str, str] | None = None) -> Response:
    """Answer with a file or, where the request has a `Range`, with the part of it."""
    headers = {'Accept-Ranges': 'bytes', 'ETag': f'"{blob.etag}"', **(headers or {})}
    size = len(blob.content)
    wanted = re.fullmatch(r'bytes=(\d+)-(\d*)', request.headers.get('Range', ''))
    if wanted is None:
        return Response(blob.content, headers=headers)
    start, stop = int(wanted[1]), min(int(wanted[2] or size) + 1, size)
    if start >= stop:
        raise HubError(416, 'Requested range not satisfiable', headers={'Content-Range': f'bytes */{size}'})
    headers['Content-Range'] = f'bytes {start}-{stop - 1}/{size}'
    return Response(blob.content[start:stop], 206, headers)


def _refuse_token(request: Request) -> None:
    # The storage's URLs are signed. It takes no second authorization, and a token must not reach it.
    if 'Authorization' in request.headers:
        raise HubError(400, 'Only one auth mechanism allowed')


def _belongs_in_lfs(path: str, sample: bytes, size: int | None = None) -> bool:
    size = len(sample) if size is None else size
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_MIN_SIZE or b'\0' in sample[:512])


def _flip_bit(body: bytes) -> bytes:
    middle = len(body) // 2
    return body[:middle] + bytes(byte ^ 1 for byte in body[middle:middle + 1]) + body[middle + 1:]


def check_card(content: str) -> tuple[list[str], list[str]]:
    """Find what the Hub objects to in a card's metadata: `(errors, warnings)`."""
    front_matter = re.match(r'\s*---[ \t]*\n(.*?)\n---[ \t]*(?:\n|$)', content, re.DOTALL)
    if front_matter is None:
        return [], ['empty or missing yaml metadata in repo card']
    try:
        card = yaml.safe_load(front_matter[1])
    except yaml.YAMLError as error:
        return [f'Invalid YAML: {error}'], []
    if not isinstance(card, dict):
        return ['metadata must be a mapping'], []

    errors = []
    for name in ('library_name', 'license_name', 'license_link', 'pipeline_tag'):
        if not isinstance(card.get(name, ''), str):
            errors.append(f'"{name}" must be a string')
    for name in ('base_model', 'datasets', 'language', 'license', 'metrics', 'tags'):
        values = card.get(name, [])
        if not all(isinstance(value, str) for value in (values if isinstance(values, list) else [values])):
            errors.append(f'"{name}" must be a string or a list of strings')
    relations = ('adapter', 'finetune', 'merge', 'quantized')
    if card.get('base_model_relation', relations[0]) not in relations:
        errors.append(f'"base_model_relation" must be one of {", ".join(relations)}')
    try:
        for i, model in enumerate(card.get('model-index', [])):
            if 'name' not in model:
                errors.append(f'"model-index[{i}].name" is required')
            for j, result in enumerate(model.get('results', [])):
                at = f'model-index[{i}].results[{j}]'
                required = {'task': ('type',), 'dataset': ('name', 'type')}
                errors += [
                    f'"{at}.{part}.{name}" is required'
                    for part, names in required.items() for name in names if name not in result.get(part, {})
                ]
                errors += [
                    f'"{at}.metrics[{k}].{name}" is required'
                    for k, metric in enumerate(result.get('metrics', [{}]))
                    for name in ('type', 'value') if name not in metric
                ]
    except (AttributeError, TypeError):
        errors.append('"model-index" must be a list of mappings with "name" and "results"')
    return errors, []
