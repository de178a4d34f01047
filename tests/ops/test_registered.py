"""The native kernels as operators that ``torch.compile`` calls."""
import contextlib
import functools

import pytest
import torch
from functorch.compile import make_boxed_func
from support.native import LAYOUTS, TOLERANCES, each_layout, needs_library, trained, values
from torch._dynamo.backends.common import aot_autograd
from torch.library import opcheck
from torch.utils._pytree import tree_map_only

from timm_dyacts.layers import BipolarMaxPool2d, BReLU, DyReLU, GlobalSoftPool2d, SoftPool1d, SoftPool2d, SoftPool3d
from timm_dyacts.ops.backends import use_backend
from timm_dyacts.ops.bipolar import registered as bipolar
from timm_dyacts.ops.compat import TELLS_EXPORTS
from timm_dyacts.ops.dyrelu import registered as dyrelu
from timm_dyacts.ops.softpool import registered as softpool

pytestmark = [
    needs_library, pytest.mark.skipif(not TELLS_EXPORTS, reason='nothing is registered before PyTorch 2.8')]

MODULES = {
    'dyrelu_a': (lambda: trained(DyReLU(6, 'a', reduction=2)), (2, 6, 7, 5)),
    'dyrelu_b': (lambda: trained(DyReLU(6, 'b', reduction=2, max_value=1.0)), (3, 6, 4, 8)),
    'dyrelu_b of vectors': (lambda: trained(DyReLU(6, 'b', reduction=2)), (3, 6)),
    'dyrelu_c': (lambda: trained(DyReLU(6, 'c', reduction=2)), (2, 6, 5, 6)),
    'softpool_1d': (lambda: SoftPool1d(3, 2, ceil_mode=True), (2, 3, 10)),
    'softpool_2d': (lambda: SoftPool2d(2), (2, 3, 9, 8)),
    'softpool_2d padded': (lambda: SoftPool2d(3, 2, 1, beta=-0.5, detach_weights=True), (2, 3, 9, 8)),
    'softpool_2d of a sample': (lambda: SoftPool2d(3, 2), (3, 9, 8)),
    'softpool_3d': (lambda: SoftPool3d(2, 1), (2, 3, 4, 5, 6)),
    'max_pool': (lambda: BipolarMaxPool2d(3, 2, 1), (2, 3, 9, 8)),
    'max_pool of a sample': (lambda: BipolarMaxPool2d(2), (3, 8, 9)),
}

@pytest.fixture(autouse=True)
def forget_compiled():
    """What is compiled anew too often is not compiled at all."""
    torch._dynamo.reset()


each_module = pytest.mark.parametrize('name', MODULES)


class Graphs(list):
    """A back end of torch.compile that keeps the names of the operators in the graphs that it is given."""

    def __call__(self, graph, inputs):
        return aot_autograd(fw_compiler=self.keep, bw_compiler=self.keep)(graph, inputs)

    def keep(self, graph, inputs):
        self.append([str(node.target) for node in graph.graph.nodes if 'timm_dyacts' in str(node.target)])
        return make_boxed_func(graph)


def run(f, x, params=()):
    x = x.detach().requires_grad_()
    y = f(x)
    grads = torch.autograd.grad(y, [x, *params], values(*y.shape, seed=1).to(y))
    return y.detach(), *(grad.detach() for grad in grads)


@pytest.mark.parametrize(
    'layout, dtype',
    [('contiguous', torch.float32), ('channels_last', torch.bfloat16), ('slice', torch.float64),
     ('channels_last', torch.float16)], ids=str)
@each_module
def test_compiled_modules_call_them(name, layout, dtype):
    make, shape = MODULES[name]
    module = make()
    if layout == 'slice' and len(shape) == 2:
        pytest.skip('vectors have no other layout')
    x = LAYOUTS[layout](values(*shape).to(dtype))
    graphs = Graphs()
    with use_backend('native'):
        expected = run(module, x, list(module.parameters()))
        found = run(torch.compile(module, backend=graphs, fullgraph=True), x, list(module.parameters()))
    assert [len(names) for names in graphs] == [1, 1]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        # The same kernels
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    if layout != 'slice':
        assert [t.stride() for t in found[:2]] == [t.stride() for t in expected[:2]]


@each_module
def test_inductor(name):
    make, shape = MODULES[name]
    module, x = make(), LAYOUTS['channels_last'](values(*shape))
    with use_backend('reference'):
        expected = run(module, x, list(module.parameters()))
    found = run(torch.compile(module, fullgraph=True), x, list(module.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2 * TOLERANCES[torch.float32] * max(b.abs().max().item(), 1))


def test_sizes_may_be_dynamic():
    module, graphs = torch.nn.Sequential(trained(DyReLU(6)), SoftPool2d(3, 2, 1), BipolarMaxPool2d(2)), Graphs()
    compiled = torch.compile(module, backend=graphs, dynamic=True, fullgraph=True)
    for shape in ((2, 6, 12, 14), (3, 6, 16, 18), (5, 6, 22, 13)):
        x = values(*shape)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=0)
    # Once with gradients for the parameters' sake, or without: not anew for each shape
    assert len(graphs) == 1


def test_others_are_left_to_the_compiler():
    graphs = Graphs()
    for module in (BReLU(), GlobalSoftPool2d(), DyReLU(6, k=3)):
        run(torch.compile(module, backend=graphs), values(2, 6, 4, 4), list(module.parameters()))
    with use_backend('reference'):
        run(torch.compile(SoftPool2d(2), backend=graphs), values(2, 6, 4, 4))
    assert graphs and not any(graphs)


@pytest.mark.parametrize('autocast', [False, True])
def test_in_a_network(autocast):
    def network():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 6, 3, bias=False), torch.nn.BatchNorm2d(6), trained(DyReLU(6, 'c')), SoftPool2d(3, 2, 1),
            torch.nn.Conv2d(6, 4, 1), BipolarMaxPool2d(2), torch.nn.Flatten(), torch.nn.LazyLinear(5))

    results = []
    for compiled in (False, True):
        model, x = network(), values(4, 3, 20, 20).to(memory_format=torch.channels_last).requires_grad_()
        model(x.detach())
        f = torch.compile(model, fullgraph=True) if compiled else model
        with torch.autocast('cpu', torch.bfloat16) if autocast else contextlib.nullcontext():
            y = f(x)
        y.float().square().sum().backward()
        results.append([y.float(), x.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        scale = max(b.abs().max().item(), 1)
        torch.testing.assert_close(a, b, rtol=0, atol=(5e-2 if autocast else 1e-5) * scale)


@pytest.mark.parametrize('name', ['dyrelu_c', 'softpool_2d padded', 'max_pool'])
def test_transforms_see_plain_operations(name):
    """Within a compiled function, as elsewhere."""
    make, shape = MODULES[name]
    module, x, graphs = make(), values(3, *shape), Graphs()
    functions = {
        'vmap': torch.func.vmap(module),
        'vmap of grad': torch.func.vmap(torch.func.grad(lambda x: module(x).sin().sum())),
    }
    for f in functions.values():
        torch.testing.assert_close(torch.compile(f, backend=graphs)(x), f(x), rtol=1e-4, atol=1e-5)
    assert not any(graphs)


def test_forward_mode_is_right_or_refused():
    module, x = SoftPool2d(2), values(2, 3, 4, 4)
    _, expected = torch.func.jvp(module, (x,), (x,))
    try:
        _, found = torch.compile(lambda x: torch.func.jvp(module, (x,), (x,)))(x)
    except Exception as e:
        assert 'timm_dyacts' not in str(e)  # noqa: PT017  what PyTorch makes of it differs from version to version
    else:
        torch.testing.assert_close(found, expected)


def calls_of(module, function, args, monkeypatch):
    """Give the operators of a module with what a function and its gradient call them with."""
    calls = {}

    def note(operator, *args):
        calls[operator] = args
        return operator(*args)

    with monkeypatch.context() as patch:
        for name in ('_forward', '_backward'):
            operator = getattr(module, name)
            patch.setattr(module, name, functools.partial(note, operator))
        function(*args).sum().backward()
    assert len(calls) == 2
    return calls


WINDOW = [3, 2], [2, 2], [1, 0], [1, 1], True
# By module: the function that calls its operators, and the arguments after the input
SAMPLES = {
    dyrelu: (dyrelu.dynamic_relu_registered, [
        (module._params(), module._settings()) for module in (trained(DyReLU(6, mode)) for mode in 'abc')]),
    softpool: (softpool.softpool_registered, [(*WINDOW, 1.5, False)]),
    bipolar: (bipolar.max_pool_registered, [(*WINDOW, 'halves')]),
}


@each_layout
@pytest.mark.parametrize('module', SAMPLES)
def test_opcheck(module, layout, monkeypatch):
    """PyTorch's own checks of schemas, fakes and gradients, with the arguments that the operators are called with."""
    x = LAYOUTS[layout](values(2, 6, 7, 8)).requires_grad_()
    function, samples = SAMPLES[module]
    for args in samples:
        for operator, arguments in calls_of(module, function, (x, *args), monkeypatch).items():
            if operator is module._backward:  # has no gradient itself
                arguments = tree_map_only(torch.Tensor, torch.Tensor.detach, arguments)
            opcheck(operator, arguments)
