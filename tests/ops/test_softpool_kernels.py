"""The Triton kernels of SoftPool against the reference in float64, and how they cut tensors into blocks."""

import pytest
import torch
import torch.nn.functional as F
from support import reference
from support.kernels import COLUMN_LAYOUTS, DEVICE, HALVES, LAYOUTS, check, each_layout, run, saved_bytes, values

from timm_dyacts.layers import GlobalSoftPool2d, SoftPool1d, SoftPool2d, SoftPool3d

# Without kernels, the results would be those of the references.
pytestmark = [pytest.mark.usefixtures('triton_kernels'), pytest.mark.filterwarnings('error:timm_dyacts runs without')]

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

    def test_offsets_of_more_than_32_bits(self, far_apart):
        expected = reference.softpool(far_apart, (2,), (2,), (0,), (1,))
        torch.testing.assert_close(SoftPool1d(2)(far_apart).double(), expected, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize('backend, dtype', [('triton', torch.bfloat16), ('cpu', torch.float32)])
    @pytest.mark.parametrize('window', [(2,), (3, 2, 1)], ids=str)
    def test_only_the_input_is_saved(self, window, backend, dtype, monkeypatch):
        if backend == 'cpu':
            monkeypatch.undo()
        x = torch.randn(2, 8, 12, 12, device='cpu' if backend == 'cpu' else DEVICE).to(dtype)
        assert saved_bytes(SoftPool2d(*window), x) == x.nbytes

    def test_empty_batch_and_nan(self):
        assert run(SoftPool2d(3, 2, 1), torch.zeros(0, 2, 5, 5, device=DEVICE))[1].shape == (0, 2, 5, 5)
        x = torch.tensor([[[float('nan'), 0.0, 0.0, 0.0]]], device=DEVICE)
        assert SoftPool1d(2)(x).isnan().tolist() == [[[True, False]]]


def global_softpool_of(module):
    def definition(x):
        window = x.shape[-2:], x.shape[-2:], (0, 0), (1, 1), False
        return reference.softpool(x, *window, module.beta, module.detach_weights)
    return definition


class TestGlobalSoftPool2d:
    @each_layout
    @pytest.mark.parametrize('shape', [(2, 3, 5, 6), (1, 70, 7, 7), (2, 1, 1, 1), (1, 2, 100, 90)], ids=str)
    def test_shapes(self, shape, layout, launches):
        module = GlobalSoftPool2d()
        check(module, global_softpool_of(module), LAYOUTS[layout](values(*shape)))
        assert launches[0] == '_global_kernel' and launches[-1] == '_global_backward_kernel'
        assert ('_global_join_kernel' in launches) == (shape == (1, 2, 100, 90))

    @pytest.mark.parametrize('beta, detach_weights', [(0, False), (-3, False), (2.5, True), (-1, True)])
    def test_beta_and_detached_weights(self, beta, detach_weights):
        module = GlobalSoftPool2d(beta, detach_weights=detach_weights)
        check(module, global_softpool_of(module), values(2, 3, 6, 5))

    @pytest.mark.parametrize('dtype', HALVES, ids=str)
    @each_layout
    def test_half_precision(self, layout, dtype):
        module = GlobalSoftPool2d()
        x = LAYOUTS[layout](values(2, 8, 16, 16).to(dtype))
        check(module, global_softpool_of(module), x, 1.5 * torch.finfo(dtype).eps)

    @pytest.mark.parametrize('dtype', [torch.float32, *HALVES], ids=str)
    @pytest.mark.parametrize('beta', [1, -1, 0, 1e30])
    @pytest.mark.parametrize('size', [(7, 7), (72, 72)], ids=str)
    def test_finite_up_to_the_largest_number(self, size, beta, dtype):
        largest = torch.finfo(dtype).max
        levels = torch.tensor([largest, -largest, largest / 2, 0, 1, -1], dtype=dtype)
        x = levels[torch.randint(6, (1, 2, *size), generator=torch.Generator().manual_seed(0))].to(DEVICE)
        y, dx = run(GlobalSoftPool2d(beta), x)
        assert y.isfinite().all() and (beta > 1 or dx.isfinite().all())
        expected = {1: largest, -1: -largest, 1e30: largest}.get(beta)
        assert expected is None or (y == expected).all()

    def test_rank_keepdim_and_gradients_in_other_layouts(self):
        x = values(3, 4, 5)
        assert GlobalSoftPool2d()(x).shape == (3, 1, 1) and GlobalSoftPool2d(keepdim=False)(x).shape == (3,)
        assert GlobalSoftPool2d(keepdim=False)(x[None]).shape == (1, 3)
        x = values(2, 3, 4, 5).requires_grad_()
        y = GlobalSoftPool2d()(x)
        dx, = torch.autograd.grad(y, x, torch.ones(1, 1, 1, 1, device=DEVICE).expand_as(y))
        expected, = torch.autograd.grad(global_softpool_of(GlobalSoftPool2d())(x).sum(), x)
        torch.testing.assert_close(dx, expected, rtol=1e-5, atol=1e-5)

    def test_empty_batch_nan_and_double_backward(self):
        assert run(GlobalSoftPool2d(), torch.zeros(0, 2, 5, 5, device=DEVICE))[1].shape == (0, 2, 5, 5)
        x = values(1, 2, 3, 3)
        x[0, 0, 1, 1] = float('nan')
        assert GlobalSoftPool2d()(x).flatten().isnan().tolist() == [True, False]
        x = values(1, 2, 3, 3).double().float().requires_grad_()
        seconds = []
        for f in (GlobalSoftPool2d(), global_softpool_of(GlobalSoftPool2d())):
            grad, = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
            seconds += torch.autograd.grad(grad.square().sum(), x)
        torch.testing.assert_close(*seconds, rtol=1e-4, atol=1e-4)

    def test_saves_the_input_and_two_numbers_of_each_plane(self):
        x = torch.randn(2, 8, 12, 12, device=DEVICE).bfloat16()
        assert saved_bytes(GlobalSoftPool2d(), x) == x.nbytes + 2 * 4 * 2 * 8

    def test_offsets_of_more_than_32_bits(self, far_apart):
        x = far_apart.unsqueeze(2)
        expected = global_softpool_of(GlobalSoftPool2d())(x)
        torch.testing.assert_close(GlobalSoftPool2d()(x).double(), expected, rtol=1e-3, atol=1e-3)
