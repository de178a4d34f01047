"""The evaluation that scripts/validate.py drives."""
import json
import logging
import os
from argparse import Namespace
from collections import OrderedDict

import torch
import yaml

from ..data import class_names
from ..data.loaders import build_dataset, build_eval_loader, check_num_classes
from ..device import build_amp, resolve_device, set_numerics
from ..files import format_csv, replace_text
from ..loading import build_model, count_parameters, resolve_input
from ..world import World
from .loop import evaluate

__all__ = ['validate', 'validate_models', 'write_results']

_logger = logging.getLogger(__name__)


def validate(args: Namespace) -> OrderedDict:
    """Evaluate a model as the options of scripts/validate.py say.

    Returns:
        The record that timm's validate.py prints: accuracies and errors in percent, parameters in millions.
    """
    _inherit_dataset(args)
    if args.input_size:
        args.in_chans = args.input_size[0]
    device = resolve_device(args.device)
    set_numerics(device, args.deterministic)
    model = build_model(args, pretrained=not args.checkpoint, checkpoint_path=args.checkpoint)
    data_config = resolve_input(args, model, use_test_size=not args.use_train_size)
    dataset = build_dataset(args, args.split, data_config['input_size'][0], batch_size=args.batch_size)
    names = class_names(dataset)
    check_num_classes(model.num_classes, names)
    args.num_classes = model.num_classes
    label_names = model.pretrained_cfg.get('label_names')
    if names and label_names and names != list(label_names):
        _logger.warning(
            'The classes differ, so the accuracy may mean nothing. Those of the data set: %s. Those of the model: %s.',
            names, label_names)
    loader = build_eval_loader(dataset, args, data_config, World(device), args.batch_size)
    autocast, _ = build_amp(args, device)
    model.to(device=device, memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)
    forward_model = torch.compile(model, backend=args.torchcompile) if args.torchcompile else model
    metrics = evaluate(forward_model, loader, autocast, channels_last=args.channels_last)
    unreadable = getattr(loader.loader.dataset, 'unreadable', None)
    if unreadable is not None and unreadable.any():
        _logger.warning('%d of %d images cannot be read and are left out.', unreadable.sum(), len(unreadable))
    return OrderedDict(
        model=args.model,
        top1=round(metrics['top1'], 4),
        top1_err=round(100 - metrics['top1'], 4),
        top5=round(metrics['top5'], 4),
        top5_err=round(100 - metrics['top5'], 4),
        param_count=round(count_parameters(model), 2),
        img_size=data_config['input_size'][-1],
        crop_pct=data_config['crop_pct'],
        interpolation=data_config['interpolation'],
    )


def validate_models(args: Namespace) -> tuple[list[OrderedDict], dict[str, str]]:
    """Evaluate the models of ``--model``, one after the other, each on its own terms.

    With ``--results-file`` the records are written after each model. One that fails does not stop the others.

    Returns:
        The records, highest top1 first, and the error messages by model.
    """
    if args.checkpoint and len(args.model) > 1:
        raise ValueError(f'--checkpoint holds the weights of one model, and --model names {len(args.model)}.')
    records, errors = [], {}
    for name in args.model:
        try:
            records.append(validate(Namespace(**dict(vars(args), model=name))))
        except (ImportError, OSError, ValueError) as e:
            if len(args.model) == 1:
                raise
            errors[name] = str(e)
            _logger.error('%s: %s', name, e)
            continue
        records.sort(key=lambda record: -record['top1'])
        if args.results_file:
            write_results(args.results_file, records, args.results_format)
    return records, errors


def write_results(path: str, records: list[OrderedDict], file_format: str = 'csv') -> None:
    """Write records as 'csv' or 'json', in one piece."""
    text = json.dumps(records, indent=4) if file_format == 'json' else format_csv(records, list(records[0]))
    replace_text(path, text)


def _inherit_dataset(args: Namespace) -> None:
    """Fill in the data set that the options leave open: that of the model's run folder, else the digits."""
    if args.dataset is not None or args.data_dir is not None:
        args.dataset = args.dataset or ''
        args.split = args.split or 'validation'
        return
    folder = args.model.removeprefix('local-dir:')
    run = dict(dataset='digits', data_dir=None, val_split='validation', class_map=None)
    for path in (os.path.join(folder, 'args.yaml'), os.path.join(folder, os.pardir, 'args.yaml')):
        if os.path.isfile(path):
            with open(path) as f:
                run = yaml.safe_load(f)
            break
    args.dataset, args.data_dir = run['dataset'], run['data_dir']
    args.split = args.split or run['val_split']
    args.class_map = args.class_map or run['class_map']
