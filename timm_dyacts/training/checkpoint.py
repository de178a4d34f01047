"""Checkpoints as timm and the Hub have them: a folder with weights and their configuration, and what was measured."""
import copy
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from timm.models import save_for_hf
from torch import nn

from ..convert import get_transition
from ..evaluation.environment import describe_environment, package_versions
from ..files import umask
from ..messages import one_line
from ..run_folder import CONFIG, RESULTS, Preprocessing, Results, Start
from ..world import World
from .config import TrainConfig
from .split_bn import drop_split_bn

__all__ = ['dataset_title', 'describe_results', 'save_checkpoint', 'set_pretrained_cfg']

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


def set_pretrained_cfg(model: nn.Module, data_config: Mapping[str, Any], from_pretrained: bool) -> None:
    """Make ``model.pretrained_cfg`` describe the weights that are about to be trained.

    Args:
        model: A timm model.
        data_config: Preprocessing as ``timm.data.resolve_data_config`` gives it.
        from_pretrained: Whether the training starts from pretrained weights, whose origin and licence then stay on
            record.
    """
    dropped = _STALE_FIELDS if from_pretrained else _STALE_FIELDS + _ORIGIN_FIELDS
    cfg = {k: v for k, v in model.pretrained_cfg.items() if k not in dropped}
    cfg.update(data_config, num_classes=model.num_classes)
    model.pretrained_cfg = model.default_cfg = cfg


def save_checkpoint(
        model: nn.Module,
        folder: str | os.PathLike[str],
        label_names: Sequence[str] | None = None,
        model_args: Mapping[str, Any] | None = None,
        results: Results | None = None,
) -> None:
    """Write a model so that ``timm.create_model('local-dir:<folder>', pretrained=True)`` gives it back, bit for bit.

    Each file is written beside and renamed: whoever looks, at whatever moment, finds the old or the new weights, never
    a part of them.

    Args:
        model: A timm model whose ``pretrained_cfg`` describes its weights (see ``set_pretrained_cfg``).
        folder: Where to write. Other files in there are left alone.
        label_names: Class names in the order of the logits.
        model_args: Arguments of ``create_model`` that rebuild the architecture; JSON types only.
        results: How good the weights are.

    Raises:
        OSError: It could not be written, as on a full disk.
    """
    # The copy is contiguous (safetensors refuses channels_last) and on the CPU.
    model = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format)
    drop_split_bn(model)
    config: dict[str, Any] = dict(label_names=list(label_names)) if label_names else {}
    t = get_transition(model)
    if t is not None:
        config['transition'] = dict(t=t, finished=False)  # for who reads the file; the weights hold it, too
        model_args = dict(model_args or {}, transition=True)  # which newer releases of timm keep by themselves
    beside = Path(folder, '.saving')
    shutil.rmtree(beside, ignore_errors=True)  # a killed process may have left it
    try:
        beside.mkdir(parents=True)
        save_for_hf(
            model,
            beside,
            model_config=config or None,
            model_args=model_args,
            safe_serialization=True,
        )
        _drop_repeated_classes(beside / CONFIG)
        if results is not None:
            (beside / RESULTS).write_text(json.dumps(results.to_dict(), indent=2))
        files = list(beside.iterdir())
        for file in files:
            file.chmod(0o666 & ~umask())  # safetensors keeps its files to their owner
            with open(file, 'rb') as f:
                os.fsync(f.fileno())
        for file in files:
            os.replace(file, Path(folder, file.name))
    except (OSError, SafetensorError) as e:
        raise OSError(f'a checkpoint could not be written to {str(folder)!r} ({one_line(e)})') from e
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _drop_repeated_classes(path: Path) -> None:
    """Leave the number of classes out of the arguments of a config: timm reads it from the config itself.

    transformers gives its own number along with the arguments, and Python takes none twice.
    """
    config = json.loads(path.read_text(encoding='utf-8'))
    config.get('model_args', {}).pop('num_classes', None)
    path.write_text(json.dumps(config, indent=2), encoding='utf-8')


def describe_results(
        metrics: Mapping[str, float],
        epoch: int,
        config: TrainConfig,
        data_config: Mapping[str, Any],
        num_images: int,
        start: Start,
        world: World,
) -> Results:
    """Put together what is on record of a checkpoint.

    Args:
        metrics: ``'top1'``, ``'top5'`` and ``'loss'``.
        epoch: The epoch of the checkpoint.
        config: The options of the run.
        data_config: Preprocessing as ``timm.data.resolve_data_config`` gives it.
        num_images: Number of images that the model was evaluated on.
        start: What the training started from.
        world: The processes that evaluated together.
    """
    return Results(
        top1=metrics['top1'],
        top5=metrics['top5'],
        loss=metrics['loss'],
        epoch=epoch,
        dataset=dataset_title(config),
        split=config.val_split,
        num_images=num_images,
        preprocessing=Preprocessing(
            input_size=tuple(data_config['input_size']),
            interpolation=data_config['interpolation'],
            mean=tuple(data_config['mean']),
            std=tuple(data_config['std']),
            crop_pct=data_config['crop_pct'],
        ),
        date=date.today().isoformat(),
        start=start,
        versions=package_versions(),
        environment=dict(
            describe_environment(
                config, world.device, config.validation_batch_size or config.batch_size, world.size),
            seed=str(config.seed),
        ),
    )


def dataset_title(config: TrainConfig) -> str:
    """Give what to call the data set of a run: its name, or the base name of its folder."""
    return config.dataset or os.path.basename(os.path.abspath(config.data_dir))
