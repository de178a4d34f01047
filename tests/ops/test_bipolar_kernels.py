"""The Triton kernels of bipolar activations and pooling against the reference in float64."""
import functools

import pytest
import torch
import torch.nn.functional as F
from support import reference
from support.kernels import DEVICE, HALVES, LAYOUTS, check, each_layout, run, saved_bytes, values

from timm_dyacts.layers import BELU, BSELU, BipolarMaxPool2d, BLeakyReLU, BPReLU, BReLU, brelu, channel_signs

# Without kernels, the results would be those of the references.
pytestmark = [pytest.mark.usefixtures('triton_kernels'), pytest.mark.filterwarnings('error:timm_dyacts runs without')]

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

    @pytest.mark.parametrize('backend, dtype', [('triton', torch.bfloat16), ('cpu', torch.float32)])
    @pytest.mark.parametrize('kwargs', [{}, dict(inplace=True, max_value=6)], ids=['brelu', 'brelu6 in place'])
    def test_only_the_input_is_saved(self, kwargs, backend, dtype, monkeypatch):
        if backend == 'cpu':
            monkeypatch.undo()
        x = torch.randn(2, 8, 12, 12, device='cpu' if backend == 'cpu' else DEVICE).to(dtype)
        assert saved_bytes(BReLU(**kwargs), x) == x.nbytes

    def test_max_pool_saves_a_byte_per_window(self):
        sizes = []
        x = values(2, 4, 8, 8).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            y = BipolarMaxPool2d(2)(x)
        assert sizes == [y.numel()]

    def test_offsets_of_more_than_32_bits(self, far_apart):
        assert torch.equal(BReLU()(far_apart), reference.bipolar(values(2, 2, 16).half(), F.relu))
