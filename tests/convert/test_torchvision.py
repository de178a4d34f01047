"""Networks of torchvision: one of each kind, small."""
import copy

import pytest
import torch
import torchvision
from support.trained_like import output, probe, trained_like_
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from timm_dyacts import BReLU, ConversionError, DyReLU, convert, finish_transition
from timm_dyacts.convert.leaves import tensors_in


def count(model, cls):
    return sum(isinstance(m, cls) for m in model.modules())


@pytest.mark.parametrize('name', ['mobilenet_v3_small', 'efficientnet_b0'])
def test_an_exact_start_for_smooth_activations(name):
    torch.manual_seed(0)
    model = trained_like_(getattr(torchvision.models, name)(num_classes=5))
    expected = output(model, probe())
    converted = convert(copy.deepcopy(model), act='dyrelu_b', transition=True)
    assert converted.conversion.function == 'exact' and torch.equal(output(converted, probe()), expected)
    assert {s.reason for s in converted.conversion.skipped} <= {'inside a gate'}
    direct = convert(model, act='dyrelu_b')
    assert list(finish_transition(converted).state_dict()) == list(direct.state_dict())


@pytest.mark.parametrize('act, exact', [('dyrelu_b', True), ('brelu', True), ('belu', False)])
def test_videos(act, exact):
    torch.manual_seed(0)
    model = torchvision.models.video.mc3_18(weights=None, num_classes=5)
    x = torch.randn(1, 3, 4, 16, 16)
    expected = output(model, x)
    converted = convert(model, act=act, input_size=(3, 4, 16, 16), transition=not exact)
    assert converted.conversion.function == 'exact' and len(converted.conversion.replaced) == 17
    assert torch.equal(output(converted, x), expected) and count(converted, nn.ReLU) == 0


def backbone():
    layers = nn.Sequential(
        nn.Conv2d(3, 32, 3, 4, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU())
    layers.out_channels = 32
    return layers


def keypoint_rcnn():
    return detection.KeypointRCNN(
        backbone(), rpn_anchor_generator=AnchorGenerator(((16, 32),), ((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(['0'], 7, 2), box_head=TwoMLPHead(32 * 49, 16),
        box_predictor=FastRCNNPredictor(16, 2), keypoint_roi_pool=MultiScaleRoIAlign(['0'], 14, 2),
        keypoint_head=KeypointRCNNHeads(32, (8, 8)), keypoint_predictor=KeypointRCNNPredictor(8, 3))


def fcos():
    return detection.FCOS(backbone(), 2, anchor_generator=AnchorGenerator(((16,),), ((1.0,),)))


def retinanet():
    return detection.RetinaNet(backbone(), 2, anchor_generator=AnchorGenerator(((16, 32),), ((1.0,),)))


@pytest.mark.parametrize('act', ['dyrelu_b', 'brelu'])
@pytest.mark.parametrize('build, kept', [(keypoint_rcnn, []), (fcos, ['relu']), (retinanet, [])])
def test_detectors(build, kept, act):
    torch.manual_seed(0)
    model = build().eval()
    relus = count(model, nn.ReLU)
    images = [torch.rand(3, 96, 80), torch.rand(3, 64, 64)]
    expected = tensors_in(output(model, images))
    model = convert(model, act=act)
    report = model.conversion
    assert report.function == 'exact' and report.max_diff == 0 and count(model, nn.ReLU) == 0
    assert [s.kind for s in report.skipped] == (kept if act == 'brelu' else [])
    assert count(model, BReLU if act == 'brelu' else DyReLU) >= relus
    found = tensors_in(output(model, images))
    assert len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    targets = [dict(boxes=torch.tensor([[4., 4., 40., 40.]]), labels=torch.tensor([1]))] * 2
    if build is keypoint_rcnn:
        targets = [target | dict(keypoints=torch.tensor([[[8., 8., 1.]] * 3])) for target in targets]
    sum(model.train()(images, targets).values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_refusal_leaves_a_detector_as_it_was():
    torch.manual_seed(0)
    model = keypoint_rcnn()
    model.backbone[0].eval()
    before = [(name, id(m), type(m), m.training, dict(vars(m))) for name, m in model.named_modules()]
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(ConversionError, match='bipolar: SoftPool does not commute'):
        convert(model, act='brelu', pool='softpool')
    assert [(name, id(m), type(m), m.training) for name, m in model.named_modules()] == [row[:4] for row in before]
    for (_, module), (*_, attributes) in zip(model.named_modules(), before, strict=True):
        assert vars(module).keys() == attributes.keys() and all(vars(module)[k] is v for k, v in attributes.items())
    assert list(state) == list(model.state_dict()) and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
