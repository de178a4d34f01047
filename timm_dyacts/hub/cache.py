"""Files of the Hub in the client's cache: how they get there, and whether they are whole."""
import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download

from ..version import __version__
from .errors import check_token, explained
from .hashes import git_sha1, sha256

__all__ = ['Repo', 'discard', 'is_intact']


@dataclass(frozen=True)
class Repo:
    """A repo at a revision, and how to get at it.

    Attributes:
        repo_id: The repo.
        revision: Branch, tag or commit, ``None`` for the default branch.
        token: For private and gated repos.
        cache_dir: Cache of the downloads, ``None`` for the client's own.
    """
    repo_id: str
    revision: str | None = None
    token: str | None = None
    cache_dir: str | os.PathLike[str] | None = None

    @classmethod
    def parse(
            cls,
            name: str,
            revision: str | None = None,
            token: str | None = None,
            cache_dir: str | os.PathLike[str] | None = None,
    ) -> 'Repo':
        """Read a name such as ``'user/name'``, ``'user/name@revision'`` or ``'hf-hub:user/name'``.

        Raises:
            ValueError: It is none, has another revision than ``revision``, or the token is impossible.
        """
        repo_id, _, suffix = name.removeprefix('hf-hub:').partition('@')
        if suffix and revision and suffix != revision:
            raise ValueError(f'revision must be given once, got {revision!r} and {suffix!r} in repo_id {name!r}.')
        if '@' in suffix or not repo_id:
            raise ValueError(f"repo_id must be 'user/name' or 'user/name@revision', got {name!r}.")
        return cls(repo_id, suffix or revision, check_token(token), cache_dir)

    @property
    def name(self) -> str:
        return f'{self.repo_id}@{self.revision}' if self.revision else self.repo_id

    def download(self, filename: str, missing: str, commit: str | None = None) -> Path:
        """Have a file in the cache.

        Args:
            filename: The file.
            missing: What to do if the repo does not have it, for the message.
            commit: Take it from this commit instead of the revision.

        Raises:
            HubError: It could not be had.
        """
        with explained(f"Could not load '{self.name}'", self.repo_id, self.token, missing):
            return Path(hf_hub_download(
                self.repo_id,
                filename,
                revision=commit or self.revision,
                token=self.token,
                cache_dir=self.cache_dir,
                library_name='timm_dyacts',
                library_version=__version__,
            ))


def is_intact(path: Path) -> bool | None:
    """Compare a file in the cache with its ETag; ``None`` if there is none to compare with.

    The client checks the size of what it downloads and no more. It names each file of its cache by the ETag, which is
    the SHA-256 of large files, and git's SHA-1 of the others.
    """
    etag = os.path.basename(os.readlink(path)) if path.is_symlink() else ''
    hash_of = {40: git_sha1, 64: sha256}.get(len(etag))
    return hash_of(path) == etag if hash_of else None


def discard(path: Path) -> None:
    """Remove a file from the cache: the name in the snapshot, and the content that it links to."""
    if path.is_symlink():
        path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)
