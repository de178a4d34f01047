"""The libraries whose networks ``convert`` is tried on: what networks they have, and how these are made and called."""
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torchvision
from torch import Tensor, nn

from ..convert.inputs import Inputs

__all__ = ['LIBRARIES', 'Library']

# Encoders of segmentation_models_pytorch: ReLU, ReLU6, SiLU, no strided convolution but for the first, one of timm's
_ENCODERS = ('resnet18', 'mobilenet_v2', 'efficientnet-b0', 'densenet121', 'vgg11_bn', 'tu-regnety_004')
# Architectures that dilate their encoder, and encoders that cannot be dilated
_DILATED, _NOT_DILATED = ('deeplabv3', 'deeplabv3plus', 'pan'), ('densenet121', 'vgg11_bn')
_YOLO = ('yolov5', 'yolov8', 'yolo11')
_TRANSFORMERS = ('ResNet', 'RegNet', 'MobileNetV1', 'MobileNetV2', 'ConvNext', 'ConvNextV2', 'Segformer')
_TASKS = ('ForImageClassification', 'ForSemanticSegmentation')


@dataclass(frozen=True)
class Library:
    """A library of vision models.

    Attributes:
        package: Its name on PyPI.
        module: What it is imported as.
        names: Gives the names of its networks.
        build: Makes a network, with random weights.
        arguments: Gives the arguments that a network is called with, for a name and a batch of images.
    """
    package: str
    module: str
    names: Callable[[], list[str]]
    build: Callable[[str], nn.Module]
    arguments: Callable[[str, Tensor], Inputs] = lambda name, x: Inputs((x,), {})

    @property
    def is_installed(self) -> bool:
        """Whether it can be imported."""
        return importlib.util.find_spec(self.module) is not None


def _names_in_timm() -> list[str]:
    ours = set(timm.list_models(module='zoo'))
    return [name for name in timm.list_models() if name not in ours]


def _names_in_torchvision() -> list[str]:
    """Give all but the quantised forms, which are the same networks before they are quantised."""
    return [name for name in torchvision.models.list_models() if not name.startswith('quantized_')]


def _build_of_torchvision(name: str) -> nn.Module:
    own = [*torchvision.models.list_models(torchvision.models.detection),
           *torchvision.models.list_models(torchvision.models.segmentation)]
    backbone: dict[str, Any] = dict(weights_backbone=None) if name in own else {}
    return torchvision.models.get_model(name, weights=None, **backbone)


def _arguments_in_torchvision(name: str, x: Tensor) -> Inputs:
    if name.startswith('raft_'):  # optical flow: two images
        return Inputs((x, x.flip(0)), {})
    if name in torchvision.models.list_models(torchvision.models.detection):
        first, *others = x
        return Inputs(([first[:, :, :first.shape[2] * 3 // 4], *others],), {})
    return Inputs((x,), {})


def _names_in_ultralytics() -> list[str]:
    return [name for name in (f'{version}{size}{head}' for version in _YOLO for size in 'ns'
                              for head in ('', '-seg', '-cls')) if not name.startswith('yolov5') or '-' not in name]


def _build_of_ultralytics(name: str) -> nn.Module:
    from ultralytics import YOLO
    return YOLO(f'{name}.yaml').model


def _names_in_smp() -> list[str]:
    from segmentation_models_pytorch import MODEL_ARCHITECTURES_MAPPING as architectures
    return [
        f'{name}:{encoder}' for name in sorted(architectures) for encoder in _ENCODERS
        if name != 'dpt' and not (name in _DILATED and encoder in _NOT_DILATED)]


def _build_of_smp(name: str) -> nn.Module:
    from segmentation_models_pytorch import create_model
    architecture, encoder = name.split(':')
    return create_model(architecture, encoder, encoder_weights=None)


def _names_in_transformers() -> list[str]:
    import transformers
    names = (f'{name}{task}' for name in _TRANSFORMERS for task in _TASKS)
    return [name for name in names if hasattr(transformers, name)]


def _build_of_transformers(name: str) -> nn.Module:
    import transformers
    config = next(name.removesuffix(task) for task in _TASKS if name.endswith(task)) + 'Config'
    return getattr(transformers, name)(getattr(transformers, config)())


LIBRARIES = dict(
    timm=Library('timm', 'timm', _names_in_timm, timm.create_model),
    torchvision=Library(
        'torchvision', 'torchvision', _names_in_torchvision, _build_of_torchvision, _arguments_in_torchvision),
    ultralytics=Library('ultralytics', 'ultralytics', _names_in_ultralytics, _build_of_ultralytics),
    smp=Library('segmentation-models-pytorch', 'segmentation_models_pytorch', _names_in_smp, _build_of_smp),
    transformers=Library('transformers', 'transformers', _names_in_transformers, _build_of_transformers),
)
