"""What the Hub holds, and who may do what with it."""
from collections.abc import Mapping
from typing import Any

from .repos import Blob, HubError, Repo
from .wire import Request

__all__ = ['Store']


class Store:
    """The Hub without its network.

    Attributes:
        user: The one user.
        token: The user's token.
        repos: The repos by id.
        uploads: Large files that were sent, and may not be part of a commit yet.
        url: Address of the Hub.
        storage_url: Address of its storage of large files.
    """

    user = 'user'
    token = 'hf_loopback'
    url: str
    storage_url: str

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.uploads: list[Blob] = []

    def add_repo(
            self,
            repo_id: str,
            files: Mapping[str, bytes],
            *,
            private: bool = False,
            gated: bool = False,
    ) -> Repo:
        """Put a repo on the Hub, with all its files in one commit on ``main``.

        Args:
            repo_id: ``namespace/name``.
            files: Content per path; weights and other large or binary files become LFS files, as on the Hub.
            private: Only the owner of the namespace knows of the repo.
            gated: Only the owner of the namespace may read the files.

        Returns:
            The repo, for further commits.
        """
        repo = self.repos[repo_id] = Repo(repo_id, private=private, gated=gated)
        repo.commit(files, title='initial commit')
        return repo

    def _user_of(self, request: Request) -> str | None:
        authorization = request.headers.get('Authorization')
        if authorization not in (None, f'Bearer {self.token}'):
            raise HubError(401, 'Invalid credentials in Authorization header')
        return self.user if authorization else None

    def login(self, request: Request) -> str:
        """Give the user of a request, or refuse the anonymous."""
        user = self._user_of(request)
        if user is None:
            raise HubError(401, 'Invalid username or password.')
        return user

    def open(
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
            self.login(request)
        if write and not owner:
            raise HubError(403, f"You don't have the rights to write to {repo_id}")
        return repo

    def stored(self, oid: str) -> Blob | None:
        """Find a large file by its SHA-256."""
        commits = (commit for repo in self.repos.values() for commit in repo.commits.values())
        committed = (blob for commit in commits for blob in commit.files.values() if blob.lfs)
        return next((blob for blob in (*self.uploads, *committed) if blob.sha256 == oid), None)

    def uploaded(self, pointer: Mapping[str, Any]) -> Blob:
        """Find the large file that a client says it has sent, or refuse."""
        blob = self.stored(pointer['oid'])
        if blob is None or len(blob.content) != pointer['size']:
            raise HubError(400, f"No LFS object of {pointer['size']} bytes was uploaded as {pointer['oid']}")
        return blob
