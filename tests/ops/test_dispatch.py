"""When the modules run Triton kernels, and what happens if Triton fails."""
import ast
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from support import reference
from support.kernels import DEVICE, kernel_modules, replace_launch, run, trained, values

from timm_dyacts.layers import BELU, BipolarMaxPool2d, BReLU, DyReLU, SoftPool2d
from timm_dyacts.ops import backends

triton = pytest.importorskip('triton')
tl = triton.language
from triton.compiler.errors import CompilationError, CompileTimeAssertionFailure  # noqa: E402
from triton.runtime import errors  # noqa: E402

from timm_dyacts.ops import triton_tiles  # noqa: E402

# Without kernels, the results would be those of the references.
pytestmark = [pytest.mark.usefixtures('triton_kernels'), pytest.mark.filterwarnings('error:timm_dyacts runs without')]


class TestModules:
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
        """``is_grads_batched`` runs the backward pass under vmap."""
        module, x = self.MODULES[name](), values(1, 4, 4, 4).requires_grad_()
        y = module(x)
        directions = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(0)).to(y)
        batched, = torch.autograd.grad(y, x, directions, is_grads_batched=True, retain_graph=True)
        for direction, grad in zip(directions, batched, strict=True):
            torch.testing.assert_close(torch.autograd.grad(y, x, direction, retain_graph=True)[0], grad)

    @pytest.mark.parametrize('failing', ['forward', 'backward', 'all'])
    @each_module
    def test_triton_fails(self, name, failing, monkeypatch):
        """One warning for each kernel, and the same results as from the reference."""
        module, x = self.MODULES[name](), values(1, 4, 4, 4)
        expected = run(module, x)

        def launch(planned, *tensors):
            if failing == 'all' or ('backward' in planned.kernel.fn.__name__) == (failing == 'backward'):
                raise backends.KernelBuildError('no kernel') from RuntimeError('Failed to find C compiler.')
            triton_tiles.launch(planned, *tensors)

        replace_launch(monkeypatch, launch)
        with pytest.warns(RuntimeWarning, match='runs without the triton kernel .*Failed to find C compiler') as caught:
            for ours, theirs in zip(run(module, x), expected, strict=True):
                torch.testing.assert_close(ours, theirs)
        # Forward kernels may run in the backward pass too, in another place.
        assert len(caught) == len({str(warning.message) for warning in caught}) <= (1 if failing == 'backward' else 2)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            run(module, x)

    @pytest.mark.parametrize('error', [torch.OutOfMemoryError, TypeError, ValueError])
    @each_module
    def test_other_errors_surface(self, name, error, monkeypatch):
        def launch(*args, **kwargs):
            raise error('no memory, or a bug of ours')

        module, x = self.MODULES[name](), values(1, 4, 4, 4)
        replace_launch(monkeypatch, launch)
        with pytest.raises(error, match='of ours'):
            module(x)
        assert not backends._unusable

    def test_triton_is_missing(self, monkeypatch):
        """One warning for all operators."""
        modules = [module.__name__ for module in kernel_modules()]
        monkeypatch.setitem(sys.modules, 'triton', None)
        backends._load.cache_clear()
        for name in modules:
            monkeypatch.delitem(sys.modules, name)
        x = values(2, 4)
        with pytest.warns(RuntimeWarning, match='runs without its back end triton.*import of triton halted') as caught:
            assert torch.equal(BReLU()(x), reference.bipolar(x, F.relu))
            assert torch.equal(DyReLU(4).to(DEVICE)(x), x.relu())
        assert len(caught) == 1


@triton.jit
def _copy_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, i < size), i < size)


def name_of(error):
    """The same in every process; the errors of Triton's compiler quote the addresses of what they are about."""
    return type(error).__name__ if isinstance(error, CompilationError) else f'{type(error).__name__}: {error}'[:60]


class TestLaunch:
    def test_again_and_again(self):
        planned = triton_tiles.Launch(_copy_kernel, 1, BLOCK=8, size=5, num_warps=1)
        for seed in range(3):
            x = values(5, seed=seed)
            y = torch.zeros_like(x)
            triton_tiles.launch(planned, x, y)
            assert torch.equal(y, x)

    def test_no_programs(self):
        x = values(5)
        y = torch.zeros_like(x)
        triton_tiles.launch(triton_tiles.Launch(_copy_kernel, 0, size=5, BLOCK=8), x, y)
        assert not y.any()

    def test_an_argument_is_missing(self):
        with pytest.raises(TypeError, match='y_ptr'):
            triton_tiles.launch(triton_tiles.Launch(_copy_kernel, 1, size=5, BLOCK=8), values(5))

    BUILD_FAILURES = [
        CompilationError(None, ast.parse('1'), 'not a language'),
        CompileTimeAssertionFailure(None, ast.parse('1'), 'no'),
        errors.OutOfResources(300000, 232448, 'shared memory'),
        getattr(errors, 'PTXASError', RuntimeError)('ptxas died'),
        subprocess.CalledProcessError(1, 'gcc'),
        FileNotFoundError('gcc'),
        PermissionError('cache'),
        ImportError('cuda_utils.so: failed to map segment from shared object'),
        RuntimeError('Failed to find C compiler. Please specify via CC environment variable.'),
        RuntimeError('0 active drivers ([]). There should only be one.'),
        RuntimeError('PassManager::run failed'),
        RuntimeError('Triton Error [CUDA]: no kernel image is available for execution on the device'),
        RuntimeError('Triton Error [CUDA]: the provided PTX was compiled with an unsupported toolchain.'),
    ]
    OTHERS = [
        TypeError('dynamic_func() got multiple values for argument'),
        ValueError('Pointer argument cannot be accessed from Triton (cpu tensor?)'),
        KeyError('Keyword argument warps was specified but unrecognised'),
        IndexError('list index out of range'),
        AssertionError(),
        RuntimeError('Triton Error [CUDA]: out of memory'),
        RuntimeError('Triton Error [CUDA]: an illegal memory access was encountered'),
        RuntimeError('Triton Error [HIP]:  Code: 2, Message: out of memory'),
        torch.OutOfMemoryError('CUDA out of memory.'),
        getattr(torch, 'AcceleratorError', RuntimeError)('CUDA error: device-side assert triggered'),
        errors.InterpreterError('a bug'),
    ]

    @pytest.mark.parametrize('error', BUILD_FAILURES, ids=name_of)
    def test_build_failures(self, error):
        with pytest.raises(backends.KernelBuildError, match='_copy_kernel cannot be compiled') as caught:
            triton_tiles.launch(triton_tiles.Launch(Failing(error), 1), values(5))
        assert caught.value.__cause__ is error

    @pytest.mark.parametrize('error', OTHERS, ids=name_of)
    def test_other_errors(self, error):
        with pytest.raises(type(error)) as caught:
            triton_tiles.launch(triton_tiles.Launch(Failing(error), 1), values(5))
        assert caught.value is error


class Failing:
    """A kernel that fails when it is launched."""

    fn = _copy_kernel.fn
    arg_names = ['x_ptr']

    def __init__(self, error):
        self.error = error

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            raise self.error

        return launch
