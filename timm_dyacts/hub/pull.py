"""Load a checkpoint from the Hub, and be sure that it is the one that was published."""
import difflib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import hf_hub_download
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from safetensors import SafetensorError, safe_open
from torch import nn

from ..version import __version__
from .errors import ChecksumError, HubError, MissingFileError, check_token, explained, summarize
from .files import CONFIG, PICKLED_WEIGHTS, WEIGHTS, git_sha1, read_config, recorded, sha256

__all__ = ['load', 'verify']

_logger = logging.getLogger(__name__)


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
            own. Where there is neither, a warning says so.
        allow_pickle: Also take weights that are pickled. They are read with torch's ``weights_only``.
        cache_dir: Cache of the downloads, that of ``huggingface_hub`` by default.
        **kwargs: Further arguments of ``timm.create_model``, such as ``num_classes`` or ``features_only``.

    Returns:
        The model. ``model.pretrained_cfg['hf_hub_id']`` names the repo and the commit.

    Raises:
        ChecksumError: The weights are not those that were published.
        HubError: Anything else, from a misspelt name to a connection that broke off.
        ValueError: An argument of the wrong form.

    Source: the client's protocol, https://huggingface.co/docs/huggingface_hub/guides/download
    """
    repo = _Repo.parse(repo_id, revision, token, cache_dir)
    snapshot = _pull(repo, verify=verify, allow_pickle=allow_pickle)
    if verify and not snapshot.verified:
        _logger.warning("There is no checksum to verify the weights of '%s' with.", repo.name)
    try:
        model = timm.create_model(f'local-dir:{snapshot.folder}', pretrained=True, **kwargs)
    except Exception as e:
        remedy = f'Load it without the arguments {kwargs}.' if kwargs else \
            f'{CONFIG} and weights must be of the same model, which the owner of the repo has to put right.'
        raise HubError(
            f"Could not load '{repo.name}': config and weights do not make a '{snapshot.config['architecture']}'. "
            f"{summarize(e)}\n{remedy}"
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
        snapshot = _pull(_Repo.parse(name, None, token, cache_dir), verify=True, allow_pickle=False)
        if not snapshot.verified:
            raise ChecksumError(f"Could not verify '{name}': neither its {CONFIG} nor the cache has a checksum.")
        weights = snapshot.weights
    else:
        folder = Path(name.removeprefix('local-dir:'))
        for file in (CONFIG, WEIGHTS):
            if not (folder / file).is_file():
                raise HubError(f"Could not verify '{folder}': it has no {file}. A folder made by publishing has.")
        weights = folder / WEIGHTS
        expected = recorded(read_config(folder / CONFIG, str(folder)), 'sha256').get(WEIGHTS)
        if expected is None:
            raise ChecksumError(
                f"Could not verify '{folder}': its {CONFIG} records no SHA-256 of {WEIGHTS}. Publishing records it, "
                f"into the Hub's copy and into the folder that a dry run leaves.")
        if sha256(weights) != expected:
            raise ChecksumError(
                f"{WEIGHTS} of '{folder}' is not what was published: its SHA-256 is {sha256(weights)}, on record is "
                f"{expected}. Get the folder anew.")
    return sha256(weights)


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
                library_name='timm_dyacts',
                library_version=__version__,
            ))


@dataclass(frozen=True)
class _Snapshot:
    """What a commit of a repo holds, in the cache."""
    folder: Path
    config: dict[str, Any]
    weights: Path
    verified: bool

    @property
    def commit(self) -> str:
        return self.folder.name


def _pull(repo: _Repo, verify: bool, allow_pickle: bool) -> _Snapshot:
    config_file = _download_config(repo, verify)
    try:
        config = read_config(config_file, repo.name)
    except HubError:
        _discard(config_file)
        raise
    _check_requirements(config, repo.name)
    _check_architecture(config, repo.name)
    _check_classes(config, repo.name)

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
    verified = verify and _verify_weights(weights, config, repo)
    if weights.suffix == '.safetensors':
        _check_safetensors(weights, repo)
    return _Snapshot(config_file.parent, config, weights, verified)


def _download_config(repo: _Repo, verify: bool) -> Path:
    missing = 'A checkpoint for timm has one; is it a model of another library?'
    path = repo.download(CONFIG, missing)
    if verify and _is_intact(path) is False:
        # Damaged on the way or, from a mirror with ETags of its own, not: what comes a second time is what is there.
        content = path.read_bytes()
        _discard(path)
        path = repo.download(CONFIG, missing)
        if _is_intact(path) is False and path.read_bytes() != content:
            _discard(path)
            raise ChecksumError(
                f"{CONFIG} of '{repo.name}' is damaged on its way here, each time differently. It was removed from the "
                f"cache; load again over another connection.")
    return path


def _check_requirements(config: dict[str, Any], name: str) -> None:
    installed = dict(timm=timm.__version__, timm_dyacts=__version__)
    for package, specifier in recorded(config, 'requires').items():
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


def _check_classes(config: dict[str, Any], name: str) -> None:
    """timm takes a contradiction for the wish to have another classifier, and leaves that one untrained."""
    cfg, args = config.get('pretrained_cfg', config), config.get('model_args', {})
    told = {
        'num_classes': config.get('num_classes'),
        'pretrained_cfg.num_classes': cfg.get('num_classes'),
        'model_args.num_classes': args.get('num_classes'),
        'the length of label_names': len(names) if isinstance(names := config.get('label_names'), list) else None,
    }
    told = {k: v for k, v in told.items() if v is not None}
    if len(set(told.values())) > 1:
        raise HubError(
            f"The {CONFIG} of '{name}' contradicts itself about the number of classes: "
            f"{', '.join(f'{k} is {v}' for k, v in told.items())}. Its owner has to publish it again.")


def _verify_weights(path: Path, config: dict[str, Any], repo: _Repo) -> bool:
    """Whether there is something to verify the weights with. Weights that differ from it are an error."""
    expected = recorded(config, 'sha256').get(path.name)
    if expected and sha256(path) == expected:
        return True
    intact = _is_intact(path)
    if not expected and intact is not False:
        return bool(intact)
    problem = 'but what the Hub holds: it was changed there' if intact else 'but damaged on the way'
    actual = sha256(path)
    _discard(path)
    raise ChecksumError(
        f"{path.name} of '{repo.name}' is not what was published {problem}. Its SHA-256 is {actual}, on record is "
        f"{expected or 'another'}. It was removed from the cache. Load again or, if that does not help, load an "
        f"earlier revision or ask the owner of the repo.")


def _is_intact(path: Path) -> bool | None:
    """Compare a file in the cache with its ETag; None if there is none to compare with.

    The client checks the size of what it downloads and no more. It names each file of its cache by the ETag, which is
    the SHA-256 of large files, and git's SHA-1 of the others.
    """
    etag = os.path.basename(os.readlink(path)) if path.is_symlink() else ''
    hash_of = {40: git_sha1, 64: sha256}.get(len(etag))
    return hash_of(path) == etag if hash_of else None


def _check_safetensors(path: Path, repo: _Repo) -> None:
    try:
        with safe_open(path, framework='pt'):
            pass
    except SafetensorError as e:
        _discard(path)
        raise HubError(
            f"{path.name} of '{repo.name}' is truncated or damaged: {summarize(e)}. It was removed from the cache; "
            f"load again or, if that does not help, ask the owner of the repo.") from e


def _discard(path: Path) -> None:
    """Remove a file from the cache: the name in the snapshot, and the content that it links to."""
    if path.is_symlink():
        path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


