"""Publish a run folder: all of it or nothing, and never over somebody else's work."""
import os
import re
import tempfile
import time
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..version import __version__
from .errors import HubError, check_token, explained
from .files import CARD, CONFIG, PICKLED_WEIGHTS, git_sha1, read_config, recorded, sha256
from .stage import CHECKPOINTS, stage, written_beside

__all__ = ['Publication', 'publish']


@dataclass(frozen=True)
class Publication:
    """What was published or, after a dry run, would be.

    Attributes:
        repo_id: The repo.
        files: Size in bytes by file name.
        remarks: What the card lacks.
        folder: Where a dry run left the files.
        commit: Sha of the commit.
        url: Page of the commit or pull request.
    """
    repo_id: str
    files: dict[str, int]
    remarks: tuple[str, ...] = ()
    folder: Path | None = None
    commit: str | None = None
    url: str | None = None


def publish(
        run_folder: str | os.PathLike,
        repo_id: str,
        *,
        weights: str = 'best',
        private: bool = False,
        revision: str | None = None,
        create_pr: bool = False,
        overwrite: bool = False,
        dry_run: bool = False,
        license: str | None = None,
        commit_message: str | None = None,
        token: str | None = None,
) -> Publication:
    """Publish a run folder of scripts/train.py as a model repo, in one commit.

    Weights, config, a card made from the results, and the recipe (``args.yaml``, ``summary.csv``, plots) are put
    together and loaded back first; only if that gives the same logits is anything sent. Publishing again replaces all
    that an earlier publication left.

    Args:
        run_folder: The folder; its checkpoints hold ``model.safetensors`` and ``config.json``, and ``results.json`` if
            they were measured.
        repo_id: 'user/name'. The repo is created if there is none.
        weights: 'best', 'ema' or 'last'.
        private: Create a private repo.
        revision: Branch to publish to, created if there is none; 'main' by default.
        create_pr: Open a pull request instead.
        overwrite: Also replace what was not published from here, has another architecture, or has a card that was
            edited by hand.
        dry_run: Send nothing, but leave the files in ``<run_folder>/publish``.
        license: Licence of weights that inherit none, such as 'apache-2.0'.
        commit_message: Title of the commit.
        token: By default the one of ``hf auth login`` or ``HF_TOKEN``.

    Returns:
        What was published, and where it can be seen.

    Raises:
        HubError: It was not published. The message says whether the repo is as it was.
        ValueError: An argument of the wrong form.

    Source: https://huggingface.co/docs/hub/models-uploading
    """
    validate_repo_id(repo_id)
    if '/' not in repo_id:
        raise ValueError(f"repo_id (--repo-id) must be 'user/name', got {repo_id!r}.")
    if weights not in CHECKPOINTS:
        raise ValueError(f'weights (--weights) must be one of {", ".join(CHECKPOINTS)}, got {weights!r}.')
    if revision and re.fullmatch(r'[0-9a-f]{40}', revision):
        raise ValueError(f'revision (--revision) must be a branch, got the commit {revision!r}.')
    token = check_token(token) or get_token()
    run_folder = Path(run_folder)
    if dry_run:
        with written_beside(run_folder / 'publish') as folder:
            published = stage(run_folder, repo_id, weights, license, token, folder)
        return Publication(repo_id, *published, folder=run_folder / 'publish')
    if token is None:
        raise HubError(
            f"Could not publish '{repo_id}': nobody is logged in. Make a token with the right to write at "
            f"https://huggingface.co/settings/tokens, then `hf auth login`, set HF_TOKEN, or pass token.")
    with tempfile.TemporaryDirectory(prefix='timm_dyacts-') as beside:
        folder = Path(beside)
        published = stage(run_folder, repo_id, weights, license, token, folder)
        target = _Target(repo_id, revision, token)
        message = commit_message or f'Publish {read_config(folder / CONFIG, repo_id)["architecture"]}'
        commit, url = target.upload(folder, message, private, create_pr, overwrite)
    return Publication(repo_id, *published, commit=commit, url=url)


class _Target:
    """A branch of a repo on the Hub."""

    def __init__(self, repo_id: str, revision: str | None, token: str):
        self.repo_id = repo_id
        self.revision = None if revision == 'main' else revision
        self.token = token
        self.api = HfApi(token=token, library_name='timm_dyacts', library_version=__version__)

    def upload(
            self,
            folder: Path,
            message: str,
            private: bool,
            create_pr: bool,
            overwrite: bool,
    ) -> tuple[str, str]:
        """Send the files of a folder in one commit. Returns its sha, and its page or that of its pull request."""
        main = self._open(private)
        head = self._find_branch() or main
        theirs = self._read_published(head)
        if not (create_pr or overwrite):
            self._check_ours(head, theirs, folder)
        if head is main and self.revision:
            with self._preparing():
                self.api.create_branch(self.repo_id, branch=self.revision, revision=main.sha, exist_ok=True)
        names = {path.name for path in folder.iterdir()}
        stale = (recorded(theirs, 'sha256').keys() | {PICKLED_WEIGHTS}) & _names(head) - names
        sha, url = self._commit(folder, message, stale, head, create_pr)
        tip = self._look(sha, f"The Hub took the commit {sha} to '{self.repo_id}', but it could not be checked")
        if not create_pr and _differing(tip, folder):
            # The Hub has no hash of small files to compare them with, so damage on the way goes unnoticed. Mend it.
            with suppress(HubError):
                sha, url = self._commit(folder, message, set(), tip, create_pr)
                tip = self._look(sha, 'not shown')
        if differing := _differing(tip, folder):
            raise HubError(
                f"'{self.repo_id}' is damaged: in the commit {sha} these files are not what was sent: "
                f'{", ".join(differing)}. Publish again with overwrite (--overwrite).')
        return sha, url

    def _commit(
            self,
            folder: Path,
            message: str,
            stale: set[str],
            head: ModelInfo,
            create_pr: bool,
    ) -> tuple[str, str]:
        """Put the files of a folder on top of ``head`` and take the stale ones away. Returns sha and page."""
        operations = [
            *(CommitOperationAdd(path.name, str(path)) for path in sorted(folder.iterdir())),
            *(CommitOperationDelete(name) for name in sorted(stale)),
        ]
        try:
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
        except HubError as error:
            if create_pr:
                raise HubError(
                    f'{error}\nThe branch is as it was. Before you do it again, see whether the pull request was '
                    f'opened all the same: {self.api.endpoint}/{self.repo_id}/discussions') from None
            return self._find_commit(folder, head, error)

    def _preparing(self) -> AbstractContextManager[None]:
        doing = f"Could not prepare '{self.repo_id}' for publishing (nothing was sent)"
        return explained(doing, self.repo_id, self.token)

    def _open(self, private: bool) -> ModelInfo:
        """The tip of the default branch; the repo is created if there is none."""
        with self._preparing():
            try:
                info = self.api.model_info(self.repo_id, files_metadata=True)
            except RepositoryNotFoundError:
                self.api.create_repo(self.repo_id, private=private, exist_ok=True)
                info = self.api.model_info(self.repo_id, files_metadata=True)
        if private and info.private is False:
            raise HubError(
                f"Could not publish '{self.repo_id}': private (--private) was asked for, and the repo is there and "
                f'public. Nothing was sent. Choose another name, or make it private in its settings.')
        return info

    def _find_branch(self) -> ModelInfo | None:
        """The tip of the branch to publish to, if it is another than the default and there is one."""
        if self.revision is None:
            return None
        with self._preparing():
            try:
                return self.api.model_info(self.repo_id, revision=self.revision, files_metadata=True)
            except RevisionNotFoundError:
                return None

    def _read_published(self, head: ModelInfo) -> dict[str, Any]:
        """The config that is there, with the hash of the card that is there; empty if there is none."""
        with tempfile.TemporaryDirectory(prefix='timm_dyacts-') as beside:
            for name in {CONFIG, CARD} & _names(head):
                with self._preparing():
                    hf_hub_download(self.repo_id, name, revision=head.sha, token=self.token, local_dir=beside)
            try:
                config = read_config(Path(beside, CONFIG), self.repo_id)
            except (HubError, FileNotFoundError):
                config = {}
            card = Path(beside, CARD)
            return config | dict(card_sha256=sha256(card) if card.is_file() else None)

    def _check_ours(self, head: ModelInfo, theirs: dict[str, Any], folder: Path) -> None:
        """Refuse to replace what was not published from here."""
        if not _names(head) - {'.gitattributes'}:
            return
        ours = read_config(folder / CONFIG, self.repo_id)['architecture']
        card = recorded(theirs, 'sha256').get(CARD)
        if card is None:
            reason = 'what is there was not published from timm_dyacts'
        elif theirs['architecture'] != ours:
            reason = f"there is a '{theirs['architecture']}', and this is a '{ours}'"
        elif theirs['card_sha256'] not in (card, None):
            reason = 'its card was edited by hand'
        else:
            return
        raise HubError(
            f"Did not publish '{self.repo_id}': {reason}. Nothing was sent. To replace it: overwrite (--overwrite). To "
            f'propose it: create_pr (--create-pr).')

    def _find_commit(self, folder: Path, head: ModelInfo, error: HubError) -> tuple[str, str]:
        """After an error: the commit, if it was made and only the answer was lost."""
        try:
            tip = self._look(self.revision, '')
        except HubError:
            raise HubError(
                f'{error}\nWhether the commit was made could not be found out. Publishing again does no harm.'
            ) from None
        if tip.sha == head.sha:
            state = 'as it was' if _names(head) - {'.gitattributes'} else 'there, with nothing of the model in it'
            raise HubError(f'{error}\nThe repo is {state}.') from None
        if _differing(tip, folder):
            raise HubError(f'{error}\nSomebody else changed the repo meanwhile; of this nothing is there.') from None
        return tip.sha, f'{self.api.endpoint}/{self.repo_id}/commit/{tip.sha}'

    def _look(self, revision: str | None, doing: str) -> ModelInfo:
        """What is there after a commit. By then it pays to be patient."""
        for pause in (1, 4, None):
            try:
                with explained(doing, self.repo_id, self.token):
                    return self.api.model_info(self.repo_id, revision=revision, files_metadata=True)
            except HubError:
                if pause is None:
                    raise
                time.sleep(pause)


def _names(info: ModelInfo) -> set[str]:
    return {sibling.rfilename for sibling in info.siblings or ()}


def _differing(info: ModelInfo, folder: Path) -> list[str]:
    """The files of a folder that a commit does not hold as they are, going by the hashes that the Hub tells."""
    there = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    differing = []
    for path in sorted(folder.iterdir()):
        sibling = there.get(path.name)
        if sibling is None:
            same = False
        elif sibling.lfs is not None:
            same = sibling.lfs['sha256'] == sha256(path)
        else:
            same = sibling.blob_id in (None, git_sha1(path))
        if not same:
            differing.append(path.name)
    return differing
