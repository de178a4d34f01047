"""Which implementation of an operator runs."""
import warnings

import pytest
import torch
import torch.nn.functional as F
from support import reference
from support.kernels import replace_launch, run, trained, values

from timm_dyacts.layers import BELU, BipolarMaxPool2d, BReLU, DyReLU, SoftPool2d
from timm_dyacts.ops import backends

# Without kernels, the results would be those of the references.
pytestmark = [pytest.mark.usefixtures('triton_kernels'), pytest.mark.filterwarnings('error:timm_dyacts runs without')]


class TestDispatch:
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
