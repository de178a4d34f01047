"""Every variant is a first-class timm model: whatever timm and PyTorch do with a model, they can do with it.

A sample of the zoo by default, all of it with ``--zoo all``. The parameters are random: Dynamic ReLUs start as plain
activations. Where precision is not the point, outputs are compared in double precision, and strictly.
"""
import copy
import io
import pickle

import pytest
import timm
import torch
from support.trained_like import max_diff, output, probe, trained_like_
from timm.models import group_parameters
from timm.utils import ModelEmaV3, freeze, unfreeze
from torch import nn
from torch._dynamo.utils import counters

from timm_dyacts import zoo

# Each operator and each kind of network, at the smallest size
SAMPLE = (
    'resnet10t_brelu',
    'resnet18_dyrelu_a',
    'resnet18_dyrelu_c_nobn',
    'seresnext26d_32x4d_brelu_nobn',
    'resnest14d_brelu',
    'dla46_c_softpool',
    'ese_vovnet19b_dw_brelu',
    'mobilenetv1_100_dyrelu_b',
    'mobilenetv2_050_softpool',
    'mobilenetv3_small_050_belu',
    'efficientnet_lite0_brelu',
)
# For the others, PyTorch's tracing is tested and the slow work on what was traced, in inductor and onnxscript, left out
OPTIMISED = ('resnet10t_brelu',)
# Architectures that timm's own tests leave out, too
NO_TORCHSCRIPT = ('densenet', 'dpn', 'hrnet', 'selecsls')

VARIANTS = {variant.name: variant for variant in zoo.variants()}


def pytest_generate_tests(metafunc):
    if 'name' in metafunc.fixturenames:
        names = VARIANTS if metafunc.config.getoption('zoo') == 'all' else SAMPLE
        metafunc.parametrize('name', names, scope='module')


def size_of(name):
    cfg = timm.get_pretrained_cfg(name)
    return cfg.input_size[-1] if cfg.fixed_input_size else 96


@torch.no_grad()
def create(name, **kwargs):
    """The variant, as if trained: what starts at zero, in Dynamic ReLUs and residual branches, has moved from there."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **kwargs)
    for p in model.parameters():
        if p.ndim > 1 and not p.any():
            nn.init.kaiming_normal_(p)
    trained_like_(model, size=size_of(name))
    # Deep networks with smaller scales, and statistics that fit them, do not amplify rounding without bounds.
    momenta = {m: m.momentum for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    for norm in momenta:
        norm.weight.mul_(0.4)
        norm.momentum = 1.0
    model.train()(probe(size_of(name), batch=4))
    for norm, momentum in momenta.items():
        norm.momentum = momentum
    return model.eval()


@pytest.fixture(scope='module')
def trained(name):
    """The variant in eval mode. Shared by the tests: those that change it take a copy."""
    return create(name)


@pytest.fixture
def model(trained):
    return copy.deepcopy(trained)


@pytest.fixture(scope='module')
def x(name):
    return probe(size_of(name))


def gradients(model, x):
    model.zero_grad()
    model(x).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_close(actual, expected, tolerance=1e-9):
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        scale = max(value.abs().max() for value in expected.values())
        worst = max(expected, key=lambda key: (actual[key] - expected[key]).abs().max())
        assert (actual[worst] - expected[worst]).abs().max() <= tolerance * scale, worst
    else:
        assert max_diff(actual, expected) <= tolerance * max(1, expected.abs().max())


# Training


def test_every_parameter_has_a_gradient(name, model, x):
    grads = gradients(model.train(), x)
    for key, grad in grads.items():
        assert grad is not None, key
        assert grad.isfinite().all(), key
        assert grad.any() or not key.endswith('fc2_bias'), f'{key}: every Dynamic ReLU has a part in the output'


def test_set_grad_checkpointing(name, model, x):
    try:
        timm.create_model(VARIANTS[name].base).set_grad_checkpointing()
    except AssertionError:
        pytest.skip('the architecture has no gradient checkpointing')
    model, x = model.double(), x.double()
    expected = gradients(model, x)
    model.set_grad_checkpointing()
    assert_close(gradients(model, x), expected)


def test_group_matcher_puts_new_parameters_between_their_neighbours(name, model):
    """So that a layer-wise learning rate treats an operator like the block that it is in."""
    names = [key for key, _ in model.named_parameters()]
    new = set(model.conversion.new_keys)
    for coarse in (False, True):
        layer = group_parameters(model, model.group_matcher(coarse), reverse=True)
        for position, key in enumerate(names):
            if key in new:
                before = [layer[k] for k in names[:position] if k not in new][-1:]
                after = [layer[k] for k in names[position:] if k not in new][:1]
                assert min(before + after) <= layer[key] <= max(before + after), key


def test_freeze(name, model, x):
    block = next(child for child, module in model.named_children() if any(True for _ in module.parameters()))
    freeze(model, block)
    frozen = [key for key, p in model.named_parameters() if not p.requires_grad]
    assert frozen and all(key.startswith(f'{block}.') for key in frozen)
    freeze(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()(x)
    assert not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    unfreeze(model)
    assert all(p.requires_grad for p in model.parameters())


def test_ema(name, model, x):
    ema = ModelEmaV3(model, decay=0.1)
    start = output(ema.module, x)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    ema.update(model)
    assert not torch.equal(output(ema.module, x), start)
    for _ in range(9):
        ema.update(model)
    for key, value in model.state_dict().items():
        assert ema.module.state_dict()[key].dtype == value.dtype, key
        torch.testing.assert_close(ema.module.state_dict()[key], value)


# The parts of a model


def test_create_model_arguments(name):
    model = timm.create_model(name, num_classes=3, in_chans=1, drop_rate=0.1, global_pool='max')
    assert output(model, probe(size_of(name), in_chans=1)).shape == (2, 3)


def test_reset_classifier(name, model, x):
    base = timm.create_model(VARIANTS[name].base, num_classes=10)
    for args in ((3,), (0,), (0, ''), (5, 'avg')):
        for m in (base, model):
            m.reset_classifier(*args)
        assert output(model, x).shape == output(base, x).shape, args
        assert model.num_classes == args[0]
    assert output(model, x).shape == (2, 5)
    assert gradients(model, x)[f'{model.default_cfg["classifier"]}.weight'].any()


def test_forward_intermediates(name, trained, x):
    base = timm.create_model(VARIANTS[name].base).eval()
    if not hasattr(base, 'forward_intermediates'):
        pytest.skip('the architecture has no forward_intermediates')
    with torch.no_grad():
        final, features = trained.forward_intermediates(x)
        _, expected = base.forward_intermediates(x)
        assert torch.equal(final, trained.forward_features(x))
    assert [f.shape for f in features] == [f.shape for f in expected]


def test_features_only(name, trained, x):
    model, base = (timm.create_model(n, features_only=True) for n in (name, VARIANTS[name].base))
    assert model.feature_info.channels() == base.feature_info.channels()
    assert model.feature_info.reduction() == base.feature_info.reduction()
    assert not model.model.load_state_dict(trained.state_dict(), strict=False).missing_keys
    with torch.no_grad():
        expected = trained.forward_intermediates(x, indices=model.out_indices, intermediates_only=True)
    for feature, value, channels in zip(output(model, x), expected, model.feature_info.channels(), strict=True):
        assert torch.equal(feature, value)
        assert feature.shape[1] == channels


# Copies


def test_deepcopy_and_pickle(name, trained, x):
    expected = output(trained, x)
    for twin in (copy.deepcopy(trained), pickle.loads(pickle.dumps(trained))):
        assert torch.equal(output(twin, x), expected)
        assert twin.conversion == trained.conversion


def test_from_the_meta_device(name, trained, x):
    with torch.device('meta'):
        model = timm.create_model(name, num_classes=10)
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    model.to_empty(device='cpu')
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float('nan') if tensor.is_floating_point() else 7)  # as memory may be
    model.load_state_dict(trained.state_dict())
    assert torch.equal(output(model, x), output(trained, x))


# Formats of numbers and memory


def test_channels_last(name, model, x):
    model, x = model.double(), x.double()
    expected = output(model, x)
    base = timm.create_model(VARIANTS[name].base).eval().to(memory_format=torch.channels_last)
    model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    assert_close(output(model, x), expected)
    with torch.no_grad():
        ours, theirs = model.forward_features(x), base.forward_features(x.float())
    assert ours.is_contiguous(memory_format=torch.channels_last) \
        or not theirs.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def with_exact_operators(model):
    """A copy whose operators compute in double precision and round once, at the end."""
    def exact(module):
        double = copy.deepcopy(module).double()

        def forward(x):
            with torch.autocast(x.device.type, enabled=False):
                return double(x.double()).to(x.dtype)
        return forward

    model = copy.deepcopy(model)
    for module in [m for m in model.modules() if type(m).__module__.startswith('timm_dyacts.')]:
        module.forward = exact(module)
    return model


def rms(x):
    return x.double().square().mean().sqrt()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=['bf16', 'fp16'])
@pytest.mark.parametrize('how', ['autocast', 'weights'])
def test_half_precision(name, model, x, how, dtype):
    """The operators add little to the error that the convolutions, which differ between CPUs, make by themselves."""
    expected = output(model, x)
    if how == 'weights':
        model, x = model.to(dtype), x.to(dtype)
    with torch.autocast('cpu', dtype, enabled=how == 'autocast'):
        actual = output(model, x)
        best = output(with_exact_operators(model), x)
    assert actual.dtype == dtype
    assert actual.isfinite().all()
    error, unavoidable = rms(actual - expected), rms(best - expected)
    assert 0 < unavoidable < rms(expected)
    assert error < 4 * unavoidable


# Compilers


def test_export_and_onnx(name, trained, x, tmp_path):
    """With a batch of any size."""
    program = torch.export.export(trained, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    x = torch.cat([x, x.flip(-1)])
    assert_close(program.module()(x), output(trained, x), 1e-5)

    pytest.importorskip('onnxscript')
    onnxruntime = pytest.importorskip('onnxruntime')
    file = io.BytesIO()
    torch.onnx.export(program, dynamo=True, optimize=name in OPTIMISED, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=['CPUExecutionProvider'])
    logits, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(logits), output(trained, x), 1e-4)


def test_compile(name, model, x):
    """In one graph, forward and backward."""
    model, x = model.double().train(), x.double()
    eager, compiled = copy.deepcopy(model), copy.deepcopy(model)
    torch._dynamo.reset()
    counters.clear()
    compiled.compile(fullgraph=True, backend='inductor' if name in OPTIMISED else 'aot_eager')
    assert_close(gradients(compiled, x), gradients(eager, x))
    assert_close(compiled.state_dict(), eager.state_dict())
    assert counters['stats']['unique_graphs'] == 1
    assert not counters['graph_break']


def test_torchscript(name, x):
    if name.startswith(NO_TORCHSCRIPT):
        pytest.skip('the architecture is not scriptable')
    model = create(name, scriptable=True)
    assert_close(output(torch.jit.script(model), x), output(model, x), 1e-5)
