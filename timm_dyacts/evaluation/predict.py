"""Which classes images may show, with the names and the preprocessing that a checkpoint keeps."""
import csv
import io
import json
import os
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import torch
from timm.data import ImageNetInfo, get_img_extensions, infer_imagenet_subset
from torch import nn
from torch.utils.data import Dataset

from ..data.errors import worker_errors
from ..data.images import read_image
from ..data.loaders import build_eval_loader, image_mode
from ..data.resumable import without_worker_trace
from ..device import build_amp, resolve_device, set_numerics
from ..files import check_output, write_output
from ..loading import label_names_of, resolve_input
from ..messages import one_line
from ..world import World
from .config import PredictConfig
from .loop import compute_logits
from .transition import remark_on_transition

__all__ = ['find_images', 'predict', 'write_predictions']


class _Files(Dataset):
    """Image files as pairs of the image and its position in the list."""

    def __init__(self, paths: Sequence[str], mode: str) -> None:
        self.paths = paths
        self.mode = mode
        self.transform: Callable | None = None

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(read_image(self.paths[index], self.mode)), index

    def __len__(self) -> int:
        return len(self.paths)

    def filename(self, index: int, absolute: bool = True) -> str:
        return self.paths[index]


def find_images(paths: Sequence[str]) -> list[str]:
    """Give the files among some paths, and the image files in and below the folders, sorted folder by folder.

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


@worker_errors
def predict(config: PredictConfig) -> list[dict[str, Any]]:
    """Predict the classes of images, and write them to ``results_file`` if there is to be one.

    Returns:
        For each file, in order: ``'path'``, and ``'predictions'``, the ``topk`` likeliest classes, each with
        ``'label'`` (its number), ``'class'`` (its name) and ``'probability'``. A file that cannot be read has
        ``'error'`` instead of predictions.

    Raises:
        OSError: Something could not be read.
        ValueError: There is no image, or the options do not fit the model.
    """
    if config.results_file:
        check_output(config.results_file, '--results-file')
    paths = find_images(config.images)
    device = resolve_device(config.device)
    set_numerics(device, config.deterministic)
    model = config.build(config.model)
    remark_on_transition(model, config.model, config.checkpoint)
    data_config = resolve_input(model, config.preprocessing, use_test_size=True)
    files = _Files(paths, image_mode(data_config['input_size'][0], config.input_img_mode))
    loader = build_eval_loader(
        files, data_config, World(device), config.batch_size, workers=config.workers, on_bad_image=config.on_bad_image)
    autocast, _ = build_amp(device, config.amp, config.amp_dtype)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    model.to(device=device, memory_format=memory_format).eval()
    forward_model = model
    if config.torchcompile:
        forward_model = torch.compile(model, backend=config.torchcompile, mode=config.torchcompile_mode)

    name_of = _class_names(model)
    records: list[dict[str, Any]] = [dict(path=path, error='cannot be read') for path in paths]
    for images, numbers in without_worker_trace(loader):
        if len(images) == 0:
            continue
        with torch.inference_mode(), autocast():
            logits = compute_logits(forward_model, images.contiguous(memory_format=memory_format))
            probabilities = logits.float().softmax(1)
        values, labels = probabilities.topk(min(config.topk, probabilities.shape[1]))
        for number, row_values, row_labels in zip(numbers.tolist(), values.tolist(), labels.tolist(), strict=True):
            records[number] = dict(path=paths[number], predictions=[
                {'label': label, 'class': name_of(label), 'probability': value}
                for label, value in zip(row_labels, row_values, strict=True)
            ])
    if config.results_file:
        text = io.StringIO()
        write_predictions(records, text, config.results_format)
        write_output(config.results_file, text.getvalue())
    return records


def _class_names(model: nn.Module) -> Callable[[int], str]:
    """Give what names a label: the checkpoint, or ImageNet if the number of classes is that of one of its subsets."""
    names = label_names_of(model)
    if names:
        return lambda label: names[label]
    subset = infer_imagenet_subset(model)
    if subset:
        return ImageNetInfo(subset).index_to_description
    return str


def write_predictions(records: Sequence[dict[str, Any]], file: TextIO, file_format: str) -> None:
    """Write what ``predict`` gave as ``'table'``, ``'csv'`` or ``'json'``."""
    dict(table=_write_table, csv=_write_csv, json=_write_json)[file_format](records, file)


def _write_table(records: Sequence[dict[str, Any]], file: TextIO) -> None:
    for record in records:
        classes = [f'{one_line(p["class"])} {100 * p["probability"]:.1f} %' for p in record.get('predictions', ())]
        print(f'{one_line(record["path"])}  {", ".join(classes) or record["error"]}', file=file)


def _write_csv(records: Sequence[dict[str, Any]], file: TextIO) -> None:
    writer = csv.writer(file, lineterminator='\n')
    writer.writerow(['path', 'rank', 'label', 'class', 'probability'])
    for record in records:
        for rank, p in enumerate(record.get('predictions', ()), start=1):
            path = os.fsencode(record['path']).decode(errors='backslashreplace')  # which may be no UTF-8
            writer.writerow([path, rank, p['label'], one_line(p['class']), f'{p["probability"]:.6f}'])


def _write_json(records: Sequence[dict[str, Any]], file: TextIO) -> None:
    json.dump(records, file, indent=2)
    file.write('\n')
