"""Share models over the Hugging Face Hub: load what was published, and be sure that it is that.

A published checkpoint is a repo with ``model.safetensors`` and timm's ``config.json``, so that a plain
``timm.create_model('hf-hub:user/name', pretrained=True)`` loads it. The config holds one entry more, which timm passes
over and ``load`` checks: the versions that the model needs and the SHA-256 of what was published::

    "timm_dyacts": {
        "requires": {"timm": ">=1.0.31", "timm_dyacts": ">=0.1.0"},
        "sha256": {"README.md": "...", "model.safetensors": "..."}
    }
"""
import difflib
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import constants, get_token, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from safetensors import SafetensorError, safe_open
from torch import nn

from .version import __version__

__all__ = ['ChecksumError', 'HubError', 'MissingFileError', 'load', 'verify']

CARD = 'README.md'
CONFIG = 'config.json'
WEIGHTS = 'model.safetensors'
PICKLED_WEIGHTS = 'pytorch_model.bin'
RECORD = 'timm_dyacts'  # our entry in config.json

_CLIENT = dict(library_name='timm_dyacts', library_version=__version__)


class HubError(OSError):
    """Something could not be had from the Hub, or not be put there. The message names the repo and the remedy."""


class ChecksumError(HubError):
    """A file is not the one that was published."""


class MissingFileError(HubError):
    """The repo is there, the file is not."""


def load(
        repo_id: str,
        *,
        revision: str | None = None,
        token: str | None = None,
        verify: bool = True,
        allow_pickle: bool = False,
        cache_dir: str | os.PathLike | None = None,
        **kwargs: Any,
) -> nn.Module:
    """Load a model from the Hub: ``timm.create_model('hf-hub:<repo_id>', pretrained=True)`` that trusts nothing.

    Config and weights come from the same commit, even if somebody publishes meanwhile. What is in the cache is not
    downloaded again, and serves when there is no network (or ``HF_HUB_OFFLINE=1``). A damaged file is removed from the
    cache.

    Args:
        repo_id: 'user/name', or 'user/name@revision'.
        revision: Branch, tag or commit, 'main' by default.
        token: For private and gated repos. By default the one of ``hf auth login`` or ``HF_TOKEN``.
        verify: Compare the SHA-256 of the weights with the one in the config or, in repos of others, with the Hub's
            own. Files that the Hub keeps in git have no SHA-256 but git's hash.
        allow_pickle: Also take weights that are pickled. They are read with torch's ``weights_only``.
        cache_dir: Cache of the downloads, that of ``huggingface_hub`` by default.
        **kwargs: Further arguments of ``timm.create_model``, such as ``num_classes`` or ``features_only``.

    Returns:
        The model. ``model.pretrained_cfg['hf_hub_id']`` names the repo and the commit.

    Raises:
        ChecksumError: The weights are not those that were published, or there is nothing to check them against.
        HubError: Anything else, from a misspelt name to a connection that broke off.
        ValueError: An argument of the wrong form.

    Source: the client's protocol, https://huggingface.co/docs/huggingface_hub/guides/download
    """
    repo = _Repo.parse(repo_id, revision, token, cache_dir)
    snapshot = _pull(repo, verify=verify, allow_pickle=allow_pickle)
    try:
        model = timm.create_model(f'local-dir:{snapshot.folder}', pretrained=True, **kwargs)
    except Exception as e:
        remedy = f'Load it without the arguments {kwargs}.' if kwargs else \
            f'{CONFIG} and weights must be of the same model, which the owner of the repo has to put right.'
        raise HubError(
            f"Could not load '{repo.name}': config and weights do not make a '{snapshot.config['architecture']}'. "
            f"{_summary(e)}\n{remedy}"
        ) from e
    model.pretrained_cfg.pop('file', None)
    model.pretrained_cfg.update(source='hf-hub', hf_hub_id=f'{repo.repo_id}@{snapshot.commit}')
    return model


def verify(name: str, *, token: str | None = None, cache_dir: str | os.PathLike | None = None) -> str:
    """Check the weights of a published checkpoint against the SHA-256 that was published with them.

    Args:
        name: 'hf-hub:user/name', with '@revision' or without, or the path of a folder, with 'local-dir:' or without.
        token: As for ``load``.
        cache_dir: As for ``load``.

    Returns:
        The SHA-256 of the weights.

    Raises:
        ChecksumError: They differ, or no SHA-256 is on record.
        HubError: The checkpoint could not be had.
    """
    if name.startswith('hf-hub:'):
        weights = _pull(_Repo.parse(name, None, token, cache_dir), verify=True, allow_pickle=False).weights
    else:
        folder = Path(name.removeprefix('local-dir:'))
        for file in (CONFIG, WEIGHTS):
            if not (folder / file).is_file():
                raise HubError(f"Could not verify '{folder}': it has no {file}. A folder made by publishing has.")
        weights = folder / WEIGHTS
        recorded = recorded_checksum(_read_config(folder / CONFIG, str(folder)), WEIGHTS)
        if recorded is None:
            raise ChecksumError(
                f"Could not verify '{folder}': its {CONFIG} records no SHA-256 of {WEIGHTS}. Publishing records it, "
                f"into the Hub's copy and into the folder that a dry run leaves.")
        if sha256(weights) != recorded:
            raise ChecksumError(_mismatch(str(folder), WEIGHTS, sha256(weights), recorded) + ' Get the folder anew.')
    return sha256(weights)


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while chunk := f.read(2 ** 20):
            digest.update(chunk)
    return digest.hexdigest()


def git_sha1(path: str | os.PathLike) -> str:
    """The name that git gives to the content of a file."""
    content = Path(path).read_bytes()
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


def recorded_checksum(config: dict[str, Any], name: str) -> str | None:
    """The SHA-256 that a config has on record for the file ``name``."""
    return _entry(_entry(config, RECORD), 'sha256').get(name)


def _entry(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class _Repo:
    """A repo at a revision, and how to get at it."""
    repo_id: str
    revision: str | None = None
    token: str | None = None
    cache_dir: str | os.PathLike | None = None

    @classmethod
    def parse(cls, name: str, revision: str | None, token: str | None, cache_dir: str | os.PathLike | None) -> '_Repo':
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
        """Have a file in the cache; ``missing`` is the remedy if the repo does not have it."""
        with explained(f"Could not load '{self.name}'", self.repo_id, self.token, missing):
            return Path(hf_hub_download(
                self.repo_id,
                filename,
                revision=commit or self.revision,
                token=self.token,
                cache_dir=self.cache_dir,
                **_CLIENT,
            ))


@dataclass(frozen=True)
class _Snapshot:
    """What a commit of a repo holds, in the cache."""
    folder: Path
    config: dict[str, Any]
    weights: Path

    @property
    def commit(self) -> str:
        return self.folder.name


def _pull(repo: _Repo, verify: bool, allow_pickle: bool) -> _Snapshot:
    config_file = repo.download(CONFIG, 'A checkpoint for timm has one; is it a model of another library?')
    if verify:
        _verify_download(config_file, repo)
    config = _read_config(config_file, repo.name)
    _check_requirements(config, repo.name)
    _check_architecture(config, repo.name)

    commit = config_file.parent.name
    try:
        weights = repo.download(
            WEIGHTS,
            'Pickled weights can run code while they are loaded, so they are only taken if asked for: '
            'allow_pickle=True.',
            commit,
        )
    except MissingFileError:
        if not allow_pickle:
            raise
        weights = repo.download(PICKLED_WEIGHTS, 'Ask the owner of the repo for weights.', commit)
    if verify:
        _verify_weights(weights, config, repo)
    if weights.suffix == '.safetensors':
        _check_safetensors(weights, repo)
    return _Snapshot(config_file.parent, config, weights)


def _read_config(path: Path, name: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as e:
        raise HubError(f"The {CONFIG} of '{name}' is not JSON: {_summary(e)}. Its owner has to publish it again.") from e
    if not isinstance(config, dict) or not isinstance(config.get('architecture'), str):
        raise HubError(
            f"The {CONFIG} of '{name}' names no architecture, so it is not one of timm's. Is it a model of another "
            f"library?")
    return config


def _check_requirements(config: dict[str, Any], name: str) -> None:
    installed = dict(timm=timm.__version__, timm_dyacts=__version__)
    for package, specifier in _entry(_entry(config, RECORD), 'requires').items():
        try:
            fits = package not in installed or SpecifierSet(specifier).contains(installed[package], prereleases=True)
        except (InvalidSpecifier, TypeError, AttributeError):
            raise HubError(
                f"The {CONFIG} of '{name}' asks for {package} {specifier!r}, which is no version specifier. Its owner "
                f"has to publish it again.") from None
        if not fits:
            raise HubError(
                f"'{name}' needs {package} {specifier}, and {installed[package]} is installed: "
                f"pip install --upgrade '{package}{specifier}'")


def _check_architecture(config: dict[str, Any], name: str) -> None:
    architecture = config['architecture']
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f' Close names: {", ".join(close)}.' if close else ''
        raise HubError(
            f"Could not load '{name}': its architecture {architecture!r} is known neither to timm {timm.__version__} "
            f"nor to timm_dyacts {__version__}.{hint} A newer version may know it: "
            f"pip install --upgrade timm timm_dyacts")


def _verify_weights(path: Path, config: dict[str, Any], repo: _Repo) -> None:
    recorded = recorded_checksum(config, path.name)
    if recorded is None:
        if not _verify_download(path, repo):
            raise ChecksumError(
                f"Could not verify {path.name} of '{repo.name}': neither its {CONFIG} nor the cache has a checksum. To "
                f"load it all the same: verify=False.")
    elif (actual := sha256(path)) != recorded:
        intact = _verify_download(path, repo)  # raises if the download is to blame, not the repo
        _discard(path)
        whose = 'The Hub holds the very same file, so it was changed after it was published' if intact else \
            'Either the download was damaged or the file was changed after it was published'
        raise ChecksumError(
            f'{_mismatch(repo.name, path.name, actual, recorded)} {whose}. It was removed from the cache; load again '
            f'or, if that does not help, load an earlier revision or ask the owner of the repo.')


def _verify_download(path: Path, repo: _Repo) -> bool:
    """Compare a file in the cache with its ETag. Returns whether there is one.

    The client checks the size of what it downloads and no more. It names each file of its cache by the ETag, which is
    the SHA-256 of large files, and git's SHA-1 of the others.
    """
    etag = os.path.basename(os.readlink(path)) if path.is_symlink() else ''
    if len(etag) == 64:
        actual = sha256(path)
    elif len(etag) == 40:
        actual = git_sha1(path)
    else:
        return False
    if actual != etag:
        _discard(path)
        raise ChecksumError(
            f'{_mismatch(repo.name, path.name, actual, etag)} The download was damaged. It was removed from the cache; '
            f'load again.')
    return True


def _check_safetensors(path: Path, repo: _Repo) -> None:
    try:
        with safe_open(path, framework='pt'):
            pass
    except SafetensorError as e:
        _discard(path)
        raise HubError(
            f"{path.name} of '{repo.name}' is truncated or damaged: {_summary(e)}. It was removed from the cache; load "
            f"again or, if that does not help, ask the owner of the repo.") from e


def _mismatch(name: str, file: str, actual: str, expected: str) -> str:
    return f"{file} of '{name}' is not what was published: its hash is {actual}, on record is {expected}."


def _discard(path: Path) -> None:
    """Remove a file from the cache: the name in the snapshot, and the content that it links to."""
    if path.is_symlink():
        path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def check_token(token: str | None) -> str | None:
    """Returns a token without white space around it; the HTTP library would quote an impossible one in its error."""
    if token is None:
        return None
    token = token.strip()
    if not token or not all('!' <= char <= '~' for char in token):
        raise ValueError("token must be a token of the Hub, as from https://huggingface.co/settings/tokens; got "
                         "something else, which is not repeated here.")
    return token


@contextmanager
def explained(what: str, repo_id: str, token: str | None, missing: str = '') -> Iterator[None]:
    """Turn what the client raises into a `HubError` with a remedy.

    The errors of the client have no base in common: they come from its HTTP library, from the file system, and from
    what it finds in an answer. The server's words are part of them, so the token is taken out.
    """
    try:
        yield
    except Exception as e:
        message = f'{what}: {type(e).__name__}: {_summary(e)}\n{_remedy(e, repo_id, missing)}'
        for secret in {token, get_token()} - {None}:
            message = message.replace(secret, '<token>')
        error = (MissingFileError if isinstance(e, RemoteEntryNotFoundError) else HubError)(message)
    else:
        return
    raise error  # out here it drags along no traceback of the client's, with the server's words in it


def _remedy(error: Exception, repo_id: str, missing: str) -> str:
    causes = list(_chain(error))
    status = next((e.response.status_code for e in causes if getattr(e, 'response', None) is not None), None)
    page = f'{constants.ENDPOINT}/{repo_id}'

    def is_a(kind: type[Exception]) -> bool:
        return any(isinstance(e, kind) for e in causes)

    if is_a(OfflineModeIsEnabled):
        return 'HF_HUB_OFFLINE is set, and the cache does not have it. Load it once with network, or unset HF_HUB_OFFLINE.'
    if is_a(GatedRepoError):
        return f'Ask for access at {page} and log in as the one who has it: hf auth login, or HF_TOKEN.'
    if is_a(RevisionNotFoundError):
        return f'Give a branch, tag or commit that {page} lists.'
    if is_a(RemoteEntryNotFoundError):
        return missing
    if is_a(RepositoryNotFoundError):
        return (
            'Check the spelling. A private repo is shown only to whoever has access: log in with `hf auth login`, set '
            'HF_TOKEN, or pass token.')
    if is_a(HFValidationError):
        return "Give the repo as 'user/name'."
    if status == 401:
        return 'The token is missing or no longer valid. Log in with `hf auth login`, set HF_TOKEN, or pass token.'
    if status == 403:
        return f'The token may not do that. Use one with the rights for {page}.'
    if status in (409, 412):
        return 'Somebody else changed the repo at the same moment. Look at what is there, then do it again.'
    if status == 429:
        return 'The Hub limits how often one may ask. Wait some minutes and do it again; with a token one may ask more.'
    if status is not None and status >= 500:
        return 'The Hub has a problem of its own (https://status.huggingface.co). Do it again later.'
    return (
        'If there is no network, or it broke off, do it again later. A mirror of the Hub is used if its address stands '
        'in the environment variable HF_ENDPOINT.')


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _summary(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    summary = ' '.join(lines[:2]) or type(error).__name__
    return summary if len(summary) <= 400 else f'{summary[:400]} ...'
