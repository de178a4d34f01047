"""Example inputs, outputs of every kind, and detectors."""
import copy
import math
from collections import OrderedDict, UserDict
from dataclasses import dataclass

import pytest
import torch
import torchvision
from torch import Tensor, nn

from timm_dyacts import ConversionError, DyReLU, convert
from timm_dyacts.convert.inputs import Inputs, as_inputs, probing
from timm_dyacts.convert.leaves import leaves_in, numbers_in, tensors_in
from timm_dyacts.convert.probe import compare_outputs
from timm_dyacts.convert.trace import trace_forward


@dataclass
class Output:
    logits: Tensor
    others: list
    name: str = 'output'


class Two(nn.Module):
    """Takes an image and a vector."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Linear(4, 8)

    def forward(self, image, vector, scale=1.0):
        return self.relu(self.conv(image) + self.fc(vector)[:, :, None, None]) * scale


IMAGE, VECTOR = torch.randn(2, 3, 8, 8), torch.randn(2, 4)


@pytest.mark.parametrize('example', [
    (IMAGE, VECTOR), dict(image=IMAGE, vector=VECTOR), ((IMAGE,), dict(vector=VECTOR, scale=2.0))])
def test_example_inputs(example):
    with pytest.raises(ConversionError, match='example_inputs'):
        convert(Two(), act='dyrelu_b')
    model = Two()
    expected = model(IMAGE, VECTOR)
    converted = convert(model, act='dyrelu_b', example_inputs=example)
    assert converted.conversion.function == 'exact' and isinstance(converted.relu, DyReLU)
    assert torch.equal(converted(IMAGE, VECTOR), expected)


def test_forms_of_example_inputs():
    assert as_inputs(IMAGE) == Inputs((IMAGE,), {})
    assert as_inputs([IMAGE]).args == ([IMAGE],)
    assert as_inputs((IMAGE, VECTOR)).args == (IMAGE, VECTOR)
    assert as_inputs(dict(x=IMAGE)) == Inputs((), dict(x=IMAGE))
    inputs = as_inputs(((), dict(x=IMAGE)))
    assert inputs.first is IMAGE and inputs.clone().first is not IMAGE and inputs.double().first.dtype == torch.float64


@pytest.mark.parametrize('example', [3, 'text', (), {}, [], (1, 2), {1: IMAGE}])
def test_example_inputs_that_are_none(example):
    with pytest.raises(ValueError, match='example_inputs must be a tensor, a list'):
        convert(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()), act='dyrelu_b', example_inputs=example)


def test_one_of_both():
    with pytest.raises(ValueError, match='input_size must be left out where example_inputs'):
        convert(nn.ReLU(), act='dyrelu_b', example_inputs=IMAGE, input_size=(3, 8, 8))


def test_example_inputs_are_not_written_to():
    image = IMAGE.clone()
    convert(nn.Sequential(nn.Identity(), Shifted()), act='dyrelu_b', example_inputs=image)
    assert torch.equal(image, IMAGE)


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU())

    def forward(self, x):
        return self.body(x.add_(1))


# Outputs


@pytest.mark.parametrize('form', [
    lambda y: Output(y, [y, 3]), lambda y: UserDict(a=y), lambda y: OrderedDict(a=[dict(b=y)]), lambda y: (3, [y])])
def test_tensors_in_outputs_of_every_kind(form):
    class Net(nn.Module):
        def __init__(self, broken=False):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
            self.broken = broken

        def forward(self, x):
            y = self.body(x).mean()
            return form(y + (self.broken and isinstance(self.body[1], DyReLU)))

    report = convert(Net(), act='dyrelu_b').conversion
    assert report.function == 'exact' and report.max_diff == 0
    with pytest.raises(ConversionError, match='though every step should be exact'):
        convert(Net(broken=True), act='dyrelu_b')


def test_numbers_are_compared():
    a = torch.ones(2)
    assert compare_outputs((a, 3), (a, 3)).is_rounding
    assert not compare_outputs((a, 3), (a, 4)).is_rounding
    assert not compare_outputs(True, False).is_rounding
    assert compare_outputs(0.1, 0.1 + 1e-9).is_rounding
    assert compare_outputs((a, 3), (a,)).largest == math.inf
    assert compare_outputs(torch.ones(0, 4), torch.ones(2, 4)).largest == math.inf
    assert compare_outputs(torch.ones(2, 4), torch.ones(0, 4)).largest == math.inf


def test_leaves():
    value = Output(IMAGE, [1, dict(a=VECTOR)], 'name')
    assert [type(leaf) for leaf in leaves_in(value)] == [Tensor, int, Tensor, str]
    assert numbers_in(value) == [1] and tensors_in(value)[1] is VECTOR


def test_an_output_that_cannot_be_compared_is_not_called_exact():
    class Text(nn.Sequential):
        def forward(self, x):
            return str(super().forward(x).shape)

    report = convert(Text(nn.Conv2d(3, 4, 1), nn.ReLU()), act='dyrelu_b', input_size=(3, 8, 8)).conversion
    assert report.function == 'unchecked' and report.max_diff is None
    assert 'function: unchecked' in str(report)


# What reaches the output


class Scores(nn.Module):
    """Two branches: boxes, and scores behind a sigmoid."""

    def __init__(self, product):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.boxes, self.scores = (nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)) for _ in range(2))
        self.product = product

    def forward(self, x):
        x = self.stem(x)
        boxes, scores = self.boxes(x), self.scores(x).sigmoid()
        whole = torch.zeros(x.shape[0], 8, *x.shape[2:])
        whole[:, :] = boxes
        return dict(all=whole * scores) if self.product else torch.cat([whole, scores], 1)


@pytest.mark.parametrize('product', [False, True])
def test_a_sigmoid_is_a_gate_only_where_it_multiplies(product):
    model = Scores(product)
    trace = trace_forward(model, IMAGE)
    assert trace.is_on_main_path(model.boxes[1])
    assert trace.is_on_main_path(model.scores[1]) == (not product)


# Detectors, segmentation, videos


def small_detector(**kwargs):
    torch.manual_seed(0)
    return torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=4, **kwargs)


def test_detectors():
    model = small_detector().eval()
    before = {name: (m.score_thresh, m.detections_per_img) for name, m in model.named_modules() if name == 'roi_heads'}
    converted = convert(copy.deepcopy(model), act='dyrelu_b')
    report = converted.conversion
    assert report.counts['relu() -> DyReLUB'] == 2 and report.max_diff > 0
    assert {s.reason for s in report.skipped} == {'inside a gate'}
    after = {name: (m.score_thresh, m.detections_per_img) for name, m in converted.named_modules()
             if name == 'roi_heads'}
    assert before == after and converted.transform.min_size == model.transform.min_size
    images = [torch.rand(3, 64, 80), torch.rand(3, 70, 64)]
    targets = [dict(boxes=torch.tensor([[4., 4., 40., 40.]]), labels=torch.tensor([1]))] * 2
    sum(converted.train()(images, targets).values()).backward()
    assert all(p.grad is not None for n, p in converted.named_parameters() if 'relu' in n and p.requires_grad)


def test_probing_keeps_detections_of_every_score():
    model = small_detector().eval()
    with torch.no_grad(), probing(model, resize=True):
        detections = model([torch.rand(3, 64, 64)])
    assert len(detections[0]['boxes']) == 8 and detections[0]['scores'].max() < 1
    assert model.transform.min_size != (128,)


def test_segmentation():
    torch.manual_seed(0)
    model = torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None)
    report = convert(model, act='bipolar').conversion
    assert report.function == 'exact' and report.max_diff is not None


def test_videos():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(4, 4, 3))
    model = trained_like_3d(net)
    assert convert(copy.deepcopy(model), act='dyrelu_b').conversion.function == 'exact'
    assert convert(model, pool='softpool').conversion.counts == {'MaxPool3d -> SoftPool3d': 1}


def trained_like_3d(net):
    with torch.no_grad():
        for _ in range(2):
            net.train()(torch.randn(2, 3, 12, 12, 12))
    return net.eval()
