"""The module that leads from one module to another, and the one that takes every n-th row and column."""
import copy
import pickle

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch._dynamo.utils import counters

from timm_dyacts import BELU, BPReLU, DyReLUB, SoftPool2d, Transition
from timm_dyacts.layers import Subsample
from timm_dyacts.layers.forms import static_form

T = (0, 0.25, 0.7, 1)


def moved(dynamic):
    """A Dynamic ReLU that has learned something."""
    with torch.no_grad():
        for parameter in dynamic.parameters():
            parameter.add_(torch.linspace(-0.5, 0.5, parameter.numel()).view_as(parameter))
    return dynamic


BRANCHES = dict(
    silu_dyrelu=lambda: (nn.SiLU(), moved(DyReLUB(4))),
    relu_belu_inplace=lambda: (nn.ReLU(inplace=True), BELU(inplace=True)),
    prelu_bprelu=lambda: (nn.PReLU(4), BPReLU(4)),
    max_soft=lambda: (nn.MaxPool2d(3, 2, 1), SoftPool2d(2, 2, ceil_mode=True)),
    every_second_soft=lambda: (Subsample((2, 2), [(4, [1, 0], [1, 0])]), SoftPool2d(2, 2, ceil_mode=True)),
)


def batch(**kwargs):
    return torch.randn(2, 4, 7, 6, generator=torch.Generator().manual_seed(0)).to(**kwargs)


def transition_of(name, t=0.0):
    torch.manual_seed(0)
    module = Transition(*BRANCHES[name]())
    module.set(t)
    return module


@pytest.fixture(params=BRANCHES)
def name(request):
    return request.param


@pytest.mark.parametrize('t', T)
def test_it_is_the_mean_that_t_weights(name, t):
    module = transition_of(name, t).double()
    old, new = (branch.double() for branch in BRANCHES[name]())
    new.load_state_dict(module.new.state_dict())
    x = batch(dtype=torch.float64)
    expected = (1 - t) * old(x.clone()) + t * new(x.clone())
    torch.testing.assert_close(module(x.clone()), expected, rtol=1e-14, atol=1e-14)
    assert module.get() == t


@pytest.mark.parametrize('t, ran', [(0, 'old'), (1, 'new')])
def test_at_the_ends_one_branch_runs_and_its_output_is_the_output(name, t, ran):
    module, calls = transition_of(name, t), []
    for branch in ('old', 'new'):
        getattr(module, branch).register_forward_hook(lambda m, args, out, branch=branch: calls.append((branch, out)))
    assert module(batch()) is calls[0][1]
    assert [branch for branch, _ in calls] == [ran]


def test_the_input_is_only_overwritten_at_the_ends():
    for t in T:
        x, module = batch(), Transition(nn.ReLU(inplace=True), nn.ELU(inplace=True))
        module.set(t)
        module(x)
        assert torch.equal(x, batch()) is (0 < t < 1)


@pytest.mark.parametrize('t', T)
def test_gradients(name, t):
    module = transition_of(name, t).double()
    x = batch(dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: module(x.clone()), x)
    module(x.clone()).square().sum().backward()
    for branch, unused in ((module.old, t == 1), (module.new, t == 0)):
        assert all((parameter.grad is None) is unused for parameter in branch.parameters())


@pytest.mark.parametrize('t', T)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtype_and_memory_format(name, dtype, t):
    module = transition_of(name, t)
    expected = module(batch())
    module = module.to(dtype)
    assert module.get() == t, 'a cast does not round it'
    y = module(batch(dtype=dtype, memory_format=torch.channels_last))
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.03)


@pytest.mark.parametrize('t', T)
def test_autocast(name, t):
    module = transition_of(name, t)
    with torch.autocast('cpu', torch.bfloat16):
        y = module(batch(dtype=torch.bfloat16))
    torch.testing.assert_close(y.float(), module(batch()).float(), rtol=0.02, atol=0.03)


def test_branches_of_different_dtypes_are_promoted():
    class Doubled(nn.Module):
        def forward(self, x):
            return x.double()

    module = Transition(nn.Identity(), Doubled())
    module.set(0.5)
    assert module(batch()).dtype == torch.float64


# The stage, which Python reads, and the buffer, which the device reads


def stages(module):
    return module.stage, module.get()


@pytest.mark.parametrize('t, stage', [(0, 0), (1e-9, 1), (0.5, 1), (1 - 1e-9, 1), (1, 2)])
def test_the_stage_goes_along_wherever_t_goes(t, stage):
    module = transition_of('prelu_bprelu', t)
    assert stages(module) == (stage, pytest.approx(t, abs=1e-18))
    assert stages(copy.deepcopy(module)) == stages(module)
    assert stages(pickle.loads(pickle.dumps(module))) == stages(module)
    for assign in (False, True):
        other = transition_of('prelu_bprelu', 0.3)
        other.load_state_dict(copy.deepcopy(module.state_dict()), assign=assign)
        assert stages(other) == stages(module)
    with torch.device('meta'):
        empty = Transition(*BRANCHES['prelu_bprelu']())
    empty.load_state_dict(module.state_dict(), assign=True)
    assert stages(empty) == stages(module)
    assert stages(module.half().double()) == stages(module)


def test_on_the_meta_device():
    with torch.device('meta'):
        module = Transition(*BRANCHES['silu_dyrelu']())
    for t in T:
        module.set(t)
        module.eval()
        assert module(batch(device='meta')).shape == batch().shape
        assert 't=?' in repr(module)


@pytest.mark.parametrize('kwargs', [{}, dict(foreach=False), dict(exclude_buffers=True)], ids=str)
def test_an_average_of_the_weights_copies_t(kwargs):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), transition_of('prelu_bprelu'))
    average = ModelEmaV3(model, decay=0.9, device=torch.device('cpu'), **kwargs)
    for t in (0.25, 0.7, 1):
        model[1].set(t)
        average.update(model)
        average.module.eval()
        assert stages(average.module[1]) == stages(model[1])
        assert torch.equal(average(batch()), average.module[1](average.module[0](batch())))


@pytest.mark.parametrize('t', [-0.1, 1.1, float('nan'), float('inf'), None, '0.5', True], ids=str)
def test_t_is_a_number_from_0_to_1(t):
    module = transition_of('silu_dyrelu', 0.5)
    with pytest.raises(ValueError, match='t must be a number from 0 to 1, got'):
        module.set(t)
    assert module.get() == 0.5


def test_outputs_of_different_shapes_are_an_error():
    module = Transition(nn.MaxPool2d(3, 2, 1), SoftPool2d(2, 2))
    module.set(0.5)
    assert module(torch.randn(1, 4, 6, 6)).shape == (1, 4, 3, 3)
    with pytest.raises(AssertionError, match='must have the same shape'):
        module(torch.randn(1, 4, 7, 7))


def test_its_form_is_that_of_the_branch_that_runs():
    module = Transition(nn.ReLU(), BELU())
    assert (module.layout, static_form(module).kind) == ('interleaved', 'relu')
    module.set(0.5)
    assert static_form(module).kind == 'dynamic'
    module.set(1)
    assert static_form(module).kind == 'elu'


# Compilers


@pytest.mark.parametrize('name', ['silu_dyrelu', 'relu_belu_inplace', 'every_second_soft'])
def test_compiled_at_most_three_times_on_the_way(name):
    module = transition_of(name)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(module, fullgraph=True, backend='aot_eager')
    for t in (0, 0, 0.1, 0.2, 0.5, 0.9, 1, 1):
        module.set(t)
        x = batch().requires_grad_()
        y = compiled(x.clone())
        y.sum().backward()
        torch.testing.assert_close(y, module(batch()))
    assert counters['stats']['unique_graphs'] == 3


@pytest.mark.parametrize('t', T)
def test_export_and_torchscript_are_the_module_as_it_is(name, t):
    module = transition_of(name, t).eval()
    expected = module(batch())
    torch.testing.assert_close(torch.export.export(module, (batch(),)).module()(batch()), expected)
    if name != 'silu_dyrelu':  # scripted within models alone, as those of timm are with scriptable=True
        torch.testing.assert_close(torch.jit.script(module)(batch()), expected)


# Subsample


@pytest.mark.parametrize('stride', [(2, 2), (2, 1), (1, 3)], ids=str)
@pytest.mark.parametrize('size', [(7, 6), (6, 7)], ids=str)
def test_rows_and_columns_by_group(size, stride):
    phases = [
        (1, [0] * stride[0], list(range(stride[1]))),
        (3, [stride[0] - 1] * stride[0], [0] * stride[1]),
    ]
    x = torch.randn(2, 4, *size)
    top, left = phases[0][1][size[0] % stride[0]], phases[0][2][size[1] % stride[1]]
    first = x[:, :, top::stride[0], left::stride[1]]
    assert torch.equal(Subsample(stride, phases[:1])(x), first)
    if stride[0] == 1 or size[0] % stride[0] == 0:  # as many rows in both groups
        second = x[:, 1:, stride[0] - 1::stride[0], ::stride[1]]
        if second.shape[2:] == first.shape[2:]:
            assert torch.equal(Subsample(stride, phases)(x), torch.cat([first[:, :1], second], 1))
