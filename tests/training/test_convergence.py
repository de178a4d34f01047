"""The drop-in test: base model and warm-started variant train side by side, on the same data, from one checkpoint."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from support.trained_like import trained_like
from timm.data import create_loader
from timm.optim import create_optimizer_v2

import timm_dyacts
from timm_dyacts.data import DigitsDataset

pytest.importorskip('sklearn.datasets')

STEPS = 30


@pytest.fixture(scope='module')
def data():
    """Thirty batches of digits, in double precision: rounding is all that may tell two exact runs apart."""
    loader = create_loader(
        DigitsDataset('train'), input_size=(3, 32, 32), batch_size=8, num_workers=0, device=torch.device('cpu'))
    return [(images.double(), labels) for _, (images, labels) in zip(range(STEPS), loader, strict=False)]


@pytest.fixture(scope='module')
def base():
    return trained_like('test_resnet', num_classes=10).double()


def losses_of(model, data, opt):
    """Train a copy in place, as timm would, and give the loss of each step and the logits at the end."""
    model = copy.deepcopy(model).train()
    optimizer = create_optimizer_v2(model, opt, lr=0.01, weight_decay=0.05)
    losses = []
    for images, labels in data:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        return torch.tensor(losses), model(data[0][0])


@pytest.mark.parametrize('opt', ['sgd', 'adamw'])
@pytest.mark.parametrize('act', ['brelu', 'bipolar'])
def test_brelu_trains_as_relu_does(base, data, act, opt):
    """Every loss equal: the two are the same network up to the sign of every other channel."""
    variant = timm_dyacts.convert(copy.deepcopy(base), act=act)
    assert variant.conversion.counts['ReLU -> BReLU'] > 5
    expected, expected_logits = losses_of(base, data, opt)
    losses, logits = losses_of(variant, data, opt)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-6)
    assert expected[-5:].mean() < 0.7 * expected[0], 'the runs that are compared learn'


@pytest.mark.parametrize('act', ['dyrelu_a', 'dyrelu_b', 'dyrelu_c'])
def test_dyrelu_starts_as_relu_and_leaves_it(base, data, act):
    variant = timm_dyacts.convert(copy.deepcopy(base), act=act)
    expected, _ = losses_of(base, data, 'sgd')
    losses, _ = losses_of(variant, data, 'sgd')
    torch.testing.assert_close(losses[0], expected[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(losses[1], expected[1], rtol=0.05, atol=0)
    assert losses[-1] != pytest.approx(expected[-1].item(), rel=1e-6), 'it has become dynamic'
    assert losses[-5:].mean() < 0.7 * losses[0]


@pytest.mark.parametrize('act', ['dyrelu_b', 'dyrelu_c'])
def test_static_dyrelu_is_relu_in_training_too(base, data, act):
    """With the hyper functions held, the gradients of all other parameters are those of ReLU."""
    variant = timm_dyacts.convert(copy.deepcopy(base), act=act)
    for module in variant.modules():
        if isinstance(module, timm_dyacts.DyReLU):
            module.requires_grad_(False)
    expected, _ = losses_of(base, data, 'sgd')
    losses, _ = losses_of(variant, data, 'sgd')
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)


def test_softpool_starts_elsewhere_and_learns(base, data):
    """SoftPool changes the function, and says so; what is kept are the weights."""
    torch.manual_seed(0)
    plain = timm.create_model('resnet10t', num_classes=10)
    variant = timm_dyacts.convert(copy.deepcopy(plain), pool='softpool')
    assert variant.conversion.function == 'approximate'
    assert set(variant.state_dict()) == set(plain.state_dict())
    losses, _ = losses_of(variant.double(), data[:20], 'adamw')
    assert losses[-5:].mean() < 0.9 * losses[0]
