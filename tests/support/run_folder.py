"""A run folder as a training leaves it, without the training."""
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.models import save_for_hf
from torch import nn

RESULTS = dict(
    top1=98.6111,
    top5=99.7222,
    loss=0.0456,
    epoch=8,
    dataset='digits',
    split='validation',
    num_images=360,
    preprocessing=dict(
        input_size=[3, 32, 32],
        interpolation='bicubic',
        mean=[0.485, 0.456, 0.406],
        std=[0.229, 0.224, 0.225],
        crop_pct=1.0,
    ),
    date='2026-11-20',
    start=dict(
        model='resnet10t_dyrelu_b.c3_in1k',
        pretrained=True,
        source='timm/resnet10t.c3_in1k',
        license='apache-2.0',
        warm_start='exact',
        kd_model=None,
    ),
    versions=dict(timm_dyacts='0.1.0', timm='1.0.31', torch='2.15.0', python='3.11.2'),
)
ARGS = dict(
    model='resnet10t_dyrelu_b', pretrained=True, pretrained_path=None, epochs=10, opt='adamw', lr=1e-3, seed=42,
    dataset='digits', val_split='validation')
LABEL_NAMES = [str(digit) for digit in range(10)]


def write_checkpoint(folder: Path, model: nn.Module, results: dict[str, Any] | None = RESULTS) -> None:
    """Write a model for 32 pixels and what was measured of it."""
    model.pretrained_cfg = dict(model.pretrained_cfg, input_size=(3, 32, 32), crop_pct=1.0)
    names = LABEL_NAMES if model.num_classes == 10 else None
    save_for_hf(model, folder, model_config=dict(label_names=names) if names else None, safe_serialization=True)
    if results is not None:
        (folder / 'results.json').write_text(json.dumps(results))


def write_run(folder: Path, model: nn.Module, results: dict[str, Any] | None = RESULTS) -> Path:
    """Write a run folder whose EMA is a little off the best weights, and the last weights a little more."""
    write_checkpoint(folder, model, results)
    for name in ('ema', 'last'):
        with torch.no_grad():
            model.get_classifier().bias.add_(0.125)
        write_checkpoint(folder / name, model, results and dict(results, top1=results['top1'] - 1))
    (folder / 'args.yaml').write_text(yaml.safe_dump(ARGS))
    (folder / 'summary.csv').write_text('epoch,train_loss,eval_top1\n0,2.3,98.6111\n')
    (folder / 'curves.png').write_bytes(b'\x89PNG\r\n\x1a\n\0')
    return folder
