"""Model cards: what a model is, how good it was measured to be, and nothing that nobody measured.

A card is rendered from data, the templates in ``templates/`` hold the words: publishing again after another run renews
it. The metadata on top of a card follow https://huggingface.co/docs/hub/model-cards.
"""
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from timm.models import get_pretrained_cfg, is_model
from torch import nn

from .. import zoo
from ..layers import (
    Bipolar,
    BipolarMaxPool2d,
    BPReLU,
    BReLU,
    DyReLU,
    GlobalSoftPool2d,
    SoftPool1d,
    SoftPool2d,
    SoftPool2dSame,
    SoftPool3d,
)
from ..layers.bipolar import BELU, BSELU, BLeakyReLU
from .render import TIMM_CITATION, render
from .size import measure_size

__all__ = ['OPERATORS', 'Operator', 'render_model_card', 'resolve_start']


@dataclass(frozen=True)
class Operator:
    """A paper, as far as cards speak of it.

    Attributes:
        name: What the paper calls it.
        tag: Its tag on the Hub.
        types: The modules that implement it.
        change: What it changes in a network.
        limit: What not to expect of it.
        citation: BibTeX of the paper.
    """
    name: str
    tag: str
    types: tuple[type[nn.Module], ...]
    change: str
    limit: str
    citation: str


OPERATORS = dict(
    dyrelu=Operator(
        'Dynamic ReLU',
        'dynamic-relu',
        (DyReLU,),
        'Dynamic ReLU puts the maximum of K lines in the place of an activation. Their slopes and intercepts come from '
        'the input itself, by way of a pooled vector and two small linear layers.',
        'Dynamic ReLU pools over the whole feature map, so the output at one place depends on all others: the features '
        'of a crop are not a crop of the features.',
        '@inproceedings{chen2020dynamic,\n'
        '  title={Dynamic ReLU},\n'
        '  author={Chen, Yinpeng and Dai, Xiyang and Liu, Mengchen and Chen, Dongdong and Yuan, Lu and Liu, Zicheng},\n'
        '  booktitle={European Conference on Computer Vision (ECCV)},\n'
        '  year={2020},\n'
        '  url={https://arxiv.org/abs/2003.10027}\n'
        '}',
    ),
    softpool=Operator(
        'SoftPool',
        'softpool',
        (SoftPool1d, SoftPool2d, SoftPool2dSame, SoftPool3d, GlobalSoftPool2d),
        'SoftPool averages each pooling window with the softmax of its values as weights, where max pooling keeps the '
        'largest value and drops the rest. It has no parameters.',
        'SoftPool is not the pooling that a base model was trained with: without training its accuracy is another.',
        '@inproceedings{stergiou2021refining,\n'
        '  title={Refining Activation Downsampling with SoftPool},\n'
        '  author={Stergiou, Alexandros and Poppe, Ronald and Kalliatakis, Grigorios},\n'
        '  booktitle={International Conference on Computer Vision (ICCV)},\n'
        '  year={2021},\n'
        '  url={https://arxiv.org/abs/2101.00440}\n'
        '}',
    ),
    bipolar=Operator(
        'Bipolar activations',
        'bipolar-activation',
        (Bipolar, BReLU, BELU, BSELU, BLeakyReLU, BPReLU, BipolarMaxPool2d),
        'A bipolar activation is f(x) on even channels and -f(-x) on odd ones. It has no parameters of its own.',
        'A BReLU network is a ReLU network with the signs of half its channels flipped. Expect no accuracy from BReLU '
        'that ReLU does not give.',
        '@article{eidnes2017shifting,\n'
        '  title={Shifting Mean Activation Towards Zero with Bipolar Activation Functions},\n'
        '  author={Eidnes, Lars and N{\\o}kland, Arild},\n'
        '  journal={arXiv preprint arXiv:1709.04054},\n'
        '  year={2017},\n'
        '  url={https://arxiv.org/abs/1709.04054}\n'
        '}',
    ),
)

# Those of timm's licences that the Hub knows by this name. Any other is "other" with a `license_name`.
_HUB_LICENSES = {
    'apache-2.0', 'apple-amlr', 'apple-ascl', 'bsd-3-clause', 'cc-by-4.0', 'cc-by-nc-4.0', 'cc-by-nc-sa-4.0',
    'cc-by-sa-4.0', 'cc0-1.0', 'gemma', 'mit', 'unknown',
}
# The options of a run that make its recipe, in the order in which one would tell them.
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
        config: dict[str, Any],
        results: dict[str, Any] | None,
        args: dict[str, Any] | None,
) -> dict[str, Any] | None:
    """What a run started from: its record in ``results.json`` or, without one, what the config and options tell.

    Args:
        config: Content of ``config.json``.
        results: Content of ``results.json``.
        args: Content of ``args.yaml``.

    Returns:
        'model', 'pretrained', 'source' (a repo, URL or file), 'license', 'warm_start' ('exact' or 'approximate') and
        'kd_model', or None if nobody knows.
    """
    if results is not None:
        return results['start']
    if args is None:
        return None
    cfg, file = config.get('pretrained_cfg', {}), args.get('pretrained_path')
    pretrained = bool(args.get('pretrained') or file)
    name = f'{config["architecture"]}.{cfg["tag"]}' if cfg.get('tag') else config['architecture']
    registered = get_pretrained_cfg(name, allow_unregistered=True) if is_model(config['architecture']) else None
    variant = {v.name: v for v in zoo.variants()}.get(config['architecture'])
    return dict(
        model=args.get('model', config['architecture']),
        pretrained=pretrained,
        source=file or (registered.hf_hub_id if registered and pretrained else None),
        license=cfg.get('license') if pretrained and not file else None,
        warm_start=variant.warm_start if variant and pretrained else None,
        kd_model=args.get('kd_model'),
    )


def render_model_card(
        repo_id: str,
        model: nn.Module,
        config: dict[str, Any],
        *,
        sha256: str,
        requires: dict[str, str],
        weights: str = 'best',
        results: dict[str, Any] | None = None,
        args: dict[str, Any] | None = None,
        files: Sequence[str] = (),
        license: str | None = None,
) -> str:
    """Write the card of a checkpoint.

    Args:
        repo_id: Where it is published.
        model: The model, with its weights.
        config: Content of its ``config.json``.
        sha256: Of its weights.
        requires: Version specifiers by package.
        weights: 'best', 'ema' or 'last'.
        results: Content of ``results.json``, if there is one.
        args: Content of ``args.yaml``, if there is one.
        files: Names of the other files that are published with it.
        license: Licence of weights that inherit none.

    Returns:
        Markdown with the metadata on top.

    Raises:
        ValueError: A ``license`` other than the inherited one.
    """
    cfg = model.pretrained_cfg
    start = resolve_start(config, results, args)
    source = _Source.parse(start)
    inherited = (start or {}).get('license')
    if license and inherited and license != inherited:
        raise ValueError(f'license (--license) must be left out: the weights inherit {inherited}, got {license!r}.')
    license = inherited or license
    operators = _operators_in(model)
    return render(
        'model_card.md',
        metadata=_metadata(repo_id, model, results, source, license, operators).to_yaml(),
        repo_id=repo_id,
        architecture=config['architecture'],
        size=measure_size(model),
        num_classes=model.num_classes,
        label_names=list(cfg.get('label_names') or ()),
        preprocessing={k: cfg[k] for k in ('input_size', 'interpolation', 'crop_pct', 'mean', 'std')},
        sha256=sha256,
        requires=requires,
        weights=_WEIGHTS[weights],
        chosen_on=args['val_split'] if args and weights == 'best' else None,
        license=license,
        operators=operators,
        start=start,
        source=source,
        results=results,
        dataset=_dataset_name(results) if results else None,
        recipe={k: args[k] for k in _RECIPE if args.get(k)} if args else {},
        files=files,
        image_mode='RGB' if cfg['input_size'][0] == 3 else 'L',
        citations=[*(operator.citation for operator, _ in operators), TIMM_CITATION],
    )


@dataclass(frozen=True)
class _Source:
    """Where pretrained weights came from: a repo of the Hub, or a text for what is none."""
    repo_id: str | None
    text: str

    @classmethod
    def parse(cls, start: dict[str, Any] | None) -> '_Source | None':
        source = (start or {}).get('source')
        if not source:
            return None
        source = str(source).removeprefix('hf-hub:')
        if re.fullmatch(r'https?://\S+', source):
            return cls(None, f'<{source}>')
        repo_id = source.partition('@')[0]
        if re.fullmatch(r'[\w.-]+/[\w.-]+', repo_id) and not repo_id.endswith(('.safetensors', '.pth', '.pt', '.bin')):
            return cls(repo_id, f'[{source}](https://huggingface.co/{repo_id})')
        return cls(None, f'a file `{os.path.basename(source)}`')


def _operators_in(model: nn.Module) -> list[tuple[Operator, dict[str, int]]]:
    """The operators that a model uses, each with the number of its modules by class name."""
    found = []
    for operator in OPERATORS.values():
        counts = Counter(type(m).__name__ for m in model.modules() if isinstance(m, operator.types))
        if counts:
            found.append((operator, dict(sorted(counts.items()))))
    return found


def _metadata(
        repo_id: str,
        model: nn.Module,
        results: dict[str, Any] | None,
        source: _Source | None,
        license: str | None,
        operators: list[tuple[Operator, dict[str, int]]],
) -> ModelCardData:
    known = license in _HUB_LICENSES or license is None
    base = dict(base_model=source.repo_id, base_model_relation='finetune') if source and source.repo_id else {}
    measured = {}
    if results is not None:
        dataset = _dataset_name(results)
        dataset_id = re.sub(r'[^\w./-]+', '-', re.sub(r'^(torch|hfds|hfids|tfds|wds)/', '', dataset)).strip('-')
        metrics = [('Top-1 accuracy', results['top1'])]
        if model.num_classes > 5:
            metrics.append(('Top-5 accuracy', results['top5']))
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
                    dataset_split=results['split'],
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
        tags=['image-classification', 'timm', 'timm_dyacts', *(operator.tag for operator, _ in operators)],
        license=license if known else 'other',
        license_name=None if known else license,
        **base,
        **measured,
    )


def _dataset_name(results: dict[str, Any]) -> str:
    """The data set's name. Of a folder that is the last part: where it lies is nobody's business."""
    name = str(results['dataset'])
    return os.path.basename(os.path.normpath(name)) if os.path.isabs(name) or name.startswith('.') else name
