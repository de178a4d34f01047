"""Checkpoints as timm and the Hub have them: a folder with ``model.safetensors`` and ``config.json``."""
import copy
import json
import os
import platform
import shutil
from argparse import Namespace
from datetime import date
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import nn

from ..version import __version__

__all__ = ['dataset_title', 'describe_run', 'describe_start', 'save_checkpoint', 'set_pretrained_cfg']

# What a model's configuration says about the weights that it started from, and that does not hold for the trained ones.
_STALE_FIELDS = (
    'url',
    'file',
    'hf_hub_id',
    'hf_hub_filename',
    'source',
    'state_dict',
    'custom_load',
    'label_names',
    'label_descriptions',
    'label_offset',
    'pool_size',
    'test_input_size',
    'test_pool_size',
    'test_crop_pct',
)
# Where those weights came from: still true after a fine-tune, never true of a random start.
_ORIGIN_FIELDS = ('tag', 'license', 'origin_url', 'paper_ids', 'paper_name', 'notes')


def set_pretrained_cfg(model: nn.Module, data_config: dict[str, Any], from_pretrained: bool) -> None:
    """Make ``model.pretrained_cfg`` describe the weights that are about to be trained.

    Args:
        model: A timm model.
        data_config: Preprocessing as ``timm.data.resolve_data_config`` gives it.
        from_pretrained: The training starts from pretrained weights, whose origin and licence stay on record.
    """
    dropped = _STALE_FIELDS if from_pretrained else _STALE_FIELDS + _ORIGIN_FIELDS
    cfg = {k: v for k, v in model.pretrained_cfg.items() if k not in dropped}
    cfg.update(data_config, num_classes=model.num_classes)
    model.pretrained_cfg = model.default_cfg = cfg


def save_checkpoint(
        model: nn.Module,
        folder: str | os.PathLike,
        label_names: list[str] | None = None,
        model_args: dict[str, Any] | None = None,
        results: dict[str, Any] | None = None,
) -> None:
    """Write a model so that ``timm.create_model('local-dir:<folder>', pretrained=True)`` gives it back, bit for bit.

    Each file is written beside and renamed: whoever looks, at whatever moment, finds the old or the new weights, never
    a part of them.

    Args:
        model: A timm model whose ``pretrained_cfg`` describes its weights (see ``set_pretrained_cfg``).
        folder: Where to write. Other files in there are left alone.
        label_names: Class names in the order of the logits.
        model_args: Arguments of ``create_model`` that rebuild the architecture; JSON types only.
        results: How good the weights are, for ``results.json``; JSON types only.
    """
    # The copy is contiguous (safetensors refuses channels_last) and on the CPU.
    model = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format)
    beside = os.path.join(folder, '.saving')
    shutil.rmtree(beside, ignore_errors=True)  # a killed process may have left it
    os.makedirs(beside)
    try:
        save_for_hf(
            model,
            beside,
            model_config=dict(label_names=label_names) if label_names else None,
            model_args=model_args,
            safe_serialization=True,
        )
        if results is not None:
            with open(os.path.join(beside, 'results.json'), 'w') as f:
                json.dump(results, f, indent=2)
        for name in os.listdir(beside):
            with open(os.path.join(beside, name), 'rb') as f:
                os.fsync(f.fileno())
        for name in os.listdir(beside):
            os.replace(os.path.join(beside, name), os.path.join(folder, name))
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def describe_start(args: Namespace, model: nn.Module) -> dict[str, Any]:
    """Where the weights of a model come from that has just been created, for ``results.json``."""
    cfg = model.pretrained_cfg
    pretrained = args.pretrained or args.pretrained_path is not None
    source = args.initial_checkpoint or args.pretrained_path
    if args.pretrained and not source:
        source = cfg.get('hf_hub_id') or cfg.get('url') or cfg.get('file')
    conversion = getattr(model, 'conversion', None)
    return dict(
        model=args.model,
        pretrained=pretrained,
        source=source or None,
        license=cfg.get('license') if pretrained else None,
        warm_start=conversion.function if pretrained and conversion is not None else None,
        kd_model=args.kd_model,
    )


def describe_run(
        args: Namespace,
        data_config: dict[str, Any],
        num_images: int,
        start: dict[str, Any],
) -> dict[str, Any]:
    """What ``results.json`` says beside the results.

    Args:
        args: Options ``dataset``, ``data_dir`` and ``val_split``.
        data_config: Preprocessing as ``timm.data.resolve_data_config`` gives it.
        num_images: Number of images that the model is evaluated on.
        start: As ``describe_start`` gives it.
    """
    return dict(
        dataset=dataset_title(args),
        split=args.val_split,
        num_images=num_images,
        preprocessing={k: data_config[k] for k in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct')},
        date=date.today().isoformat(),
        start=start,
        versions=dict(
            timm_dyacts=__version__,
            timm=timm.__version__,
            torch=str(torch.__version__),
            python=platform.python_version(),
        ),
    )


def dataset_title(args: Namespace) -> str:
    """What to call the data set of a run: its name, or the base name of its folder."""
    return args.dataset or os.path.basename(os.path.abspath(args.data_dir))
