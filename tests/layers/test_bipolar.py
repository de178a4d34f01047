"""Bipolar activations: the definition, the symmetry that makes warm starts exact, in-place use, PyTorch around it."""
import copy
import io
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from timm_dyacts.layers import (
    BELU,
    BSELU,
    Bipolar,
    BipolarMaxPool2d,
    BLeakyReLU,
    BPReLU,
    BReLU,
    belu,
    bipolar,
    bipolar_max_pool2d,
    bleaky_relu,
    bprelu,
    brelu,
    bselu,
    channel_signs,
)
from timm_dyacts.ops.backends import current_backend, use_backend

LAYOUTS = ('interleaved', 'halves')
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Each member as a module and as a function, and the plain activation it mirrors.
MEMBERS = {
    'brelu': (BReLU, brelu, F.relu),
    'brelu6': (partial(BReLU, max_value=6), partial(brelu, max_value=6.0), F.relu6),
    'belu': (partial(BELU, alpha=0.5), partial(belu, alpha=0.5), partial(F.elu, alpha=0.5)),
    'bselu': (BSELU, bselu, F.selu),
    'bleaky_relu': (
        partial(BLeakyReLU, negative_slope=-0.2),
        partial(bleaky_relu, negative_slope=-0.2),
        partial(F.leaky_relu, negative_slope=-0.2),
    ),
    'bsilu': (partial(Bipolar, nn.SiLU()), partial(bipolar, fn=F.silu), F.silu),
    'bhardswish': (partial(Bipolar, F.hardswish), partial(bipolar, fn=F.hardswish), F.hardswish),
}
each_member = pytest.mark.parametrize('member', MEMBERS)
each_layout = pytest.mark.parametrize('layout', LAYOUTS)


def values(*shape, dtype=torch.float64, seed=0):
    """Normal numbers, and zeros of both signs, where kinks are."""
    x = 4 * torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    x.view(-1)[::7] = 0.0
    x.view(-1)[3::7] = -0.0
    return x


def output_and_grad(f, x):
    x = x.clone().requires_grad_()
    y = f(x)
    return y.detach(), *torch.autograd.grad((y * torch.arange(1, y.numel() + 1).reshape(y.shape)).sum(), x)


class TestDefinition:
    @each_layout
    @each_member
    def test_output_and_gradient(self, member, layout):
        module, function, plain = MEMBERS[member]
        for shape in ((3, 5), (2, 6, 7), (2, 5, 4, 3), (2, 4, 3, 2, 3)):
            x = values(*shape)
            expected = output_and_grad(lambda x: reference.bipolar(x, plain, layout), x)
            torch.testing.assert_close(output_and_grad(module(layout=layout), x), expected)
            torch.testing.assert_close(output_and_grad(partial(function, layout=layout), x), expected)

    @settings(max_examples=30, deadline=None)
    @given(st.integers(0, 3), st.integers(1, 9), st.lists(st.integers(1, 5), max_size=3), st.sampled_from(LAYOUTS))
    def test_any_shape(self, batch, channels, spatial, layout):
        x = values(batch, channels, *spatial)
        y = brelu(x, layout=layout)
        assert y.shape == x.shape
        if batch:
            assert torch.equal(y, reference.bipolar(x, F.relu, layout))

    def test_channel_signs(self):
        assert channel_signs(5).tolist() == [1, -1, 1, -1, 1]
        assert channel_signs(5, 'halves').tolist() == [1, 1, 1, -1, -1]
        assert channel_signs(4, 'halves', dtype=torch.int64).tolist() == [1, 1, -1, -1]
        assert channel_signs(2, device='meta').device.type == 'meta'

    @pytest.mark.parametrize('num_parameters', [1, 6])
    def test_bprelu(self, num_parameters):
        module = BPReLU(num_parameters, init=0.1)
        assert (module.weight == 0.1).all() and module.weight.shape == (num_parameters,)
        x, scale = values(2, 6, 4, 4, dtype=torch.float32), torch.linspace(0.5, 2, num_parameters)
        weight = (module.weight.detach() * scale).requires_grad_()
        signs = channel_signs(6).reshape(6, 1, 1)
        expected = torch.where(x * signs > 0, x, weight.expand(6).reshape(6, 1, 1) * x)
        y = bprelu(x, weight)
        torch.testing.assert_close(y, expected)
        grads = [torch.autograd.grad(out.square().sum(), weight)[0] for out in (y, expected)]
        torch.testing.assert_close(*grads)
        module.load_state_dict({'weight': weight.detach()})
        assert torch.equal(module(x), y)

    @each_member
    def test_gradcheck(self, member):
        function = MEMBERS[member][1]
        x = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


def assert_same(a, b, has_exponentials):
    """Compare bit for bit, unless native kernels and PyTorch may round exponentials in different ways."""
    if has_exponentials and current_backend() != 'cpu':
        torch.testing.assert_close(a, b)
    else:
        assert torch.equal(a, b)


class TestSymmetry:
    """``f_B(s * x) = s * f(x)``, bit for bit: what makes a trained plain network a bipolar one."""

    @pytest.mark.parametrize('backend', ['auto', 'cpu'])
    @pytest.mark.parametrize('dtype', DTYPES, ids=str)
    @each_layout
    @each_member
    def test_activation(self, member, layout, dtype, backend):
        with use_backend(backend):
            self.check_activation(member, layout, dtype)

    def check_activation(self, member, layout, dtype):
        module, _, plain = MEMBERS[member]
        has_exponentials = member in ('belu', 'bselu')
        x = values(2, 5, 7, 6, dtype=dtype)
        signs = channel_signs(5, layout, dtype=dtype).reshape(5, 1, 1)
        weight = values(2, 5, 7, 6, dtype=dtype, seed=1)
        grads = []
        for f, s in ((plain, 1), (module(layout=layout), signs)):
            z = x.clone().requires_grad_()
            y = f(s * z)
            grads.append(torch.autograd.grad((s * y * weight).sum(), z)[0])
            assert y.dtype == dtype
            assert_same(s * y, plain(x), has_exponentials)
        assert_same(*grads, has_exponentials)

    def test_gradient_at_zero_is_that_of_relu(self):
        for zero in (0.0, -0.0):
            x = torch.full((1, 4, 2), zero, requires_grad=True)
            assert not torch.autograd.grad(brelu(x).sum(), x)[0].any()

    def test_gradient_at_the_bound_is_that_of_relu6(self):
        x = (6 * channel_signs(4)).reshape(1, 4).requires_grad_()
        assert not torch.autograd.grad(brelu(x, 6.0).sum(), x)[0].any()

    @each_layout
    @pytest.mark.parametrize('args', [(2,), (3, 2, 1), (3, 2, 0, 1, True), ((3, 2), (2, 1), (1, 0), 2)], ids=str)
    def test_max_pool(self, args, layout):
        x = values(2, 5, 9, 8).requires_grad_()
        signs = channel_signs(5, layout, dtype=x.dtype).reshape(5, 1, 1)
        pooled, expected = bipolar_max_pool2d(signs * x, *args, layout=layout), F.max_pool2d(x, *args)
        assert torch.equal(signs * pooled, expected)
        weight = values(*pooled.shape, seed=1)
        grads = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (signs * pooled, expected)]
        assert torch.equal(*grads)
        module = BipolarMaxPool2d(*args, layout=layout)
        assert torch.equal(module(x), bipolar_max_pool2d(x, *args, layout=layout))
        assert torch.equal(module(x[0]), module(x)[0])

    def test_max_pool_takes_the_minimum_of_odd_channels(self):
        x = torch.arange(8.0).reshape(1, 2, 2, 2)
        assert bipolar_max_pool2d(x, 2).flatten().tolist() == [3, 4]
        assert bipolar_max_pool2d(x + 1, 2, padding=1)[0, 1].tolist() == [[5, 6], [7, 8]]

    def test_network(self):
        """A small net in training mode: outputs and all gradients are the plain net's up to the signs of channels."""
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 3), nn.ReLU())
        flipped = copy.deepcopy(plain)
        flipped[1], flipped[2], flipped[4] = BReLU(), BipolarMaxPool2d(2), BReLU()
        first, second = channel_signs(6), channel_signs(4)
        signs = {
            '0.weight': first.reshape(6, 1, 1, 1),
            '0.bias': first,
            '3.weight': second.reshape(4, 1, 1, 1) * first.reshape(6, 1, 1),
            '3.bias': second,
        }
        x = torch.randn(2, 3, 12, 12)
        params = dict(plain.named_parameters())
        y = torch.func.functional_call(flipped, {name: signs[name] * param for name, param in params.items()}, (x,))
        y, expected = y * second.reshape(4, 1, 1), plain(x)
        assert torch.equal(y, expected) and expected.any()
        for name, param in params.items():
            grads = [torch.autograd.grad(out.square().sum(), param, retain_graph=True)[0] for out in (y, expected)]
            assert torch.equal(*grads), name


class TestLayout:
    @each_member
    def test_in_place(self, member):
        module = MEMBERS[member][0]
        x = values(2, 5, 4, 3)
        expected = output_and_grad(module(), x)
        torch.testing.assert_close(output_and_grad(lambda x: module(inplace=True)(x * 1), x), expected)
        kept = x.clone()
        module()(x)
        assert torch.equal(x, kept)

    @pytest.mark.parametrize('module', [BReLU(inplace=True), BReLU(inplace=True, max_value=6)], ids=repr)
    def test_in_place_inference_needs_no_memory(self, module):
        x = values(2, 5, 4, 3)
        with torch.no_grad():
            assert module(x).data_ptr() == x.data_ptr()

    def test_in_place_inner_activation(self):
        x = values(2, 5, 4, 3)
        torch.testing.assert_close(output_and_grad(Bipolar(nn.ReLU(inplace=True)), x), output_and_grad(BReLU(), x))

    @pytest.mark.parametrize('shape, memory_format', [
        ((2, 4, 5, 6), torch.channels_last),
        ((2, 4, 3, 5, 6), torch.channels_last_3d),
    ], ids=['2d', '3d'])
    @each_member
    def test_memory_format_is_kept(self, member, shape, memory_format):
        module, x = MEMBERS[member][0](), values(*shape)
        y = module(x.to(memory_format=memory_format))
        assert y.is_contiguous(memory_format=memory_format)
        assert torch.equal(y, module(x)) and module(x).is_contiguous()

    def test_max_pool_keeps_memory_format(self):
        x = values(2, 4, 6, 7)
        y = bipolar_max_pool2d(x.to(memory_format=torch.channels_last), 3, 2, 1)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(y, bipolar_max_pool2d(x, 3, 2, 1))

    @each_member
    def test_noncontiguous_input(self, member):
        module, x = MEMBERS[member][0](), values(6, 8, 3, 2).transpose(0, 2)[:, ::2]
        assert not x.is_contiguous()
        torch.testing.assert_close(module(x), module(x.contiguous()))

    @pytest.mark.parametrize('device', ['cpu', 'meta'])
    @pytest.mark.parametrize('module', [BReLU(), BPReLU(), BipolarMaxPool2d(2)], ids=repr)
    def test_empty_batch(self, module, device):
        module = copy.deepcopy(module).to(device)
        x = torch.zeros(0, 4, 6, 6, device=device, requires_grad=True)
        module(x).sum().backward()
        assert x.grad.shape == x.shape

    def test_nan_is_not_hidden(self):
        x = torch.full((1, 2), float('nan'))
        assert brelu(x).isnan().all() and brelu(x, 6.0).isnan().all()


ALL = [
    BReLU(),
    BReLU(max_value=6, layout='halves'),
    BELU(),
    BSELU(),
    BLeakyReLU(),
    BPReLU(),
    BPReLU(4),
    Bipolar(nn.SiLU(inplace=True)),
    Bipolar(F.mish),
    BipolarMaxPool2d(3, 2, 1),
]


class TestTransforms:
    @pytest.mark.parametrize('module', [BReLU(), BReLU(True), Bipolar(nn.SiLU()), BipolarMaxPool2d(2)], ids=repr)
    def test_compile_without_graph_break(self, module):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend='aot_eager')
        for shape in ((2, 4, 5, 6), (3, 4, 7, 4)):
            x = values(*shape)
            expected = output_and_grad(lambda x: module(x * 1), x)
            torch.testing.assert_close(output_and_grad(lambda x: compiled(x * 1), x), expected)
        assert not torch._dynamo.utils.counters['graph_break']

    @pytest.mark.parametrize('module', [BReLU(), BipolarMaxPool2d(3, 2, 1)], ids=repr)
    def test_export_with_dynamic_batch_and_size(self, module):
        dims = {0: torch.export.Dim('n'), 2: torch.export.Dim('h', min=4), 3: torch.export.Dim('w', min=4)}
        example = dict(args=(torch.zeros(2, 4, 9, 8),), dynamic_shapes=(dims,))
        if isinstance(module, BipolarMaxPool2d):
            try:
                torch.export.export(nn.MaxPool2d(3, 2, 1), **example)
            except Exception as e:
                pytest.skip(f'the plain max pool cannot in torch {torch.__version__}: {type(e).__name__}')
        program = torch.export.export(module, **example)
        x = values(3, 4, 12, 7, dtype=torch.float32)
        assert torch.equal(program.module()(x), module(x))

    @pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
    @pytest.mark.parametrize('module', ALL, ids=repr)
    def test_torchscript_and_fx(self, module):
        x = values(2, 4, 5, 6, dtype=torch.float32)
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.script(module), buffer)
        buffer.seek(0)
        traced = torch.fx.symbolic_trace(module)
        pickles = [pickle.loads(pickle.dumps(m)) for m in (module, traced)]
        for duplicate in (torch.jit.load(buffer), traced, copy.deepcopy(module), *pickles):
            assert_same(duplicate(x), module(x), isinstance(module, (BELU, BSELU)))

    @pytest.mark.filterwarnings('error::torch.jit.TracerWarning', 'ignore::FutureWarning', 'ignore::DeprecationWarning')
    @pytest.mark.parametrize('module', ALL, ids=repr)
    def test_trace(self, module):
        traced = torch.jit.trace(module, torch.ones(2, 4, 5, 6))
        x = values(3, 4, 8, 7, dtype=torch.float32)
        assert_same(traced(x), module(x), isinstance(module, (BELU, BSELU)))

    @pytest.mark.filterwarnings('error::torch.jit.TracerWarning', 'ignore::FutureWarning', 'ignore::DeprecationWarning')
    @pytest.mark.parametrize(
        'module', [BReLU(inplace=True), BELU(inplace=True), Bipolar(nn.ReLU(inplace=True))], ids=repr)
    def test_trace_in_place(self, module):
        """PyTorch traces with gradients, once more without, and compares."""
        net = nn.Sequential(nn.Conv2d(4, 4, 1), module)
        x = values(3, 4, 8, 7, dtype=torch.float32)
        assert_same(torch.jit.trace(net, torch.ones(2, 4, 5, 6))(x), net(x), isinstance(module, BELU))

    @pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
    def test_functions_in_a_module_of_somebody_else(self):
        """TorchScript compiles them, and those whose checks read no shape can be traced by FX."""
        class Scripted(nn.Module):
            def forward(self, x, weight):
                y = belu(bselu(brelu(x, 6.0, 'halves')), 0.5)
                return bprelu(bleaky_relu(y, 0.1), weight) * channel_signs(4, device=x.device).reshape(4, 1, 1)

        class Traced(nn.Module):
            def forward(self, x):
                return bipolar_max_pool2d(bipolar(x, F.silu, 'halves'), 3, 2, 1)

        x, weight = values(2, 4, 5, 6, dtype=torch.float32), torch.tensor([0.3])
        assert_same(torch.jit.script(Scripted())(x, weight), Scripted()(x, weight), has_exponentials=True)
        assert torch.equal(torch.fx.symbolic_trace(Traced())(x), Traced()(x))

    def test_feature_extractor(self):
        net = nn.Sequential(nn.Conv2d(3, 4, 1), BReLU(), Bipolar(nn.SiLU()))
        x = values(2, 3, 6, 6, dtype=torch.float32)
        features = create_feature_extractor(net, {'1': 'brelu', '2.f': 'silu'})(x)
        assert torch.equal(features['brelu'], net[:2](x)) and features['silu'].any()

    def test_state(self):
        assert not any(module.state_dict() for module in ALL if not isinstance(module, BPReLU))

    def test_repr(self):
        assert [repr(module) for module in (BReLU(), BReLU(True, 6), BELU(), BPReLU(4, layout='halves'))] == [
            "BReLU(layout='interleaved')",
            "BReLU(max_value=6, layout='interleaved', inplace=True)",
            "BELU(alpha=1, layout='interleaved')",
            "BPReLU(num_parameters=4, layout='halves')",
        ]


class TestBadInput:
    @pytest.mark.parametrize('construct, error, match', [
        (lambda: BReLU(layout='odd'), ValueError, "layout must be one of 'interleaved', 'halves', got 'odd'"),
        (lambda: BipolarMaxPool2d(2, layout='odd'), ValueError, 'layout must be one of'),
        (lambda: channel_signs(4, 'odd'), ValueError, 'layout must be one of'),
        (lambda: channel_signs(0), ValueError, 'channels must be at least 1, got 0'),
        (lambda: BReLU(max_value=0), ValueError, 'max_value must be positive, got 0'),
        (lambda: BELU(alpha=None), TypeError, 'alpha must be a number, got None'),
        (lambda: BPReLU(0), ValueError, 'num_parameters must be at least 1, got 0'),
        (lambda: Bipolar('relu'), TypeError, "f must be a module or a function of a tensor, got 'relu'"),
        (lambda: BipolarMaxPool2d(0), ValueError, 'kernel_size must be at least 1, got 0'),
        (lambda: BipolarMaxPool2d(3, padding=2), ValueError, 'padding must be at most half of the kernel'),
        (lambda: BipolarMaxPool2d(2, ceil_mode=1), TypeError, 'ceil_mode must be True or False, got 1'),
        (lambda: BReLU('yes'), TypeError, "inplace must be True or False, got 'yes'"),
        (lambda: BELU(channel_dim=True), ValueError, 'channel_dim must be one of 1, -1, got True'),
        (lambda: BPReLU(dtype=torch.int64), TypeError, 'dtype must be a .* floating-point one, got torch.int64'),
    ])
    def test_construction(self, construct, error, match):
        with pytest.raises(error, match=match):
            construct()

    @pytest.mark.parametrize('x, error, match', [
        (torch.zeros(4), ValueError, 'x must have 2 to 5 dimensions, got 1'),
        (torch.zeros(2, 4, 0, 3), ValueError, r'no empty dimension besides the batch, got shape \(2, 4, 0, 3\)'),
        (torch.zeros(2, 4, dtype=torch.int64), TypeError, 'floating-point dtype, got torch.int64'),
        ([1.0], TypeError, 'x must be a tensor, got list'),
        (torch.zeros(2, 4).to_sparse(), TypeError, 'x must be a dense tensor, got one of layout torch.sparse_coo'),
        (torch.zeros(2, 4).to(torch.float8_e5m2), TypeError, 'floating-point dtype, got torch.float8_e5m2'),
    ])
    @each_member
    def test_forward(self, member, x, error, match):
        with pytest.raises(error, match=match):
            MEMBERS[member][0]()(x)

    @each_member
    def test_arguments_of_a_function(self, member):
        function, x = MEMBERS[member][1], torch.zeros(2, 4, 4)
        with pytest.raises(ValueError, match="layout must be one of 'interleaved', 'halves', got 'odd'"):
            function(x, layout='odd')
        with pytest.raises(ValueError, match='channel_dim must be one of 1, -1, got 2'):
            function(x, channel_dim=2)
        with pytest.raises(TypeError, match='inplace must be True or False, got 1'):
            function(x, inplace=1)

    @pytest.mark.parametrize('call, error, match', [
        (lambda x: brelu(x, float('nan')), ValueError, 'max_value must be finite, got nan'),
        (lambda x: brelu(x, -1.0), ValueError, 'max_value must be positive, got -1.0'),
        (lambda x: belu(x, None), TypeError, 'alpha must be a number, got None'),
        (lambda x: belu(x, 1e39), ValueError, r'alpha must lie between -3\.4.*e\+38 .* torch.float32, got 1e\+39'),
        (lambda x: bleaky_relu(x, '1'), TypeError, "negative_slope must be a number, got '1'"),
        (lambda x: bprelu(x, 0.25), TypeError, 'weight must be a tensor, got float'),
        (lambda x: bprelu(x, torch.ones(4).long()), TypeError, 'weight must have .* dtype, got torch.int64'),
        (lambda x: bprelu(x, torch.ones(1, 4)), ValueError, r'weight must have shape \(1,\) or \(C,\), got \(1, 4\)'),
        (lambda x: bprelu(x, torch.ones(0)), ValueError, r'weight must have shape \(1,\) or \(C,\), got \(0,\)'),
        (lambda x: bprelu(x, torch.ones(4, device='meta')), ValueError, 'weight must be on the device of x, cpu, got'),
        (lambda x: bipolar(x, None), TypeError, 'fn must be a function of a tensor, got None'),
        (lambda x: bipolar(x, nn.ReLU), TypeError, 'the result of the function must be a tensor, got ReLU'),
        (lambda x: bipolar(x, torch.sum), ValueError, 'the result of the function must have 2 to 5 dimensions, got 0'),
    ])
    def test_parameters_of_a_function(self, call, error, match):
        with pytest.raises(error, match=match):
            call(torch.zeros(2, 4))

    def test_channels_of_bprelu(self):
        with pytest.raises(ValueError, match=r'x must have 4 channels \(dimension 1\), got 6 \(shape \(2, 6\)\)'):
            BPReLU(4)(torch.zeros(2, 6))
        with pytest.raises(ValueError, match=r'4 channels \(dimension -1\), got 6 \(shape \(2, 4, 6\)\)'):
            BPReLU(4, channel_dim=-1)(torch.zeros(2, 4, 6))

    @pytest.mark.parametrize('x, error, match', [
        (torch.zeros(2, 4), ValueError, 'x must have 3 to 4 dimensions, got 2'),
        (torch.zeros(2, 4, 2, 8), ValueError, 'kernel_size must fit into the padded input'),
        (torch.zeros(2, 4, 0, 8), ValueError, 'no empty dimension'),
        (torch.zeros(2, 4, 8, 8, dtype=torch.uint8), TypeError, 'floating-point dtype, got torch.uint8'),
    ])
    def test_max_pool(self, x, error, match):
        with pytest.raises(error, match=match):
            BipolarMaxPool2d(3)(x)


class TestEdges:
    """The same from all back ends, where PyTorch's own functions differ or refuse."""
    pytestmark = pytest.mark.parametrize('backend', ['auto', 'cpu', 'reference'])

    @pytest.mark.parametrize('dtype', DTYPES, ids=str)
    def test_bound_out_of_reach(self, dtype, backend):
        x = values(2, 4, 5, dtype=dtype)
        with use_backend(backend):
            assert torch.equal(brelu(x, 1e39), brelu(x))

    def test_gradient_at_infinity(self, backend):
        x = torch.tensor([[float('inf'), -float('inf')]], requires_grad=True)
        with use_backend(backend):
            grad, = torch.autograd.grad(brelu(x).sum(), x)
        assert grad.tolist() == [[1, 1]]

    @pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
    def test_gradient_of_exponentials_keeps_its_digits(self, dtype, backend):
        """Far below 0 as well, where it is small beside 1."""
        x = torch.linspace(-60, 0, 61, dtype=dtype)[:, None].requires_grad_()
        with use_backend(backend):
            grad, = torch.autograd.grad(belu(x).sum(), x)
        torch.testing.assert_close(grad, x.detach().exp(), rtol=8 * torch.finfo(dtype).eps, atol=0)

    @pytest.mark.parametrize('autocast', [False, True])
    @pytest.mark.parametrize('dtype', DTYPES, ids=str)
    def test_slopes_of_another_dtype(self, dtype, autocast, backend):
        """And no rounding of the input under autocast."""
        x, weight = values(2, 4, 5, dtype=dtype), values(4, dtype=torch.float32, seed=1)
        plain = torch.stack([F.prelu(x[:, [c]].double(), weight[c:c + 1].double())[:, 0] for c in range(4)], 1)
        mirrored = torch.stack([-F.prelu(-x[:, [c]].double(), weight[c:c + 1].double())[:, 0] for c in range(4)], 1)
        expected = torch.where(torch.arange(4)[:, None] % 2 == 0, plain, mirrored)
        with use_backend(backend), torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            y = bprelu(x, weight)
        eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps if dtype != torch.float64 else 0)
        torch.testing.assert_close(y, expected.to(dtype), rtol=2 * eps, atol=0)

    def test_empty_batch_and_a_large_window(self, backend):
        x = torch.zeros(0, 4, 20, 20, requires_grad=True)
        with use_backend(backend):
            y = bipolar_max_pool2d(x, 13)
            grad, = torch.autograd.grad(y.sum(), x)
        assert y.shape == (0, 4, 1, 1) and grad.shape == x.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('module', [BReLU(), BReLU(inplace=True, max_value=6), BipolarMaxPool2d(2)], ids=repr)
def test_cuda_without_synchronisation(module):
    x = values(2, 4, 6, 6, dtype=torch.float32)
    z = x.cuda()
    torch.cuda.set_sync_debug_mode('error')
    try:
        y = module(z)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert torch.equal(y.cpu(), module(x))


@pytest.mark.parametrize('module', [BReLU, BELU, BSELU, BLeakyReLU, lambda **kw: BPReLU(6, **kw)])
@pytest.mark.parametrize('layout', ['interleaved', 'halves'])
def test_channels_last_tokens(module, layout):
    first, last = module(layout=layout), module(layout=layout, channel_dim=-1)
    x = torch.randn(2, 6, 5)
    assert torch.equal(last(x.mT), first(x).mT)
    with pytest.raises(ValueError, match='channel_dim must be one of 1, -1, got 2'):
        module(channel_dim=2)
