"""The prediction that scripts/predict.py drives: which classes an image may show."""
import csv
import json
import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import torch
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.data.readers.img_extensions import get_img_extensions
from torch import nn
from torch.utils.data import Dataset

from ..data.loaders import build_eval_loader
from ..data.resumable import without_worker_trace
from ..device import build_amp, resolve_device, set_numerics
from ..loading import build_model, resolve_input
from ..world import World

__all__ = ['FORMATS', 'find_images', 'predict']


class _Files(Dataset):
    """Image files as (image, number of the file)."""

    def __init__(self, paths: Sequence[str], mode: str) -> None:
        self.paths = paths
        self.mode = mode
        self.transform: Callable | None = None

    def __getitem__(self, index: int) -> tuple[Any, int]:
        with Image.open(self.paths[index]) as file:
            image = file.convert(self.mode)
        return self.transform(image), index

    def __len__(self) -> int:
        return len(self.paths)

    def filename(self, index: int, absolute: bool = True) -> str:
        return self.paths[index]


def find_images(paths: Sequence[str]) -> list[str]:
    """The files among the paths, and the image files in and below the folders, sorted folder by folder.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: There is no image.
    """
    extensions = get_img_extensions(as_set=True)
    found = []
    for path in paths:
        if not os.path.exists(path):
            raise FileNotFoundError(f'image or folder of images expected, got {path!r}, which does not exist.')
        if os.path.isfile(path):
            found.append(path)
            continue
        found += sorted(
            os.path.join(folder, name)
            for folder, _, names in os.walk(path) for name in names
            if os.path.splitext(name)[1].lower() in extensions
        )
    if not found:
        raise ValueError(f'no image found in {", ".join(paths)} (known endings: {", ".join(sorted(extensions))}).')
    return found


def predict(args: Namespace) -> list[dict[str, Any]]:
    """Predict as the options of scripts/predict.py say.

    Returns:
        For each file, in order: 'path', and 'predictions', the ``--topk`` likeliest classes, each with 'label' (its
        number), 'class' (its name) and 'probability'. A file that cannot be read has an 'error' in their place.
    """
    if args.topk < 1:
        raise ValueError(f'--topk must be at least 1, got {args.topk}.')
    paths = find_images(args.images)
    args.dataset = ''
    args.in_chans = args.input_size[0] if args.input_size else args.in_chans
    device = resolve_device(args.device)
    set_numerics(device, args.deterministic)
    model = build_model(args, pretrained=not args.checkpoint, checkpoint_path=args.checkpoint)
    data_config = resolve_input(args, model, use_test_size=True)
    args.num_classes = None  # the labels are numbers of files
    mode = 'RGB' if data_config['input_size'][0] == 3 else 'L'
    loader = build_eval_loader(_Files(paths, mode), args, data_config, World(device), args.batch_size)
    autocast, _ = build_amp(args, device)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    model.to(device=device, memory_format=memory_format).eval()
    forward_model = torch.compile(model, backend=args.torchcompile) if args.torchcompile else model

    names = _class_names(model)
    records: list[dict[str, Any]] = [dict(path=path, error='cannot be read') for path in paths]
    for images, numbers in without_worker_trace(loader):
        if len(images) == 0:
            continue
        with torch.inference_mode(), autocast():
            probabilities = forward_model(images.contiguous(memory_format=memory_format)).float().softmax(1)
        values, labels = probabilities.topk(min(args.topk, probabilities.shape[1]))
        for number, row_values, row_labels in zip(numbers.tolist(), values.tolist(), labels.tolist(), strict=True):
            records[number] = dict(path=paths[number], predictions=[
                {'label': label, 'class': names(label), 'probability': value}
                for label, value in zip(row_labels, row_values, strict=True)
            ])
    return records


def _class_names(model: nn.Module) -> Callable[[int], str]:
    """Label to name: as the checkpoint says, else of ImageNet if the number of classes is one of its subsets'."""
    names = model.pretrained_cfg.get('label_names')
    if names:
        return lambda label: names[label]
    subset = infer_imagenet_subset(model)
    if subset:
        return ImageNetInfo(subset).index_to_description
    return str


def _write_table(records: list[dict[str, Any]], file: TextIO) -> None:
    for record in records:
        classes = [f'{p["class"]} {100 * p["probability"]:.1f} %' for p in record.get('predictions', ())]
        print(f'{record["path"]}  {", ".join(classes) or record["error"]}', file=file)


def _write_csv(records: list[dict[str, Any]], file: TextIO) -> None:
    writer = csv.writer(file, lineterminator='\n')
    writer.writerow(['path', 'rank', 'label', 'class', 'probability'])
    for record in records:
        for rank, p in enumerate(record.get('predictions', ()), start=1):
            writer.writerow([record['path'], rank, p['label'], p['class'], f'{p["probability"]:.6f}'])


def _write_json(records: list[dict[str, Any]], file: TextIO) -> None:
    json.dump(records, file, indent=2)
    file.write('\n')


FORMATS: dict[str, Callable[[list[dict[str, Any]], TextIO], None]] = dict(
    table=_write_table, csv=_write_csv, json=_write_json)
