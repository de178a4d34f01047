"""The Triton kernels against the definitions in float64, values and all gradients, and when they are used.

With a GPU they run there. Without one, Triton's interpreter runs them on the CPU (see conftest.py).
"""
import dataclasses
import functools
import math
import os
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import reference
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from timm_dyacts.layers import (
    BELU,
    BSELU,
    BipolarMaxPool2d,
    BLeakyReLU,
    BPReLU,
    BReLU,
    DyReLU,
    DyReLUB,
    SoftPool1d,
    SoftPool2d,
    SoftPool3d,
    brelu,
    channel_signs,
    dyrelu,
)
from timm_dyacts.ops import backends

triton = pytest.importorskip('triton')
tl = triton.language
# Without kernels, results would be those of the definitions.
pytestmark = pytest.mark.filterwarnings('error:timm_dyacts runs without')
ON_GPU = torch.cuda.is_available()
DEVICE = 'cuda' if ON_GPU else 'cpu'

# The tensor in another layout of memory, equal to what it was.
LAYOUTS = {
    'contiguous': lambda x: x.contiguous(),
    'channels_last': lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    'slice': lambda x: torch.stack([x, x], 2).flatten(1, 2)[:, ::2],
    'transposed': lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
}
each_layout = pytest.mark.parametrize('layout', LAYOUTS)
# Of an input whose columns are seen in pairs, these are laid out in other ways.
COLUMN_LAYOUTS = {
    'from an odd column': lambda x: F.pad(x, (1, 0))[..., 1:],
    'from an even column': lambda x: F.pad(x, (2, 4))[..., 2:-4],
    'odd rows': lambda x: F.pad(x, (0, 1))[..., :-1],
    'every other column': lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    'some rows': lambda x: F.pad(x, (0, 0, 1, 2))[..., 1:-2, :],
    'batch inside': lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}
HALVES = (torch.float16, torch.bfloat16)


@triton.jit
def _count(total_ptr, n):
    total = 0
    for _ in range(n):
        total += 1
    tl.store(total_ptr, total)


@functools.cache
def interpreter_loops():
    """Not all versions of Triton's interpreter do, with all versions of NumPy."""
    total = torch.zeros(1, dtype=torch.int32)
    try:
        _count[(1,)](total, 3)
    except triton.runtime.errors.InterpreterError:
        return False
    return total.item() == 3


@pytest.fixture(autouse=True)
def triton_kernels(monkeypatch):
    """Has the operators run their Triton kernels, whatever the device."""
    if not ON_GPU:
        if not interpreter_loops():
            pytest.skip(f'the interpreter of Triton {triton.__version__} fails in loops with this NumPy')
        backend, = (backend for backend in backends.BACKENDS if backend.name == 'triton')
        monkeypatch.setattr(backends, 'BACKENDS', (dataclasses.replace(backend, device_type='cpu'),))
    monkeypatch.setattr(backends, '_unusable', set())


def replace_launch(monkeypatch, launch):
    """Has all kernels launched by another function."""
    from timm_dyacts.ops.bipolar import triton as bipolar
    from timm_dyacts.ops.dyrelu import triton as module_of_kernels
    from timm_dyacts.ops.dyrelu import triton_hyper as hyper
    from timm_dyacts.ops.softpool import triton as softpool
    for module in (bipolar, module_of_kernels, hyper, softpool):
        monkeypatch.setattr(module, 'launch', launch)


def values(*shape, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x.view(-1)[::7] = 0
    return x.to(DEVICE)


def trained(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in module.parameters():
            param.normal_(generator=generator)
    return module.to(DEVICE)


def moderate(module):
    """The module with parameters that leave the residuals of DyReLU well within their bounds."""
    with torch.no_grad():
        for i, param in enumerate(module.parameters()):
            param.copy_(values(*param.shape, seed=i) / param.shape[-1] ** 0.5)
    return module.to(DEVICE)


def run(f, x, params=(), seed=1):
    """The output of `f`, and the gradients of `x` and of parameters."""
    x = x.detach().requires_grad_()
    y = f(x)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y)
    return y.detach(), *torch.autograd.grad((y * weight).sum(), [x, *params])


def check(module, definition, x, tolerance=1e-5):
    """Compares a module with its definition, of which the result is in float64."""
    params = list(module.parameters())
    for ours, expected in zip(run(module, x, params), run(definition, x, params), strict=True):
        assert ours.dtype in (x.dtype, torch.float32)
        scale = expected.abs().max().item() if expected.numel() else 0
        torch.testing.assert_close(ours.double(), expected.double(), rtol=0, atol=tolerance * max(scale, 1))


class TestDyReLU:
    @each_layout
    @pytest.mark.parametrize('mode', 'abc')
    def test_layouts(self, mode, layout):
        module = trained(DyReLU(5, mode, reduction=2, max_value=1.5, tau=2.0))
        check(module, functools.partial(reference.dyrelu_module, module), LAYOUTS[layout](values(2, 5, 6, 7)))

    @pytest.mark.parametrize('k', [1, 2, 3, 4])
    @pytest.mark.parametrize('mode', 'abc')
    def test_pieces(self, mode, k):
        module = trained(DyReLU(3, mode, reduction=1, k=k))
        check(module, functools.partial(reference.dyrelu_module, module), values(2, 3, 4, 3))

    @pytest.mark.parametrize('shape', [(3, 5), (2, 3, 70), (1, 130, 3, 3), (2, 3, 2, 3, 4)], ids=str)
    @pytest.mark.parametrize('mode', 'bc')
    def test_shapes(self, mode, shape):
        module = trained(DyReLU(shape[1], mode, paper_scale=mode == 'c'))
        for x in (values(*shape), LAYOUTS['channels_last'](values(*shape))):
            check(module, functools.partial(reference.dyrelu_module, module), x, 1e-4)

    @pytest.mark.parametrize('shape, layout', [((1, 2, 70, 80), 'contiguous'), ((1, 6, 40, 50), 'channels_last')])
    @pytest.mark.parametrize('mode', 'bc')
    def test_many_tiles(self, mode, shape, layout, monkeypatch):
        """Sums go over several tiles of a program and over several programs."""
        from timm_dyacts.ops.dyrelu import triton as module_of_kernels
        from timm_dyacts.ops.dyrelu import triton_hyper as hyper
        module = trained(DyReLU(shape[1], mode))
        for tile, few in ((8192, 2 ** 16), (16, 2 ** 16), (16, 15)):
            monkeypatch.setattr(module_of_kernels, '_ENOUGH', 1)
            monkeypatch.setattr(module_of_kernels, '_RUN', 2)
            monkeypatch.setattr(hyper, '_TILE', tile)
            monkeypatch.setattr(hyper, '_FEW', few)
            x = LAYOUTS[layout](values(*shape))
            check(module, functools.partial(reference.dyrelu_module, module), x, 1e-4)

    @pytest.mark.parametrize('dtype', HALVES, ids=str)
    @pytest.mark.parametrize('mode', 'abc')
    def test_half_precision(self, mode, dtype):
        """Computed in fp32: what is left is one rounding of the output, and of gradients one for each of two passes."""
        module = trained(DyReLU(6, mode))
        x = values(2, 6, 5, 4).to(dtype)
        check(module, functools.partial(reference.dyrelu_module, module), x, 3 * torch.finfo(dtype).eps)

    @pytest.mark.parametrize('mode', 'abc')
    def test_fresh_module_is_relu_to_the_last_bit_and_gradient(self, mode):
        x = values(2, 5, 4, 3)
        for ours, expected in zip(run(DyReLU(5, mode).to(DEVICE), x), run(F.relu, x), strict=True):
            assert torch.equal(ours, expected)

    @pytest.mark.parametrize('k', [1, 2, 3])
    @pytest.mark.parametrize('channels', [1, 3, 8, 40, 300, 600])
    @pytest.mark.parametrize('mode', 'abc')
    def test_hyper_function(self, mode, channels, k):
        """Of any size: the largest takes the way of layers that are left to PyTorch."""
        from timm_dyacts.ops.dyrelu import triton_hyper as hyper
        module = moderate(DyReLU(channels, mode, k=k, tau=0.5, max_value=2))
        if channels == 600 and mode != 'a':
            assert not hyper._are_few(module.fc1_weight, module.fc2_weight)
        check(module, functools.partial(reference.dyrelu_module, module), values(2, channels, 3, 3), 1e-4)

    @pytest.mark.parametrize('dtype', HALVES, ids=str)
    @pytest.mark.parametrize('channels', [8, 600])
    def test_half_precision_parameters(self, channels, dtype):
        module = moderate(DyReLU(channels, 'c', dtype=dtype))
        params = list(module.parameters())
        x = values(2, channels, 3, 3)
        for ours, expected in zip(
                run(module, x, params), run(functools.partial(reference.dyrelu_module, module), x, params),
                strict=True):
            scale = max(expected.abs().max().item(), 1)
            torch.testing.assert_close(ours.double(), expected.double(), rtol=0, atol=torch.finfo(dtype).eps * scale)

    @pytest.mark.parametrize('mode', 'abc')
    def test_gradients_that_are_not_asked_for(self, mode):
        module, x = trained(DyReLU(5, mode)), values(2, 5, 4, 3)
        params = list(module.parameters())
        expected = run(module, x, params)[1:]
        for needed in ([0], [1], range(1, len(expected)), range(len(expected))):
            leaves = [x.detach(), *params]
            for i, leaf in enumerate(leaves):
                leaf.requires_grad_(i in needed)
            y = module(leaves[0])
            weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
            grads = torch.autograd.grad((y * weight).sum(), [leaves[i] for i in needed])
            assert all(torch.equal(grad, expected[i]) for i, grad in zip(needed, grads, strict=True))

    @each_layout
    @pytest.mark.parametrize('mode', 'abc')
    def test_two_backward_passes_over_one_graph(self, mode, layout):
        """What the first overwrites is its own."""
        module, x = trained(DyReLU(5, mode)), LAYOUTS[layout](values(2, 5, 6, 7)).requires_grad_()
        y = module(x)
        dy = values(*y.shape, seed=1)
        kept = dy.clone()
        first = torch.autograd.grad(y, [x, *module.parameters()], dy, retain_graph=True)
        second = torch.autograd.grad(y, [x, *module.parameters()], dy)
        assert torch.equal(dy, kept)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    @pytest.mark.parametrize('extreme', [float('nan'), float('inf'), -float('inf')])
    @pytest.mark.parametrize('channels', [8, 600])
    @pytest.mark.parametrize('mode', 'abc')
    def test_not_finite_as_in_the_definition(self, mode, channels, extreme, monkeypatch):
        """In one sample; the others know nothing of it."""
        module, x = trained(DyReLU(channels, mode, max_value=6)), values(2, channels, 3, 3)
        expected = module(x)[0]
        x[1, 0, 1, 2] = extreme
        y = module(x)
        assert torch.equal(y[0], expected)
        monkeypatch.setattr(backends, 'find_kernel', lambda *args: None)
        torch.testing.assert_close(y, module(x), rtol=1e-4, atol=1e-4, equal_nan=True)

    def test_residuals_at_their_bounds(self):
        """tanh(inf) is 1, and the gradient there 0."""
        module = DyReLU(2, 'b').to(DEVICE)
        with torch.no_grad():
            module.fc2_bias.copy_(torch.tensor([float('inf'), -float('inf'), 200, -200, 1e-6, 0, 0, 0]))
        y, *grads = run(module, values(3, 2, 4), list(module.parameters()))
        torch.testing.assert_close(y.double(), reference.dyrelu_module(module, values(3, 2, 4)))
        assert all(grad.isfinite().all() for grad in grads)

    def test_channels_at_the_end(self):
        first, last = trained(DyReLUB(6)), trained(DyReLUB(6, channel_dim=-1))
        x = values(2, 6, 4, 3)
        for ours, expected in zip(
                run(lambda x: last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), x), run(first, x), strict=True):
            torch.testing.assert_close(ours, expected)

    def test_given_coefficients(self):
        """Gradients of coefficients and weights of positions, of which some share memory."""
        x = values(2, 3, 4, 4)
        theta, pi = values(2, 1, 6, seed=2), values(2, 1, 1, 4, seed=3).expand(2, 1, 4, 4)
        leaves = [t.detach().clone().requires_grad_() for t in (theta, pi)]
        for function in (dyrelu, reference.dyrelu):
            grads = run(lambda x, f=function: f(x, *leaves), x, leaves)
            if function is dyrelu:
                ours = grads
        for a, b in zip(ours, grads, strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5)
        grad, = torch.autograd.grad(dyrelu(x.requires_grad_(), theta).sum(), x)
        expected, = torch.autograd.grad(reference.dyrelu(x, theta).sum(), x)
        torch.testing.assert_close(grad, expected)

    @pytest.mark.parametrize('mode', 'abc')
    def test_empty_batch(self, mode):
        module = trained(DyReLU(4, mode))
        y, dx, *grads = run(module, torch.zeros(0, 4, 3, 3, device=DEVICE), list(module.parameters()))
        assert y.shape == dx.shape == (0, 4, 3, 3) and not any(grad.any() for grad in grads)

    def test_nan_is_not_hidden(self):
        x = values(1, 2, 3)
        x[0, 0, 1] = float('nan')
        assert dyrelu(x, torch.ones(1, 2, 4, device=DEVICE), max_value=6.0)[0, 0, 1].isnan()

    def test_double_backward(self):
        module, x = trained(DyReLU(3, 'c', reduction=1)), values(1, 3, 2, 2)

        def second(f, x):
            x = x.requires_grad_()
            grad, = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
            return torch.autograd.grad(grad.square().sum(), [x, *module.parameters()], allow_unused=True)

        expected = second(functools.partial(reference.dyrelu_module, module), x.double())
        for ours, theirs in zip(second(module, x), expected, strict=True):
            torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-3, atol=1e-3)


WINDOWS = [
    (2, 2, 0, 1, False),
    (3, 2, 1, 1, False),
    (2, 3, 0, 1, True),
    (3, 1, 1, 2, False),
    (4, 3, 2, 2, True),
    (5, 2, 1, 1, False),
]


def softpool_of(module, detach_weights=False):
    window = module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode
    return lambda x: reference.softpool(x, *window, module.beta, detach_weights)


class TestSoftPool:
    @pytest.mark.parametrize('window', WINDOWS, ids=str)
    @pytest.mark.parametrize('cls, shape', [(SoftPool1d, (2, 3, 9)), (SoftPool2d, (1, 2, 7, 6))])
    def test_windows(self, cls, shape, window):
        module = cls(*window)
        check(module, softpool_of(module), values(*shape))

    @pytest.mark.parametrize('window', WINDOWS[:2], ids=str)
    def test_three_dimensions(self, window):
        module = SoftPool3d(*window)
        check(module, softpool_of(module), values(1, 1, 2, 4, 3))

    @each_layout
    @pytest.mark.parametrize('window', WINDOWS[:2], ids=str)
    def test_layouts(self, window, layout):
        module = SoftPool2d(*window)
        check(module, softpool_of(module), LAYOUTS[layout](values(2, 3, 5, 6)))

    @pytest.mark.parametrize('dtype', [torch.float32, *HALVES], ids=str)
    @pytest.mark.parametrize('window', [(2,), (3, 2, 1), ((1, 2),), ((3, 2), 2, (1, 0)), ((2, 4), 2)], ids=str)
    @pytest.mark.parametrize('layout', COLUMN_LAYOUTS)
    def test_layouts_of_columns(self, layout, window, dtype):
        module = SoftPool2d(*window)
        tolerance = 1.5 * torch.finfo(dtype).eps if dtype in HALVES else 1e-5
        check(module, softpool_of(module), COLUMN_LAYOUTS[layout](values(2, 2, 6, 16).to(dtype)), tolerance)

    @pytest.mark.parametrize('size', [(6, 9), (7, 8), (7, 9), (5, 28), (2, 2), (1, 4)], ids=str)
    @pytest.mark.parametrize('ceil_mode', [False, True])
    def test_sizes(self, ceil_mode, size):
        module = SoftPool2d((1 if size[0] == 1 else 2, 2), ceil_mode=ceil_mode)
        check(module, softpool_of(module), values(2, 3, *size))

    def test_more_windows_than_rows(self):
        module = SoftPool2d(4, (2, 3), 2, (1, 2), True)
        check(module, softpool_of(module), values(2, 2, 1, 2))

    @pytest.mark.parametrize('window', [(2,), ((1, 2, 2),), ((2, 1, 2),), (3, 2, 1)], ids=str)
    @pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'slice'])
    def test_volumes(self, layout, window):
        module = SoftPool3d(*window)
        check(module, softpool_of(module), LAYOUTS[layout](values(2, 2, 4, 2, 4)))

    @pytest.mark.parametrize('window', WINDOWS[:2], ids=str)
    @pytest.mark.parametrize('change', [
        lambda dy: dy[..., :1, :1].expand_as(dy), LAYOUTS['channels_last'], *COLUMN_LAYOUTS.values(),
    ], ids=['expanded', 'channels_last', *COLUMN_LAYOUTS])
    def test_layouts_of_the_gradient(self, change, window):
        module, x = SoftPool2d(*window), values(2, 3, 6, 8).requires_grad_()
        y, expected = module(x), softpool_of(module)(x)
        dy = change(values(*y.shape, seed=1))
        dx, = torch.autograd.grad(y, x, dy)
        torch.testing.assert_close(dx, torch.autograd.grad(expected, x, dy.double())[0], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize('window', WINDOWS[:2], ids=str)
    @pytest.mark.parametrize('beta, detach_weights', [(0, False), (-3, False), (2.5, True)])
    def test_beta_and_detached_weights(self, beta, detach_weights, window):
        module = SoftPool2d(*window, beta=beta, detach_weights=detach_weights)
        check(module, softpool_of(module, detach_weights), values(1, 2, 6, 5))

    @pytest.mark.parametrize('dtype', HALVES, ids=str)
    @pytest.mark.parametrize('window', WINDOWS[:2], ids=str)
    def test_half_precision(self, window, dtype):
        module = SoftPool2d(*window)
        check(module, softpool_of(module), values(1, 2, 6, 5).to(dtype), 1.5 * torch.finfo(dtype).eps)

    @pytest.mark.parametrize('dtype', [torch.float32, *HALVES], ids=str)
    @pytest.mark.parametrize('beta', [1, -1, 0, 1e30])
    def test_finite_up_to_the_largest_number(self, beta, dtype):
        largest = torch.finfo(dtype).max
        levels = torch.tensor([largest, -largest, largest / 2, 0, 1, -1], dtype=dtype)
        x = levels[torch.randint(6, (1, 2, 7, 7), generator=torch.Generator().manual_seed(0))].to(DEVICE)
        for window in WINDOWS[:2]:
            y, dx = run(SoftPool2d(*window, beta=beta), x)
            assert y.isfinite().all() and (beta > 1 or dx.isfinite().all())
            assert (y <= F.max_pool2d(x, *window)).all() and (y >= -F.max_pool2d(-x, *window)).all()

    def test_far_below_the_rest_of_the_plane(self):
        x = torch.tensor([[[89.0, 88.0, 0.0, 0.0, -1e4, -1e4 - 1]]], device=DEVICE)
        expected = reference.softpool(x, (2,), (2,), (0,), (1,)).float()
        torch.testing.assert_close(SoftPool1d(2)(x), expected)
        assert (SoftPool2d(3, 2, 1)(torch.full((1, 1, 5, 5), 0.1, device=DEVICE)) == torch.tensor(0.1)).all()

    def test_windows_too_large_for_registers(self):
        module = SoftPool2d(5, 5)
        check(module, softpool_of(module), values(1, 2, 10, 6))

    def test_empty_batch_and_nan(self):
        assert run(SoftPool2d(3, 2, 1), torch.zeros(0, 2, 5, 5, device=DEVICE))[1].shape == (0, 2, 5, 5)
        x = torch.tensor([[[float('nan'), 0.0, 0.0, 0.0]]], device=DEVICE)
        assert SoftPool1d(2)(x).isnan().tolist() == [[[True, False]]]


class TestLayouts:
    """How the kernels of pooling see tensors."""

    @staticmethod
    def layout_of(shape, kernel_size=2, stride=2, padding=0, dtype=torch.float32, **kwargs):
        from timm_dyacts.ops.pooling.triton_elements import layout_of
        from timm_dyacts.ops.pooling.window import Window
        window = Window.of([kernel_size] * 2, [stride] * 2, [padding] * 2, (1, 1))
        x = torch.empty(*shape[:2], 1, *shape[2:], device='meta', dtype=dtype)
        y = x.new_empty(*shape[:2], *window.out_size((1, *shape[2:]), False))
        if kwargs.pop('channels_last', False):
            x, y = (t.to(memory_format=torch.channels_last_3d) for t in (x, y))
        return layout_of(window, (x,), (y,), **kwargs)

    @pytest.mark.parametrize('dtype', [torch.float32, *HALVES], ids=str)
    @pytest.mark.parametrize('channels_last', [False, True])
    @pytest.mark.parametrize('columns', [112, 56, 28, 14])
    def test_no_lane_is_idle(self, columns, channels_last, dtype):
        layout = self.layout_of((256, 64, columns, columns), channels_last=channels_last, dtype=dtype)
        assert layout.words != channels_last and layout.blocks[0] == layout.blocks[3] == 1
        assert layout.programs * math.prod(layout.block) == 256 * 64 * columns ** 2 // 4

    def test_rows_that_32_bits_do_not_count(self):
        few, many = self.layout_of((2 ** 6, 2 ** 10, 2 ** 6, 4)), self.layout_of((2 ** 16, 2 ** 10, 2 ** 6, 4))
        assert few.blocks[0] == 1 and many.blocks[0] == 2 ** 16
        assert many.channels == 2 ** 10 and many.sites == (1, 2 ** 5, 2)

    def test_windows_that_positions_share(self):
        """Of 3x3/2, the first of two positions is in one window, the second in two."""
        shares = self.layout_of((1, 1, 1, 8), 3, 2, 1, sites='steps').shares
        assert {share[2:3] + share[6:8] for share in shares if share[:2] == (0, 0)} == {(0, 4, 5), (1, -1, 3)}


MEMBERS = {
    'brelu': (BReLU, F.relu),
    'brelu6': (functools.partial(BReLU, max_value=1), lambda x: F.hardtanh(x, 0.0, 1.0)),
    'belu': (functools.partial(BELU, alpha=0.5), functools.partial(F.elu, alpha=0.5)),
    'bselu': (BSELU, F.selu),
    'bleaky_relu': (functools.partial(BLeakyReLU, negative_slope=-0.2),
                    functools.partial(F.leaky_relu, negative_slope=-0.2)),
}


class TestBipolar:
    @each_layout
    @pytest.mark.parametrize('member', MEMBERS)
    def test_layouts(self, member, layout):
        module, plain = MEMBERS[member]
        x = LAYOUTS[layout](values(2, 5, 3, 4))
        for signs in ('interleaved', 'halves'):
            check(module(layout=signs), lambda x, signs=signs: reference.bipolar(x.double(), plain, signs), x, 1e-6)

    @each_layout
    @pytest.mark.parametrize('channels', [1, 6])
    def test_bprelu(self, channels, layout):
        module = BPReLU(channels, init=0.3).to(DEVICE)
        signs = channel_signs(6, device=DEVICE).reshape(6, 1, 1)

        def definition(x):
            return torch.where(x * signs > 0, x, module.weight.expand(6).reshape(6, 1, 1) * x).double()

        check(module, definition, LAYOUTS[layout](values(2, 6, 5, 3)))

    @pytest.mark.parametrize('dtype', HALVES, ids=str)
    @pytest.mark.parametrize('member', MEMBERS)
    def test_half_precision(self, member, dtype):
        module, plain = MEMBERS[member]
        x = values(2, 4, 3, 5).to(dtype)
        check(module(), lambda x: reference.bipolar(x.double(), plain), x, torch.finfo(dtype).eps)

    def test_elu_near_zero(self):
        x = -torch.logspace(-7, 1, 40, device=DEVICE).reshape(20, 2) * torch.tensor([1, -1], device=DEVICE)
        torch.testing.assert_close(BELU()(x), reference.bipolar(x.double(), F.elu).float(), rtol=1e-6, atol=0)

    @each_layout
    def test_in_place(self, layout):
        x = LAYOUTS[layout](values(2, 5, 4, 3))
        expected = run(BReLU(max_value=1), x)
        for ours, theirs in zip(run(lambda x: BReLU(True, max_value=1)(x * 1), x), expected, strict=True):
            assert torch.equal(ours, theirs)
        z = LAYOUTS[layout](x.clone())
        with torch.no_grad():
            assert brelu(z, 1.0, inplace=True).data_ptr() == z.data_ptr()
        assert torch.equal(z, expected[0])

    def test_channels_at_the_end_empty_batch_and_nan(self):
        x = values(2, 4, 5, 3)
        y = BReLU(channel_dim=-1)(x.permute(0, 2, 3, 1))
        assert torch.equal(y.permute(0, 3, 1, 2), BReLU()(x))
        assert run(BPReLU().to(DEVICE), torch.zeros(0, 4, 2, device=DEVICE))[1].shape == (0, 4, 2)
        assert BReLU(max_value=6)(torch.full((1, 2), float('nan'), device=DEVICE)).isnan().all()

    def test_double_backward(self):
        x = values(1, 3, 4).double().float().requires_grad_()
        grad, = torch.autograd.grad(BReLU()(x).square().sum(), x, create_graph=True)
        second, = torch.autograd.grad(grad.sum(), x)
        assert torch.equal(second, 2.0 * (BReLU()(x) != 0))

    @each_layout
    @pytest.mark.parametrize('args', [(2,), (3, 2, 1), ((3, 2), (2, 1), (1, 0), 2, True), (5, 2, 2)], ids=str)
    def test_max_pool(self, args, layout):
        signs = channel_signs(3, device=DEVICE).reshape(3, 1, 1)
        module = BipolarMaxPool2d(*args)
        x = LAYOUTS[layout](values(2, 3, 7, 8))
        ours, expected = run(module, x), run(lambda x: signs * F.max_pool2d(signs * x, *args), x)
        assert torch.equal(ours[0], expected[0])
        torch.testing.assert_close(ours[1], expected[1])
        assert torch.equal(module(x.half()), signs.half() * F.max_pool2d(signs * x.half(), *args))

    def test_max_pool_double_backward(self):
        x = values(1, 2, 5, 5).requires_grad_()
        grad, = torch.autograd.grad(BipolarMaxPool2d(3, 2, 1)(x).pow(3).sum(), x, create_graph=True)
        assert torch.autograd.grad(grad.sum(), x)[0].any()
        y = BipolarMaxPool2d(3, 2, 1)(torch.full((1, 2, 3, 3), float('nan'), device=DEVICE))
        assert y.isnan().all()


class TestSaved:
    """The bytes kept for the backward pass, besides parameters."""

    @pytest.mark.parametrize('backend, dtype', [('triton', torch.bfloat16), ('cpu', torch.float32)])
    @pytest.mark.parametrize('make, in_inputs, others', [
        # the input; four coefficients of each plane and what the hyper function keeps
        (lambda: DyReLU(8, 'b'), 1, 2 * 8 * 4 * 20),
        (lambda: DyReLU(8, 'a'), 1, 2 * 8 * 4 * 20),
        # and, of each position, its weight before and after it is bounded; on CPUs also what leads there
        (lambda: DyReLU(8, 'c'), 1, 2 * 8 * 4 * 20 + 2 * 144 * 4 * 5),
        (lambda: SoftPool2d(2), 1, 0),
        (lambda: SoftPool2d(3, 2, 1), 1, 0),
        (lambda: BReLU(), 1, 0),
        (lambda: BReLU(inplace=True, max_value=6), 1, 0),
    ], ids=['dyrelu_b', 'dyrelu_a', 'dyrelu_c', 'softpool 2x2', 'softpool 3x3', 'brelu', 'brelu6 in place'])
    def test_bytes(self, make, in_inputs, others, backend, dtype, monkeypatch):
        if backend == 'cpu':
            monkeypatch.undo()
        device = 'cpu' if backend == 'cpu' else DEVICE
        module = make().to(device)
        x = torch.randn(2, 8, 12, 12, device=device).to(dtype).requires_grad_()
        storages = {}

        def pack(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        z = x * 1
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = module(z)
        params = {p.untyped_storage().data_ptr() for p in module.parameters()}
        kept = sum(size for pointer, size in storages.items() if pointer not in params)
        assert in_inputs * x.nbytes <= kept <= in_inputs * x.nbytes + others
        y.sum().backward()

    def test_max_pool_keeps_a_byte_per_window(self):
        sizes = []
        x = values(2, 4, 8, 8).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            y = BipolarMaxPool2d(2)(x)
        assert sizes == [y.numel()]


class Memory(TorchFunctionMode):
    """Counts the bytes of all tensors that come out of functions, for as long as these exist, and their peak."""

    def __init__(self, *known):
        super().__init__()
        self.held = {t.untyped_storage().data_ptr(): 0 for t in known}
        self.peak = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if storage.data_ptr() not in self.held:
                    self.held[storage.data_ptr()] = storage.nbytes()
                    weakref.finalize(storage, self.held.pop, storage.data_ptr())
        self.peak = max(self.peak, sum(self.held.values()))
        return out


class TestMemory:
    """The peak of a forward and backward pass. Nothing is computed, so that tensors may be large."""

    @pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
    @pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize('shape', [(64, 64, 56, 56), (64, 256, 28, 28)], ids=str)
    @pytest.mark.parametrize('mode, limit', [('a', 1.05), ('b', 1.05), ('c', 1.15)])
    def test_dyrelu_takes_little_more_than_relu(self, mode, limit, shape, dtype, layout, monkeypatch):
        replace_launch(monkeypatch, lambda *args, **kwargs: None)
        x = LAYOUTS[layout](torch.empty(shape, dtype=dtype, device=DEVICE)).requires_grad_()
        module, dy = DyReLU(shape[1], mode).to(DEVICE), torch.empty_like(x)
        with Memory(x, dy, *module.parameters()) as memory:
            y = module(x)
            with torch.no_grad():
                # Not through the engine of autograd, which is one function for the counter.
                grads = y.grad_fn.apply(dy)
        of_relu = y.nbytes + x.nbytes  # the output and the gradient of the input
        assert len(grads) == 9 and of_relu <= memory.peak <= limit * of_relu


class TestDispatch:
    @pytest.fixture
    def launches(self, monkeypatch):
        """The names of the kernels that are launched."""
        from timm_dyacts.ops import triton_tiles as tiles
        names = []

        def launch(kernel, *args, **kwargs):
            names.append(kernel.fn.__name__)
            tiles.launch(kernel, *args, **kwargs)

        replace_launch(monkeypatch, launch)
        return names

    MODULES = {
        'dyrelu': lambda: trained(DyReLU(4, 'c')),
        'softpool': lambda: SoftPool2d(3, 2, 1),
        'brelu': BReLU,
        'belu': BELU,
        'max_pool': lambda: BipolarMaxPool2d(2),
    }
    each_module = pytest.mark.parametrize('name', MODULES)

    @each_module
    def test_eager_mode_launches_kernels(self, name, launches):
        module, x = self.MODULES[name](), values(1, 4, 4, 4).requires_grad_()
        y = module(x)
        forward = len(launches)
        y.sum().backward()
        assert 0 < forward < len(launches)

    @pytest.mark.parametrize('mode', 'abc')
    def test_dyrelu_launches_few_kernels(self, mode, launches):
        between = ['_attention_kernel'] if mode == 'c' else []
        back = ['_attention_backward_kernel'] if mode == 'c' else []
        DyReLU(4, mode).to(DEVICE)(values(2, 4, 5).requires_grad_()).sum().backward()
        assert launches == [
            '_statistics_kernel', '_coefficients_kernel', *between, '_apply_kernel',
            '_apply_backward_kernel', *back, '_coefficients_backward_kernel', '_parameters_backward_kernel',
            '_statistics_backward_kernel']

    @pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
    @pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
    @each_module
    def test_transforms_get_plain_operations(self, name, launches):
        module, x = self.MODULES[name](), values(2, 4, 4, 4)
        expected = module(x)
        del launches[:]
        torch.testing.assert_close(torch.vmap(lambda x: module(x[None])[0])(x), expected)
        torch.testing.assert_close(torch.func.jvp(module, (x,), (x,))[0], expected)
        torch.func.grad(lambda x: module(x).sum())(x)
        with torch.autograd.forward_ad.dual_level():
            module(torch.autograd.forward_ad.make_dual(x, x))
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert module(mode.from_tensor(x)).shape == expected.shape
        torch.testing.assert_close(torch.compile(module, backend='eager', fullgraph=True)(x), expected)
        torch.testing.assert_close(torch.jit.trace(module, x, check_trace=False)(x), expected)
        assert not launches

    @each_module
    def test_batched_gradients(self, name):
        """`is_grads_batched` runs the backward pass under vmap."""
        module, x = self.MODULES[name](), values(1, 4, 4, 4).requires_grad_()
        y = module(x)
        directions = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(0)).to(y)
        batched, = torch.autograd.grad(y, x, directions, is_grads_batched=True, retain_graph=True)
        for direction, grad in zip(directions, batched, strict=True):
            torch.testing.assert_close(torch.autograd.grad(y, x, direction, retain_graph=True)[0], grad)

    @pytest.mark.parametrize('failing', ['forward', 'backward'])
    @each_module
    def test_triton_fails(self, name, failing, monkeypatch):
        """One warning, and the same results as from the definition."""
        from timm_dyacts.ops import triton_tiles as tiles
        module, x = self.MODULES[name](), values(1, 4, 4, 4)
        expected = run(module, x)

        def launch(kernel, *args, **kwargs):
            if failing == 'forward' or 'backward' in kernel.fn.__name__:
                raise backends.KernelBuildError('no kernel') from RuntimeError('Failed to find C compiler.')
            tiles.launch(kernel, *args, **kwargs)

        replace_launch(monkeypatch, launch)
        with pytest.warns(RuntimeWarning, match='runs without the triton kernel .*Failed to find C compiler') as caught:
            for ours, theirs in zip(run(module, x), expected, strict=True):
                torch.testing.assert_close(ours, theirs)
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            run(module, x)

    def test_memory_running_out_stays_an_error(self, monkeypatch):
        from timm_dyacts.ops.bipolar import triton as bipolar

        def launch(*args, **kwargs):
            raise torch.OutOfMemoryError('no memory')

        monkeypatch.setattr(bipolar, 'launch', launch)
        with pytest.raises(torch.OutOfMemoryError):
            BReLU()(values(2, 4))
        assert not backends._unusable

    def test_triton_is_missing(self, monkeypatch):
        def fail(*args):
            raise ImportError('no Triton')

        monkeypatch.setattr(backends, '_import_kernels', fail)
        with pytest.warns(RuntimeWarning, match='runs without its back end triton'):
            y = BReLU()(values(2, 4))
        assert torch.equal(y, reference.bipolar(values(2, 4), F.relu))

    @pytest.mark.parametrize('channels', [4, 600])
    @pytest.mark.parametrize('mode', 'bc')
    def test_autocast(self, mode, channels):
        module, x = trained(DyReLU(channels, mode)), values(2, channels, 3, 3)
        expected = run(module, x)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            for ours, theirs in zip(run(module, x), expected, strict=True):
                assert torch.equal(ours, theirs)


def test_offsets_of_more_than_32_bits():
    """Samples and channels that lie further apart than 32-bit numbers of elements reach."""
    far = 2 ** 31 + 16
    try:
        memory = torch.empty(far + 64, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip('needs 4 GiB of address space')
    for strides in ((far, 16, 1), (16, far, 1)):
        x = memory.as_strided((2, 2, 16), strides).copy_(values(2, 2, 16))
        assert torch.equal(BReLU()(x), reference.bipolar(values(2, 2, 16).half(), F.relu))
        theta = values(2, 2, 4, seed=1)
        torch.testing.assert_close(dyrelu(x, theta).double(), reference.dyrelu(x, theta), rtol=1e-3, atol=1e-3)
        expected = reference.softpool(x, (2,), (2,), (0,), (1,))
        torch.testing.assert_close(SoftPool1d(2)(x).double(), expected, rtol=1e-3, atol=1e-3)


def test_kernels_compile_for_a_gpu_that_is_not_there(tmp_path):
    """The interpreter accepts what the compiler may not.

    Activations have to move 16 bytes at a time, and so does SoftPool 2x2, the smaller output in as many steps. Threads
    have to keep to themselves what they have read, and no register is spilled.
    """
    env = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    script = Path(__file__).with_name('compile_kernels.py')
    done = subprocess.run(
        [sys.executable, str(script)], env=dict(env, TRITON_CACHE_DIR=str(tmp_path)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len({kernel for *_, kernel, _, _, _, _ in lines}) == 20
    # What has one number for each coefficient moves little.
    small = {'_coefficients_kernel', '_parameters_backward_kernel', '_head_kernel', '_head_backward_kernel'}
    for dtype, layout, columns, window, kernel, loads, stores, shared, stack in lines:
        case = dtype, layout, columns, window, kernel, loads, stores, shared, stack
        assert stack == '0', case
        if window == '-' and kernel not in small:
            assert '16' in (loads + ',' + stores).split(','), case
        if window == '2x2' and 'max_pool' not in kernel:
            assert shared == '0', case
            assert (loads, stores) == expected_widths(dtype, layout, int(columns), 'backward' in kernel), case


def expected_widths(dtype, layout, columns, backward):
    """Of the loads and stores of SoftPool 2x2 of 64 channels."""
    if layout == 'channels_last':
        return '16', '16'
    item = 2 if dtype == 'bfloat16' else 4
    if layout == 'slice':  # its rows begin at an odd word
        return str(2 * item), str(2 * item)
    x, y = math.gcd(columns, 16 // item) * item, math.gcd(columns, 16 // item) * item // 2
    return (f'{y},{x}', str(x)) if backward else (str(x), str(y))
