"""The functions of Dynamic ReLU. ``tests/layers/test_dyrelu.py`` tests what the modules make of them."""
import pickle

import pytest
import torch
from support import reference

from timm_dyacts.layers import DyReLU
from timm_dyacts.ops.backends import use_backend
from timm_dyacts.ops.dyrelu import functional
from timm_dyacts.ops.dyrelu.functional import dyrelu
from timm_dyacts.ops.dyrelu.settings import DyReLUParams, DyReLUSettings


def values(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


class TestGivenCoefficients:
    def test_coefficient_layout(self):
        """Per channel the K slopes, then the K intercepts."""
        theta = torch.tensor([[[1.0, 0.5, 0.0, 2.0]]])
        x = torch.tensor([[-8.0, 0.0, 8.0]])
        assert dyrelu(x, theta).tolist() == [[-2.0, 2.0, 8.0]]
        assert dyrelu(x, theta, max_value=3.0).tolist() == [[-2.0, 2.0, 3.0]]
        assert dyrelu(x, theta, pi=torch.tensor([[0.5]])).tolist() == [[-1.0, 1.0, 4.0]]

    @pytest.mark.parametrize('choice', ['auto', 'reference'])
    def test_definition(self, choice):
        """With coefficients that channels share, and a weight of positions that samples share."""
        x, theta, pi = values(2, 3, 4, 5), values(2, 1, 6, seed=1), values(1, 1, 4, 5, seed=2).expand(2, 1, 4, 5)
        leaves = [t.requires_grad_() for t in (x, theta, pi.clone())]
        with use_backend(choice):
            y = dyrelu(*leaves, max_value=0.5)
            grads = torch.autograd.grad(y.sum(), leaves)
        expected = reference.dyrelu(*leaves, max_value=0.5)
        torch.testing.assert_close(y.double(), expected)
        for grad, expected_grad in zip(grads, torch.autograd.grad(expected.sum(), leaves), strict=True):
            torch.testing.assert_close(grad, expected_grad)

    def test_the_last_of_pieces_that_tie_has_the_gradient(self):
        x, theta = torch.ones(1, 1, 1), torch.tensor([[[1.0, 2.0, 0.5, 0.0, -1.0, 0.5]]]).requires_grad_()
        for function in (dyrelu, torch.compile(dyrelu, backend='aot_eager')):
            grad, = torch.autograd.grad(function(x, theta).sum(), theta)
            assert grad.tolist() == [[[0, 0, 1, 0, 0, 1]]]

    @pytest.mark.parametrize('theta', [(2, 8), (3, 8, 4), (2, 7, 4), (2, 8, 3), (2, 8, 0)], ids=str)
    def test_theta(self, theta):
        with pytest.raises(ValueError, match=r'theta must have shape \(N, C or 1, 2K\) with N=2, C=8'):
            dyrelu(torch.zeros(2, 8, 3, 3), torch.zeros(theta))

    def test_pi(self):
        with pytest.raises(ValueError, match=r'pi must have shape \(2, 1, 3, 3\), got \(2, 8, 3, 3\)'):
            dyrelu(torch.zeros(2, 8, 3, 3), torch.zeros(2, 8, 4), torch.zeros(2, 8, 3, 3))

    @pytest.mark.parametrize('theta, pi, max_value, error, match', [
        ([1.0], None, None, TypeError, 'theta must be a tensor, got list'),
        (torch.zeros(2, 8, 4).long(), None, None, TypeError, 'theta must have .* dtype, got torch.int64'),
        (torch.zeros(2, 8, 4, device='meta'), None, None, ValueError, 'theta must be on the device of x, cpu, got one'),
        (torch.zeros(2, 8, 4), 0.5, None, TypeError, 'pi must be a tensor, got float'),
        (torch.zeros(2, 8, 4), torch.ones(2, 1, 3, 3) > 0, None, TypeError, 'pi must have .* dtype, got torch.bool'),
        (torch.zeros(2, 8, 4), None, float('nan'), ValueError, 'max_value must be finite, got nan'),
        (torch.zeros(2, 8, 4), None, '6', TypeError, "max_value must be a number, got '6'"),
    ])
    def test_operands(self, theta, pi, max_value, error, match):
        with pytest.raises(error, match=match):
            dyrelu(torch.zeros(2, 8, 3, 3), theta, pi, max_value)

    @pytest.mark.parametrize('backend', ['auto', 'cpu', 'reference'])
    @pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize('k', [2, 3])
    def test_bound_out_of_reach(self, k, dtype, backend):
        x, theta = values(2, 3, 4, dtype=dtype), values(2, 3, 2 * k, dtype=dtype)
        with use_backend(backend):
            assert torch.equal(dyrelu(x, theta, max_value=1e39), dyrelu(x, theta))

    @pytest.mark.parametrize('backend', ['auto', 'cpu', 'reference'])
    def test_products_that_leave_the_fp16_range(self, backend):
        x, theta, pi = (torch.tensor(t, dtype=torch.float16) for t in ([[6e4]], [[[1.5, 0.0]]], [[0.5]]))
        with use_backend(backend):
            assert dyrelu(x, theta, pi).item() == torch.tensor(4.5e4).half()


def _apply(x, theta):
    return functional.dyrelu(x, theta) + 1


class TestFromTheInput:
    SETTINGS = DyReLUSettings([1.0, 0.0], [0.0, 0.1], 1.0, 0.5, 10.0, False, 2.0)

    @staticmethod
    def params(channels, hidden=2, spatial=True, dtype=torch.float32):
        shapes = (hidden, channels), (hidden,), (4 * channels, hidden), (4 * channels,), (1, channels), (1,)
        params = [values(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
        return DyReLUParams(*(params if spatial else [*params[:4], None, None]))

    @pytest.mark.parametrize('spatial', [False, True])
    def test_is_made_of_its_parts(self, spatial):
        x, params = values(2, 6, 4, 5, seed=9), self.params(6, spatial=spatial)
        theta = functional.coefficients(x, params, self.SETTINGS)
        pi = functional.attention(x, params, self.SETTINGS)
        assert theta.shape == (2, 6, 4) and (pi is None if not spatial else pi.shape == (2, 1, 4, 5))
        y = functional.dynamic_relu(x, params, self.SETTINGS)
        torch.testing.assert_close(y, dyrelu(x, theta, pi, self.SETTINGS.max_value))
        with use_backend('reference'):
            torch.testing.assert_close(functional.dynamic_relu(x, params, self.SETTINGS), y)

    @pytest.mark.parametrize('function', [functional.coefficients, functional.attention, functional.dynamic_relu])
    def test_checks(self, function):
        with pytest.raises(ValueError, match=r'x must have 6 channels \(dimension 1\), got 5'):
            function(values(2, 5, 3), self.params(6), self.SETTINGS)
        with pytest.raises(ValueError, match='x must have 2 to 5 dimensions, got 1'):
            function(values(6), self.params(6), self.SETTINGS)

    def test_parameters_are_those_of_the_module(self):
        module = DyReLU(8, 'c')
        assert tuple(dict(module.named_parameters())) == DyReLUParams._fields
        assert all(a is b for a, b in zip(module._params(), module.parameters(), strict=True))

    @pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
    def test_torchscript(self):
        x, params = values(2, 6, 4, 5, seed=9), self.params(6)
        for params in (self.params(6), self.params(6, spatial=False)):
            scripted = torch.jit.script(functional.dynamic_relu)
            torch.testing.assert_close(
                scripted(x, params, self.SETTINGS), functional.dynamic_relu(x, params, self.SETTINGS))
        theta = values(2, 6, 4)
        torch.testing.assert_close(torch.jit.script(_apply)(x, theta), _apply(x, theta))

    def test_fx_sees_one_function(self):
        traced = torch.fx.symbolic_trace(_apply)
        assert [node.target for node in traced.graph.nodes if node.op == 'call_function'][0] is functional.dyrelu
        module = torch.fx.symbolic_trace(torch.nn.Sequential(DyReLU(6, 'c')))
        assert functional.dynamic_relu in [node.target for node in module.graph.nodes]
        x = values(2, 6, 4)
        assert torch.equal(pickle.loads(pickle.dumps(module))(x), x.relu())

    def test_compile_without_graph_break(self):
        x, params = values(2, 6, 4, 5, seed=9), self.params(6)
        compiled = torch.compile(functional.dynamic_relu, backend='aot_eager', fullgraph=True)
        torch.testing.assert_close(
            compiled(x, params, self.SETTINGS), functional.dynamic_relu(x, params, self.SETTINGS))
