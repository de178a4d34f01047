"""The model that a run begins with, and where its weights come from."""
import textwrap
from typing import Any

from torch import nn

from ..files import sha256
from ..loading import build_from_file, build_model
from ..messages import one_line
from ..run_folder import Start
from ..weights_file import Loaded, check_start, read_weights, wrong_kinds
from ..zoo import find_variant
from ..zoo.weights import recorded_mismatch
from .config import TrainConfig
from .finetune import init_head
from .transition import check_transition, create_arguments

__all__ = ['create_initial_model']


def create_initial_model(config: TrainConfig) -> tuple[nn.Module, Start]:
    """Create the model of a run, and say where its weights come from.

    Raises:
        OSError: Weights could not be read.
        ValueError: A file holds no weights, or those of another architecture, or the options do not fit the model.
    """
    kwargs = dict(
        model_kwargs=create_arguments(config),
        num_classes=config.num_classes,
        drop_rate=config.drop,
        drop_path_rate=config.drop_path,
        drop_block_rate=config.drop_block,
    )
    loaded = None
    try:
        if config.pretrained_path is not None:
            model, loaded = _start_from_file(config, **kwargs)
        else:
            model = build_model(config.model, config.preprocessing, config.pretrained, **kwargs)
        if config.initial_checkpoint is not None:
            model = build_from_file(
                config.model, config.initial_checkpoint, '--initial-checkpoint', config.preprocessing, **kwargs)
    except (AssertionError, OSError, TypeError, ValueError) as e:
        # ``build_model`` puts it down to --model-kwargs, ``hub.load`` to the repo
        cause = e.__cause__ if isinstance(e, (OSError, ValueError)) else e
        refusal = _refusal(config, cause) if isinstance(cause, (AssertionError, TypeError)) else None
        if refusal is None:
            raise
        raise ValueError(f'{refusal}, got --model {config.model!r}.') from e
    start = _describe_start(config, model, loaded)
    init_head(model, config.head_init_scale, config.head_init_bias)
    check_transition(config, model)
    return model, start


def _start_from_file(config: TrainConfig, **kwargs: Any) -> tuple[nn.Module, Loaded | None]:
    """Create the model as if the file of ``--pretrained-path`` held its pretrained weights."""
    path = config.pretrained_path
    given = read_weights(path, '--pretrained-path')
    # No source, or the weights of a folder or repo would go before the file; -1: its classifier is never taken over
    overlay = dict(file=path, source=None, num_classes=-1)
    try:
        with recorded_mismatch() as (absent, _):
            model = build_model(
                config.model, config.preprocessing, True, pretrained_cfg_overlay=overlay, **kwargs)
    except (KeyError, ValueError) as e:  # what timm raises for entries that it cannot use, and build_model
        reason = textwrap.shorten(one_line(e), 300, placeholder=' ...')
        raise ValueError(
            f'--pretrained-path must hold weights of {config.model}, got {path!r}: {reason}') from None
    for key in sorted(wrong_kinds(given, model)):
        raise ValueError(
            f'--pretrained-path must hold floating-point weights, got {path!r}: {key!r} is {given[key].dtype}.')
    if find_variant(config.model) is not None:
        return model, None  # for which files are complete or refused
    return model, check_start(model, absent, '--pretrained-path', path)


def _describe_start(config: TrainConfig, model: nn.Module, loaded: Loaded | None) -> Start:
    """Say where the weights of a model come from that has just been created."""
    cfg = model.pretrained_cfg
    file = config.initial_checkpoint or config.pretrained_path
    pretrained = config.pretrained or config.pretrained_path is not None
    source = file
    if config.pretrained and not file:
        source = cfg.get('hf_hub_id') or cfg.get('url') or cfg.get('file')
    conversion = getattr(model, 'conversion', None)
    return Start(
        model=config.model,
        pretrained=pretrained,
        source=source or None,
        # A file does not say whose weights it holds, whatever the model is called.
        license=cfg.get('license') if config.pretrained and not file else None,
        warm_start=conversion.function if pretrained and conversion is not None else None,
        kd_model=config.kd_model,
        sha256=sha256(file) if file else None,
        entries=loaded.entries if loaded else None,
        entries_of=loaded.of if loaded else None,
    )


def _refusal(config: TrainConfig, error: Exception) -> str | None:
    """Say which option an architecture does not take, by the error that its constructor raised."""
    if isinstance(error, AssertionError):  # what timm raises for a name that it does not know
        return None if config.gp is None else f'--gp {config.gp!r} is no global pooling of this model'
    needed = dict(
        transition='--transition-epochs needs a variant, such as resnet50_softpool',
        global_pool='--gp needs a model that can be built with another global pooling',
        bn_momentum='--bn-momentum needs a model that takes it, such as an EfficientNet or a MobileNet',
        bn_eps='--bn-eps needs a model that takes it, such as an EfficientNet or a MobileNet',
        drop_block_rate='--drop-block needs a model that takes it, such as a ResNet',
    )
    return next((text for name, text in needed.items() if f"'{name}'" in str(error)), None)
