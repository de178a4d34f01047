"""Encoders of segmentation_models_pytorch."""
import pytest
import torch
import torch.nn.functional as F

smp = pytest.importorskip('segmentation_models_pytorch')

# With the decoders' names, and the stride at which their encoders end
DECODERS = {'Unet': 32, 'FPN': 32, 'DeepLabV3Plus': 16}
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def features(decoder, name, **kwargs):
    model = getattr(smp, decoder)(f'tu-{name}', encoder_weights=True, classes=2, **kwargs)
    return model.encoder.eval()(X)


@pytest.mark.parametrize('decoder', DECODERS)
@pytest.mark.parametrize('encoder', ['resnet18_dyrelu_b', 'mobilenetv2_100_softpool'])
def test_a_step_of_training(encoder, decoder):
    torch.manual_seed(0)
    model = getattr(smp, decoder)(f'tu-{encoder}', encoder_weights=None, classes=2)
    assert model.encoder.output_stride == DECODERS[decoder]
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    target = (X.mean(1) > 0).long()
    before = {name: value.clone() for name, value in model.named_parameters()}
    masks = model(X)
    assert masks.shape == (2, 2, 64, 64)
    F.cross_entropy(masks, target).backward()
    optimizer.step()
    after = dict(model.named_parameters())
    assert all(parameter.grad is not None and parameter.isfinite().all() for parameter in after.values())
    if 'dyrelu' in encoder:  # fc1 gets no gradient before fc2 has left its start, zero
        moved = [name for name in after if 'fc2' in name and not torch.equal(before[name], after[name])]
        assert len(moved) >= 16


@pytest.mark.parametrize('decoder', DECODERS)
def test_dyrelu_starts_with_the_features_of_the_base(decoder, weights):
    ours, base = (features(decoder, name, **weights('resnet18')) for name in ('resnet18_dyrelu_b', 'resnet18'))
    assert len(ours) == len(base) == 6
    assert all(torch.equal(a, b) for a, b in zip(ours, base, strict=True))
    assert base[-1].shape[-1] == 64 // DECODERS[decoder]


def test_softpool_does_so_up_to_the_first_pool_or_by_transition(weights):
    base = features('Unet', 'mobilenetv2_100', **weights('mobilenetv2_100'))
    ours = features('Unet', 'mobilenetv2_100_softpool', **weights('mobilenetv2_100'))
    assert [torch.equal(a, b) for a, b in zip(ours, base, strict=True)] == [True, True, False, False, False, False]
    led = features('Unet', 'mobilenetv2_100_softpool', transition=True, **weights('mobilenetv2_100'))
    assert all(torch.equal(a, b) for a, b in zip(led, base, strict=True))


def test_bipolar_does_so_but_for_signs(weights):
    ours, base = (features('FPN', name, **weights('resnet18')) for name in ('resnet18_brelu', 'resnet18'))
    for a, b in list(zip(ours, base, strict=True))[1:]:
        assert torch.equal(a[:, ::2], b[:, ::2]) and torch.equal(a[:, 1::2], -b[:, 1::2])
