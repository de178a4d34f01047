"""SoftPool: the definition, shapes as of max pooling, finite results, true gradients, the machinery of PyTorch."""
import copy
import inspect
import io
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from timm_dyacts.layers import (
    GlobalSoftPool2d,
    SoftPool1d,
    SoftPool2d,
    SoftPool2dSame,
    SoftPool3d,
    global_softpool2d,
    softpool1d,
    softpool2d,
    softpool3d,
)
from timm_dyacts.ops.backends import use_backend

FUNCTIONS = {1: softpool1d, 2: softpool2d, 3: softpool3d}
MODULES = {1: SoftPool1d, 2: SoftPool2d, 3: SoftPool3d}
MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# kernel_size, stride, padding, dilation, ceil_mode
WINDOWS = [
    (2, 2, 0, 1, False),
    (3, 2, 1, 1, False),
    (3, 2, 0, 1, True),
    (2, 3, 0, 1, True),
    (3, 1, 1, 2, False),
    (4, 3, 2, 2, True),
]


def values(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@st.composite
def windows(draw):
    """The size of an input and arguments of a pooling that max pooling accepts, one set per dimension."""
    rank = draw(st.integers(1, 3))
    per_dim = []
    for _ in range(rank):
        kernel_size, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 3))
        padding = draw(st.integers(0, kernel_size // 2))
        size = draw(st.integers(max(dilation, dilation * (kernel_size - 1) + 1 - 2 * padding), 10))
        per_dim.append((size, kernel_size, draw(st.integers(1, 4)), padding, dilation))
    size, *window = zip(*per_dim, strict=True)
    return size, window, draw(st.booleans())


class TestDefinition:
    @settings(max_examples=60, deadline=None)
    @given(windows(), st.sampled_from([1.0, 0.0, -2.0, 5.0]))
    def test_output(self, case, beta):
        size, window, ceil_mode = case
        x = values(2, 3, *size)
        y = FUNCTIONS[len(size)](x, *window, ceil_mode, beta)
        assert y.shape == MAX_POOLS[len(size)](x, *window, ceil_mode).shape
        torch.testing.assert_close(y, reference.softpool(x, *window, ceil_mode, beta))

    @pytest.mark.parametrize('detach_weights', [False, True])
    @pytest.mark.parametrize('window', WINDOWS, ids=str)
    @pytest.mark.parametrize('rank', [1, 2, 3])
    def test_gradient(self, rank, window, detach_weights):
        *window, ceil_mode = window
        x = values(2, 2, *(5, 7, 6)[:rank]).requires_grad_()
        y = FUNCTIONS[rank](x, *window, ceil_mode, 1.5, detach_weights)
        expected = reference.softpool(x, *([v] * rank for v in window), ceil_mode, 1.5, detach_weights)
        weight = values(*y.shape, seed=1)
        grad, = torch.autograd.grad((y * weight).sum(), x)
        expected_grad, = torch.autograd.grad((expected * weight).sum(), x)
        torch.testing.assert_close(grad, expected_grad)

    @pytest.mark.parametrize('window', WINDOWS, ids=str)
    @pytest.mark.parametrize('rank', [1, 2, 3])
    def test_gradcheck(self, rank, window):
        *window, ceil_mode = window
        x = values(1, 1, *{1: (9,), 2: (5, 6), 3: (3, 5, 4)}[rank]).requires_grad_()

        def f(x):
            return FUNCTIONS[rank](x, *window, ceil_mode, 0.7)

        assert torch.autograd.gradcheck(f, x)
        assert torch.autograd.gradgradcheck(f, x)

    @pytest.mark.parametrize('beta', [1.0, 0.0, -3.0])
    @pytest.mark.parametrize('detach_weights', [False, True])
    def test_global(self, beta, detach_weights):
        """The window is the whole plane."""
        x = values(2, 3, 4, 5).requires_grad_()
        y = global_softpool2d(x, beta, detach_weights=detach_weights)
        expected = reference.softpool(x, (4, 5), (1, 1), (0, 0), (1, 1), False, beta, detach_weights)
        assert y.shape == (2, 3, 1, 1)
        torch.testing.assert_close(y, expected)
        weight = values(2, 3, 1, 1)
        grad, = torch.autograd.grad((y * weight).sum(), x)
        expected_grad, = torch.autograd.grad((expected * weight).sum(), x)
        torch.testing.assert_close(grad, expected_grad)
        assert torch.equal(global_softpool2d(x, beta, keepdim=False), y.flatten(1))
        assert torch.equal(global_softpool2d(x[0], beta), y[0])
        assert torch.autograd.gradcheck(lambda x: global_softpool2d(x, 0.7), x)
        assert torch.autograd.gradgradcheck(lambda x: global_softpool2d(x, 0.7), x)

    def test_gradient_formula(self):
        """``w_i * (1 + beta * (x_i - y))``; with `detach_weights` the authors' ``w_i``."""
        x, beta = values(1, 1, 4).requires_grad_(), 2.0
        y = softpool1d(x, 4, beta=beta)
        w = torch.softmax(beta * x, 2)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], w * (1 + beta * (x - y)))
        y = softpool1d(x, 4, beta=beta, detach_weights=True)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], w)

    @pytest.mark.parametrize('window', WINDOWS, ids=str)
    def test_beta_goes_from_min_to_max(self, window):
        *window, ceil_mode = window
        x = values(2, 3, 7, 9)
        largest = F.max_pool2d(x, *window, ceil_mode)
        assert torch.equal(softpool2d(x, *window, ceil_mode, beta=1e6), largest)
        assert torch.equal(softpool2d(x, *window, ceil_mode, beta=-1e6), -F.max_pool2d(-x, *window, ceil_mode))
        if window[3] == 1 and not ceil_mode:
            mean = F.avg_pool2d(x, *window[:3], count_include_pad=False)
            torch.testing.assert_close(softpool2d(x, *window, beta=0), mean)

    @pytest.mark.parametrize('rank', [1, 2, 3])
    def test_unbatched(self, rank):
        x = values(2, 3, *[6] * rank)
        assert torch.equal(FUNCTIONS[rank](x[0], 3, 2, 1), FUNCTIONS[rank](x, 3, 2, 1)[0])

    @pytest.mark.parametrize('rank', [1, 2, 3])
    def test_module(self, rank):
        x = values(2, 3, *[7] * rank)
        module = MODULES[rank](3, 2, padding=1, beta=2, ceil_mode=True)
        assert torch.equal(module(x), FUNCTIONS[rank](x, 3, 2, 1, ceil_mode=True, beta=2))
        assert torch.equal(MODULES[rank](2)(x), FUNCTIONS[rank](x, 2, 2))


class TestPrecision:
    @pytest.mark.parametrize('dtype', DTYPES, ids=str)
    @pytest.mark.parametrize('beta', [1, 0, -1, 1e-40, 1e30, -1e300])
    def test_finite_up_to_the_largest_number(self, beta, dtype):
        largest = torch.finfo(dtype).max
        levels = torch.tensor([largest, -largest, largest / 2, 0, 1, -1, torch.finfo(dtype).tiny], dtype=dtype)
        x = levels[torch.randint(7, (4, 8, 9, 9), generator=torch.Generator().manual_seed(0))]
        for window in WINDOWS:
            y = softpool2d(x, *window, beta=beta)
            assert y.isfinite().all()
            assert (y <= F.max_pool2d(x, *window)).all() and (y >= -F.max_pool2d(-x, *window)).all()
        assert global_softpool2d(x, beta).isfinite().all()

    @pytest.mark.parametrize('dtype, size', [(torch.float32, 1e4), (torch.float16, 6e4)], ids=str)
    def test_gradient_is_finite(self, dtype, size):
        x = (size * values(2, 3, 9, 9).sign()).to(dtype).requires_grad_()
        for pool in (SoftPool2d(3, 2, 1), GlobalSoftPool2d()):
            grad, = torch.autograd.grad(pool(x).sum(), x)
            assert grad.isfinite().all() and grad.any()

    @pytest.mark.parametrize('backend', ['auto', 'cpu', 'reference'])
    @pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize('beta', [1, 0, -2, 1e30])
    @pytest.mark.parametrize('detach_weights', [False, True])
    def test_gradient_of_the_largest_numbers(self, detach_weights, beta, dtype, backend):
        """What has a weight equals the output, so that the weights are the gradient."""
        largest = torch.finfo(dtype).max
        levels = torch.tensor([largest, -largest, largest / 2], dtype=dtype)
        x = levels[torch.randint(3, (2, 3, 9, 9), generator=torch.Generator().manual_seed(0))]
        same, whole = ((3, 3), (2, 2), (1, 1), (1, 1)), ((9, 9), (1, 1), (0, 0), (1, 1))
        options = dict(beta=beta, detach_weights=detach_weights)
        for pool, window in ((SoftPool2d(*same, **options), same), (GlobalSoftPool2d(**options), whole)):
            dy = 100 * values(2, 3, *pool(x).shape[2:]).to(dtype)
            x.requires_grad_()
            with use_backend(backend):
                grad, = torch.autograd.grad(pool(x), x, dy)
            expected = reference.softpool(x, *window, beta=beta, detach_weights=True)
            expected, = torch.autograd.grad(expected, x, dy.double())
            torch.testing.assert_close(grad, expected.to(dtype), rtol=4 * torch.finfo(dtype).eps, atol=1e-4)

    def test_window_far_below_the_rest_of_the_plane(self):
        x = torch.tensor([[[89.0, 88.0, 0.0, 0.0, -1e4, -1e4 - 1]]])
        expected = reference.softpool(x, (2,), (2,), (0,), (1,)).float()
        torch.testing.assert_close(softpool1d(x, 2), expected)

    @pytest.mark.parametrize('value', [0.1, 3.4e38, -3.4e38])
    def test_constant_window_is_kept_exactly(self, value):
        x = torch.full((1, 1, 7, 7), value)
        for y in (softpool2d(x, 3, 2, 1), softpool2d(x, 3, 2, 1, beta=-7), global_softpool2d(x)):
            assert (y == x[0, 0, 0, 0]).all()

    @pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
    def test_half_precision_rounds_once(self, dtype):
        x = values(2, 3, 9, 9, dtype=dtype)
        expected = reference.softpool(x, (3, 3), (2, 2), (1, 1), (1, 1)).to(dtype)
        torch.testing.assert_close(softpool2d(x, 3, 2, 1), expected, atol=0, rtol=1.5 * torch.finfo(dtype).eps)
        expected = reference.softpool(x, (9, 9), (1, 1), (0, 0), (1, 1)).to(dtype)
        torch.testing.assert_close(global_softpool2d(x), expected, atol=0, rtol=1.5 * torch.finfo(dtype).eps)

    @pytest.mark.parametrize('pool', [SoftPool2d(3, 2, 1), GlobalSoftPool2d()], ids=str)
    @pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
    def test_autocast_changes_nothing(self, pool, dtype):
        x = values(2, 3, 9, 9, dtype=dtype)
        with torch.autocast('cpu', dtype=torch.float16):
            y = pool(x)
        assert y.dtype == dtype
        assert torch.equal(y, pool(x))

    def test_nan_is_not_hidden(self):
        x = torch.ones(1, 1, 4)
        x[0, 0, 0] = float('nan')
        assert softpool1d(x, 2).isnan().tolist() == [[[True, False]]]


class TestLayout:
    @pytest.mark.parametrize('window', WINDOWS, ids=str)
    @pytest.mark.parametrize('rank, memory_format', [(2, torch.channels_last), (3, torch.channels_last_3d)])
    def test_memory_format_is_kept(self, rank, memory_format, window):
        x = values(2, 4, *(6, 8, 7)[:rank], dtype=torch.float32)
        y = FUNCTIONS[rank](x.to(memory_format=memory_format), *window)
        assert y.is_contiguous(memory_format=memory_format)
        expected = FUNCTIONS[rank](x, *window)
        assert expected.is_contiguous()
        torch.testing.assert_close(y, expected)

    @pytest.mark.parametrize('beta, detach_weights', [(1.0, False), (-2.0, True)])
    def test_global_pool(self, beta, detach_weights):
        """The gradient has the memory format of the input."""
        pool, x = GlobalSoftPool2d(beta=beta, detach_weights=detach_weights), values(2, 4, 6, 8).requires_grad_()
        expected, = torch.autograd.grad(pool(x).square().sum(), x)
        for other in (x.to(memory_format=torch.channels_last), x.mT.contiguous().mT):
            other = other.detach().requires_grad_()
            torch.testing.assert_close(pool(other), pool(x))
            grad, = torch.autograd.grad(pool(other).square().sum(), other)
            torch.testing.assert_close(grad, expected)
        other = x.detach().to(memory_format=torch.channels_last).requires_grad_()
        grad, = torch.autograd.grad(pool(other).sum(), other)
        assert grad.is_contiguous(memory_format=torch.channels_last)

    @pytest.mark.parametrize('rank', [1, 2, 3])
    def test_noncontiguous_input(self, rank):
        x = values(*[8] * rank, 6, 4).transpose(0, -1)[:, ::2]
        assert not x.is_contiguous()
        assert torch.equal(FUNCTIONS[rank](x, 3, 2, 1), FUNCTIONS[rank](x.contiguous(), 3, 2, 1))

    @pytest.mark.parametrize('device', ['cpu', 'meta'])
    @pytest.mark.parametrize('rank', [1, 2, 3])
    def test_empty_batch(self, rank, device):
        x = torch.zeros(0, 3, *[6] * rank, device=device, requires_grad=True)
        y = FUNCTIONS[rank](x, 3, 2, 1)
        y.sum().backward()
        assert y.shape == (0, 3, *[3] * rank) and x.grad.shape == x.shape


class TestTransforms:
    @pytest.mark.parametrize('pool', [SoftPool2d(2), SoftPool2d(3, 2, 1), GlobalSoftPool2d()], ids=str)
    def test_compile_without_graph_break(self, pool):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(pool, fullgraph=True, backend='aot_eager')
        x = values(2, 3, 7, 9, dtype=torch.float32).requires_grad_()
        y, expected = compiled(x), pool(x)
        torch.testing.assert_close(y, expected)
        weight = values(*y.shape, dtype=torch.float32)
        grads = [torch.autograd.grad((out * weight).sum(), x)[0] for out in (y, expected)]
        torch.testing.assert_close(*grads)
        assert not torch._dynamo.utils.counters['graph_break']

    def test_compile_with_dynamic_sizes(self):
        torch._dynamo.reset()
        compiled = torch.compile(softpool1d, fullgraph=True, dynamic=True, backend='aot_eager')
        for shape, beta in itertools.product(((2, 3, 8), (4, 3, 11)), (1.0, 0.5)):
            x = values(*shape)
            torch.testing.assert_close(compiled(x, 3, 2, 1, beta=beta), softpool1d(x, 3, 2, 1, beta=beta))

    @pytest.mark.parametrize('pool', [SoftPool2d(3, 2, 1), GlobalSoftPool2d()], ids=str)
    def test_export_with_dynamic_batch(self, pool):
        program = torch.export.export(pool, (torch.zeros(2, 3, 7, 9),), dynamic_shapes=({0: torch.export.Dim('n')},))
        x = values(5, 3, 7, 9, dtype=torch.float32)
        torch.testing.assert_close(program.module()(x), pool(x))

    @pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
    @pytest.mark.parametrize('pool, rank', [
        (SoftPool1d(3, 2, 1), 1),
        (SoftPool2d(2, beta=2), 2),
        (SoftPool2d((3, 2), (2, 1), (1, 0), dilation=2, ceil_mode=True), 2),
        (SoftPool3d(3, 2, 1, beta=-1, detach_weights=True), 3),
        (GlobalSoftPool2d(keepdim=False), 2),
    ], ids=str)
    def test_torchscript_and_fx(self, pool, rank):
        x = values(2, 3, *(7, 6, 9)[:rank], dtype=torch.float32)
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.script(pool), buffer)
        buffer.seek(0)
        torch.testing.assert_close(torch.jit.load(buffer)(x), pool(x))
        traced = torch.fx.symbolic_trace(pool)
        pickles = [pickle.loads(pickle.dumps(module)) for module in (pool, traced)]
        for duplicate in (traced, copy.deepcopy(pool), *pickles):
            assert torch.equal(duplicate(x), pool(x))

    def test_functions_in_a_module_of_somebody_else(self):
        class Traced(nn.Module):
            def forward(self, x):
                return softpool2d(x, 3, 2, 1, beta=2)

        x = values(2, 3, 6, 6, dtype=torch.float32)
        assert torch.equal(torch.fx.symbolic_trace(Traced())(x), softpool2d(x, 3, 2, 1, beta=2))

    @pytest.mark.parametrize('rank', [1, 2, 3])
    def test_functions_have_a_name_and_a_signature(self, rank):
        function = FUNCTIONS[rank]
        assert function.__name__ == f'softpool{rank}d' and f'F.max_pool{rank}d' in function.__doc__
        assert pickle.loads(pickle.dumps(function)) is function
        names = ['kernel_size', 'stride', 'padding', 'dilation', 'ceil_mode', 'beta', 'detach_weights']
        assert list(inspect.signature(function).parameters) == ['x', *names]
        for module in (MODULES[rank], SoftPool2dSame):
            assert list(inspect.signature(module).parameters) == [*names, 'channels', 'device', 'dtype']

    def test_feature_extractor(self):
        net = nn.Sequential(nn.Conv2d(3, 4, 1), SoftPool2d(2), nn.ReLU())
        x = values(2, 3, 6, 6, dtype=torch.float32)
        assert torch.equal(create_feature_extractor(net, {'1': 'pool'})(x)['pool'], net[:2](x))

    def test_no_state(self):
        assert not SoftPool2d(2).state_dict() and not GlobalSoftPool2d().state_dict()

    def test_repr(self):
        assert repr(SoftPool2d(3, 2, 1)) == (
            'SoftPool2d(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(1, 1), ceil_mode=False, beta=1, '
            'detach_weights=False)'
        )


class TestBadInput:
    @pytest.mark.parametrize('args, error, match', [
        ((0,), ValueError, 'kernel_size must be at least 1, got 0'),
        ((2.0,), TypeError, 'kernel_size must be an int, got 2.0'),
        (((2, 2, 2),), ValueError, r'kernel_size must be an int or 2 ints, got \(2, 2, 2\)'),
        ((2, 0), ValueError, 'stride must be at least 1, got 0'),
        ((2, ()), ValueError, r'stride must be an int or 2 ints, got \(\)'),
        ((2, 2, -1), ValueError, 'padding must be at least 0, got -1'),
        ((3, 2, 2, 2), ValueError, r'padding must be at most half of the kernel, got padding=\(2, 2\)'),
        ((3, 2, 1, 0), ValueError, 'dilation must be at least 1, got 0'),
        ((2, 2, 0, 1, False, float('inf')), ValueError, 'beta must be finite, got inf'),
        ((2, 2, 0, 1, False, 'soft'), TypeError, "beta must be a number, got 'soft'"),
        ((2, 2, 0, 1, False, 10 ** 400), ValueError, 'beta must be finite, got 1000'),
        ((2, 10 ** 20), ValueError, 'stride must be at most 9223372036854775807, got 100000000000000000000'),
        ((2, 2, 0, 1, 'yes'), TypeError, "ceil_mode must be True or False, got 'yes'"),
        ((2, 2, 0, 1, False, 1, None), TypeError, 'detach_weights must be True or False, got None'),
    ])
    def test_arguments(self, args, error, match):
        for call in (lambda: SoftPool2d(*args), lambda: softpool2d(torch.zeros(1, 1, 8, 8), *args)):
            with pytest.raises(error, match=match):
                call()

    def test_flags_of_the_global_pool(self):
        for name in ('keepdim', 'detach_weights'):
            for call in (GlobalSoftPool2d, lambda **kwargs: global_softpool2d(torch.zeros(1, 1, 8, 8), **kwargs)):
                with pytest.raises(TypeError, match=f'{name} must be True or False, got 1'):
                    call(**{name: 1})

    @pytest.mark.parametrize('pool', [SoftPool2d(2), SoftPool2dSame(2), GlobalSoftPool2d()], ids=str)
    @pytest.mark.parametrize('x, error, match', [
        (None, TypeError, 'x must be a tensor, got NoneType'),
        (torch.zeros(1, 1, 8, 8).numpy(), TypeError, 'x must be a tensor, got ndarray'),
        (torch.zeros(1, 1, 8, 8).to(torch.float8_e5m2), TypeError, 'floating-point dtype, got torch.float8_e5m2'),
        (torch.zeros(1, 1, 8, 8).to_sparse(), TypeError, 'x must be a dense tensor, got one of layout torch.sparse'),
        (torch.zeros(8, 8), ValueError, 'x must have 3 to 4 dimensions, got 2'),
        (torch.zeros(1, 1, 8, 8, 8), ValueError, 'x must have 3 to 4 dimensions, got 5'),
        (torch.zeros(1, 1, 8, 8, dtype=torch.int32), TypeError, 'floating-point dtype, got torch.int32'),
        (torch.zeros(1, 1, 0, 8), ValueError, r'no empty dimension besides the batch, got shape \(1, 1, 0, 8\)'),
        (torch.zeros(0, 8, 8), ValueError, 'no empty dimension besides the batch'),
    ])
    def test_input(self, pool, x, error, match):
        with pytest.raises(error, match=match):
            pool(x)

    def test_same_padding(self):
        with pytest.raises(ValueError, match=r'kernel_size must be odd where stride is 1, got \(2, 2\)'):
            SoftPool2dSame(2, 1)
        assert SoftPool2dSame(2).stride == (2, 2)

    def test_kernel_larger_than_the_input(self):
        with pytest.raises(ValueError, match=r'kernel_size must fit into the padded input, got kernel_size=\(5, 5\)'):
            softpool2d(torch.zeros(1, 1, 8, 4), 5)
        with pytest.raises(ValueError, match=r'dilation=\(4, 4\) for an input of shape \(1, 1, 8, 8\)'):
            softpool2d(torch.zeros(1, 1, 8, 8), 3, dilation=4)
        assert softpool2d(torch.zeros(1, 1, 8, 4), 5, padding=1).shape == (1, 1, 2, 1)

    @pytest.mark.parametrize('backend', ['auto', 'cpu', 'reference'])
    def test_window_far_larger_than_the_input(self, backend):
        """It costs what the input does."""
        x = values(2, 3, 5, 6)
        far = 10 ** 9
        with use_backend(backend):
            assert torch.equal(softpool2d(x, 2, far), softpool2d(x[..., :2, :2], 2))
            assert torch.equal(softpool2d(x, far, far, ceil_mode=True).flatten(), softpool2d(x, (5, 6)).flatten())
            assert torch.equal(softpool2d(x, 2 * far, 1, far), softpool2d(x, (10, 12), 1, (5, 6)))

    def test_window_without_an_element(self):
        """Where dilation steps from one padding to the other, max pooling gives -inf."""
        assert F.max_pool1d(torch.zeros(1, 1, 2), 2, 1, 1, 3).item() == -float('inf')
        with pytest.raises(ValueError, match=r'dilation must leave an element in each window, got dilation=\(3,\)'):
            softpool1d(torch.zeros(1, 1, 2), 2, 1, 1, 3)
        x, window = values(1, 1, 4), ((4,), (9,), (2,), (5,))
        torch.testing.assert_close(softpool1d(x, *window, ceil_mode=True), reference.softpool(x, *window, True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('pool', [SoftPool2d(3, 2, 1), GlobalSoftPool2d()], ids=str)
def test_cuda_without_synchronisation(pool):
    x = values(2, 3, 9, 9, dtype=torch.float32)
    torch.cuda.set_sync_debug_mode('error')
    try:
        y = pool(x.cuda())
    finally:
        torch.cuda.set_sync_debug_mode('default')
    torch.testing.assert_close(y.cpu(), pool(x))
