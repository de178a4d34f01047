"""The modules of Dynamic ReLU: definition, zero start, precision, lazy form, and what PyTorch does with modules."""
import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torchvision.models.feature_extraction import create_feature_extractor

from timm_dyacts.layers import DyReLU, DyReLUA, DyReLUB, DyReLUC

MODES = ('a', 'b', 'c')
CLASSES = (DyReLUA, DyReLUB, DyReLUC)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
STATIC = {
    'relu': ({}, F.relu),
    'relu6': ({'max_value': 6}, F.relu6),
    'leaky_relu': ({'alpha': (1, 0.1)}, lambda x: F.leaky_relu(x, 0.1)),
    'identity': ({'k': 1}, lambda x: x),
}


def trained(module, seed=0):
    """The module with parameters as far from the zero start as training may bring them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in module.parameters():
            param.normal_(generator=generator)
    return module


def values(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


class TestDefinition:
    @pytest.mark.parametrize('spatial', [(), (7,), (5, 6), (3, 4, 5)], ids=lambda s: f'{len(s)}d')
    @pytest.mark.parametrize('k', [1, 2, 3])
    @pytest.mark.parametrize('mode', MODES)
    def test_output_and_gradients(self, mode, k, spatial):
        module = trained(DyReLU(6, mode, reduction=2, k=k, max_value=1.5, tau=2.0, dtype=torch.float64))
        x = values(2, 6, *spatial).requires_grad_()
        y, expected = module(x), reference.dyrelu_module(module, x)
        torch.testing.assert_close(y, expected)
        inputs = [x, *module.parameters()]
        weight = values(*y.shape, seed=1)
        grads = torch.autograd.grad((y * weight).sum(), inputs)
        expected_grads = torch.autograd.grad((expected * weight).sum(), inputs)
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad, expected_grad, atol=1e-12, rtol=1e-7)

    @pytest.mark.parametrize('mode', MODES)
    def test_knobs(self, mode):
        module = trained(DyReLU(
            4, mode, k=3, lambda_a=0.7, lambda_b=2, alpha=(1, 0.2, -1), beta=(0, 0.1, -0.5), paper_scale=True, tau=0.5))
        x = values(2, 4, 3, 5, dtype=torch.float32)
        torch.testing.assert_close(module(x).double(), reference.dyrelu_module(module, x), atol=1e-5, rtol=1e-5)

    @settings(max_examples=40, deadline=None)
    @given(
        mode=st.sampled_from(MODES),
        channels=st.integers(1, 17),
        reduction=st.integers(1, 32),
        batch=st.integers(0, 3),
        spatial=st.lists(st.integers(1, 5), max_size=3),
    )
    def test_any_shape(self, mode, channels, reduction, batch, spatial):
        module = trained(DyReLU(channels, mode, reduction, dtype=torch.float64))
        x = values(batch, channels, *spatial)
        y = module(x)
        assert y.shape == x.shape
        assert module.fc1_weight.shape == (max(channels // reduction, 1), channels)
        if batch:
            torch.testing.assert_close(y, reference.dyrelu_module(module, x))

    @pytest.mark.parametrize('mode', MODES)
    def test_gradcheck(self, mode):
        module = trained(DyReLU(3, mode, reduction=1, max_value=2.0, dtype=torch.float64))
        x = values(2, 3, 2, 3).requires_grad_()
        params = dict(module.named_parameters())

        def f(x, *values):
            return torch.func.functional_call(module, dict(zip(params, values, strict=True)), (x,))

        assert torch.autograd.gradcheck(f, (x, *params.values()))
        assert torch.autograd.gradgradcheck(f, (x, *params.values()))

    def test_attention_scale(self):
        x = values(2, 5, 4, 4, dtype=torch.float32)
        module = trained(DyReLUC(5, tau=1e3))
        pi = module.attention(x)
        assert pi.shape == (2, 1, 4, 4)
        assert pi.unique().numel() > 1
        torch.testing.assert_close(pi.mean((1, 2, 3)), torch.ones(2))
        peaked = trained(DyReLUC(5, tau=1e-3)).attention(x)
        assert peaked.max() == 3 and peaked.min() == 0
        assert trained(DyReLUC(5, tau=1e-3, paper_scale=True)).attention(x).max() == 1
        assert DyReLUA(5).attention(x) is None and DyReLUB(5).attention(x) is None


class TestStart:
    @pytest.mark.parametrize('dtype', DTYPES, ids=str)
    @pytest.mark.parametrize('static', STATIC)
    @pytest.mark.parametrize('mode', MODES)
    def test_is_the_static_activation(self, mode, static, dtype):
        kwargs, f = STATIC[static]
        x = 10 * values(3, 16, 7, 5, dtype=dtype)
        for param_dtype in {dtype, torch.float32}:
            y = DyReLU(16, mode, dtype=param_dtype, **kwargs)(x)
            assert y.dtype == dtype
            assert torch.equal(y, f(x))

    def test_paper_scale_starts_at_a_third(self):
        x = values(2, 8, 5, 5, dtype=torch.float32)
        torch.testing.assert_close(DyReLUC(8, paper_scale=True)(x), x.relu() / 3)

    @pytest.mark.parametrize('compiled', [False, True], ids=['eager', 'compiled'])
    @pytest.mark.parametrize('static', STATIC)
    @pytest.mark.parametrize('mode', MODES)
    def test_gradient_is_that_of_the_static_activation(self, mode, static, compiled):
        """At the kinks too: 0, and the bound of ReLU6."""
        kwargs, f = STATIC[static]
        x = values(2, 8, 5, 5, dtype=torch.float32)
        x[:, :, 0], x[:, :, 1], x[:, :, 2] = 0.0, -0.0, 6.0
        x.requires_grad_()
        module = DyReLU(8, mode, **kwargs)
        y = (torch.compile(module, backend='aot_eager') if compiled else module)(x)
        grad, = torch.autograd.grad(y.sum(), x)
        expected, = torch.autograd.grad(f(x).sum(), x)
        assert torch.equal(grad, expected)

    @pytest.mark.parametrize('mode', MODES)
    def test_every_parameter_gets_a_gradient_and_moves(self, mode):
        module = DyReLU(8, mode, reduction=1)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        x, weight = values(2, 4, 8, 5, 5, dtype=torch.float32)
        for _ in range(2):
            optimizer.zero_grad()
            (module(x) * weight).sum().backward()
            assert all(param.grad is not None for param in module.parameters())
            optimizer.step()
        # Softmax does not see its bias.
        assert all(param.grad.any() for name, param in module.named_parameters() if name != 'spatial_bias')
        assert not module.is_fresh()

    @pytest.mark.parametrize('mode', MODES)
    def test_is_fresh_and_reset_parameters(self, mode):
        module = DyReLU(8, mode)
        assert module.is_fresh()
        for name, param in module.named_parameters():
            with torch.no_grad():
                param.view(-1)[0] += 1
            assert module.is_fresh() == name.startswith('fc1')
            module.reset_parameters()
            assert module.is_fresh()
        assert module.fc1_weight.abs().max() <= 8 ** -0.5 and module.fc1_weight.std() > 0

    def test_initialisers_that_walk_over_modules_find_nothing(self):
        """timm initialises every nn.Linear and nn.Conv2d of a model."""
        assert [type(m) for m in DyReLUC(8).modules()] == [DyReLUC]


class TestPrecision:
    @pytest.mark.parametrize('mode', MODES)
    def test_fp16_at_the_end_of_its_range(self, mode):
        """Means, products and the spatial logits leave the range of fp16; the result is in it again."""
        x = (6e4 * values(2, 64, 4, 4).sign()).half()
        module = trained(DyReLU(64, mode, lambda_a=0.01, max_value=2e4))
        for m in (module, copy.deepcopy(module).half()):
            y = m(x)
            assert y.isfinite().all()
            torch.testing.assert_close(y, reference.dyrelu_module(m, x).half())

    @pytest.mark.parametrize('mode', MODES)
    def test_fp32_at_1e4(self, mode):
        x = 1e4 * values(2, 64, 4, 4, dtype=torch.float32).sign()
        x.requires_grad_()
        module = trained(DyReLU(64, mode))
        y = module(x)
        y.sum().backward()
        assert y.isfinite().all()
        assert all(t.grad.isfinite().all() for t in (x, *module.parameters()))

    @pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize('mode', MODES)
    def test_half_precision_rounds_once(self, mode, dtype):
        module, x = trained(DyReLU(16, mode)), values(2, 16, 6, 6, dtype=dtype)
        expected = reference.dyrelu_module(module, x).to(dtype)
        torch.testing.assert_close(module(x), expected, atol=1e-6, rtol=1.5 * torch.finfo(dtype).eps)

    @pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize('mode', MODES)
    def test_autocast_changes_nothing(self, mode, dtype):
        module = trained(DyReLU(16, mode))
        for x in (values(2, 16, 6, 6, dtype=torch.float32), values(2, 16, 6, 6, dtype=dtype)):
            with torch.autocast('cpu', dtype=dtype):
                y = module(x)
            assert torch.equal(y, module(x))

    def test_nan_is_not_hidden(self):
        x = torch.ones(1, 2, 3)
        x[0, 0, 1] = float('nan')
        assert DyReLUB(2, max_value=6)(x)[0, 0].isnan().all()


class TestLayout:
    @pytest.mark.parametrize('mode', MODES)
    @pytest.mark.parametrize('shape, memory_format', [
        ((2, 8, 5, 6), torch.channels_last),
        ((2, 8, 3, 5, 6), torch.channels_last_3d),
    ], ids=['2d', '3d'])
    def test_memory_format_is_kept(self, mode, shape, memory_format):
        module, x = trained(DyReLU(8, mode, max_value=2)), values(*shape, dtype=torch.float32)
        y = module(x.to(memory_format=memory_format))
        assert y.is_contiguous(memory_format=memory_format)
        assert module(x).is_contiguous()
        torch.testing.assert_close(y, module(x))

    @pytest.mark.parametrize('mode', MODES)
    def test_noncontiguous_input(self, mode):
        module, x = trained(DyReLU(8, mode)), values(5, 16, 6, 2, dtype=torch.float32).transpose(0, 3)[:, ::2, 1:]
        assert not x.is_contiguous()
        torch.testing.assert_close(module(x), module(x.contiguous()))

    def test_input_is_not_written(self):
        x = values(2, 8, 5, 5, dtype=torch.float32)
        kept = x.clone()
        DyReLUB(8, inplace=True)(x)
        assert torch.equal(x, kept)

    @pytest.mark.parametrize('mode', MODES)
    def test_empty_batch(self, mode):
        module = DyReLU(8, mode)
        y = module(torch.zeros(0, 8, 5, 5))
        y.sum().backward()
        assert y.shape == (0, 8, 5, 5)

    @pytest.mark.parametrize('mode', MODES)
    def test_meta_device(self, mode):
        module = DyReLU(8, mode, device='meta')
        assert module(torch.zeros(2, 8, 5, 5, device='meta')).shape == (2, 8, 5, 5)
        module = module.to_empty(device='cpu')
        module.reset_parameters()
        x = values(2, 8, 5, 5, dtype=torch.float32)
        assert torch.equal(module(x), x.relu())


class TestLazy:
    @pytest.mark.parametrize('cls', CLASSES)
    def test_first_input_decides(self, cls):
        module = cls(reduction=4, max_value=6)
        assert isinstance(module, LazyModuleMixin) and isinstance(module, DyReLU)
        assert module.is_fresh()
        x = 10 * values(2, 12, 5, 5, dtype=torch.float32)
        assert torch.equal(module(x), F.relu6(x))
        assert type(module) is cls
        assert module.channels == 12 and module.fc1_weight.shape == (3, 12)
        assert not module._forward_pre_hooks and not module._load_state_dict_pre_hooks
        assert vars(module).keys() == vars(cls(12)).keys()

    @pytest.mark.parametrize('cls', CLASSES)
    def test_state_dict_decides(self, cls):
        full = nn.Sequential(nn.Identity(), trained(cls(12)))
        lazy = nn.Sequential(nn.Identity(), cls())
        lazy.load_state_dict(full.state_dict())
        assert type(lazy[1]) is cls
        x = values(2, 12, 5, 5, dtype=torch.float32)
        assert torch.equal(lazy(x), full(x))

    @pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['copy', 'io'])
    @pytest.mark.parametrize('cls', CLASSES)
    def test_copies_before_and_after(self, cls, duplicate):
        x = values(2, 12, 5, 5, dtype=torch.float32)
        module = cls()
        early = duplicate(module)
        module(x)
        trained(module)
        late = duplicate(module)
        assert isinstance(early, LazyModuleMixin)
        assert torch.equal(early(x), x.relu())
        assert type(early) is type(late) is cls
        assert torch.equal(late(x), module(x))

    def test_dtype_is_the_one_asked_for(self):
        x = values(2, 4, 3, 3, dtype=torch.float32)

        def dtype_of(module, x=x):
            module(x)
            return module.fc1_weight.dtype

        assert dtype_of(DyReLUB()) == torch.float32
        assert dtype_of(DyReLUB(), x.half()) == torch.float32
        assert dtype_of(DyReLUB(dtype=torch.bfloat16)) == torch.bfloat16
        assert dtype_of(DyReLUB().double()) == torch.float64

    def test_subclasses_come_back_as_themselves(self):
        module = NamedDyReLU()
        module(torch.zeros(1, 4))
        assert type(module) is NamedDyReLU

    def test_lazy_to_lazy(self):
        """Neither checkpoint nor module knows the channels: the module stays lazy."""
        module = DyReLUB()
        module.load_state_dict(DyReLUB().state_dict())
        assert isinstance(module, LazyModuleMixin)

    def test_bad_first_input(self):
        module = DyReLUB()
        with pytest.raises(ValueError, match='empty dimension'):
            module(torch.zeros(2, 0, 3))
        with pytest.raises(TypeError, match='x must be a tensor, got Proxy'):
            torch.fx.symbolic_trace(nn.Sequential(module))
        assert torch.equal(module(-torch.ones(1, 4)), torch.zeros(1, 4))

    def test_compile_materialises(self):
        x = values(2, 4, 3, 3, dtype=torch.float32)
        assert torch.equal(torch.compile(DyReLUB(), backend='aot_eager')(x), x.relu())


class NamedDyReLU(DyReLUC):
    pass


class TestTransforms:
    @pytest.mark.parametrize('mode', MODES)
    def test_compile_without_graph_break(self, mode):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        module = trained(DyReLU(8, mode, max_value=2))
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend='aot_eager')
        for shape in ((2, 8, 5, 6), (3, 8, 7, 4)):
            x = values(*shape, dtype=torch.float32).requires_grad_()
            y, expected = compiled(x), module(x)
            torch.testing.assert_close(y, expected)
            grads = torch.autograd.grad(y.square().sum(), [x, *module.parameters()])
            expected_grads = torch.autograd.grad(expected.square().sum(), [x, *module.parameters()])
            for grad, expected_grad in zip(grads, expected_grads, strict=True):
                torch.testing.assert_close(grad, expected_grad, atol=1e-3, rtol=1e-4)
        assert not torch._dynamo.utils.counters['graph_break']

    @pytest.mark.parametrize('mode', MODES)
    def test_export_with_dynamic_batch_and_size(self, mode):
        module = trained(DyReLU(8, mode, max_value=2))
        dims = {0: torch.export.Dim('n'), 2: torch.export.Dim('h'), 3: torch.export.Dim('w')}
        program = torch.export.export(module, (torch.zeros(2, 8, 5, 6),), dynamic_shapes=(dims,))
        x = values(4, 8, 9, 3, dtype=torch.float32)
        torch.testing.assert_close(program.module()(x), module(x))

    @pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
    @pytest.mark.parametrize('mode', MODES)
    def test_torchscript(self, mode):
        module = trained(DyReLU(8, mode, max_value=2))
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.script(module), buffer)
        buffer.seek(0)
        loaded = torch.jit.load(buffer)
        for shape in ((2, 8), (2, 8, 5, 6), (2, 8, 2, 3, 4)):
            x = values(*shape, dtype=torch.float32)
            torch.testing.assert_close(loaded(x), module(x))

    @pytest.mark.filterwarnings('error::torch.jit.TracerWarning', 'ignore::FutureWarning', 'ignore::DeprecationWarning')
    @pytest.mark.parametrize('mode', MODES)
    def test_trace(self, mode):
        module = trained(DyReLU(8, mode))
        traced = torch.jit.trace(module, torch.zeros(2, 8, 5, 6))
        x = values(3, 8, 4, 7, dtype=torch.float32)
        torch.testing.assert_close(traced(x), module(x))

    @pytest.mark.parametrize('mode', MODES)
    def test_fx(self, mode):
        net = nn.Sequential(nn.Conv2d(3, 8, 1), trained(DyReLU(8, mode)), nn.Conv2d(8, 4, 1))
        x = values(2, 3, 5, 6, dtype=torch.float32)
        traced = torch.fx.symbolic_trace(net)
        assert torch.equal(traced(x), net(x))
        assert torch.equal(pickle.loads(pickle.dumps(traced))(x), net(x))
        features = create_feature_extractor(net, {'1': 'act'})(x)
        assert torch.equal(features['act'], net[:2](x))

    @pytest.mark.parametrize('mode', MODES)
    def test_state_dict_holds_parameters_only(self, mode):
        module = trained(DyReLU(8, mode))
        names = ['fc1_weight', 'fc1_bias', 'fc2_weight', 'fc2_bias']
        assert list(module.state_dict()) == names + (['spatial_weight', 'spatial_bias'] if mode == 'c' else [])
        assert module.fc2_weight.shape == (4 if mode == 'a' else 32, 1)
        other = DyReLU(8, mode)
        other.load_state_dict(module.state_dict())
        x = values(2, 8, 5, 5, dtype=torch.float32)
        assert torch.equal(other(x), module(x))

    def test_repr(self):
        assert repr(DyReLUB(8)) == "DyReLUB(8, mode='b', reduction=8, k=2, alpha=[1.0, 0.0])"
        assert 'max_value=6' in repr(DyReLUB(8, max_value=6)) and 'paper_scale' in repr(DyReLUC(8, paper_scale=True))
        assert repr(DyReLUC()).startswith('LazyDyReLU(None')


class TestStatic:
    """``static=True``: mode "b" with a hyper function that is a bias and nothing else."""

    @staticmethod
    def pair(**kwargs):
        static = trained(DyReLUB(6, static=True, **kwargs))
        dynamic = DyReLUB(6, **kwargs)  # fresh: the weights of fc2 are zero
        dynamic.load_state_dict(static.state_dict(), strict=False)
        return static, dynamic

    @pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
    @pytest.mark.parametrize('dtype', DTYPES, ids=str)
    @pytest.mark.parametrize('k', [1, 2, 3])
    def test_is_mode_b_with_weights_of_zero(self, k, dtype, memory_format):
        static, dynamic = self.pair(k=k, max_value=1.5, dtype=dtype)
        x = values(3, 6, 5, 4, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
        y, expected = static(x), dynamic(x)
        assert y.dtype == dtype and y.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(y, expected)
        weight = values(3, 6, 5, 4, dtype=dtype, seed=1)
        grads = torch.autograd.grad((y * weight).sum(), [x, static.fc2_bias])
        expected_grads = torch.autograd.grad((expected * weight).sum(), [x, dynamic.fc2_bias])
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            tolerance = {} if dtype.itemsize > 2 else dict(rtol=0.02, atol=0.05)
            torch.testing.assert_close(grad, expected_grad, **tolerance)

    @pytest.mark.parametrize('static', STATIC)
    def test_starts_as_the_activation(self, static):
        kwargs, function = STATIC[static]
        x = values(2, 6, 4, 4, dtype=torch.float32)
        assert torch.equal(DyReLUB(6, static=True, **kwargs)(x), function(x))

    def test_samples_do_not_see_each_other(self):
        static, _ = self.pair()
        x = values(3, 6, 4, 4, dtype=torch.float32)
        assert torch.equal(static(x)[1:2, :, 1:3], static(x[1:2, :, 1:3]))
        assert static(x[:0]).shape == (0, 6, 4, 4)

    @pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
    def test_transforms(self):
        static, _ = self.pair(max_value=6)
        x = values(2, 6, 5, 4, dtype=torch.float32)
        expected = static(x)
        dims = {0: torch.export.Dim('n'), 2: torch.export.Dim('h')}
        exported = torch.export.export(static, (torch.zeros(3, 6, 7, 4),), dynamic_shapes=(dims,)).module()
        compiled = torch.compile(static, fullgraph=True, backend='aot_eager')
        for transformed in (exported, compiled, torch.jit.script(static), torch.fx.symbolic_trace(static)):
            torch.testing.assert_close(transformed(x), expected)

    def test_lazy_copies_and_state_dict(self):
        static, _ = self.pair()
        assert list(static.state_dict()) == ['fc2_bias'] and static.fc2_bias.shape == (24,)
        lazy = DyReLUB(static=True)
        lazy.load_state_dict(static.state_dict())
        first_input = DyReLUB(static=True)
        x = values(2, 6, 5, dtype=torch.float32)
        first_input(x)
        assert lazy.channels == first_input.channels == 6
        for module in (lazy, copy.deepcopy(static), pickle.loads(pickle.dumps(static))):
            assert torch.equal(module(x), static(x))
        assert not static.is_fresh()
        static.reset_parameters()
        assert static.is_fresh() and 'static=True' in repr(static)

    @pytest.mark.parametrize('mode', ['a', 'c'])
    def test_mode_b_alone(self, mode):
        with pytest.raises(ValueError, match=f"static must be False in mode '{mode}'"):
            DyReLU(6, mode, static=True)


class TestBadInput:
    @pytest.mark.parametrize('kwargs, error, match', [
        ({'channels': 0}, ValueError, 'channels must be at least 1, got 0'),
        ({'channels': 8.0}, TypeError, 'channels must be an int, got 8.0'),
        ({'mode': 'd'}, ValueError, "mode must be one of 'a', 'b', 'c', got 'd'"),
        ({'reduction': 0}, ValueError, 'reduction must be at least 1, got 0'),
        ({'k': 0}, ValueError, 'k must be at least 1, got 0'),
        ({'alpha': (1, 0, 0)}, ValueError, r'alpha must hold k=2 numbers, got \(1, 0, 0\)'),
        ({'beta': (0,)}, ValueError, r'beta must hold k=2 numbers, got \(0,\)'),
        ({'alpha': ('1', 0)}, TypeError, "alpha must be a number, got '1'"),
        ({'lambda_a': float('nan')}, ValueError, 'lambda_a must be finite, got nan'),
        ({'max_value': float('inf')}, ValueError, 'max_value must be finite, got inf'),
        ({'tau': 0}, ValueError, 'tau must be positive, got 0'),
        ({'alpha': 1.0}, TypeError, 'alpha must be a sequence of k=2 numbers, got 1.0'),
        ({'max_value': 10 ** 400}, ValueError, 'max_value must be finite, got 1000'),
        ({'paper_scale': 1}, TypeError, 'paper_scale must be True or False, got 1'),
        ({'channel_dim': 1.0}, ValueError, 'channel_dim must be one of 1, -1, got 1.0'),
        ({'dtype': torch.complex64}, TypeError, 'dtype must be a .* floating-point one, got torch.complex64'),
    ])
    def test_construction(self, kwargs, error, match):
        with pytest.raises(error, match=match):
            DyReLU(**{'channels': 8, **kwargs})

    @pytest.mark.parametrize('x, error, match', [
        (torch.zeros(8), ValueError, r'x must have 2 to 5 dimensions, got 1 \(shape \(8,\)\)'),
        (torch.zeros(1, 8, 1, 1, 1, 1), ValueError, 'x must have 2 to 5 dimensions, got 6'),
        (torch.zeros(2, 9, 3, 3), ValueError, r'x must have 8 channels \(dimension 1\), got 9'),
        (torch.zeros(2, 8, 0, 3), ValueError, r'no empty dimension besides the batch, got shape \(2, 8, 0, 3\)'),
        (torch.zeros(2, 8, 3, 3, dtype=torch.int64), TypeError, 'floating-point dtype, got torch.int64'),
        (torch.zeros(2, 8, 3, 3, dtype=torch.complex64), TypeError, 'floating-point dtype, got torch.complex64'),
        (None, TypeError, 'x must be a tensor, got NoneType'),
        (torch.zeros(2, 8).to_sparse(), TypeError, 'x must be a dense tensor, got one of layout torch.sparse_coo'),
    ])
    @pytest.mark.parametrize('mode', [*MODES, 'static'])
    def test_forward(self, mode, x, error, match):
        module = DyReLU(8, static=True) if mode == 'static' else DyReLU(8, mode)
        for call in (module, module.coefficients):
            with pytest.raises(error, match=match):
                call(x)

    @pytest.mark.parametrize('x, error, match', [
        ([1.0], TypeError, 'x must be a tensor, got list'),
        (torch.zeros(8), ValueError, 'x must have 2 to 5 dimensions, got 1'),
        (torch.zeros(2, 8, 9), ValueError, r'x must have 8 channels \(dimension -1\), got 9 \(shape \(2, 8, 9\)\)'),
    ])
    def test_forward_of_channels_last(self, x, error, match):
        with pytest.raises(error, match=match):
            DyReLU(8, channel_dim=-1)(x)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('mode', MODES)
def test_cuda_without_synchronisation(mode):
    module = trained(DyReLU(16, mode, max_value=2))
    x = values(2, 16, 6, 6, dtype=torch.float32)
    expected = module(x)
    module, x = module.cuda(), x.cuda()
    torch.cuda.set_sync_debug_mode('error')
    try:
        y = module(x)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    torch.testing.assert_close(y.cpu(), expected)


@pytest.mark.parametrize('module', [DyReLUA, DyReLUB, DyReLUC])
def test_channels_last_tokens(module):
    first, last = module(6), module(channel_dim=-1)
    x = torch.randn(2, 6, 5, 4)
    last(x.permute(0, 2, 3, 1))  # takes its channels from here
    with torch.no_grad():
        for p in first.parameters():
            p.normal_()
    last.load_state_dict(first.state_dict())
    assert torch.equal(last(x.permute(0, 2, 3, 1)), first(x).permute(0, 2, 3, 1))
    with pytest.raises(ValueError, match='channel_dim must be one of 1, -1, got 2'):
        module(6, channel_dim=2)
