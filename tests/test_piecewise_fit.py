"""Piecewise linear starts for Dynamic ReLU."""
import pytest
import torch
from support.trained_like import max_diff, output, probe, trained_like
from torch import nn

from timm_dyacts import DyReLU, convert
from timm_dyacts.piecewise_fit import fit_pieces


def error(activation, slopes, intercepts):
    """Root mean square over standard normal inputs, by sampling."""
    x = torch.randn(200_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = (x * torch.tensor(slopes) + torch.tensor(intercepts)).amax(1)
    return (y - activation(x[:, 0])).square().mean().sqrt().item()


@pytest.mark.parametrize('activation', [nn.SiLU(), nn.GELU(), nn.Hardswish(), nn.ELU(), nn.Mish()])
def test_more_pieces_come_nearer_and_relu_is_beaten(activation):
    errors = [error(activation, *fit_pieces(activation, k)) for k in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[1] < error(activation, [1.0, 0.0], [0.0, 0.0])


def test_what_is_piecewise_linear_is_found():
    for activation, slopes in ((nn.ReLU(), [1, 0]), (nn.LeakyReLU(0.3), [1, 0.3])):
        found, intercepts = fit_pieces(activation)
        torch.testing.assert_close(torch.tensor(found), torch.tensor(slopes, dtype=torch.float32), atol=2e-3, rtol=0)
        assert max(map(abs, intercepts)) < 2e-3


def test_no_small_change_is_an_improvement():
    slopes, intercepts = fit_pieces(nn.SiLU(), 3)
    best = error(nn.SiLU(), slopes, intercepts)
    for i in range(3):
        for step in (-0.03, 0.03):
            moved = [a + step * (i == j) for j, a in enumerate(slopes)]
            assert error(nn.SiLU(), moved, intercepts) > best


def test_a_changed_result_changes_no_other():
    slopes, intercepts = fit_pieces(nn.SiLU())
    expected = list(slopes), list(intercepts)
    slopes[0], intercepts[1] = 7.0, 7.0
    assert fit_pieces(nn.SiLU()) == expected


def test_it_starts_the_dynamic_relus_of_a_model():
    model = trained_like('efficientnet_b0')
    expected = output(model, probe())
    moved = {}
    for name, options in dict(relu={}, fit=dict(start='fit'), fit3=dict(start='fit', act_kwargs=dict(k=3))).items():
        converted = convert(trained_like('efficientnet_b0'), act='dyrelu_b', **options)
        assert converted.conversion.function == 'approximate'
        moved[name] = max_diff(output(converted, probe()), expected)
    assert moved['fit3'] < moved['fit'] < moved['relu']
    assert {m.k for m in converted.modules() if isinstance(m, DyReLU)} == {3}


def test_exact_starts_stay_exact():
    assert convert(trained_like('resnet18'), act='dyrelu_b', start='fit').conversion.max_diff == 0


def test_bad_input():
    with pytest.raises(ValueError, match='k must be at least 1, got 0'):
        fit_pieces(nn.SiLU(), 0)
    with pytest.raises(ValueError, match="start must be one of 'relu', 'fit', got 'silu'"):
        convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU()), act='dyrelu_b', start='silu')
