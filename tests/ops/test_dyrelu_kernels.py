"""The Triton kernels of Dynamic ReLU against the reference in float64, and what they keep and allocate."""
import functools

import pytest
import torch
import torch.nn.functional as F
from support import reference
from support.kernels import (
    DEVICE,
    HALVES,
    LAYOUTS,
    check,
    each_layout,
    moderate,
    replace_launch,
    run,
    saved_bytes,
    set_constant,
    trained,
    values,
)
from support.memory import Memory

from timm_dyacts.layers import DyReLU, DyReLUB, dyrelu
from timm_dyacts.ops import backends

# Without kernels, the results would be those of the references.
pytestmark = [pytest.mark.usefixtures('triton_kernels'), pytest.mark.filterwarnings('error:timm_dyacts runs without')]


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
        from timm_dyacts.ops.dyrelu import triton as kernels
        from timm_dyacts.ops.dyrelu import triton_hyper as hyper
        module = trained(DyReLU(shape[1], mode))
        for tile, few in ((8192, 2 ** 16), (16, 2 ** 16), (16, 15)):
            set_constant(monkeypatch, kernels, '_ENOUGH', 1)
            set_constant(monkeypatch, kernels, '_RUN', 2)
            set_constant(monkeypatch, hyper, '_TILE', tile)
            set_constant(monkeypatch, hyper, '_FEW', few)
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

    @pytest.mark.parametrize('channels', [8, 600])
    def test_parameters_in_another_layout(self, channels):
        module = moderate(DyReLU(channels, 'c', reduction=2))
        with torch.no_grad():
            for weight in (module.fc1_weight, module.fc2_weight):
                weight.set_(weight.t().contiguous().t())
                assert not weight.is_contiguous()
        check(module, functools.partial(reference.dyrelu_module, module), values(2, channels, 3, 3), 1e-4)

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
    def test_not_finite_as_in_the_reference(self, mode, channels, extreme, monkeypatch):
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

    @pytest.mark.parametrize('channels', [4, 600])
    @pytest.mark.parametrize('mode', 'bc')
    def test_autocast(self, mode, channels):
        module, x = trained(DyReLU(channels, mode)), values(2, channels, 3, 3)
        expected = run(module, x)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            for ours, theirs in zip(run(module, x), expected, strict=True):
                assert torch.equal(ours, theirs)

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

    @pytest.mark.parametrize('mode', 'abc')
    def test_launches_few_kernels(self, mode, launches):
        between = ['_attention_kernel'] if mode == 'c' else []
        back = ['_attention_backward_kernel'] if mode == 'c' else []
        DyReLU(4, mode).to(DEVICE)(values(2, 4, 5).requires_grad_()).sum().backward()
        assert launches == [
            '_statistics_kernel', '_coefficients_kernel', *between, '_apply_kernel',
            '_apply_backward_kernel', *back, '_coefficients_backward_kernel', '_parameters_backward_kernel',
            '_statistics_backward_kernel']

    def test_offsets_of_more_than_32_bits(self, far_apart):
        x = far_apart
        theta = values(2, 2, 4, seed=1)
        torch.testing.assert_close(dyrelu(x, theta).double(), reference.dyrelu(x, theta), rtol=1e-3, atol=1e-3)


class TestSaved:
    """What is kept for the backward pass."""

    @pytest.mark.parametrize('backend, dtype', [('triton', torch.bfloat16), ('cpu', torch.float32)])
    @pytest.mark.parametrize('mode, others', [
        # four coefficients of each plane and what the hyper function keeps
        ('b', 2 * 8 * 4 * 20),
        ('a', 2 * 8 * 4 * 20),
        # and, for each position, its attention before and after the bound; on CPUs also what leads there
        ('c', 2 * 8 * 4 * 20 + 2 * 144 * 4 * 5),
    ])
    def test_the_input_and_little_else(self, mode, others, backend, dtype, monkeypatch):
        if backend == 'cpu':
            monkeypatch.undo()
        device = 'cpu' if backend == 'cpu' else DEVICE
        x = torch.randn(2, 8, 12, 12, device=device).to(dtype)
        assert x.nbytes <= saved_bytes(DyReLU(8, mode).to(device), x) <= x.nbytes + others


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
