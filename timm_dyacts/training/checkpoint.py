"""Checkpoints as timm and the Hub have them: a folder with ``model.safetensors`` and ``config.json``."""
import copy
import os
import tempfile
from typing import Any

import torch
from timm.models import save_for_hf
from torch import nn

__all__ = ['save_checkpoint', 'set_pretrained_cfg']

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
) -> None:
    """Write a model so that ``timm.create_model('local-dir:<folder>', pretrained=True)`` gives it back, bit for bit.

    Each file is written beside and renamed: whoever looks, at whatever moment, finds the old or the new weights, never
    a part of them.

    Args:
        model: A timm model whose ``pretrained_cfg`` describes its weights (see ``set_pretrained_cfg``).
        folder: Where to write. Other files in there are left alone.
        label_names: Class names in the order of the logits.
        model_args: Arguments of ``create_model`` that rebuild the architecture; JSON types only.
    """
    # The copy is contiguous (safetensors refuses channels_last) and on the CPU.
    model = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format)
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix='.saving-') as beside:
        save_for_hf(
            model,
            beside,
            model_config=dict(label_names=label_names) if label_names else None,
            model_args=model_args,
            safe_serialization=True,
        )
        for name in os.listdir(beside):
            os.replace(os.path.join(beside, name), os.path.join(folder, name))
