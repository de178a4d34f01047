"""The options of evaluation and prediction, and those that they share with training.

Names, ranges and help of an option stand here or in ``training/config.py``, and nowhere else.
"""
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..loading import build_from_file, build_model
from ..options import Options, option

__all__ = [
    'INTERPOLATIONS',
    'LARGEST_NUM_CLASSES',
    'LARGEST_SIDE',
    'DeviceOptions',
    'InputOptions',
    'LoaderOptions',
    'PredictConfig',
    'PreprocessingOptions',
    'ValidateConfig',
]

# Of an image, in pixels: one of 16384 x 16384 takes 3 GB as the input of a model
LARGEST_SIDE = 2 ** 14
LARGEST_NUM_CLASSES = 10 ** 7
INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')


@dataclass(frozen=True, kw_only=True)
class InputOptions(Options):
    """The data set."""
    data_dir: str | None = option(None, group='Data', metavar='DIR', help='folder of the data set')
    dataset: str | None = option(
        None, group='Data', metavar='NAME',
        help="'digits', a timm data set such as 'torch/cifar10' or 'hfds/<id>', or an image folder",
        unset='the image folder --data-dir, or the digits')
    dataset_download: bool = option(False, group='Data', help='download the data set where it supports that')
    labels: str | None = option(
        None, group='Data', metavar='FILE',
        help='CSV or Parquet file with the columns file (relative to --data-dir), label and, if there are several '
             'splits, split; in place of a folder for each class')
    class_map: str | None = option(
        None, group='Data', metavar='FILE', help='class name to label mapping of an image folder')
    input_key: str | None = option(
        None, group='Data', metavar='NAME', help='name of the images in a data set of the Hub, tfds or wds',
        unset='the usual one')
    target_key: str | None = option(
        None, group='Data', metavar='NAME', help='name of the labels there', unset='the usual one')

    def check(self) -> None:
        super().check()
        if self.labels is not None and (self.data_dir is None or self.dataset):
            raise ValueError(
                f'--labels needs --data-dir, the folder of the images, and no --dataset, got {self.data_dir!r} and '
                f'{self.dataset!r}.')


@dataclass(frozen=True, kw_only=True)
class PreprocessingOptions(Options):
    """The input of a model, and how it is created. ``None`` means what the model's own configuration says."""
    num_classes: int | None = option(
        None, group='Preprocessing', minimum=1, maximum=LARGEST_NUM_CLASSES, metavar='N', help='number of classes',
        unset='those of the data')
    in_chans: int | None = option(
        None, group='Preprocessing', minimum=1, maximum=LARGEST_SIDE, metavar='N', help='image channels', unset='3')
    img_size: int | None = option(
        None, group='Preprocessing', minimum=1, maximum=LARGEST_SIDE, metavar='N', help='image height and width',
        unset='of the model')
    input_size: tuple[int, int, int] | None = option(
        None, group='Preprocessing', minimum=1, maximum=LARGEST_SIDE, metavar='N',
        help='channels, height and width, e.g. 3 224 224 (overrides --img-size and --in-chans)')
    crop_pct: float | None = option(
        None, group='Preprocessing', minimum=0.01, maximum=100, metavar='PCT', help='crop for evaluation',
        unset='of the model')
    mean: tuple[float, ...] | None = option(
        None, group='Preprocessing', metavar='MEAN', help='pixel mean', unset='of the model')
    std: tuple[float, ...] | None = option(
        None, group='Preprocessing', above=0, metavar='STD', help='pixel std dev', unset='of the model')
    interpolation: str | None = option(
        None, group='Preprocessing', choices=INTERPOLATIONS, help='resize interpolation', unset='of the model')
    input_img_mode: str | None = option(
        None, group='Preprocessing', choices=('L', 'RGB', 'YCbCr', 'HSV', 'RGBA', 'CMYK'),
        help='mode that images are converted to', unset='RGB for 3 channels, else L')
    model_kwargs: Mapping[str, Any] = option(
        {}, group='Model', metavar='KEY=VALUE', help='further arguments of timm.create_model')

    def implied(self) -> dict[str, Any]:
        values = super().implied()
        if self.input_size is not None:
            values['in_chans'] = self.input_size[0]
        return values

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The options that ``loading.build_model`` and ``loading.resolve_input`` take."""
        names = ('in_chans', 'img_size', 'input_size', 'crop_pct', 'mean', 'std', 'interpolation')
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class LoaderOptions(Options):
    """How data are loaded in batches."""
    workers: int = option(
        min(4, os.cpu_count() or 1), group='Loader', flags=('-j',), minimum=0, maximum=1024, metavar='N',
        help='processes that load data')
    on_bad_image: str = option(
        'skip', group='Loader', choices=('skip', 'error'),
        help='what to do with an image that cannot be read: leave it out and count it, or stop')


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(Options):
    """The machine, and how it computes."""
    device: str | None = option(
        None, group='Device', metavar='NAME', help='device', unset='cuda if there is one, else cpu')
    amp: bool = option(False, group='Device', help='mixed precision')
    amp_dtype: str = option('float16', group='Device', choices=('float16', 'bfloat16'), help='lower precision of --amp')
    deterministic: bool = option(False, group='Device', help='on a GPU too, the same bits in each run; slower there')
    channels_last: bool = option(False, group='Device', help='channels_last memory layout')
    torchcompile: str | None = option(
        None, group='Device', const='inductor', metavar='BACKEND', help='compile the model (default backend: inductor)')
    torchcompile_mode: str | None = option(
        None, group='Device', choices=('default', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs'),
        help='what inductor strives for', unset='default')

    def check(self) -> None:
        super().check()
        if self.amp_dtype != 'float16' and not self.amp:
            raise ValueError(f'--amp-dtype must be left out without --amp, got {self.amp_dtype}.')
        if self.torchcompile not in (None, 'inductor', 'eager', 'aot_eager'):
            backends = torch.compiler.list_backends(exclude_tags=())
            if self.torchcompile not in backends:
                raise ValueError(f'--torchcompile must be one of {", ".join(backends)}, got {self.torchcompile!r}.')
        if self.torchcompile_mode is not None and self.torchcompile != 'inductor':
            raise ValueError(
                f'--torchcompile-mode must be left out without --torchcompile inductor, got {self.torchcompile_mode}.')


@dataclass(frozen=True, kw_only=True)
class WeightsOptions(PreprocessingOptions):
    """The weights of a trained model."""
    checkpoint: str | None = option(
        None, flags=('--initial-checkpoint', '--pretrained-path'), metavar='FILE',
        help='load these weights in place of the pretrained ones; those of its base fit a variant, too')

    def build(self, name: str) -> nn.Module:
        """Create a model with its pretrained weights, or those of ``checkpoint``.

        Raises:
            OSError: The weights could not be read.
            ValueError: There is no such model, or the file has not its weights.
        """
        kwargs = dict(model_kwargs=self.model_kwargs, num_classes=self.num_classes)
        if self.checkpoint is not None:
            return build_from_file(name, self.checkpoint, '--checkpoint', self.preprocessing, **kwargs)
        model = build_model(name, self.preprocessing, pretrained=True, **kwargs)
        trained = model.pretrained_cfg.get('num_classes')
        if self.num_classes not in (None, trained):  # its classifier is a new one, of random weights
            raise ValueError(
                f'--num-classes must be left out, or be {trained}, the classes of the weights of {name}, got '
                f'{self.num_classes}.')
        return model


@dataclass(frozen=True, kw_only=True)
class ValidateConfig(LoaderOptions, DeviceOptions, WeightsOptions, InputOptions):
    """How to evaluate models."""
    model: tuple[str, ...] = option(flags=('-m',), metavar='NAME', help='what to evaluate')
    split: str | None = option(None, metavar='NAME', help='split to evaluate on', unset='of the run, or validation')
    batch_size: int = option(256, flags=('-b',), minimum=1, metavar='N')
    use_train_size: bool = option(
        False, help='use the training image size even where the model recommends another one for testing')
    results_file: str | None = option(None, metavar='FILE', help='also write the records to this file')
    results_format: str = option('csv', choices=('csv', 'json'))

    def check(self) -> None:
        super().check()
        if self.checkpoint and len(self.model) > 1:
            raise ValueError(f'--checkpoint holds the weights of one model, and --model names {len(self.model)}.')


@dataclass(frozen=True, kw_only=True)
class PredictConfig(LoaderOptions, DeviceOptions, WeightsOptions):
    """How to predict, and of what."""
    images: tuple[str, ...] = option(positional=True, metavar='PATH', help='image files, and folders of images')
    model: str = option(flags=('-m',), metavar='NAME', help='what to predict with')
    topk: int = option(5, minimum=1, metavar='K', help='classes per image')
    results_format: str = option('table', choices=('table', 'csv', 'json'))
    results_file: str | None = option(None, metavar='FILE', help='where to write', unset='standard output')
    batch_size: int = option(64, flags=('-b',), minimum=1, metavar='N')
