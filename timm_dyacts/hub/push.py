"""Publish a run folder: all of it or nothing, and never over somebody else's work."""
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
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
from timm.models._pretrained import filter_pretrained_cfg
from torch import nn

from ..card import render_model_card, resolve_start
from ..version import __version__
from .errors import HubError, check_token, explained, summarize
from .files import CARD, CONFIG, PICKLED_WEIGHTS, RECORD, WEIGHTS, git_sha1, read_config, recorded, sha256

__all__ = ['Publication', 'publish']

_CHECKPOINTS = dict(best='.', ema='ema', last='last')  # folders within a run folder
_RESULTS = 'results.json'
_OPTIONS = 'args.yaml'
_EXTRAS = (_OPTIONS, 'summary.csv', '*.png')
_METRICS = ('top1', 'top5', 'loss')
# What the card is made of, and what of it has parts.
_RESULTS_KEYS = dict.fromkeys((*_METRICS, 'dataset', 'split', 'num_images', 'date', 'versions'), ()) | dict(
    preprocessing=('input_size', 'interpolation', 'mean', 'std', 'crop_pct'),
    start=('model', 'pretrained', 'source', 'license', 'warm_start', 'kd_model'),
)
_TOKEN = re.compile(r'\bhf_[A-Za-z0-9]{20,}')


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
    if weights not in _CHECKPOINTS:
        raise ValueError(f'weights (--weights) must be one of {", ".join(_CHECKPOINTS)}, got {weights!r}.')
    if revision and re.fullmatch(r'[0-9a-f]{40}', revision):
        raise ValueError(f'revision (--revision) must be a branch, got the commit {revision!r}.')
    token = check_token(token) or get_token()
    run_folder = Path(run_folder)
    if dry_run:
        with _written_beside(run_folder / 'publish') as folder:
            published = _stage(run_folder, repo_id, weights, license, token, folder)
        return Publication(repo_id, *published, folder=run_folder / 'publish')
    if token is None:
        raise HubError(
            f"Could not publish '{repo_id}': nobody is logged in. Make a token with the right to write at "
            f"https://huggingface.co/settings/tokens, then `hf auth login`, set HF_TOKEN, or pass token.")
    with tempfile.TemporaryDirectory(prefix='timm_dyacts-') as beside:
        folder = Path(beside)
        published = _stage(run_folder, repo_id, weights, license, token, folder)
        target = _Target(repo_id, revision, token)
        message = commit_message or f'Publish {read_config(folder / CONFIG, repo_id)["architecture"]}'
        commit, url = target.upload(folder, message, private, create_pr, overwrite)
    return Publication(repo_id, *published, commit=commit, url=url)


def _stage(
        run_folder: Path,
        repo_id: str,
        weights: str,
        license: str | None,
        token: str | None,
        folder: Path,
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Write all that is to be published into ``folder``. Returns the sizes by name, and what the card lacks."""
    checkpoint = run_folder / _CHECKPOINTS[weights]
    _check_checkpoint(run_folder, checkpoint, weights)
    shutil.copyfile(checkpoint / WEIGHTS, folder / WEIGHTS)
    for pattern in _EXTRAS:
        for path in run_folder.glob(pattern):
            shutil.copyfile(path, folder / path.name)

    model = _load(checkpoint)
    config = read_config(checkpoint / CONFIG, str(checkpoint))
    config['pretrained_cfg'] = filter_pretrained_cfg(
        config.get('pretrained_cfg', {}), remove_source=True, remove_null=False)
    results = _read_results(checkpoint / _RESULTS)
    args = _read_args(run_folder / _OPTIONS)
    requires = dict(timm=f'>={timm.__version__}', timm_dyacts=f'>={__version__}')
    card = render_model_card(
        repo_id,
        model,
        config,
        sha256=sha256(folder / WEIGHTS),
        requires=requires,
        weights=weights,
        results=results,
        args=args,
        files=sorted(path.name for path in folder.iterdir()),
        license=license,
    )
    (folder / CARD).write_text(card, encoding='utf-8')
    config[RECORD] = dict(
        requires=requires,
        sha256={path.name: sha256(path) for path in sorted(folder.iterdir())},
    )
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')

    _check_secrets(folder, token)
    _check_same_function(model, folder, checkpoint)
    remarks = []
    if results is None:
        remarks.append(f'The checkpoint has no {_RESULTS}, so the card shows no results.')
    if not (license or (resolve_start(config, results, args) or {}).get('license')):
        remarks.append('The weights inherit no licence and none was given (--license), so nobody may use them.')
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}, tuple(remarks)


def _check_checkpoint(run_folder: Path, checkpoint: Path, weights: str) -> None:
    missing = [file for file in (CONFIG, WEIGHTS) if not (checkpoint / file).is_file()]
    if not missing:
        return
    complete = [
        name for name, sub in _CHECKPOINTS.items()
        if all((run_folder / sub / file).is_file() for file in (CONFIG, WEIGHTS))
    ]
    there = f'The folder has the weights {", ".join(complete)} (--weights).' if complete else \
        'Give the folder of a run of scripts/train.py. Pickled weights are not published.'
    raise HubError(f"Could not publish the {weights} weights of '{run_folder}': {missing[0]} is missing. {there}")


def _read_results(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    again = 'Run the evaluation again, or remove the file and publish without results.'
    try:
        results = json.loads(path.read_text(encoding='utf-8'))
        missing = [key for key in _RESULTS_KEYS if key not in results]
        missing += [
            f'{key}.{sub}' for key, subs in _RESULTS_KEYS.items() if key in results
            for sub in subs if sub not in results[key]
        ]
        wrong = [f'{key} = {results[key]}' for key in _METRICS if key in results and not math.isfinite(results[key])]
    except (TypeError, ValueError) as e:
        raise HubError(f"Could not publish: '{path}' cannot be read: {summarize(e)}. {again}") from e
    if missing or wrong:
        problem = f'lacks {", ".join(missing)}' if missing else f'has {", ".join(wrong)}'
        raise HubError(f"Could not publish: '{path}' {problem}. {again}")
    return results


def _read_args(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        args = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (ValueError, yaml.YAMLError) as e:
        raise HubError(f"Could not publish: '{path}' is not YAML: {summarize(e)}") from e
    if not isinstance(args, dict):
        raise HubError(f"Could not publish: '{path}' does not hold the options of a run.")
    return args


def _load(folder: Path) -> nn.Module:
    try:
        return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    except Exception as e:
        raise HubError(f"Could not publish '{folder}': it does not load. {summarize(e)}") from e


def _check_secrets(folder: Path, token: str | None) -> None:
    for path in folder.iterdir():
        if path.suffix in ('.csv', '.json', '.md', '.yaml'):
            text = path.read_text(encoding='utf-8', errors='replace')
            if (token and len(token) >= 8 and token in text) or _TOKEN.search(text):
                raise HubError(
                    f'Could not publish: {path.name} of the run folder has a token in it. Nothing was sent. Take the '
                    f'token out, and revoke it if others can read the folder.')


@torch.no_grad()
def _check_same_function(model: nn.Module, folder: Path, checkpoint: Path) -> None:
    """Load back what is to be published, and compare it with what the run left."""
    loaded = _load(folder)
    x = torch.randn(2, *model.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))
    expected, actual = model(x), loaded(x)
    if not expected.isfinite().all():
        raise HubError(f"Could not publish '{checkpoint}': its logits are not finite. Nothing was sent.")
    if not torch.equal(actual, expected):
        raise HubError(
            f"Could not publish '{checkpoint}': loaded back, its logits differ by up to "
            f'{(actual - expected).abs().max():.3g}. Nothing was sent. Is a training still writing to it?')


@contextmanager
def _written_beside(folder: Path) -> Iterator[Path]:
    """Give an empty folder that takes the place of ``folder`` in the end, or leaves no trace."""
    if folder.exists() and not (folder / CONFIG).is_file():
        raise HubError(f"Could not write '{folder}': it is there and not from a dry run. Move it away.")
    if not folder.parent.is_dir():
        raise HubError(f"Could not publish '{folder.parent}': there is no such folder.")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix='.publishing-') as beside:
        new, old = Path(beside, 'new'), Path(beside, 'old')
        new.mkdir()
        yield new
        if folder.exists():
            folder.rename(old)
        new.rename(folder)


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
                f"Published '{self.repo_id}', but in the commit {sha} these files are not what was sent: "
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
