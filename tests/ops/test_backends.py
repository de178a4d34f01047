"""The protocol of kernels: which one is found, what happens if it cannot be built, and how gradients are computed."""
import dataclasses
import importlib
import os
import subprocess
import sys
import warnings

import pytest
import timm
import torch
from torch import nn
from torch.autograd import forward_ad

from timm_dyacts import ops
from timm_dyacts.ops import backends
from timm_dyacts.ops.backends import KernelBuildError, find_kernel, run_kernel, use_backend
from timm_dyacts.version import SUPPORTED

X = torch.tensor([1.0, 2.0])
CPU, = (backend for backend in backends.BACKENDS if backend.name == 'cpu')


def square_reference(x):
    return x.square()


@pytest.fixture
def write_kernels(tmp_path, monkeypatch):
    """Make an operator ``square`` of the test's own. Gives the function that writes its kernels for CPUs."""
    folder = tmp_path / 'square'
    folder.mkdir()
    (folder / '__init__.py').touch()
    monkeypatch.setattr(ops, '__path__', [*ops.__path__, str(tmp_path)])
    monkeypatch.setattr(backends, '_unusable', set())

    def write(*lines):
        (folder / 'cpu.py').write_text('\n'.join(['from timm_dyacts.ops.backends import KernelBuildError', *lines]))
        importlib.invalidate_caches()

    yield write
    for name in [name for name in sys.modules if name.startswith(f'{ops.__name__}.square')]:
        del sys.modules[name]
    vars(ops).pop('square', None)
    backends._load.cache_clear()


SQUARE = '__all__ = ["square"]', 'def square(x): return x * x'
TWICE = '__all__ = ["square", "twice"]', 'def twice(x): return 2 * x'
NOT_BUILT = 'def square(x): raise KernelBuildError("square cannot be compiled") from OSError("no compiler")',


def run_python(code, **env):
    env = {name: value for name, value in os.environ.items() if name != 'TIMM_DYACTS_BACKEND'} | env
    return subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)


class TestChoice:
    def test_environment_variable(self):
        code = 'from timm_dyacts.ops.backends import current_backend; print(current_backend())'
        assert run_python(code, TIMM_DYACTS_BACKEND='reference').stdout == 'reference\n'
        assert run_python(code, TIMM_DYACTS_BACKEND='').stdout == 'auto\n'

    def test_unknown_environment_variable(self):
        done = run_python('import timm_dyacts', TIMM_DYACTS_BACKEND='cuda')
        assert done.returncode != 0
        message = "ValueError: TIMM_DYACTS_BACKEND must be one of auto, reference, native, cpu, triton, got 'cuda'"
        assert message in done.stderr

    def test_for_a_while(self):
        before = backends.current_backend()
        with pytest.raises(RuntimeError, match='within'), use_backend('reference'):
            assert backends.current_backend() == 'reference'
            raise RuntimeError('within')
        assert backends.current_backend() == before
        with pytest.raises(ValueError, match="choice must be one of auto, reference, native, cpu, triton, got 'gpu'"):
            with use_backend('gpu'):
                pass
        assert backends.current_backend() == before

    def test_each_choice(self, write_kernels, monkeypatch):
        monkeypatch.delenv('TRITON_INTERPRET', raising=False)
        write_kernels(*SQUARE)
        found = {}
        for choice in backends.CHOICES:
            with use_backend(choice):
                found[choice] = find_kernel('square', 'square', X)
        assert found['auto'] is found['cpu'] is not None
        assert found['reference'] is found['triton'] is None

    def test_interpreter_only_where_it_is_asked_for(self, monkeypatch):
        triton = backends.BACKENDS[-1]
        for choice, interpret, takes in (('triton', '1', True), ('triton', '0', False), ('auto', '1', False)):
            monkeypatch.setenv('TRITON_INTERPRET', interpret)
            with use_backend(choice):
                assert triton.takes('cpu') == takes and triton.takes('cuda')

    def test_description(self, monkeypatch):
        assert backends.describe_backends()['cpu'] == 'works'
        monkeypatch.setitem(sys.modules, 'triton', None)
        assert backends.describe_backends()['triton'].startswith('triton cannot be imported: ')


    def test_a_package_that_is_too_old(self):
        backend = dataclasses.replace(backends.BACKENDS[-1], requires='timm', least='99')
        with pytest.raises(backends.TooOld, match=f'back end triton needs timm>=99, got {timm.__version__}') as caught:
            backend.require()
        assert backend.why_not() == str(caught.value)
        assert backend.is_missing(caught.value), 'others take over'


class TestFindKernel:
    def test_where_it_comes_from(self, write_kernels):
        write_kernels(*SQUARE, *TWICE)
        kernel = find_kernel('square', 'twice', X)
        assert (kernel.backend, kernel.operator, kernel.name) == ('cpu', 'square', 'twice')
        assert run_kernel(kernel, square_reference, X).tolist() == [2, 4]

    def test_what_is_not_offered(self, write_kernels, monkeypatch):
        write_kernels('__all__ = []', *SQUARE[1:])
        assert find_kernel('square', 'square', X) is None
        monkeypatch.setattr(backends, 'BACKENDS', (backends.Backend('another', 'cpu'),))
        assert find_kernel('square', 'square', X) is None
        with pytest.raises(ModuleNotFoundError, match='ops.circle'):
            find_kernel('circle', 'circle', X)

    def test_operands(self, write_kernels):
        class Subclass(torch.Tensor):
            pass

        write_kernels(*SQUARE)
        for operands in ((X,), (X, None, 3), (X, nn.Parameter(X)), (X.double(), X)):
            assert find_kernel('square', 'square', *operands) is not None
        for operands in ((X, X.to('meta')), (X.to('meta'),), (X, X.as_subclass(Subclass))):
            assert find_kernel('square', 'square', *operands) is None

    def test_dtypes(self, write_kernels, monkeypatch):
        write_kernels(*SQUARE)
        backend = backends.Backend('cpu', 'cpu', frozenset({torch.float32}))
        monkeypatch.setattr(backends, 'BACKENDS', (backend,))
        assert find_kernel('square', 'square', X, X) is not None
        assert find_kernel('square', 'square', X, X.double()) is None

    @pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
    def test_transforms(self, write_kernels):
        """Where operations are recorded or transformed, there is none."""
        write_kernels(*SQUARE)
        found = []

        def f(x):
            found.append(find_kernel('square', 'square', x))
            return x * 1

        torch.vmap(f)(X)
        torch.func.grad(lambda x: f(x).sum())(X)
        torch.func.jvp(f, (X,), (X,))
        torch.jit.trace(f, X, check_trace=False)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            f(X)
        with forward_ad.dual_level():
            f(forward_ad.make_dual(X, X))
        y = (X.clone().requires_grad_() * 1)
        y.register_hook(f)
        torch.autograd.grad(y, y, torch.ones(3, 2), is_grads_batched=True)
        assert found and not any(found)
        compiled = torch.compile(lambda x: x * 1 if find_kernel('square', 'square', x) is None else x, backend='eager')
        assert compiled(X) is not X
        with forward_ad.dual_level():
            f(X)
        f(X)
        assert all(found[-2:])


class TestFailure:
    def test_a_kernel_that_cannot_be_built(self, write_kernels):
        """It alone is left out, with one warning."""
        write_kernels(*TWICE, *NOT_BUILT)
        kernel = find_kernel('square', 'square', X)
        with pytest.warns(RuntimeWarning, match='without the cpu kernel square of square.*no compiler') as caught:
            assert run_kernel(kernel, square_reference, X).tolist() == [1, 4]
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            assert find_kernel('square', 'square', X) is None
            assert run_kernel(find_kernel('square', 'twice', X), square_reference, X).tolist() == [2, 4]

    def test_a_kernel_that_is_asked_for_by_name(self, write_kernels):
        """That it cannot be built is an error, also where this has been found out before."""
        write_kernels(*TWICE, *NOT_BUILT)
        with pytest.warns(RuntimeWarning):
            run_kernel(find_kernel('square', 'square', X), square_reference, X)
        for _ in range(2):
            with use_backend('cpu'), pytest.raises(KernelBuildError, match='square cannot be compiled'):
                run_kernel(find_kernel('square', 'square', X), square_reference, X)

    @pytest.mark.parametrize('error', [TypeError, ValueError, RuntimeError, torch.OutOfMemoryError, ImportError])
    @pytest.mark.parametrize('choice', ['auto', 'cpu'])
    def test_other_errors_surface(self, choice, error, write_kernels):
        write_kernels(
            'import torch', '__all__ = ["square"]',
            f'def square(x): raise {"torch." * (error is torch.OutOfMemoryError)}{error.__name__}("of ours")')
        with use_backend(choice), pytest.raises(error, match='of ours'):
            run_kernel(find_kernel('square', 'square', X), square_reference, X)
        assert not backends._unusable

    def test_a_package_that_is_missing(self, write_kernels, monkeypatch):
        """One warning for all of its kernels; an error for those who ask for the back end."""
        write_kernels('import timm_dyacts_needs_this', *SQUARE, *TWICE)
        backend = dataclasses.replace(CPU, requires='timm_dyacts_needs_this')
        monkeypatch.setattr(backends, 'BACKENDS', (backend,))
        with pytest.warns(RuntimeWarning, match='without its back end cpu.*No module named') as caught:
            assert find_kernel('square', 'square', X) is None
            assert find_kernel('square', 'square', X) is find_kernel('square', 'twice', X) is None
        assert len(caught) == 1
        for _ in range(2):
            with use_backend('cpu'), pytest.raises(ImportError, match='timm_dyacts_needs_this'):
                find_kernel('square', 'square', X)

    def test_a_package_that_lacks_something(self, write_kernels, monkeypatch):
        """A version that the kernels do not know is as good as none."""
        write_kernels('from colorsys import paint', *SQUARE)
        backend = dataclasses.replace(CPU, requires='colorsys')
        monkeypatch.setattr(backends, 'BACKENDS', (backend,))
        with pytest.warns(RuntimeWarning, match='without its back end cpu.*paint'):
            assert find_kernel('square', 'square', X) is None

    def test_a_failed_import_of_another_module_surfaces(self, write_kernels, monkeypatch):
        write_kernels('import timm_dyacts.nothing', *SQUARE)
        backend = dataclasses.replace(CPU, requires='colorsys')
        for each in (backend, CPU):
            monkeypatch.setattr(backends, 'BACKENDS', (each,))
            with pytest.raises(ImportError, match='timm_dyacts.nothing'):
                find_kernel('square', 'square', X)

    def test_private_parts_of_torch(self):
        """A torch that lacks one is told apart when the module is imported."""
        code = """if True:
            import importlib
            import torch
            from timm_dyacts.ops import backends
            for owner, name in (
                (torch._C._functorch, 'peek_interpreter_stack'),
                (torch._C._functorch, 'is_legacy_batchedtensor'),
                (torch.utils._python_dispatch, '_get_current_dispatch_mode'),
                (torch.autograd.forward_ad, '_current_level'),
            ):
                part = getattr(owner, name)
                delattr(owner, name)
                try:
                    importlib.reload(backends)
                except ImportError as error:
                    assert name in str(error), error
                    print(error)
                setattr(owner, name, part)
            """
        done = run_python(code)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert len(lines) == 4
        assert all(line.startswith(f'torch {torch.__version__} is not known to this release') for line in lines)
        assert all(line.endswith(f'supports torch{SUPPORTED["torch"]}.') for line in lines)


class TestDifferentiate:
    @staticmethod
    def differentiate(x, kernel=None, saved=None):
        kernel = kernel and backends.Kernel('cpu', 'square', 'square_backward', kernel)
        return backends.differentiate(kernel, square_reference, (x,), (torch.ones_like(x),), (True,), saved=saved)

    @staticmethod
    def kernel(dy, x, *, saved=(2.0,)):
        return dy * x * saved[0],

    def test_by_a_kernel(self):
        with torch.no_grad():
            assert self.differentiate(X, self.kernel)[0].tolist() == [2, 4]
            assert self.differentiate(X, self.kernel, saved=(3.0,))[0].tolist() == [3, 6]

    def test_by_the_reference(self):
        with torch.no_grad():
            assert self.differentiate(X)[0].tolist() == [2, 4]
        # A kernel has no derivative.
        x = X.clone().requires_grad_()
        grad, = self.differentiate(x, self.kernel, saved=(3.0,))
        assert grad.tolist() == [2, 4]
        assert torch.autograd.grad(grad.sum(), x)[0].tolist() == [2, 2]

    def test_of_what_needs_it(self):
        def reference(a, b, scale):
            return a * b * scale, a.detach()

        a, b = torch.tensor(2.0), torch.tensor(3.0)
        with torch.no_grad():
            for args in ((a, b), (a, a)):
                grads = backends.differentiate(
                    None, reference, (*args, 5.0), (torch.tensor(1.0), None), (True, False, False))
                assert grads == (args[1] * 5, None, None)
            assert backends.differentiate(
                None, reference, (a, a, 5.0), (torch.tensor(1.0), None), (True, True, False)) == (10, 10, None)
