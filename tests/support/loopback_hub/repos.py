"""What the Hub stores: repos, their commits and files."""
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

__all__ = ['Blob', 'Commit', 'HubError', 'Repo', 'belongs_in_lfs']

# Files that the Hub stores as LFS objects: those of its default ``.gitattributes`` that matter here, and large ones.
LFS_SUFFIXES = ('.bin', '.npz', '.onnx', '.pkl', '.pt', '.pth', '.safetensors', '.zip')
LFS_MIN_SIZE = 10 * 2 ** 20


class HubError(Exception):
    """A refusal, in the Hub's terms: a status, a message and, for the client to choose its exception by, a code."""

    def __init__(
            self,
            status: int,
            message: str,
            *,
            code: str | None = None,
            headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers or {}


@dataclass(frozen=True)
class Blob:
    """The content of one file, kept in git itself or, where ``lfs``, in the large file storage."""

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
    """A model repo: commits, and refs such as ``refs/heads/main``, ``refs/tags/v1``, ``refs/pr/1`` that name some."""

    def __init__(self, repo_id: str, *, private: bool = False, gated: bool = False) -> None:
        self.repo_id = repo_id
        self.private = private
        self.gated = gated
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}

    def find(self, revision: str = 'main') -> Commit:
        """Look up a commit.

        Args:
            revision: A branch, a tag, a full ref or the SHA of a commit.

        Raises:
            HubError: ``RevisionNotFound``.
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
            changes: New content per path; ``None`` removes the path.
            revision: The branch, or full ref, that moves to the new commit.
            title: First line of the commit's message.
            parent: SHA of the commit to build on; the tip of ``revision`` where ``None``.

        Returns:
            The new commit.

        Raises:
            HubError: ``EntryNotFound`` for a removed path that does not exist.
        """
        ref = revision if revision.startswith('refs/') else f'refs/heads/{revision}'
        parent = parent or self.refs.get(ref)
        files = dict(self.commits[parent].files) if parent else {}
        for path, content in changes.items():
            if content is not None:
                files[path] = content if isinstance(content, Blob) else Blob(content, belongs_in_lfs(path, content))
            elif files.pop(path, None) is None:
                raise HubError(404, f"A file with this name doesn't exist: {path}", code='EntryNotFound')
        listing = sorted((path, blob.oid) for path, blob in files.items())
        sha = hashlib.sha1(repr((parent, title, listing)).encode()).hexdigest()
        self.commits[sha] = Commit(sha, title, parent, files)
        self.refs[ref] = sha
        return self.commits[sha]


def belongs_in_lfs(path: str, sample: bytes, size: int | None = None) -> bool:
    size = len(sample) if size is None else size
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_MIN_SIZE or b'\0' in sample[:512])
