"""Networks of other libraries, where these are installed."""
import pickle

import pytest
import torch
from torch import nn

from timm_dyacts import DyReLU, convert
from timm_dyacts.convert.leaves import tensors_in


def count(model, cls):
    return sum(type(m) is cls or cls is DyReLU and isinstance(m, DyReLU) for m in model.modules())


@pytest.mark.parametrize('name, kind', [
    ('yolov8n.yaml', 'DetectionModel'), ('yolo11n-seg.yaml', 'SegmentationModel'),
    ('yolo11n-cls.yaml', 'ClassificationModel'),
])
def test_ultralytics(name, kind):
    tasks = pytest.importorskip('ultralytics.nn.tasks')
    torch.manual_seed(0)
    model = getattr(tasks, kind)(name, verbose=False)
    convert(model, act='dyrelu_b')
    assert model.conversion.skipped == [] and count(model, nn.SiLU) == 0
    if 'cls' not in name:
        convert(model, pool='softpool')
        assert model.conversion.counts == {'MaxPool2d -> SoftPool2d': 1}
    copied = pickle.loads(pickle.dumps(model))
    copied.load_state_dict(model.state_dict())
    outputs = tensors_in(copied.train()(torch.rand(2, 3, 64, 64)))
    sum(t.float().mean() for t in outputs if t.requires_grad).backward()


@pytest.mark.parametrize('name, encoder', [('Unet', 'resnet18'), ('FPN', 'mobilenet_v2'), ('Linknet', 'densenet121')])
def test_segmentation_models_pytorch(name, encoder):
    smp = pytest.importorskip('segmentation_models_pytorch')
    torch.manual_seed(0)
    report = convert(getattr(smp, name)(encoder, encoder_weights=None), act='dyrelu_b').conversion
    assert report.function == 'exact' and report.max_diff == 0 and report.replaced


@pytest.mark.parametrize('name, exact', [
    ('ResNet', True), ('RegNet', True), ('MobileNetV1', True), ('MobileNetV2', True), ('ConvNext', False),
    ('Segformer', False),
])
def test_transformers(name, exact):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    config = getattr(transformers, f'{name}Config')()
    model = getattr(transformers, f'{name}ForImageClassification')(config)
    report = convert(model, act='dyrelu_b').conversion
    assert report.function == ('exact' if exact else 'approximate') and report.max_diff is not None
    assert count(model, DyReLU) > 0
