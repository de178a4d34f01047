"""Load a checkpoint from the Hub, and be sure that it is the one that was published."""
import logging
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from packaging.version import Version
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..run_folder import CONFIG, PICKLED_WEIGHTS, WEIGHTS, CheckpointFolder
from ..version import needs
from ..weights_file import check_start, classifier_entries, read_weights, wrong_kinds
from ..zoo import find_variant
from ..zoo.weights import COUNTER, recorded_mismatch
from .bounds import check_header, limited_building
from .cache import Repo, discard, is_intact
from .config import check_config, read_config, recorded_sha256
from .errors import ChecksumError, HubError, MissingFileError, shown, summarize
from .hashes import sha256

__all__ = ['find_architecture', 'has_checksum', 'load', 'verify']

_logger = logging.getLogger(__name__)
_LONGEST_NAME = 1000  # of an entry of the weights, in characters


def load(
        repo_id: str,
        *,
        revision: str | None = None,
        token: str | None = None,
        verify: bool = True,
        allow_pickle: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        pretrained: bool = True,
        **kwargs: Any,
) -> nn.Module:
    """Load a model from the Hub: ``timm.create_model('hf-hub:<repo_id>', pretrained=True)`` that trusts nothing.

    Config and weights come from the same commit, even if somebody publishes meanwhile. What is in the cache is not
    downloaded again, and serves when there is no network (or ``HF_HUB_OFFLINE=1``). A damaged file is removed from the
    cache.

    Args:
        repo_id: ``'user/name'``, or ``'user/name@revision'``.
        revision: Branch, tag or commit, ``'main'`` by default.
        token: For private and gated repos. By default the one of ``hf auth login`` or ``HF_TOKEN``.
        verify: Compare the SHA-256 of the weights with the one in the config or, in repos of others, with the Hub's
            own. Where there is neither, a warning says so.
        allow_pickle: Also take weights that are pickled. They are read with torch's ``weights_only``.
        cache_dir: Cache of the downloads, that of ``huggingface_hub`` by default.
        pretrained: Fill the model with the weights. They are had and verified without it as well, since the size of
            their file bounds what is built.
        **kwargs: Further arguments of ``timm.create_model``, such as ``num_classes`` or ``features_only``.

    Returns:
        The model. ``model.pretrained_cfg['hf_hub_id']`` names the repo and the commit.

    Raises:
        ChecksumError: The weights are not those that were published.
        HubError: Anything else, from a misspelt name to a connection that broke off.
        ImportError: ``allow_pickle`` with PyTorch before 2.6, where ``weights_only`` does not keep code from running.
        ValueError: An argument of the wrong form.

    Source: the client's protocol, https://huggingface.co/docs/huggingface_hub/guides/download
    """
    repo = Repo.parse(repo_id, revision, token, cache_dir)
    snapshot = _pull(repo, verify=verify, allow_pickle=allow_pickle)
    if verify and not snapshot.verified:
        _logger.warning("There is no checksum to verify the weights of '%s' with.", repo.name)
    kwargs = {key: value for key, value in kwargs.items() if value is not None}  # to which timm's default applies
    try:
        given = _read_weights(snapshot.weights) if pretrained else {}
        with limited_building(snapshot.weights), recorded_mismatch() as (absent, _):
            model = timm.create_model(f'local-dir:{snapshot.folder}', pretrained=pretrained, **kwargs)
        if pretrained:
            _check_filled(model, snapshot, given, absent, adapted=bool(kwargs))
    except Exception as e:
        remedy = f'Load it without the arguments {kwargs}.' if kwargs else \
            f'{CONFIG} and weights must be of the same model, which the owner of the repo has to put right.'
        raise HubError(
            f"Could not load '{repo.name}': config and weights do not make a '{snapshot.architecture}'. "
            f"{summarize(e)}\n{remedy}"
        ) from e
    model.pretrained_cfg.pop('file', None)
    model.pretrained_cfg.update(source='hf-hub', hf_hub_id=f'{repo.repo_id}@{snapshot.commit}')
    return model


def find_architecture(name: str) -> str:
    """Give the architecture of a repo, ``'user/name'`` or ``'user/name@revision'``, without its weights.

    Raises:
        HubError: Its config could not be had, or is none that ``load`` takes.
    """
    config, _ = _pull_config(Repo.parse(name), verify=True)
    return config['architecture']


def verify(name: str, *, token: str | None = None, cache_dir: str | os.PathLike[str] | None = None) -> str:
    """Check the weights of a published checkpoint against the SHA-256 that was published with them.

    Args:
        name: ``'hf-hub:user/name'``, with ``'@revision'`` or without, or the path of a folder, with ``'local-dir:'`` or
            without.
        token: As for ``load``.
        cache_dir: As for ``load``.

    Returns:
        The SHA-256 of the weights.

    Raises:
        ChecksumError: They differ, or no SHA-256 is on record.
        HubError: The checkpoint could not be had.
    """
    if not name.startswith('hf-hub:'):
        return _verify_folder(CheckpointFolder(name.removeprefix('local-dir:')))
    snapshot = _pull(Repo.parse(name, token=token, cache_dir=cache_dir), verify=True, allow_pickle=False)
    if not snapshot.verified:
        raise ChecksumError(f"Could not verify '{name}': neither its {CONFIG} nor the cache has a checksum.")
    return sha256(snapshot.weights)


def has_checksum(folder: str) -> bool:
    """Say whether a folder, with ``'local-dir:'`` or without, has what ``verify`` compares with: it was published."""
    config = CheckpointFolder(folder.removeprefix('local-dir:')).config
    return config.is_file() and recorded_sha256(read_config(config, folder), WEIGHTS, folder) is not None


def _verify_folder(folder: CheckpointFolder) -> str:
    for file in folder.missing():
        raise HubError(f"Could not verify '{folder}': it has no {file}. A folder made by publishing has.")
    expected = recorded_sha256(read_config(folder.config, str(folder)), WEIGHTS, str(folder))
    if expected is None:
        raise ChecksumError(
            f"Could not verify '{folder}': its {CONFIG} records no SHA-256 of {WEIGHTS}. Publishing records it, in the "
            f"Hub's copy and in the folder that a dry run leaves.")
    actual = sha256(folder.weights)
    if actual != expected:
        raise ChecksumError(
            f"{WEIGHTS} of '{folder}' is not what was published: its SHA-256 is {actual}, on record is {expected}. Get "
            f"the folder anew.")
    return actual


@dataclass(frozen=True)
class _Snapshot:
    """A checkpoint of a commit, in the cache.

    Attributes:
        weights: Its weights; ``config.json`` lies beside them.
        architecture: Its model.
        verified: Whether there was something to verify the weights with.
    """
    weights: Path
    architecture: str
    verified: bool

    @property
    def folder(self) -> Path:
        return self.weights.parent

    @property
    def commit(self) -> str:
        return self.folder.name


def _pull_config(repo: Repo, verify: bool) -> tuple[dict[str, Any], Path]:
    """Have the config of a repo, and the file that holds it, in the folder of a commit."""
    config_file = _download_config(repo, verify)
    try:
        config = read_config(config_file, repo.name)
    except HubError:
        discard(config_file)
        raise
    check_config(config, repo.name)
    return config, config_file


def _pull(repo: Repo, verify: bool, allow_pickle: bool) -> _Snapshot:
    config, config_file = _pull_config(repo, verify)
    weights = _download_weights(repo, config_file.parent.name, allow_pickle)
    verified = verify and _verify_weights(weights, recorded_sha256(config, weights.name, repo.name), repo)
    if weights.suffix == '.safetensors':
        _check_safetensors(weights, repo)
    return _Snapshot(weights, config['architecture'], verified)


def _download_config(repo: Repo, verify: bool) -> Path:
    missing = 'A checkpoint for timm has one; is it a model of another library?'
    path = repo.download(CONFIG, missing)
    if verify and is_intact(path) is False:
        # It was damaged on the way, or the mirror has ETags of its own: what comes twice is what is there.
        content = path.read_bytes()
        discard(path)
        path = repo.download(CONFIG, missing)
        if is_intact(path) is False and path.read_bytes() != content:
            discard(path)
            raise ChecksumError(
                f"{CONFIG} of '{repo.name}' is damaged on its way here, each time differently. It was removed from the "
                f"cache; load again over another connection.")
    return path


def _download_weights(repo: Repo, commit: str, allow_pickle: bool) -> Path:
    try:
        return repo.download(
            WEIGHTS,
            'Pickled weights can run code while they are loaded, so they are only taken if asked for, in Python: '
            'timm_dyacts.hub.load(..., allow_pickle=True).',
            commit,
        )
    except MissingFileError:
        if not allow_pickle:
            raise
        if Version(torch.__version__) < Version('2.6'):  # CVE-2025-32434: code can run in spite of weights_only
            raise needs('allow_pickle=True', 'torch', '2.6', torch.__version__) from None
        return repo.download(PICKLED_WEIGHTS, 'Ask the owner of the repo for weights.', commit)


def _verify_weights(path: Path, expected: str | None, repo: Repo) -> bool:
    """Say whether there is something to verify the weights with, and raise an error if they differ from it.

    Args:
        path: The weights.
        expected: Their SHA-256 on record, ``None`` if there is none.
        repo: Where they come from.
    """
    if expected and sha256(path) == expected:
        return True
    intact = is_intact(path)
    if not expected and intact is not False:
        return bool(intact)
    problem = 'it was changed there' if intact else 'it was damaged on the way'
    actual = sha256(path)
    discard(path)
    raise ChecksumError(
        f"{path.name} of '{repo.name}' is not what was published: {problem}. Its SHA-256 is {actual}, on record is "
        f"{expected or 'another'}. It was removed from the cache. Load again or, if that does not help, load an "
        f"earlier revision or ask the owner of the repo.")


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Read weights, and refuse what timm would take without a word, or quote in its log as it is.

    Raises:
        ValueError: They are not finite, not floating-point numbers, or have names that a terminal would obey.
    """
    given = read_weights(path, path.name)
    for key in given:
        if not key.isprintable() or len(key) > _LONGEST_NAME:
            raise ValueError(f'{path.name} has an entry {shown(key)}, which is no name of one.')
    return given


def _check_filled(
        model: nn.Module,
        snapshot: _Snapshot,
        given: dict[str, Tensor],
        absent: Collection[str],
        adapted: bool,
) -> None:
    """Raise ``ValueError`` if weights have not filled a model as timm lets them: integers, or less than the whole.

    Args:
        model: The model.
        snapshot: What it was made from.
        given: The weights.
        absent: The entries that were not in them.
        adapted: Whether it was asked for with arguments, with which a part of it may start anew.
    """
    name = snapshot.weights.name
    for key in sorted(wrong_kinds(given, model)):
        if not given[key].is_floating_point():  # the reverse is an average of checkpoints, with counters in it
            raise ValueError(f'{name} must hold floating-point weights, and {key!r} is {given[key].dtype}.')
    if find_variant(snapshot.architecture) is not None:
        return  # which is filled or refused
    if adapted:
        check_start(model, absent, name, str(snapshot.weights))
        return
    head = classifier_entries(model)
    for key in model.state_dict().keys() & set(absent) - set(head):
        if not key.endswith(COUNTER):
            raise ValueError(f'{name} lacks {key!r}.')


def _check_safetensors(path: Path, repo: Repo) -> None:
    check_header(path, repo.name)
    try:
        with safe_open(path, framework='pt'):
            pass
    except SafetensorError as e:
        discard(path)
        raise HubError(
            f"{path.name} of '{repo.name}' is truncated or damaged: {summarize(e)}. It was removed from the cache; "
            f"load again or, if that does not help, ask the owner of the repo.") from e
