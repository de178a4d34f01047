"""What leads to a launch: plans that are kept, and nothing that a CUDA graph could not capture."""
import copy
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.kernels import DEVICE, LAYOUTS, ON_GPU, forget_plans, plans, run, values

from timm_dyacts.layers import BELU, BipolarMaxPool2d, BPReLU, BReLU, DyReLU, GlobalSoftPool2d, SoftPool2d
from timm_dyacts.ops import backends

pytest.importorskip('triton')

from support.traffic import kernels_on_cpus  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

MODULES = {
    'dyrelu_a': lambda: DyReLU(4, 'a'),
    'dyrelu_b': lambda: DyReLU(4, 'b'),
    'dyrelu_c': lambda: DyReLU(4, 'c'),
    'dyrelu_large': lambda: DyReLU(600, 'b', reduction=2),
    'softpool_2x2': lambda: SoftPool2d(2),
    'softpool_3x3': lambda: SoftPool2d(3, 2, 1),
    'softpool_4x4': lambda: SoftPool2d(4, 3, 1),
    'global_softpool': GlobalSoftPool2d,
    'brelu': BReLU,
    'belu': BELU,
    'bprelu': lambda: BPReLU(num_parameters=4),
    'max_pool_2x2': lambda: BipolarMaxPool2d(2),
    'max_pool_4x4': lambda: BipolarMaxPool2d(4, 3, 1),
}
each_module = pytest.mark.parametrize('name', MODULES)


def channels(name):
    return 600 if name == 'dyrelu_large' else 4


def misaligned(x):
    """Give an equal tensor whose memory starts an element further."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return memory[1:].view(x.shape).copy_(x)


# An equal tensor, of which something differs that launches are planned by
OTHERS = {
    'batch': lambda x: x[:1],
    'size': lambda x: x[..., 1:].contiguous(),
    'strides': LAYOUTS['slice'],
    'layout': LAYOUTS['channels_last'],
    'dtype': lambda x: x.bfloat16(),
    'alignment': misaligned,
}


def forward_and_backward(module, x):
    leaf = x.detach().requires_grad_()
    y = module(leaf)
    return y, *torch.autograd.grad(y, [leaf, *module.parameters()], torch.ones_like(y), allow_unused=True)


def count():
    return sum(len(of_function) for of_function in plans().values())


class TestPlans:
    @pytest.fixture(autouse=True)
    def without_launches(self):
        forget_plans()
        with kernels_on_cpus(lambda *args: None):
            yield

    @each_module
    def test_are_made_once(self, name):
        module, x = MODULES[name](), torch.randn(2, channels(name), 8, 8)
        forward_and_backward(module, x)
        known = count()
        assert known
        forward_and_backward(module, torch.randn_like(x))
        forward_and_backward(MODULES[name](), x)
        with torch.no_grad():
            module(x.clone())
        assert count() == known

    @pytest.mark.parametrize('other', OTHERS)
    @each_module
    def test_are_made_anew_for_other_tensors(self, name, other):
        module, x = MODULES[name](), torch.randn(2, channels(name), 8, 8)
        forward_and_backward(module, x)
        known = count()
        x = OTHERS[other](x)
        forward_and_backward(module, x)
        assert count() > known
        known = count()
        forward_and_backward(module, x)
        assert count() == known

    @pytest.mark.parametrize('modules', [
        (SoftPool2d(3, 2, 1), SoftPool2d(3, 2, 0)),
        (SoftPool2d(2), SoftPool2d(2, beta=2.0)),
        (SoftPool2d(2), SoftPool2d(2, detach_weights=True)),
        (GlobalSoftPool2d(), GlobalSoftPool2d(beta=-1.0)),
        (BReLU(), BReLU(layout='halves')),
        (BReLU(), BReLU(max_value=6.0)),
        (DyReLU(4), DyReLU(4, max_value=6.0)),
        (DyReLU(4), DyReLU(4, alpha=(1.0, 0.5))),
        (DyReLU(4), DyReLU(4, lambda_b=1.0)),
        (DyReLU(4), DyReLU(4, k=3)),
        (DyReLU(4, reduction=2), DyReLU(4, reduction=4)),
        (DyReLU(4, 'c'), DyReLU(4, 'c', tau=2.0)),
        (DyReLU(4), DyReLU(4, dtype=torch.bfloat16)),
        (BipolarMaxPool2d(2), BipolarMaxPool2d(2, layout='halves')),
    ], ids=str)
    def test_are_made_anew_for_other_options(self, modules):
        x = torch.randn(2, 4, 8, 8)
        counts = []
        for module in modules * 2:
            forward_and_backward(module, x)
            counts.append(count())
        assert counts[0] < counts[1] == counts[2] == counts[3]

    def test_are_not_kept_for_ever(self, monkeypatch):
        from timm_dyacts.ops import tiling
        monkeypatch.setattr(tiling, '_MOST_PLANS', 3)
        for size in range(1, 9):
            BReLU()(torch.randn(1, 2, size))
        assert 0 < max(len(of_function) for of_function in plans().values()) <= 3


@pytest.mark.usefixtures('triton_kernels')
@each_module
def test_results_do_not_depend_on_what_came_before(name):
    """A plan that is not of these tensors would give something else, or what lies beyond them."""
    module = MODULES[name]().to(DEVICE)
    with torch.no_grad():
        for i, param in enumerate(module.parameters()):
            param.copy_(values(*param.shape, seed=i) / param.shape[-1] ** 0.5)
    params = list(module.parameters())
    x = values(2, channels(name), 4, 4)
    inputs = [x, *(other(x) for other in OTHERS.values())]
    exact = copy.deepcopy(module).double()
    with backends.use_backend('reference'):
        expected = [run(exact, x.double(), list(exact.parameters())) for x in inputs]
    calls = 2 * list(zip(inputs, expected, strict=True))
    random.Random(0).shuffle(calls)
    for x, results in calls:
        for ours, theirs in zip(run(module, x, params), results, strict=True):
            tolerance = max(1e-5, 8 * torch.finfo(x.dtype).eps) * max(1, theirs.abs().max().item())
            torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=tolerance)


class _NoSync(TorchDispatchMode):
    """Refuses what waits for a device, or copies from the host to it or back, as the capture of a CUDA graph does."""
    REFUSED = {
        '_local_scalar_dense', 'equal', 'is_nonzero', 'item', 'lift_fresh', 'lift_fresh_copy', 'masked_select',
        'nonzero', 'pin_memory', '_pin_memory', 'record_stream', '_unique2', 'unique_dim', 'repeat_interleave',
    }

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix('aten::')
        out = function(*args, **(kwargs or {}))
        devices = {t.device for t in (*args, out) if isinstance(t, torch.Tensor)}
        # Plans ask, on the meta device, what a tensor would be like.
        if name in self.REFUSED or (len(devices) > 1 and not name.startswith('empty')):
            raise AssertionError(f'{name} on {devices} cannot be captured')
        return out


class TestCapture:
    @pytest.mark.parametrize('function', [
        lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x.nonzero(), lambda x: x.new_tensor([1.0, 2.0]),
        lambda x: torch.tensor(1.0), lambda x: x.to('meta'), lambda x: x.repeat_interleave(x.long()),
    ])
    def test_what_syncs_is_refused(self, function):
        with _NoSync(), pytest.raises(AssertionError, match='cannot be captured'):
            function(torch.ones(4))

    @pytest.mark.parametrize('known', [False, True])
    @each_module
    def test_nothing_syncs(self, name, known, monkeypatch):
        """Neither when launches are planned, nor when they are known."""
        launched = []
        module, x = MODULES[name](), torch.randn(2, channels(name), 8, 8)
        with kernels_on_cpus(lambda planned, *tensors: launched.append(planned)):
            if known:
                forward_and_backward(module, x)
            del launched[:]
            # Dispatch modes get references, but here.
            monkeypatch.setattr(backends, '_get_current_dispatch_mode', lambda: None)
            with _NoSync():
                forward_and_backward(module, x)
        assert len(launched) > 1

    @pytest.mark.skipif(not ON_GPU, reason='needs a GPU')
    @each_module
    def test_cuda_graph(self, name):
        module = MODULES[name]().to(DEVICE)
        x = torch.randn(2, channels(name), 8, 8, device=DEVICE)

        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            forward_and_backward(module, x)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = forward_and_backward(module, x)
        for seed in range(3):
            x.copy_(values(*x.shape, seed=seed))
            graph.replay()
            for ours, expected in zip(captured, forward_and_backward(module, x), strict=True):
                assert ours is expected is None or torch.equal(ours, expected)


def test_compiled_kernels_are_launched_without_asking_triton_again(tmp_path):
    """In a process that compiles, for a GPU that is not there: Triton decides when it is imported."""
    script = Path(__file__).with_name('launch_kernels.py')
    env = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    env['PYTHONPATH'] = os.pathsep.join([str(script.parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, str(script)], env=dict(env, TRITON_CACHE_DIR=str(tmp_path)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ['compiled', 'known', 'misaligned', 'other', 'plan', 'all']
