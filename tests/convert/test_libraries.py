"""Networks of other libraries, where these are installed."""
import copy
import pickle

import pytest
import torch
from torch import nn

from timm_dyacts import (
    Bipolar,
    BipolarMaxPool2d,
    ConversionError,
    DyReLU,
    convert,
    finish_transition,
    get_transition,
    set_transition,
)
from timm_dyacts.convert.leaves import tensors_in


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def with_statistics(model):
    """Give norms statistics such as training leaves, and values to what starts at zero."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.7, 1.3)
                module.bias.normal_(0, 0.1)
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.05)
    return model


def outputs(model, x, training=False):
    """The outputs of a copy, so that the statistics of the model stay."""
    with torch.no_grad():
        return tensors_in(copy.deepcopy(model).train(training)(x))


def assert_same(found, expected):
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def kinds(model):
    """The classes of the modules, but not of those that a transition leads away from."""
    return {type(m) for name, m in model.named_modules() if 'old' not in name.split('.')}


# ultralytics


YOLO = [
    ('yolov5n.yaml', 'DetectionModel'), ('yolov8n.yaml', 'DetectionModel'), ('yolo11n.yaml', 'DetectionModel'),
    ('yolov3-tiny.yaml', 'DetectionModel'), ('yolo11n-seg.yaml', 'SegmentationModel'),
    ('yolo11n-cls.yaml', 'ClassificationModel'),
]


def yolo(name, kind, **kwargs):
    tasks = pytest.importorskip('ultralytics.nn.tasks')
    model = getattr(tasks, kind)(name, verbose=False, **kwargs)
    model.args = copy.copy(pytest.importorskip('ultralytics.utils').DEFAULT_CFG)  # what its loss reads
    return model


def boxes(n=2, size=64, seed=0):
    """Images of a bright box each, and where it is."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.2 * torch.rand(n, 3, size, size, generator=generator)
    found = torch.empty(n, 4)
    for image, box in zip(images, found, strict=True):
        top, left = torch.randint(size // 2, (2,), generator=generator).tolist()
        image[:, top:top + size // 4, left:left + size // 3] = 1
        box[:] = torch.tensor([left + size / 6, top + size / 8, size / 3, size / 4]) / size
    return dict(img=images, batch_idx=torch.arange(n), cls=torch.zeros(n, 1), bboxes=found)


def targets(model):
    kind = type(model).__name__
    if kind == 'ClassificationModel':
        return dict(img=torch.rand(2, 3, 64, 64), cls=torch.tensor([1, 2]))
    masks = (torch.arange(2.0).view(2, 1, 1) + 1).expand(2, 16, 16)
    return boxes() | (dict(masks=masks, sem_masks=masks) if kind == 'SegmentationModel' else {})


def train_step(model, batch, optimizer):
    loss = model.train().loss(batch)[0].sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize('name, kind', YOLO)
def test_yolo(name, kind):
    base, x = with_statistics(yolo(name, kind)), torch.rand(2, 3, 64, 64)
    request = dict(act='dyrelu_b') if 'cls' in name else dict(act='dyrelu_b', pool='softpool')
    model = convert(copy.deepcopy(base), transition=True, **request)
    report = model.conversion
    assert report.function == 'exact' and report.max_diff == 0 and report.skipped == []
    assert kinds(model).isdisjoint({nn.SiLU, nn.MaxPool2d})
    for training in (False, True):
        assert_same(outputs(model, x, training), outputs(base, x, training))
    assert_same(outputs(pickle.loads(pickle.dumps(model)), x), outputs(base, x))

    for t in (0, 0.5, 1):
        set_transition(model, t)
        train_step(model, targets(base), torch.optim.SGD(model.parameters(), 1e-3))
        missing = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
        assert not missing or t == 0 and all('.new.' in n for n in missing)
    before = outputs(model, x)
    finish_transition(model)
    assert_same(outputs(model, x), before)
    assert list(model.state_dict()) == list(convert(copy.deepcopy(base), **request).state_dict())
    train_step(model, targets(base), torch.optim.SGD(model.parameters(), 1e-3))

    before = outputs(model, x)
    fused = outputs(model.eval().fuse(verbose=False), x)
    assert all(torch.allclose(a, b, atol=1e-4 * b.abs().max().item()) for a, b in zip(fused, before, strict=True))


@pytest.mark.parametrize('name, kind', [YOLO[1], YOLO[3]])
def test_bipolar_yolo(name, kind):
    base, x = with_statistics(yolo(name, kind)), torch.rand(2, 3, 64, 64)
    model = convert(copy.deepcopy(base), act='bipolar')
    assert model.conversion.function == 'exact' and model.conversion.max_diff == 0
    pools = sum(isinstance(m, nn.MaxPool2d) for m in base.modules())
    assert sum(isinstance(m, BipolarMaxPool2d) for m in model.modules()) == pools > 0
    assert all(isinstance(m.act, Bipolar) for m in model.modules() if type(m).__name__ == 'Conv')
    found, expected = outputs(model, x), outputs(base, x)
    assert torch.equal(found[0], expected[0])
    # The features that the head was given are outputs, too: those have signs.
    assert_same([t.abs() for t in found], [t.abs() for t in expected])
    assert model.conversion.flipped_output


def test_a_yolo_trained_on_boxes_and_exported(tmp_path):
    runtime, _ = pytest.importorskip('onnxruntime'), pytest.importorskip('onnx')
    model = yolo('yolov8n.yaml', 'DetectionModel', nc=1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(30):  # until boxes are assigned, which makes the loss rise from next to nothing
        train_step(model, boxes(4, seed=step % 3), optimizer)

    convert(model, act='dyrelu_b', pool='softpool', transition=True)
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-3), []
    for step in range(60):
        set_transition(model, min(1.0, step / 30))
        losses.append(train_step(model, boxes(4, seed=step % 3), optimizer))
    assert get_transition(model) == 1 and all(torch.isfinite(p).all() for p in model.parameters())
    assert sum(losses[-6:]) < 0.7 * sum(losses[:6])
    x = boxes(1, seed=5)['img']
    before = outputs(model, x)
    finish_transition(model).eval()
    assert_same(outputs(model, x), before)

    torch.onnx.export(model, (x,), str(tmp_path / 'yolo.onnx'), dynamo=False)
    session = runtime.InferenceSession(str(tmp_path / 'yolo.onnx'), providers=['CPUExecutionProvider'])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert len(found) == len(before)
    for a, b in zip(map(torch.from_numpy, found), before, strict=True):
        assert a.shape == b.shape and (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_what_ultralytics_does_with_a_model(tmp_path, monkeypatch):
    wrapper = pytest.importorskip('ultralytics').YOLO('yolo11n.yaml')
    monkeypatch.chdir(tmp_path)
    convert(wrapper.model, act='dyrelu_b', pool='softpool', transition=True)
    image = (torch.rand(64, 64, 3) * 255).byte().numpy()
    assert len(wrapper.predict(image, imgsz=64, verbose=False)) == 1
    set_transition(wrapper.model, 1)
    finish_transition(wrapper.model)
    wrapper.save('yolo.pt')
    loaded = type(wrapper)('yolo.pt').model
    assert sum(isinstance(m, DyReLU) for m in loaded.modules()) == 77 and nn.SiLU not in kinds(loaded)
    x = torch.rand(1, 3, 64, 64)
    found, expected = outputs(loaded.float(), x), outputs(wrapper.model.float(), x)
    assert all(torch.allclose(a, b, atol=1e-2 * b.abs().max().item()) for a, b in zip(found, expected, strict=True))


def write_images(root, n=8):
    image = pytest.importorskip('PIL.Image')
    for split in ('train', 'val'):
        batch = boxes(n, seed=int(split == 'val'))
        for kind in ('images', 'labels'):
            (root / kind / split).mkdir(parents=True)
        for i, (pixels, box) in enumerate(zip(batch['img'], batch['bboxes'].tolist(), strict=True)):
            array = (pixels * 255).byte().permute(1, 2, 0).numpy()
            image.fromarray(array).save(root / 'images' / split / f'{i}.png')
            (root / 'labels' / split / f'{i}.txt').write_text(' '.join(map(str, [0, *box])))
    (root / 'data.yaml').write_text(f'path: {root}\ntrain: images/train\nval: images/val\nnames: {{0: box}}\n')
    return str(root / 'data.yaml')


def test_the_trainer_of_ultralytics(tmp_path):
    wrapper = pytest.importorskip('ultralytics').YOLO('yolov8n.yaml')
    trainer = pytest.importorskip('ultralytics.models.yolo.detect').DetectionTrainer

    class Trainer(trainer):
        def get_model(self, *args, **kwargs):
            return convert(super().get_model(*args, **kwargs), act='dyrelu_b', pool='softpool', transition=True)

    def move(trainer):
        # Its averages leave whole numbers alone, t among them.
        for model in (trainer.model, trainer.ema.ema):
            set_transition(model, min(1.0, trainer.epoch / 2))

    wrapper.add_callback('on_train_epoch_start', move)
    wrapper.train(
        trainer=Trainer, data=write_images(tmp_path / 'data'), epochs=3, imgsz=64, batch=8, workers=0, device='cpu',
        plots=False, val=False, amp=False, verbose=False, project=str(tmp_path / 'runs'))
    assert get_transition(wrapper.model) == 1
    x = torch.rand(1, 3, 64, 64)
    before = outputs(wrapper.model, x)
    finish_transition(wrapper.model)
    assert_same(outputs(wrapper.model, x), before)
    assert sum(isinstance(m, DyReLU) for m in wrapper.model.modules()) == 57 and nn.SiLU not in kinds(wrapper.model)


def test_yolo_is_left_as_it_was():
    model = yolo('yolov8n.yaml', 'DetectionModel')
    model.model[0].conv.eval()
    modules = [(name, id(m), type(m), m.training) for name, m in model.named_modules(remove_duplicate=False)]
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(ConversionError, match='bipolar: SoftPool does not commute'):
        convert(model, act='bipolar', pool='softpool')
    assert [(n, id(m), type(m), m.training) for n, m in model.named_modules(remove_duplicate=False)] == modules
    assert list(state) == list(model.state_dict()) and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


# segmentation_models_pytorch


@pytest.mark.parametrize('request_', [
    dict(act='dyrelu_b'), dict(act='dyrelu_b', transition=True), dict(act='brelu'),
    dict(pool='softpool', transition=True),
], ids=lambda request_: '-'.join(map(str, request_.values())))
@pytest.mark.parametrize('name, encoder', [
    ('Unet', 'resnet18'), ('FPN', 'mobilenet_v2'), ('Linknet', 'densenet121'), ('UPerNet', 'resnet18'),
    ('PSPNet', 'efficientnet-b0'), ('Unet', 'tu-convnext_atto'),
])
def test_segmentation_models_pytorch(name, encoder, request_):
    smp = pytest.importorskip('segmentation_models_pytorch')
    model = with_statistics(getattr(smp, name)(encoder, encoder_weights=None))
    if 'pool' in request_ and not any(isinstance(m, nn.MaxPool2d) for m in model.modules()):
        with pytest.raises(ConversionError, match='It has no max pool'):
            convert(model, **request_)
        return
    x = torch.rand(1, 3, 64, 64)
    before = outputs(model, x)
    report = convert(model, **request_).conversion
    is_smooth = encoder in ('efficientnet-b0', 'tu-convnext_atto') and 'transition' not in request_
    assert report.function == ('approximate' if is_smooth else 'exact') and report.replaced
    if not is_smooth:
        assert_same(outputs(model, x), before)


# transformers


@pytest.mark.parametrize('name, task, act, exact', [
    ('ResNet', 'ImageClassification', 'dyrelu_b', True), ('ResNet', 'ImageClassification', 'brelu', True),
    ('RegNet', 'ImageClassification', 'brelu', True), ('MobileNetV1', 'ImageClassification', 'brelu', True),
    ('MobileNetV2', 'ImageClassification', 'dyrelu_b', True), ('MobileNetV2', 'SemanticSegmentation', 'brelu', True),
    ('ConvNext', 'ImageClassification', 'dyrelu_b', False), ('ConvNextV2', 'ImageClassification', 'dyrelu_b', False),
    ('Segformer', 'ImageClassification', 'dyrelu_b', False), ('Segformer', 'SemanticSegmentation', 'dyrelu_b', False),
])
def test_transformers(name, task, act, exact):
    transformers = pytest.importorskip('transformers')
    model = with_statistics(getattr(transformers, f'{name}For{task}')(getattr(transformers, f'{name}Config')()))
    x = torch.rand(1, 3, 64, 64)
    before = outputs(model, x)
    report = convert(copy.deepcopy(model), act=act).conversion
    assert report.function == ('exact' if exact else 'approximate') and report.max_diff is not None
    model = convert(model, act=act, transition=True)
    assert model.conversion.function == 'exact'
    assert_same(outputs(model, x), before)
    reasons = {skip.reason for skip in model.conversion.skipped}
    assert reasons <= {
        'inside a gate', 'what it gives does not reach the output',
        "after the addition of a bottleneck block (where='inner')"}
    assert ('inside a gate' in reasons) == (name == 'RegNet')  # squeeze-excite
    if act == 'dyrelu_b':
        assert any('bottleneck' in reason for reason in reasons) == (name == 'ResNet')


def test_softpool_in_a_resnet_of_transformers():
    transformers = pytest.importorskip('transformers')
    model = with_statistics(transformers.ResNetForImageClassification(transformers.ResNetConfig()))
    before = outputs(model, torch.ones(1, 3, 64, 64))
    convert(model, pool='softpool', transition=True)
    assert model.conversion.counts == {'MaxPool2d -> SoftPool2d (transition)': 1}
    assert_same(outputs(model, torch.ones(1, 3, 64, 64)), before)
