"""Put together from a run folder what is to be published, and load it back before anybody sees it."""
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from timm.models._pretrained import filter_pretrained_cfg
from torch import nn

from ..card import render_model_card, resolve_start
from ..version import __version__
from .errors import HubError, summarize
from .files import CARD, CONFIG, RECORD, WEIGHTS, read_config, sha256

__all__ = ['CHECKPOINTS', 'stage', 'written_beside']

CHECKPOINTS = dict(best='.', ema='ema', last='last')  # folders within a run folder
_RESULTS = 'results.json'
_OPTIONS = 'args.yaml'
# Not all pictures of a run: some show images of its data, which may not be for everybody.
_EXTRAS = (_OPTIONS, 'summary.csv', 'curves.png', 'confusion.png', 'dyrelu.png')
_METRICS = ('top1', 'top5', 'loss')
# What the card is made of, and what of it has parts.
_RESULTS_KEYS = dict.fromkeys((*_METRICS, 'dataset', 'split', 'num_images', 'date', 'versions'), ()) | dict(
    preprocessing=('input_size', 'interpolation', 'mean', 'std', 'crop_pct'),
    start=('model', 'pretrained', 'source', 'license', 'warm_start', 'kd_model'),
)
_TOKEN = re.compile(r'\bhf_[A-Za-z0-9]{20,}')


def stage(
        run_folder: Path,
        repo_id: str,
        weights: str,
        license: str | None,
        token: str | None,
        folder: Path,
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Write all that is to be published into ``folder``. Returns the sizes by name, and what the card lacks."""
    checkpoint = run_folder / CHECKPOINTS[weights]
    _check_checkpoint(run_folder, checkpoint, weights)
    shutil.copyfile(checkpoint / WEIGHTS, folder / WEIGHTS)
    for name in _EXTRAS:
        if (run_folder / name).is_file():
            shutil.copyfile(run_folder / name, folder / name)

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
        name for name, sub in CHECKPOINTS.items()
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
