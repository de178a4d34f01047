"""A branch of a repo on the Hub: what is there, and what is put there."""
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from ..run_folder import CARD, CONFIG
from ..version import __version__
from .config import read_config, recorded
from .errors import HubError, explained
from .hashes import git_sha1, sha256

__all__ = ['Branch', 'Published', 'differing', 'is_empty', 'names']


@dataclass(frozen=True)
class Published:
    """What lies on a branch already.

    Attributes:
        config: Its ``config.json``, empty if there is none that can be read.
        card_sha256: SHA-256 of its card, ``None`` if there is none.
    """
    config: dict[str, Any] = field(default_factory=dict)
    card_sha256: str | None = None

    @property
    def hashes(self) -> dict[str, Any]:
        """The SHA-256 by file name of what was published from timm_dyacts."""
        return recorded(self.config, 'sha256')


class Branch:
    """A branch of a repo on the Hub.

    Args:
        repo_id: The repo.
        revision: The branch, ``None`` for the default one.
        token: Must have the right to write.
    """

    def __init__(self, repo_id: str, revision: str | None, token: str) -> None:
        self.repo_id = repo_id
        self.revision: str | None = None if revision == 'main' else revision
        self.token = token
        self.api: HfApi = HfApi(token=token, library_name='timm_dyacts', library_version=__version__)

    @property
    def page(self) -> str:
        return f'{self.api.endpoint}/{self.repo_id}'

    def open(self, private: bool) -> ModelInfo:
        """Give the tip of the default branch. The repo is created if there is none.

        Args:
            private: Create a private repo. One that is there has to be private.
        """
        with self._preparing():
            try:
                info = self._info(None)
            except RepositoryNotFoundError:
                self.api.create_repo(self.repo_id, private=private, exist_ok=True)
                info = self._info(None)
        if private and info.private is False:
            raise HubError(
                f"Could not publish '{self.repo_id}': private (--private) was asked for, and the repo is there and "
                f'public. Nothing was sent. Choose another name, or make it private in its settings.')
        return info

    def find_tip(self) -> ModelInfo | None:
        """Give the tip of this branch, ``None`` if it is the default branch or not there."""
        if self.revision is None:
            return None
        with self._preparing():
            try:
                return self._info(self.revision)
            except RevisionNotFoundError:
                return None

    def create(self, main: ModelInfo) -> None:
        """Create this branch where the default one is."""
        with self._preparing():
            self.api.create_branch(self.repo_id, branch=self.revision, revision=main.sha, exist_ok=True)

    def read_published(self, head: ModelInfo) -> Published:
        """Read what lies on a branch already."""
        with tempfile.TemporaryDirectory(prefix='timm_dyacts-') as beside:
            for name in {CONFIG, CARD} & names(head):
                with self._preparing():
                    hf_hub_download(self.repo_id, name, revision=head.sha, token=self.token, local_dir=beside)
            try:
                config = read_config(Path(beside, CONFIG), self.repo_id)
            except (HubError, FileNotFoundError):
                config = {}
            card = Path(beside, CARD)
            return Published(config, sha256(card) if card.is_file() else None)

    def commit(
            self,
            operations: Sequence[CommitOperationAdd | CommitOperationDelete],
            message: str,
            head: ModelInfo,
            create_pr: bool,
    ) -> tuple[str, str]:
        """Make one commit on top of ``head``.

        Returns:
            Its SHA, and its page or that of its pull request.
        """
        with explained(f"Could not publish '{self.repo_id}'", self.repo_id, self.token):
            commit = self.api.create_commit(
                self.repo_id,
                operations,
                commit_message=message,
                revision=self.revision,
                create_pr=create_pr,
                parent_commit=head.sha,
            )
            return commit.oid, commit.pr_url or commit.commit_url

    def look(self, revision: str | None, doing: str = '') -> ModelInfo:
        """See what is there after a commit. By then it pays to be patient.

        Args:
            revision: Branch or commit.
            doing: What could not be done if this fails, for the message.
        """
        for pause in (1, 4, None):
            try:
                with explained(doing, self.repo_id, self.token):
                    return self._info(revision)
            except HubError:
                if pause is None:
                    raise
                time.sleep(pause)

    def _info(self, revision: str | None) -> ModelInfo:
        return self.api.model_info(self.repo_id, revision=revision, files_metadata=True)

    def _preparing(self) -> AbstractContextManager[None]:
        doing = f"Could not prepare '{self.repo_id}' for publishing (nothing was sent)"
        return explained(doing, self.repo_id, self.token)


def names(info: ModelInfo) -> set[str]:
    """Give the files of a commit."""
    return {sibling.rfilename for sibling in info.siblings or ()}


def is_empty(info: ModelInfo) -> bool:
    """Say whether a commit holds nothing but what the Hub put there when it created the repo."""
    return not names(info) - {'.gitattributes'}


def differing(info: ModelInfo, folder: Path) -> list[str]:
    """Name the files of a folder that a commit does not hold as they are, going by the hashes that the Hub tells."""
    there = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    different = []
    for path in sorted(folder.iterdir()):
        sibling = there.get(path.name)
        if sibling is None:
            same = False
        elif sibling.lfs is not None:
            same = sibling.lfs['sha256'] == sha256(path)
        else:
            same = sibling.blob_id in (None, git_sha1(path))
        if not same:
            different.append(path.name)
    return different
