"""Dynamic ReLU with coefficients that no longer follow the image."""
import pytest
import timm
import torch
from torch import nn

from timm_dyacts.layers import DyReLU, DyReLUA, DyReLUB, DyReLUC
from timm_dyacts.study.frozen import freeze_coefficients


def randomize(module):
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module


def batches(*shape, count=3):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(*shape, generator=generator), None) for _ in range(count)]


@pytest.mark.parametrize('module', [
    DyReLUA(6), DyReLUB(6), DyReLUB(6, k=3, max_value=2.0), DyReLUB(6, alpha=(1.0, 0.25), beta=(0.1, -0.2), lambda_b=0),
], ids=['a', 'b', 'k3', 'leaky'])
def test_the_coefficients_are_the_mean(module):
    model = nn.Sequential(randomize(module))
    data = batches(4, 6, 5, 3)
    mean = torch.cat([module.coefficients(x) for x, _ in data]).mean(0).expand(6, -1)
    assert freeze_coefficients(model, data) == 1
    frozen, = model
    assert frozen.static and type(frozen) is DyReLU
    torch.testing.assert_close(frozen.coefficients(data[0][0])[0], mean, rtol=1e-5, atol=1e-5)


def test_what_does_not_look_at_the_image_stays_as_it_is():
    """With the weights of ``fc2`` at zero the coefficients are the same for all images."""
    model = timm.create_model('resnet10t_dyrelu_b', num_classes=4).eval()
    for module in model.modules():
        if isinstance(module, DyReLU):
            nn.init.normal_(module.fc2_bias)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(x)
        assert freeze_coefficients(model, batches(2, 3, 32, 32)) > 5
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(m, DyReLU) and not m.static for m in model.modules())


def test_channels_last_tokens_and_shared_modules():
    shared = randomize(DyReLUB(6, channel_dim=-1))
    model = nn.Sequential(shared, nn.Linear(6, 6), shared).train()
    assert freeze_coefficients(model, batches(2, 5, 6)) == 1
    assert model[0] is not shared and model[0].channel_dim == -1 and model[2].static and model.training
    assert model(torch.randn(2, 5, 6)).shape == (2, 5, 6)


@pytest.mark.parametrize('model, words', [
    (nn.Sequential(nn.ReLU()), 'must have a Dynamic ReLU'),
    (nn.Sequential(DyReLUB(6, static=True)), 'must have a Dynamic ReLU'),
    (nn.Sequential(DyReLUB(6), DyReLUC(6)), "no Dynamic ReLU of mode 'c'"),
], ids=['none', 'static', 'c'])
def test_what_cannot_be_frozen(model, words):
    before = list(model)
    with pytest.raises(ValueError, match=words):
        freeze_coefficients(model, batches(2, 6, 4, 4))
    assert list(model) == before
