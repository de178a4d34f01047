"""The card of a published checkpoint: what the model is, how good it was measured to be, nothing that nobody measured.

A card is rendered from data: publishing again after another run renews it. The metadata on top of it follow
https://huggingface.co/docs/hub/model-cards.
"""
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from timm.models import get_pretrained_cfg, is_model
from torch import nn

from .. import zoo
from ..messages import one_line
from ..operators import Paper, operator_parameters, papers
from ..run_folder import Results, Start
from .render import TIMM_CITATION, as_text, render
from .size import measure_size

__all__ = ['render_model_card', 'resolve_start']

# Those of timm's licences that the Hub knows by this name. Any other is "other" with a ``license_name``.
_HUB_LICENSES = {
    'apache-2.0', 'apple-amlr', 'apple-ascl', 'bsd-3-clause', 'cc-by-4.0', 'cc-by-nc-4.0', 'cc-by-nc-sa-4.0',
    'cc-by-sa-4.0', 'cc0-1.0', 'gemma', 'mit', 'unknown',
}
# The options of a run that make up its recipe, the most important first.
_RECIPE = (
    'model', 'pretrained', 'epochs', 'batch_size', 'grad_accum_steps', 'opt', 'lr', 'weight_decay', 'layer_decay',
    'clip_grad', 'sched', 'warmup_epochs', 'min_lr', 'scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'aa', 'reprob',
    'mixup', 'cutmix', 'smoothing', 'drop', 'drop_path', 'model_ema', 'kd_model', 'amp', 'seed',
)
_WEIGHTS = dict(
    best='of the best epoch',
    ema='averaged over training (exponential moving average)',
    last='of the last epoch',
)


def resolve_start(
        config: Mapping[str, Any],
        results: Results | None,
        options: Mapping[str, Any] | None,
) -> Start | None:
    """Find out what a run started from: from its results or, without any, from its config and options.

    Args:
        config: Content of ``config.json``.
        results: Content of ``results.json``, if there is one.
        options: Content of ``args.yaml``, if there is one.

    Returns:
        The start, None if nothing tells.

    Raises:
        ValueError: An entry of the config or the options has the wrong type.
    """
    if results is not None:
        return results.start
    if options is None:
        return None
    architecture, cfg = config['architecture'], config.get('pretrained_cfg', {})
    file = options.get('pretrained_path')
    pretrained = bool(options.get('pretrained') or file)
    name = f'{architecture}.{cfg["tag"]}' if cfg.get('tag') else architecture
    registered = get_pretrained_cfg(name, allow_unregistered=True) if is_model(architecture) else None
    return Start.from_dict(dict(
        model=options.get('model', architecture),
        pretrained=pretrained,
        source=file or (registered.hf_hub_id if registered and pretrained else None),
        license=cfg.get('license') if pretrained and not file else None,
        warm_start=_warm_start(architecture, options) if pretrained else None,
        kd_model=options.get('kd_model'),
    ))


def _warm_start(architecture: str, options: Mapping[str, Any]) -> str | None:
    """Tell how a pretrained run started. One with a transition did so exactly, whatever its operator."""
    return 'exact' if options.get('transition_epochs') else zoo.resolve_warm_start(architecture)


def render_model_card(
        repo_id: str,
        model: nn.Module,
        config: Mapping[str, Any],
        *,
        sha256: str,
        requires: Mapping[str, str],
        weights: str = 'best',
        results: Results | None = None,
        start: Start | None = None,
        options: Mapping[str, Any] | None = None,
        files: Sequence[str] = (),
        license: str | None = None,
) -> str:
    """Write the card of a checkpoint.

    Args:
        repo_id: Where it is published.
        model: The model, with its weights.
        config: Content of its ``config.json``.
        sha256: SHA-256 of its weights.
        requires: Version specifiers by package.
        weights: Which of the run's checkpoints it is: ``'best'``, ``'ema'`` or ``'last'``.
        results: How good it is, if that was measured.
        start: What the training started from, if that is known: see ``resolve_start``.
        options: The options of the run, if they are known.
        files: Names of the other files that are published with it.
        license: Licence of weights that inherit none.

    Returns:
        Markdown with the metadata on top.

    Raises:
        ValueError: A ``license`` other than the inherited one.
    """
    cfg = model.pretrained_cfg
    source = _Source.parse(start)
    inherited = start.license if start else None
    if license and inherited and license != inherited:
        raise ValueError(f'license (--license) must be left out: the weights inherit {inherited}, got {license!r}.')
    license = inherited or license
    size = measure_size(model)
    operators = _operators_in(model)
    options = options or {}
    return render(
        'model_card.md',
        metadata=_metadata(repo_id, model, results, source, license, operators).to_yaml(),
        repo_id=repo_id,
        architecture=config['architecture'],
        model_args={k: v for k, v in config.get('model_args', {}).items() if k in zoo.all_options()},
        size=size,
        num_classes=model.num_classes,
        label_names=list(cfg.get('label_names') or ()),
        preprocessing={k: cfg[k] for k in ('input_size', 'interpolation', 'crop_pct', 'mean', 'std')},
        sha256=sha256,
        requires=requires,
        weights=_WEIGHTS[weights],
        chosen_on=options.get('val_split') if weights == 'best' else None,
        license=license,
        operators=operators,
        start=start,
        source=source,
        results=results,
        dataset=_dataset_name(results) if results else None,
        recipe={k: options[k] for k in _RECIPE if options.get(k)},
        files=files,
        image_mode='RGB' if cfg['input_size'][0] == 3 else 'L',
        citations=[*(operator.paper.citation for operator in operators), TIMM_CITATION],
    )


@dataclass(frozen=True)
class _Source:
    """Where pretrained weights came from.

    Attributes:
        repo_id: The repo of the Hub, if it was one.
        text: What to call it, in Markdown.
    """
    repo_id: str | None
    text: str

    @classmethod
    def parse(cls, start: Start | None) -> '_Source | None':
        if start is None or not start.source:
            return None
        source = start.source.removeprefix('hf-hub:')
        if re.fullmatch(r'https?://[^\s<>]+', source):
            return cls(None, f'<{source}>')
        repo_id = source.partition('@')[0]
        if re.fullmatch(r'[\w.-]+/[\w.-]+', repo_id) and not repo_id.endswith(('.safetensors', '.pth', '.pt', '.bin')):
            return cls(repo_id, f'[{as_text(source)}](https://huggingface.co/{repo_id})')
        return cls(None, f'a file `{as_text(os.path.basename(source))}`')


@dataclass(frozen=True)
class _Used:
    """The operators of a paper, as far as a model uses them.

    Attributes:
        paper: The paper.
        counts: Number of modules by class name.
        params: Number of their own parameters.
    """
    paper: Paper
    counts: dict[str, int]
    params: int


def _operators_in(model: nn.Module) -> list[_Used]:
    own = operator_parameters(model)
    used = []
    for paper, types in papers():
        modules = {name: module for name, module in model.named_modules() if isinstance(module, types)}
        if modules:
            counts = Counter(type(module).__name__ for module in modules.values())
            params = sum(parameter.numel() for name, parameter in own.items() if name.rpartition('.')[0] in modules)
            used.append(_Used(paper, dict(sorted(counts.items())), params))
    return used


def _metadata(
        repo_id: str,
        model: nn.Module,
        results: Results | None,
        source: _Source | None,
        license: str | None,
        operators: Sequence[_Used],
) -> ModelCardData:
    known = license in _HUB_LICENSES or license is None
    base = dict(base_model=source.repo_id, base_model_relation='finetune') if source and source.repo_id else {}
    measured = {}
    if results is not None:
        dataset = one_line(_dataset_name(results))  # a line of its own could end the metadata
        dataset_id = re.sub(r'[^\w./-]+', '-', re.sub(r'^(torch|hfds|hfids|tfds|wds)/', '', dataset)).strip('-')
        metrics = [('Top-1 accuracy', results.top1)]
        if model.num_classes > 5:
            metrics.append(('Top-5 accuracy', results.top5))
        measured = dict(
            datasets=[dataset_id],
            metrics=['accuracy'],
            model_name=repo_id.split('/')[-1],
            eval_results=[
                EvalResult(
                    task_type='image-classification',
                    task_name='Image Classification',
                    dataset_type=dataset_id,
                    dataset_name=dataset,
                    dataset_split=one_line(results.split),
                    metric_type='accuracy',
                    metric_name=name,
                    metric_value=round(value, 4),
                )
                for name, value in metrics
            ],
        )
    return ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm_dyacts', *(operator.paper.tag for operator in operators)],
        license=license if known else 'other',
        license_name=None if known else one_line(license),
        **base,
        **measured,
    )


def _dataset_name(results: Results) -> str:
    """Name the data set. A folder is named by its last part: where it lies is nobody's business."""
    name = results.dataset
    return os.path.basename(os.path.normpath(name)) if os.path.isabs(name) or name.startswith('.') else name
