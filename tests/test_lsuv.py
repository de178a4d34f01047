"""lsuv_(): what it sets, leaves alone and reports; and that deep networks without BatchNorm train from it."""
import copy
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from support.trained_like import trained_like
from timm.layers import ScaledStdConv2d
from torch import nn
from torchvision.transforms.functional import to_tensor

import timm_dyacts
from timm_dyacts.data import DigitsDataset
from timm_dyacts.lsuv import lsuv_

ROOT = Path(__file__).parents[1]
LAYERS = (nn.Conv2d, nn.Linear)


def small_net():
    """A plain net with a grouped and a depthwise convolution, dropout, and a bias everywhere."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(),
        nn.Conv2d(8, 12, 3, groups=4), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(12, 12, 3, groups=12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(12 * 16, 5),
    )


class Residual(nn.Module):
    """``x + branch(x)``, with a convolution as shortcut where asked."""

    def __init__(self, branch, shortcut=None):
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut or nn.Identity()

    def forward(self, x):
        return self.shortcut(x) + self.branch(x)


def images(batch=8, size=32, seed=0):
    """Smooth pictures, more like photos than noise is."""
    coarse = torch.randn(batch, 3, size // 8, size // 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(size, size), mode='bicubic')


@torch.no_grad()
def output_stds(model, x):
    """Name -> standard deviation of the output, of all convolutions and linear layers, measured here anew."""
    stds = {}
    model = copy.deepcopy(model).eval()
    names = {module: name for name, module in model.named_modules() if isinstance(module, LAYERS)}

    def measure(module, args, output):
        stds.setdefault(names[module], output.double().std(correction=0).item())

    for module in names:
        module.register_forward_hook(measure)
    model(x)
    return stds


def same_state(model, other):
    state, others = model.state_dict(), other.state_dict()
    return state.keys() == others.keys() and all(torch.equal(state[key], others[key]) for key in state)


# What it sets


@pytest.mark.parametrize('name, kwargs', [
    ('resnet18_brelu_nobn', {}),
    ('resnext50_32x4d_brelu_nobn', {}),
    ('vgg11', dict(mlp_ratio=1 / 16)),  # a smaller head
])
def test_every_layer_gets_unit_variance(name, kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **kwargs)
    report = lsuv_(model, images(), residual_std=1.0)
    stds = output_stds(model, images())
    assert [row.name for row in report.layers] == list(stds), 'each of them, in the order in which they run'
    assert list(stds.values()) == pytest.approx([1.0] * len(stds), rel=0.05)
    assert not report.skipped


def test_target_and_tolerance():
    model = small_net()
    report = lsuv_(model, images(), target_std=0.5, tol=1e-3)
    assert list(output_stds(model, images()).values()) == pytest.approx([0.5] * 4, rel=1e-3)
    assert [row.target for row in report.layers] == [0.5] * 4

    loose = lsuv_(small_net(), images(), tol=1e6)
    assert [row.iterations for row in loose.layers] == [0] * 4, 'already within the tolerance'


def test_weights_are_orthonormal_within_each_group_and_biases_zero():
    model = small_net()
    lsuv_(model, images())
    for layer in model:
        if not isinstance(layer, LAYERS):
            continue
        assert (layer.bias == 0).all()
        for group in layer.weight.detach().chunk(getattr(layer, 'groups', 1)):
            matrix = group.flatten(1)
            gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
            assert gram[0, 0] > 0
            torch.testing.assert_close(gram / gram[0, 0], torch.eye(len(gram)), atol=1e-5, rtol=0)


def test_folded_biases_and_branches_that_start_at_zero():
    """A fresh net, with BatchNorm's zero scale folded into the last weight of each branch; and a trained one."""
    fresh = timm.create_model('resnet18_brelu_nobn')
    assert (fresh.layer1[0].conv2.weight == 0).all()
    trained = timm_dyacts.convert(trained_like('resnet18'), norm='none')
    assert (trained.conv1.bias != 0).all()
    for model in (fresh, trained):
        lsuv_(model, images())
        assert all((m.bias == 0).all() for m in model.modules() if isinstance(m, LAYERS))
        assert all((m.weight != 0).any() for m in model.modules() if isinstance(m, LAYERS))


@pytest.mark.parametrize('name, ends', [
    ('resnet18_brelu_nobn', r'layer\d\.\d\.conv2'),
    ('resnet50_brelu_nobn', r'layer\d\.\d\.conv3'),
    ('mobilenetv2_050', r'blocks\.(1\.1|2\.[12]|3\.[123]|4\.[12]|5\.[12])\.conv_pwl'),  # the blocks with a shortcut
    ('resnetv2_50', r'stages\.\d\.blocks\.\d\.conv3'),
    ('convnext_atto', r'stages\.\d\.blocks\.\d\.mlp\.fc2'),
])
def test_residual_branches_end_smaller(name, ends):
    model = timm.create_model(name)
    expected = [n for n, m in model.named_modules() if re.fullmatch(ends, n) and isinstance(m, LAYERS)]
    report = lsuv_(model, images())
    assert [row.name for row in report.layers if row.target != 1] == expected
    assert {row.target for row in report.layers} == {1, 1 / math.sqrt(len(expected))}
    for row in report.layers:
        assert row.after == pytest.approx(row.target, rel=0.05)


def test_variance_stays_bounded_however_deep():
    """Each branch adds 1 / B; with unit variance in each, the sum grows with the depth."""
    def net(depth):
        return nn.Sequential(nn.Conv2d(3, 8, 1), *(Residual(nn.Conv2d(8, 8, 3, padding=1)) for _ in range(depth)))

    def output_variance(depth, **kwargs):
        torch.manual_seed(0)
        model = net(depth)
        lsuv_(model, images(), **kwargs)
        with torch.no_grad():
            return model(images()).var().item()

    assert 1 < output_variance(25) < 4
    assert output_variance(25, residual_std=1.0) > 12


def test_the_order_is_that_of_execution():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Conv2d(4, 4, 1)
            self.first = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.last(self.first(x))

    model = Reversed()
    assert [row.name for row in lsuv_(model, images()).layers] == ['first', 'last']
    assert list(output_stds(model, images()).values()) == pytest.approx([1.0, 1.0], rel=1e-3)


def test_a_shared_layer_is_set_at_its_first_call():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    model = nn.Sequential(conv, nn.ReLU(), conv, nn.ReLU())
    report = lsuv_(model, images())
    assert [(row.name, row.kind) for row in report.rows] == [('0', 'Conv2d'), ('1', 'ReLU'), ('3', 'ReLU')]
    assert output_stds(model, images())['0'] == pytest.approx(1.0, rel=1e-3)


# What it leaves alone


def test_gates_keep_their_weights():
    """Squeeze-excite, and the coefficients of Dynamic ReLU, which starts as the activation that it replaced."""
    model = timm.create_model('seresnet50_dyrelu_b_nobn')
    before = copy.deepcopy(model.state_dict())
    report = lsuv_(model, images())
    assert {s.reason for s in report.skipped} == {'inside a gate'}
    skipped = {s.name for s in report.skipped}
    assert {'layer1.0.se.fc1', 'layer1.0.se.fc2'} <= skipped
    assert all(m.is_fresh() for m in model.modules() if isinstance(m, timm_dyacts.DyReLU))
    for key, value in model.state_dict().items():
        if any(key.startswith(f'{name}.') for name in skipped):
            assert torch.equal(value, before[key])


def test_layers_that_cannot_be_set_are_reported_and_kept():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 1)
            self.standardised = ScaledStdConv2d(8, 8, 1, gamma=3.0)
            self.computed = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))
            self.tied = nn.Conv2d(3, 8, 1)
            self.tied.weight = self.stem.weight
            self.idle = nn.Linear(2, 2)
            self.last = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return self.last(self.computed(self.standardised(self.stem(x))) * self.tied(x))

    model = Odd()
    before = copy.deepcopy(model.state_dict())
    report = lsuv_(model, images())
    assert {s.name: s.reason for s in report.skipped} == dict(
        standardised='its output does not follow the scale of its weight',
        computed='its weight is computed, not a parameter',
        tied="has the weight of 'stem'",
        idle='not called in a forward pass in eval mode',
    )
    assert [row.name for row in report.layers] == ['stem', 'last']
    assert output_stds(model, images())['last'] == pytest.approx(1.0, rel=1e-3), 'behind the others as they are'
    for key, value in model.state_dict().items():
        if key.startswith(('standardised', 'computed', 'idle')):
            assert torch.equal(value, before[key])


def test_the_rest_of_the_model_is_untouched():
    torch.manual_seed(0)
    model = timm.create_model('mobilenetv2_050')  # with BatchNorm
    model.blocks[2].eval()
    model.bn1.weight.requires_grad_(False)
    norms = {k: v.clone() for k, v in model.state_dict().items() if 'bn' in k}
    flags = [m.training for m in model.modules()]
    parameters = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    lsuv_(model, images())
    assert [m.training for m in model.modules()] == flags
    assert {n: (id(p), p.requires_grad) for n, p in model.named_parameters()} == parameters
    assert all(p.grad is None and p.grad_fn is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert norms and all(torch.equal(value, norms[k]) for k, value in model.state_dict().items() if k in norms)


# Randomness, precision, cost


def test_the_seed_decides_and_dropout_does_not():
    def weights(seed, **kwargs):
        torch.manual_seed(seed)
        model = small_net()
        torch.manual_seed(seed)
        lsuv_(model, images(), **kwargs)
        return model

    assert same_state(weights(0), weights(0))
    assert not same_state(weights(0), weights(1))

    state = torch.random.get_rng_state()
    drawn = [small_net() for _ in range(2)]
    torch.random.set_rng_state(state)
    for model in drawn:
        lsuv_(model, images(), generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.random.get_rng_state(), state), 'a generator spares the global one'
    assert same_state(*drawn)


@pytest.mark.parametrize('dtype, rel', [(torch.float64, 1e-9), (torch.float16, 1e-2), (torch.bfloat16, 2e-2)])
def test_dtypes(dtype, rel):
    model = small_net().to(dtype)
    lsuv_(model, images().to(dtype))
    assert all(p.dtype == dtype for p in model.parameters())
    assert list(output_stds(model, images().to(dtype)).values()) == pytest.approx([1.0] * 4, rel=rel)


def test_statistics_do_not_overflow_in_half_precision():
    """Squares of 1000 are more than float16 can hold."""
    model = small_net().half()
    lsuv_(model, (1000 * images()).half())
    assert list(output_stds(model, (1000 * images()).half()).values()) == pytest.approx([1.0] * 4, rel=1e-2)


@pytest.mark.parametrize('depth', [2, 12])
def test_the_number_of_forward_passes_does_not_grow_with_the_depth(depth):
    model = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(depth)))
    passes = []
    model.register_forward_pre_hook(lambda m, args: passes.append(len(args[0])))
    lsuv_(model, images())
    assert passes == [2, 8, 8, 8], 'a dry run on two images, before, scaling, after'


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu_and_a_generator_of_the_cpu():
    def weights(device):
        model = small_net().to(device)
        lsuv_(model, images().to(device), generator=torch.Generator().manual_seed(0))
        return model.cpu()

    for p, q in zip(weights('cuda').parameters(), weights('cpu').parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-4)


# The report


def test_report_holds_layers_and_activations_in_order():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 900, 5))
    before = output_stds(model, images())
    report = lsuv_(model, images())
    conv, act, fc = report.rows
    assert (conv.name, conv.kind, conv.target, conv.iterations) == ('0', 'Conv2d', 1.0, 1)
    assert (act.name, act.kind, act.target, act.iterations) == ('1', 'ReLU', None, None)
    assert (fc.name, fc.kind, fc.target, fc.iterations) == ('3', 'Linear', 1.0, 1)
    assert [conv.before, fc.before] == pytest.approx([before['0'], before['3']])
    with torch.no_grad():
        assert act.after == pytest.approx(model[1](model[0](images())).std().item(), rel=1e-3)
    assert (report.layers, report.activations) == ([conv, fc], [act])


def test_report_prints_as_a_table():
    report = lsuv_(timm.create_model('seresnet50_brelu_nobn'), images())
    lines = str(report).splitlines()
    table, notes = lines[:len(report.rows) + 1], lines[len(report.rows) + 1:]
    assert re.split(r'\s{2,}', table[0]) == ['name', 'kind', 'std before', 'std after', 'target', 'iterations']
    cells = {line.split()[0]: line.split()[1:] for line in table[1:]}
    assert len(cells) == len(report.rows)
    assert cells['layer1.0.conv3'] == ['Conv2d', '0', '0.25', '0.25', '1']
    assert cells['fc'][0] == 'Linear' and cells['fc'][2:] == ['1', '1', '1']
    assert cells['layer1.0.act3'][0] == 'BReLU' and len(cells['layer1.0.act3']) == 3
    assert 'left alone: layer1.0.se.fc1 (Conv2d): inside a gate' in notes


# Bad input


@pytest.mark.parametrize('kwargs, error, message', [
    (dict(batch=torch.zeros(0, 3, 32, 32)), ValueError, r'batch must not be empty, got shape \(0, 3, 32, 32\)'),
    (dict(batch=images() / 0), ValueError, 'batch must be finite, got 24576 elements that are not'),
    (dict(batch=torch.zeros(2, 3, 16, 16)), ValueError, r"batch .* finite output that is not constant, .* '0'"),
    (dict(batch=images()[:, :2]), ValueError, r'batch must be an input of the model, got shape \(8, 2, 32, 32\): '),
    (dict(batch=images().double()), TypeError, 'batch must have the .* dtype of the model, torch.float32, got .*64'),
    (dict(batch=images().long()), TypeError, 'batch must have the floating-point dtype .* got torch.int64'),
    (dict(batch=images().to('meta')), ValueError, 'batch must hold data on the device of the model, got meta'),
    (dict(batch=torch.tensor(1.0)), ValueError, r'batch must be an input of the model, got shape \(\): '),
    (dict(batch=[1.0]), TypeError, 'batch must be a tensor, got list'),
    (dict(model=nn.ReLU()), ValueError, 'model must have a convolution or linear layer to initialise, got ReLU'),
    (dict(model='resnet18'), TypeError, 'model must be a module, got str'),
    (dict(target_std=0.0), ValueError, 'target_std must be positive, got 0'),
    (dict(residual_std=-1.0), ValueError, 'residual_std must be positive, got -1'),
    (dict(tol=math.nan), ValueError, 'tol must be finite, got nan'),
    (dict(max_iters=0), ValueError, 'max_iters must be at least 1, got 0'),
    (dict(generator=3), TypeError, 'generator must be a torch.Generator or None, got 3'),
])
def test_bad_input_names_the_argument_and_changes_nothing(kwargs, error, message):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1))
    before = copy.deepcopy(model)
    with pytest.raises(error, match=message):
        lsuv_(**{**dict(model=model, batch=images()), **kwargs})
    assert same_state(model, before)
    assert not any(m._forward_hooks for m in model.modules())


def test_a_batch_with_one_output_element():
    """The first layer has been scaled when the second one turns out to have no variance."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1))
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"batch must .* not constant, got shape \(1, .* '3' has .* deviation 0"):
        lsuv_(model, images(batch=1))
    assert same_state(model, before)


# Training


def sgd_losses(model, x, labels, steps):
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.001, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize('name, steps', [('resnet50_brelu_nobn', 20), ('resnet101_brelu_nobn', 10)])
def test_deep_resnets_train_without_normalisation(name, steps):
    digits = DigitsDataset('train')
    x = torch.stack([to_tensor(digits[i][0]) - 0.5 for i in range(16)])
    labels = torch.tensor(digits.targets[:16])
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    lsuv_(model, x)
    losses = sgd_losses(model, x, labels, steps)
    assert all(map(math.isfinite, losses))
    assert sum(losses[-3:]) / 3 < 0.7 * losses[0]


# scripts/lsuv.py


@pytest.fixture
def lsuv_script(monkeypatch):
    """Run the script within this process, which saves its start."""
    def call(*options):
        monkeypatch.setattr(sys, 'argv', ['lsuv.py', *map(str, options)])
        runpy.run_path(str(ROOT / 'scripts' / 'lsuv.py'), run_name='__main__')
    return call


def test_script_prints_the_table_and_draws_it(lsuv_script, capsys, tmp_path):
    options = ('--model', 'test_resnet', '--img-size', '32', '--batch-size', '4', '--device', 'cpu')
    lsuv_script(*options, '--plot', tmp_path / 'variance.png')
    first = capsys.readouterr().out
    assert re.search(r'^fc +Linear +\S+ +1 +1 +1$', first, re.M)
    assert (tmp_path / 'variance.png').read_bytes().startswith(b'\x89PNG')

    lsuv_script(*options)
    assert capsys.readouterr().out == first, 'the seed is fixed'
    lsuv_script(*options, '--seed', '1')
    assert capsys.readouterr().out != first


@pytest.mark.parametrize('options, message', [
    (['--model', 'resnet50_brelu_nbn'], 'Close names: .*resnet50_brelu_nobn'),
    (['--data-dir', 'no/such/folder'], "existing image folder or tar file, got 'no/such/folder'"),
    (['--model', 'test_resnet', '--batch-size', '0'], '--batch-size must be at least 1, got 0'),
    (['--model', 'test_resnet', '--residual-std', '0'], '--residual-std must be positive, got 0'),
    (['--model', 'vit_tiny_patch16_224'], 'batch must be an input of the model'),
])
def test_script_answers_bad_input_with_one_line(lsuv_script, options, message):
    with pytest.raises(SystemExit) as exit_info:
        lsuv_script(*options)
    assert re.fullmatch(f'lsuv.py: error: .*{message}.*', exit_info.value.code)
