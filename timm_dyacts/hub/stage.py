"""Put together from a run folder what is to be published, and load it back before anybody sees it."""
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from ..card import render_model_card, resolve_start
from ..convert import get_transition
from ..privacy import reduced
from ..run_folder import (
    CARD,
    CONFIG,
    OPTIONS,
    PUBLISHED_EXTRAS,
    RESULTS,
    WEIGHTS,
    CheckpointFolder,
    RunFolder,
    Start,
    how_to_finish,
)
from ..version import unsupported
from .bounds import check_arguments
from .config import RECORD, read_config, requirements
from .errors import HubError, summarize
from .hashes import sha256

try:
    from timm.models import filter_pretrained_cfg
except ImportError as e:
    raise unsupported('timm', timm.__version__, f'what takes local paths out of a config ({e})') from e

__all__ = ['Staged', 'stage', 'written_beside']

_TOKEN = re.compile(r'\bhf_[A-Za-z0-9]{20,}')


@dataclass(frozen=True)
class Staged:
    """What lies ready to be published.

    Attributes:
        architecture: The model.
        files: Size in bytes by file name.
        remarks: What the card lacks, and what of the options others do not see.
    """
    architecture: str
    files: dict[str, int]
    remarks: tuple[str, ...]


def stage(
        run: RunFolder,
        repo_id: str,
        weights: str,
        license: str | None,
        token: str | None,
        folder: Path,
) -> Staged:
    """Write all that is to be published, and check that it gives the model that the run left.

    Args:
        run: The run.
        repo_id: Where it is to be published.
        weights: Which of its checkpoints.
        license: Licence of weights that inherit none.
        token: Must not be in any of the files.
        folder: An empty folder, where to write.

    Raises:
        HubError: The run cannot be published.
        ValueError: A ``license`` other than the inherited one.
    """
    checkpoint = run.checkpoint(weights)
    _check_complete(run, weights)
    try:
        results, options, recipe = checkpoint.read_results(), run.read_options(), run.read_recipe()
    except ValueError as e:
        raise HubError(f'Could not publish: {e}') from e
    shutil.copyfile(checkpoint.weights, folder / WEIGHTS)
    for name in PUBLISHED_EXTRAS:
        if name != OPTIONS and (run.path / name).is_file():
            _check_inside(run.path / name, run)
            shutil.copyfile(run.path / name, folder / name)
    if recipe is not None:
        RunFolder(folder).write_options(recipe, run.read_notes())

    config = _read_config(checkpoint)
    model = _load(checkpoint)
    _check_finished(model, checkpoint)
    config['pretrained_cfg'] = filter_pretrained_cfg(
        config.get('pretrained_cfg', {}), remove_source=True, remove_null=False)
    config = _without_folders(config)
    try:
        start = resolve_start(config, results, options)
    except ValueError as e:
        raise HubError(
            f"Could not publish '{checkpoint}': what {CONFIG} and '{run.options}' tell of its start {e}. Correct "
            f"it.") from e
    card = render_model_card(
        repo_id,
        model,
        config,
        sha256=sha256(folder / WEIGHTS),
        requires=requirements(),
        weights=weights,
        results=results and replace(results, dataset=reduced(results.dataset), split=reduced(results.split)),
        start=start and _start_for_others(start, options or {}),
        options=recipe,
        files=_names(folder),
        license=license,
    )
    (folder / CARD).write_text(card, encoding='utf-8')
    config[RECORD] = dict(requires=requirements(), sha256={name: sha256(folder / name) for name in _names(folder)})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')

    _check_secrets([*folder.iterdir(), run.options], token)
    _check_same_function(model, CheckpointFolder(folder), checkpoint)
    remarks = _privacy_remarks(options or {}, recipe or {})
    if results is None:
        remarks.append(f'The checkpoint has no {RESULTS}, so the card shows no results.')
    if not (license or (start and start.license)):
        remarks.append('The weights inherit no licence and none was given (--license), so nobody may use them.')
    sizes = {name: (folder / name).stat().st_size for name in _names(folder)}
    return Staged(config['architecture'], sizes, tuple(remarks))


def _without_folders(config: dict[str, Any]) -> dict[str, Any]:
    """Give a config without paths of this machine. Names of classes are what they are: some begin with a slash."""
    kept = {key: config[key] for key in ('label_names', 'label_descriptions') if key in config}
    arguments = {'model_args': reduced(config['model_args'])} if 'model_args' in config else {}
    return reduced(config, names=True) | arguments | kept


def _start_for_others(start: Start, options: Mapping[str, Any]) -> Start:
    files = [options.get(name) for name in ('initial_checkpoint', 'pretrained_path')]
    source = start.source
    if source is not None:
        is_file = source in files or source.endswith(('.safetensors', '.pth', '.pt', '.bin'))
        source = reduced(source, names=not is_file)
    kd_model = start.kd_model and reduced(start.kd_model)
    return replace(start, model=reduced(start.model), source=source, kd_model=kd_model)


def _privacy_remarks(options: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[str]:
    """Say how the published options differ from those of the run."""
    left_out = [name for name, value in options.items() if name not in recipe and value not in (None, False, [], '')]
    shortened = [f'{name} is {recipe[name]!r}' for name in recipe if recipe[name] != options[name]]
    remarks = [f'{OPTIONS} is published without {", ".join(left_out)}.'] if left_out else []
    return remarks + ([f'{OPTIONS} is published without folders: {", ".join(shortened)}.'] if shortened else [])


def _check_inside(path: Path, run: RunFolder) -> None:
    """Refuse a link that leads out of a run folder, which somebody may have sent, to what is nobody's business."""
    if not path.resolve().is_relative_to(run.path.resolve()):
        raise HubError(
            f"Could not publish '{run}': its {path.name} is a link to '{path.resolve()}', which is outside. Put the "
            f"file itself there, or remove the link.")


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _check_complete(run: RunFolder, weights: str) -> None:
    missing = run.checkpoint(weights).missing()
    if missing:
        complete = run.checkpoints()
        there = f'The folder has the weights {", ".join(complete)} (--weights).' if complete else \
            'Give the folder of a run of `timm-dyacts train`. Pickled weights are not published.'
        raise HubError(f"Could not publish the {weights} weights of '{run}': {missing[0]} is missing. {there}")


def _check_finished(model: nn.Module, checkpoint: CheckpointFolder) -> None:
    t = get_transition(model)
    if t is not None:
        raise HubError(
            f"Could not publish '{checkpoint}': its transition is not finished (t = {t:.4g}), so it is not yet the "
            f'model that its name says. {how_to_finish(str(checkpoint), t)}')


def _read_config(checkpoint: CheckpointFolder) -> dict[str, Any]:
    try:
        config = read_config(checkpoint.config, str(checkpoint))
        check_arguments(config, str(checkpoint))
    except HubError as e:
        raise HubError(f"Could not publish '{checkpoint}': it does not load. {e}") from e
    return config


def _load(folder: CheckpointFolder) -> nn.Module:
    try:
        return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    except Exception as e:
        raise HubError(f"Could not publish '{folder}': it does not load. {summarize(e)}") from e


def _check_secrets(paths: Iterable[Path], token: str | None) -> None:
    for path in paths:
        if path.suffix in ('.csv', '.json', '.md', '.yaml') and path.is_file():
            text = path.read_text(encoding='utf-8', errors='replace')
            if (token and len(token) >= 8 and token in text) or _TOKEN.search(text):
                raise HubError(
                    f'Could not publish: {path.name} of the run folder has a token in it. Nothing was sent. Take the '
                    f'token out, and revoke it if others can read the folder.')


@torch.no_grad()
def _check_same_function(model: nn.Module, folder: CheckpointFolder, checkpoint: CheckpointFolder) -> None:
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
def written_beside(folder: Path) -> Iterator[Path]:
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
