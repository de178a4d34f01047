"""The native kernels against the references in float64; threads, forks, and what happens where there is no library."""
import copy
import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from support.native import LAYOUTS, TOLERANCES, each_dtype, each_layout, needs_library, trained, values
from torch.utils.data import DataLoader

from timm_dyacts.layers import BELU, BSELU, BipolarMaxPool2d, BLeakyReLU, BPReLU, BReLU, DyReLU
from timm_dyacts.ops import backends
from timm_dyacts.ops.backends import find_kernel, use_backend
from timm_dyacts.ops.large_pages import in_large_pages
from timm_dyacts.ops.softpool import functional as softpools

MEMBERS = {
    'brelu': lambda: BReLU(),
    'brelu6': lambda: BReLU(max_value=1, layout='halves'),
    'belu': lambda: BELU(alpha=0.7),
    'bselu': lambda: BSELU(),
    'bleaky_relu': lambda: BLeakyReLU(negative_slope=-0.2),
    'bprelu': lambda: BPReLU(5),
}
WINDOWS = [
    ((8, 9), dict(kernel_size=2)),
    ((9, 11), dict(kernel_size=2, ceil_mode=True)),
    ((6, 38), dict(kernel_size=2)),
    ((7, 71), dict(kernel_size=2)),
    ((3, 4, 64), dict(kernel_size=(1, 2, 2))),
    ((13, 6), dict(kernel_size=3, stride=2, padding=1)),
    ((12, 14), dict(kernel_size=(3, 2), stride=(1, 3), padding=(0, 1), dilation=(2, 3))),
    ((17,), dict(kernel_size=4, stride=3, padding=2, ceil_mode=True)),
    ((5, 6, 7), dict(kernel_size=3, stride=2, padding=1, dilation=(1, 2, 1))),
]


def run(f, x, params=(), dtype=torch.float64):
    """Compute the output of ``f``, and gradients from one of the output that ``dtype`` holds exactly."""
    x = x.detach().requires_grad_()
    y = f(x)
    dy = values(*y.shape, seed=1).to(dtype).to(y)
    return y.detach(), *torch.autograd.grad(y, [x, *params], dy)


def check(f, definition, x, params=(), definition_params=()):
    with use_backend('native'):
        ours = run(f, x, params, x.dtype)
    with use_backend('reference'):
        expected = run(definition, x.double(), definition_params, x.dtype)
    for a, b in zip(ours, expected, strict=True):
        scale = max(b.abs().max().item(), 1) if b.numel() else 1
        torch.testing.assert_close(a.double(), b, rtol=0, atol=TOLERANCES[x.dtype] * scale)


@needs_library
class TestResults:
    @pytest.mark.parametrize('shape', [(2, 5, 6, 7), (3, 17, 40, 41), (2, 300, 3), (3, 9), (0, 4, 5, 5)], ids=str)
    @each_layout
    @each_dtype
    @pytest.mark.parametrize('mode, k', [('a', 2), ('b', 1), ('b', 2), ('b', 3), ('c', 2)])
    def test_dyrelu(self, mode, k, dtype, layout, shape):
        module = trained(DyReLU(shape[1], mode, k=k, tau=2.0, max_value=1.3 if mode != 'b' else None))
        exact = copy.deepcopy(module).double()
        # All but the bias of the attention, whose gradient is zero
        params, exact_params = (list(m.parameters())[:5] for m in (module, exact))
        check(module, exact, LAYOUTS[layout](values(*shape).to(dtype)), params, exact_params)

    @pytest.mark.parametrize('beta, detach', [(1.0, False), (-2.0, False), (0.0, True)])
    @each_layout
    @each_dtype
    @pytest.mark.parametrize('channels', [3, 260])
    @pytest.mark.parametrize('size, window', WINDOWS, ids=str)
    def test_softpool(self, size, window, channels, dtype, layout, beta, detach):
        if channels > 3 and (beta != 1 or dtype is torch.float64):
            pytest.skip('a few of many')
        pool = getattr(softpools, f'softpool{len(size)}d')
        x = LAYOUTS[layout]((values(2, channels, *size) * 3).to(dtype))

        def f(x):
            return pool(x, beta=beta, detach_weights=detach, **window)

        check(f, f, x)

    @pytest.mark.parametrize('shape', [(2, 5, 6, 7), (3, 5, 9, 9), (2, 1, 4), (4, 5)], ids=str)
    @each_layout
    @each_dtype
    @pytest.mark.parametrize('member', MEMBERS)
    def test_bipolar(self, member, dtype, layout, shape):
        module = MEMBERS[member]() if shape[1] > 1 or member != 'bprelu' else BPReLU(1)
        exact = copy.deepcopy(module).double()
        x = (values(*shape) * 2).to(dtype)
        x.view(-1)[::7] = 0
        check(module, exact, LAYOUTS[layout](x), list(module.parameters()), list(exact.parameters()))

    @pytest.mark.parametrize('values_are', ['distinct', 'tied', 'not finite'])
    @each_layout
    @each_dtype
    @pytest.mark.parametrize('channels', [3, 70])
    @pytest.mark.parametrize('size, window', [(size, window) for size, window in WINDOWS if len(size) == 2] + [
        ((5, 5), dict(kernel_size=5)), ((20, 21), dict(kernel_size=(12, 11), stride=1)), ((8, 6), dict(kernel_size=1))],
        ids=str)
    def test_max_pool(self, size, window, channels, dtype, layout, values_are):
        if dtype is not torch.float32 and (channels > 3 or values_are != 'distinct'):
            pytest.skip('a few of many')
        x = values(2, channels, *size).to(dtype)
        if values_are == 'tied':
            x = (x * 2).round()
        elif values_are == 'not finite':
            x[0, :, 1, 2] = float('nan')
            x[1, 0], x[1, 1] = float('inf'), -float('inf')
        pool = BipolarMaxPool2d(**window)
        with use_backend('native'):
            y, dx = run(pool, LAYOUTS[layout](x), dtype=dtype)
        with use_backend('reference'):
            expected_y, expected_dx = run(pool, x.double(), dtype=dtype)
        assert torch.equal(y.double().nan_to_num(7), expected_y.nan_to_num(7))
        torch.testing.assert_close(
            dx.double(), expected_dx, rtol=0, atol=TOLERANCES[dtype] * max(1, expected_dx.abs().max().item()))

    def test_gradcheck(self):
        x = values(2, 4, 5, 6).double().requires_grad_()
        with use_backend('native'):
            assert torch.autograd.gradcheck(trained(DyReLU(4, 'c').double()), x)
            assert torch.autograd.gradcheck(lambda x: softpools.softpool2d(x, 3, 2, 1), x)

    def test_double_backward(self):
        x = values(2, 3, 4, 4).double().requires_grad_()
        with use_backend('native'):
            assert torch.autograd.gradgradcheck(lambda x: softpools.softpool2d(x, 2), x)

    @each_layout
    @pytest.mark.parametrize('extreme', [float('nan'), float('inf'), -float('inf')])
    def test_not_finite_as_in_the_reference(self, extreme, layout):
        x = values(2, 4, 6, 6)
        x[1, 0, 1, 2] = extreme
        x = LAYOUTS[layout](x)
        modules = [trained(DyReLU(4, mode, max_value=2)) for mode in 'abc']
        pools = [lambda x, w=w: softpools.softpool2d(x, *w) for w in ((2,), (3, 2, 1))]
        for f in (*modules, *pools, BReLU(max_value=6), BELU(), BLeakyReLU()):
            results = []
            for choice in ('native', 'reference'):
                with use_backend(choice):
                    results.append(run(f, x))
            for ours, expected in zip(*results, strict=True):
                torch.testing.assert_close(ours[0], expected[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5, equal_nan=True)

    def test_softpool_does_not_overflow(self):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            most = torch.finfo(dtype).max
            x = torch.tensor([[[[most, -most, 89, 88], [0, most, 0, 0]]]], dtype=dtype)
            with use_backend('native'):
                assert softpools.softpool2d(x, 3, 2, 1).isfinite().all()
                y = softpools.softpool2d(x, 2)
            assert y[0, 0, 0, 0] == most and abs(y[0, 0, 0, 1].item() - 88.73) < 0.3

    @each_layout
    def test_sums_over_large_planes(self, layout):
        """Of many numbers of one sign, where plain sums of fp32 are off by 1e-4."""
        x = LAYOUTS[layout](values(1, 2, 512, 512).abs() + 1)
        module = trained(DyReLU(2, 'b', reduction=1))
        exact = copy.deepcopy(module).double()
        with use_backend('native'):
            ours = torch.autograd.grad(module(x).sum(), list(module.parameters()))
        with use_backend('reference'):
            expected = torch.autograd.grad(exact(x.double()).sum(), list(exact.parameters()))
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=1e-5 * b.abs().max().item())

    def test_elu_near_zero(self):
        x = -torch.logspace(-7, 1, 40).reshape(20, 2) * torch.tensor([1, -1])
        with use_backend('native'):
            y = BELU()(x)
        expected = x.double() * torch.tensor([1, -1])
        torch.testing.assert_close(y, (F.elu(expected) * torch.tensor([1, -1])).float(), rtol=1e-6, atol=0)

    def test_in_place(self):
        x = values(2, 4, 5, 5)
        for layout in LAYOUTS.values():
            z = layout(x.clone())
            with use_backend('native'), torch.no_grad():
                assert BReLU(inplace=True)(z).data_ptr() == z.data_ptr()
            with use_backend('reference'):
                assert torch.equal(z, BReLU()(x))


    @pytest.mark.parametrize('shape', [(2, 5, 6, 7), (2, 5, 3, 3), (2, 5, 40, 40), (1, 3, 181, 183)], ids=str)
    @each_layout
    @pytest.mark.parametrize('mode', ['a', 'b', 'c'])
    def test_dyrelu_in_place_in_inference(self, mode, layout, shape):
        module = trained(DyReLU(shape[1], mode, inplace=True))
        x = LAYOUTS[layout](values(*shape))
        given, version = x.clone(), x._version
        with use_backend('native'):
            y = module(x.requires_grad_())
            assert torch.equal(x, given) and x._version == version, 'a backward pass needs the input'
            with torch.no_grad():
                x = x.detach()
                z = module(x)
        assert torch.equal(z, y)
        # A slice is copied, and the copy overwritten.
        assert (z.data_ptr() == x.data_ptr()) == (layout != 'slice')
        assert torch.equal(x, given if layout == 'slice' else z)
        assert (x._version == version) == (layout == 'slice')

    def test_a_module_that_is_not_in_place_leaves_its_input(self):
        x = values(2, 4, 9, 9)
        with use_backend('native'), torch.inference_mode():
            trained(DyReLU(4))(x)
        assert torch.equal(x, values(2, 4, 9, 9))


def step():
    x = values(4, 16, 40, 40, seed=5).requires_grad_()
    module = trained(DyReLU(16, 'c'))
    y = softpools.softpool2d(module(x), 3, 2, 1)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]


class Pooled(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        torch.set_num_threads(2)
        with use_backend('native'):
            return softpools.softpool2d(values(8, 16, 64, 64, seed=index), 2)


@pytest.fixture
def threads():
    # Here, not in the threads: the choice is the process's, and one of them would restore that of the other.
    before = torch.get_num_threads()
    with use_backend('native'):
        yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_library
class TestThreads:
    def test_any_number_gives_the_same_to_the_last_bit(self, threads):
        threads(1)
        expected = step()
        for number in (2, 3):
            threads(number)
            for ours, theirs in zip(step()[:2], expected[:2], strict=True):
                assert torch.equal(ours, theirs)

    def test_forked_workers(self, threads):
        """Their team was left behind in the process that they come from."""
        threads(2)
        step()
        expected = [softpools.softpool2d(values(8, 16, 64, 64, seed=i), 2) for i in range(4)]
        loader = DataLoader(Pooled(), batch_size=None, num_workers=2, multiprocessing_context='fork', timeout=100)
        assert all(torch.equal(a, b) for a, b in zip(loader, expected, strict=True))

    def test_two_at_once(self, threads):
        threads(2)
        expected = step()[0]
        results = []
        callers = [threading.Thread(target=lambda: results.append(step()[0])) for _ in range(2)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert len(results) == 2 and all(torch.equal(y, expected) for y in results)


def run_python(code, **env):
    env = {name: value for name, value in os.environ.items() if name != 'TIMM_DYACTS_BACKEND'} | env
    return subprocess.run([sys.executable, '-W', 'always', '-c', code], env=env, capture_output=True, text=True)


class TestWithoutLibrary:
    CODE = """if True:
        import torch
        from timm_dyacts.layers import BReLU, DyReLU
        from timm_dyacts.ops.backends import describe_backends, find_kernel
        x = torch.randn(2, 8, 5, 5)
        assert torch.equal(DyReLU(8)(x), x.relu())
        BReLU()(x)
        print(find_kernel('dyrelu', 'dyrelu', x).backend, '|', describe_backends()['native'])
        """

    @pytest.mark.parametrize('env, reason', [
        (dict(TIMM_DYACTS_NATIVE_BUILD='0'), 'TIMM_DYACTS_NATIVE_BUILD=0'),
        (dict(CC='no-such-compiler'), 'no C compiler'),
    ])
    def test_is_nothing_to_warn_of(self, env, reason, tmp_path):
        done = run_python(self.CODE, XDG_CACHE_HOME=str(tmp_path), **env)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith('cpu | ') and reason in done.stdout
        assert 'runs without' not in done.stderr

    @pytest.mark.parametrize('failing', ['compiler', 'library'])
    def test_a_failure_is_one_warning(self, failing, tmp_path):
        env = dict(CC='false')
        if failing == 'library':
            from timm_dyacts.ops import native_build
            folder = tmp_path / 'timm_dyacts' / 'native'
            folder.mkdir(parents=True)
            for level in native_build.LEVELS:
                (folder / native_build.library_name(level)).write_bytes(b'broken')
        done = run_python(self.CODE, XDG_CACHE_HOME=str(tmp_path), **env)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith('cpu | ') and done.stderr.count('RuntimeWarning') == 1, done.stderr

    def test_is_an_error_where_it_is_asked_for(self, tmp_path):
        done = run_python(self.CODE, XDG_CACHE_HOME=str(tmp_path), TIMM_DYACTS_BACKEND='native', CC='no-such-compiler')
        assert done.returncode != 0 and 'no C compiler' in done.stderr


@pytest.mark.parametrize('size', [0, 1, (4 << 20) // 4 - 1, (4 << 20) // 4, (9 << 20) // 4 + 3])
def test_large_pages_keep_values(size):
    whole = torch.arange(size + 2, dtype=torch.float32)
    inner = whole[1:-1]
    assert in_large_pages(inner) is inner
    assert torch.equal(whole, torch.arange(size + 2, dtype=torch.float32))


@needs_library
def test_processes_that_compile_at_once(tmp_path):
    code = 'from timm_dyacts.ops.backends import describe_backends; print(describe_backends()["native"])'
    env = os.environ | dict(XDG_CACHE_HOME=str(tmp_path), OMP_NUM_THREADS='1')
    runs = [subprocess.Popen([sys.executable, '-c', code], env=env, stdout=subprocess.PIPE, text=True) for _ in 'ab']
    assert [run.communicate()[0].strip() for run in runs] == ['works', 'works']
    left = [path for path in tmp_path.rglob('*') if path.is_file()]
    assert len(left) <= 1  # none where the installation brought a library


@needs_library
def test_it_is_the_first_choice():
    if backends.current_backend() == 'auto':
        assert find_kernel('softpool', 'softpool', values(2, 2)).backend == 'native'
