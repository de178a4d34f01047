"""The evaluation of whole models, each on its own terms."""
import dataclasses
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

from ..data import class_names, create_dataset
from ..data.errors import worker_errors
from ..data.loaders import build_eval_loader, check_num_classes, image_mode
from ..device import build_amp, resolve_device, set_numerics
from ..files import check_output, format_csv, write_output
from ..loading import count_parameters, label_names_of, resolve_input
from ..messages import one_line
from ..run_folder import RunFolder
from ..world import World
from .config import ValidateConfig
from .loop import evaluate
from .transition import remark_on_transition

__all__ = ['Measurement', 'measure', 'validate', 'validate_models', 'write_results']

_logger = logging.getLogger(__name__)


def validate(config: ValidateConfig) -> OrderedDict[str, Any]:
    """Evaluate one model, and write the record to ``results_file`` if there is to be one.

    A model with a run folder is evaluated on the data set that it was trained on, unless told otherwise; any other one
    on the digits.

    Returns:
        The record that timm's validate.py prints: accuracies and errors in percent, parameters in millions.

    Raises:
        OSError: Something could not be read or written.
        ValueError: The options do not fit each other, the model or the data.
    """
    if len(config.model) != 1:
        raise ValueError(f'model must be one model, got {len(config.model)}; validate_models takes several.')
    [record], _ = validate_models(config)
    return record


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What an evaluation gave, unrounded.

    Attributes:
        metrics: ``'top1'`` and ``'top5'`` in percent, ``'loss'``.
        model: The model.
        data_config: Preprocessing as ``timm.data.resolve_data_config`` gives it.
        num_images: Number of images that could be read.
    """
    metrics: OrderedDict[str, Any]
    model: torch.nn.Module
    data_config: dict[str, Any]
    num_images: int


def _evaluate_model(config: ValidateConfig, name: str) -> OrderedDict[str, Any]:
    measured = measure(config, name)
    metrics, data_config = measured.metrics, measured.data_config
    return OrderedDict(
        model=name,
        top1=round(metrics['top1'], 4),
        top1_err=round(100 - metrics['top1'], 4),
        top5=round(metrics['top5'], 4),
        top5_err=round(100 - metrics['top5'], 4),
        param_count=round(count_parameters(measured.model), 2),
        img_size=data_config['input_size'][-1],
        crop_pct=data_config['crop_pct'],
        interpolation=data_config['interpolation'],
    )


@worker_errors
def measure(config: ValidateConfig, name: str) -> Measurement:
    """Evaluate a model on the data set of the options, or that of its run folder."""
    config = _resolve_dataset(config, name)
    device = resolve_device(config.device)
    set_numerics(device, config.deterministic)
    model = config.build(name)
    remark_on_transition(model, name, config.checkpoint)
    data_config = resolve_input(model, config.preprocessing, use_test_size=not config.use_train_size)
    dataset = create_dataset(
        config.dataset,
        root=config.data_dir,
        split=config.split,
        labels=config.labels,
        class_map=config.class_map,
        download=config.dataset_download,
        input_img_mode=image_mode(data_config['input_size'][0], config.input_img_mode),
        input_key=config.input_key,
        target_key=config.target_key,
        batch_size=config.batch_size,
    )
    _check_classes(class_names(dataset), model)
    loader = build_eval_loader(
        dataset,
        data_config,
        World(device),
        config.batch_size,
        num_classes=model.num_classes,
        workers=config.workers,
        on_bad_image=config.on_bad_image,
        input_img_mode=config.input_img_mode,
    )
    autocast, _ = build_amp(device, config.amp, config.amp_dtype)
    model.to(device=device, memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
    forward_model = model
    if config.torchcompile:
        forward_model = torch.compile(model, backend=config.torchcompile, mode=config.torchcompile_mode)
    metrics = evaluate(forward_model, loader, autocast, channels_last=config.channels_last)
    unreadable = getattr(loader.loader.dataset, 'unreadable', None)
    if unreadable is not None and unreadable.any():
        _logger.warning('%d of %d images cannot be read and are left out.', unreadable.sum(), len(unreadable))
    count = len(dataset) - (0 if unreadable is None else int(unreadable.sum()))
    return Measurement(metrics, model, data_config, count)


def validate_models(config: ValidateConfig) -> tuple[list[OrderedDict[str, Any]], dict[str, str]]:
    """Evaluate several models, one after the other.

    With ``results_file`` the records are written after each model. One that fails does not stop the others.

    Returns:
        The records, highest top1 first, and the error messages by model.
    """
    if config.results_file:
        check_output(config.results_file, '--results-file')
    records, errors = [], {}
    for name in config.model:
        try:
            records.append(_evaluate_model(config, name))
        except (ImportError, OSError, ValueError) as e:
            if len(config.model) == 1:
                raise
            errors[name] = str(e)
            _logger.error('%s: %s', name, one_line(e))
            continue
        records.sort(key=lambda record: -record['top1'])
        if config.results_file:
            write_results(config.results_file, records, config.results_format)
    return records, errors


def write_results(path: str | os.PathLike[str], records: Sequence[dict[str, Any]], file_format: str = 'csv') -> None:
    """Write records as ``'csv'`` or ``'json'``, in one piece."""
    text = json.dumps(records, indent=4) if file_format == 'json' else format_csv(records, list(records[0]))
    write_output(path, text)


def _resolve_dataset(config: ValidateConfig, name: str) -> ValidateConfig:
    """Fill in the data set that the options leave open: that of the run folder of a model, else the digits."""
    if config.dataset is not None or config.data_dir is not None:
        return dataclasses.replace(config, dataset=config.dataset or '', split=config.split or 'validation')
    run = RunFolder.containing(name.removeprefix('local-dir:'))
    options = (run.read_options() if run is not None else None) or dict(dataset='digits')
    return dataclasses.replace(
        config,
        dataset=options['dataset'],
        data_dir=options.get('data_dir'),
        split=config.split or options.get('val_split', 'validation'),
        **{name: getattr(config, name) or options.get(name)
           for name in ('class_map', 'labels', 'input_img_mode', 'input_key', 'target_key')},
    )


def _check_classes(names: list[str] | None, model: torch.nn.Module) -> None:
    """Raise ``ValueError`` if the data set has more classes than the model, warn if it has others."""
    check_num_classes(model.num_classes, names)
    label_names = label_names_of(model)
    if names and label_names and names != label_names:
        _logger.warning(
            'The classes differ, so the accuracy may mean nothing. Those of the data set: %s. Those of the model: %s.',
            one_line(names), one_line(label_names))
