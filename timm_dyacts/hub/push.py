"""Publish a run folder, or show what would be published."""
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import get_token

from ..run_folder import CHECKPOINTS, RunFolder
from ..version import unsupported
from .branch import Branch
from .errors import HubError, check_token
from .stage import stage, written_beside
from .upload import upload

try:
    from huggingface_hub.utils import validate_repo_id
except ImportError as e:
    raise unsupported('huggingface_hub', huggingface_hub.__version__, f'what checks the names of repos ({e})') from e

__all__ = ['Publication', 'publish']

# Names that git takes for a branch, less those that need quoting in a shell
_BRANCH = re.compile(r'(?!.*(\.\.|//|/\.|\.lock(/|$)))\w[\w.+/-]*(?<![./])')
# As the Hub has them: https://huggingface.co/docs/hub/repositories-licenses
_LICENSE = re.compile(r'[a-z0-9][a-z0-9.+-]*')


@dataclass(frozen=True)
class Publication:
    """What was published or, after a dry run, what would be.

    Attributes:
        repo_id: The repo.
        files: Size in bytes by file name.
        remarks: What the card lacks, and what of the options others do not see.
        folder: Where a dry run left the files.
        commit: SHA of the commit.
        url: Page of the commit or pull request.
    """
    repo_id: str
    files: dict[str, int]
    remarks: tuple[str, ...] = ()
    folder: Path | None = None
    commit: str | None = None
    url: str | None = None


def publish(
        run_folder: str | os.PathLike[str],
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
    """Publish the run folder of a training as a model repo, in one commit.

    Weights, config, a card made from the results, and the recipe (``args.yaml``, ``summary.csv``, plots) are put
    together and loaded back first; only if that gives the same logits is anything sent. Publishing again replaces all
    that an earlier publication left.

    Args:
        run_folder: The folder; its checkpoints hold ``model.safetensors`` and ``config.json``, and ``results.json`` if
            they were measured.
        repo_id: ``'user/name'``. The repo is created if there is none.
        weights: ``'best'``, ``'ema'`` or ``'last'``.
        private: Create a private repo.
        revision: Branch to publish to, created if there is none; ``'main'`` by default.
        create_pr: Open a pull request instead.
        overwrite: Also replace what was not published from here, has another architecture, or has a card that was
            edited by hand.
        dry_run: Send nothing, but leave the files in ``<run_folder>/publish``.
        license: Licence of weights that inherit none, such as ``'apache-2.0'``.
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
    if revision is not None and (not _BRANCH.fullmatch(revision) or re.fullmatch(r'[0-9a-f]{40}', revision)):
        raise ValueError(f'revision (--revision) must be a branch, and no commit, got {revision!r}.')
    if license is not None and not _LICENSE.fullmatch(license):
        raise ValueError(f"license (--license) must be an id such as 'apache-2.0' or 'other', got {license!r}.")
    if commit_message is not None and not (commit_message.strip() and commit_message.isprintable()):
        raise ValueError(f'commit_message (--commit-message) must be a line of text, got {commit_message!r}.')
    token = check_token(token) or get_token()
    run = RunFolder(run_folder)
    if dry_run:
        with written_beside(run.publish) as folder:
            staged = stage(run, repo_id, weights, license, token, folder)
        return Publication(repo_id, staged.files, staged.remarks, folder=run.publish)
    if token is None:
        raise HubError(
            f"Could not publish '{repo_id}': nobody is logged in. Make a token with the right to write at "
            f"https://huggingface.co/settings/tokens, then `hf auth login`, set HF_TOKEN, or pass token.")
    with tempfile.TemporaryDirectory(prefix='timm_dyacts-') as beside:
        folder = Path(beside)
        staged = stage(run, repo_id, weights, license, token, folder)
        commit, url = upload(
            Branch(repo_id, revision, token),
            folder,
            staged.architecture,
            commit_message or f'Publish {staged.architecture}',
            private=private,
            create_pr=create_pr,
            overwrite=overwrite,
        )
    return Publication(repo_id, staged.files, staged.remarks, commit=commit, url=url)
