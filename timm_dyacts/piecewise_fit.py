"""The start of a Dynamic ReLU that replaces a smooth activation: the piecewise linear function nearest to it."""
from functools import cache

import torch
from torch import Tensor, nn

__all__ = ['fit_pieces']


def fit_pieces(activation: nn.Module, k: int = 2) -> tuple[list[float], list[float]]:
    """Fit ``max_k(a_k x + b_k)`` to an elementwise activation, in the mean square over standard normal inputs.

    Standard normal is what a BatchNorm at its start hands to the activation.

    Args:
        activation: The activation, without parameters of its own.
        k: Number of pieces.

    Returns:
        The slopes, largest first, and the intercepts.

    Raises:
        ValueError: If ``k`` is less than 1.
    """
    if k < 1:
        raise ValueError(f'k must be at least 1, got {k}')
    x = torch.linspace(-5, 5, 2001, dtype=torch.float64)
    with torch.no_grad():
        y = activation(x.clone())
    slopes, intercepts = _fit(tuple(y.tolist()), k)
    return list(slopes), list(intercepts)


@cache
def _fit(values: tuple[float, ...], k: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    x = torch.linspace(-5, 5, len(values), dtype=torch.float64)
    y = torch.tensor(values, dtype=torch.float64)
    weight = torch.exp(-x ** 2 / 2)
    weight /= weight.sum()

    # Start from chords between quantiles of the inputs, which is near enough for a smooth optimiser.
    knots = torch.linspace(-2, 2, k + 1, dtype=torch.float64)
    at = y[((knots + 5) / 10 * (len(values) - 1)).round().long()]
    slopes = ((at[1:] - at[:-1]) / (knots[1:] - knots[:-1])).requires_grad_()
    intercepts = (at[:-1] - slopes.detach() * knots[:-1]).requires_grad_()
    optimizer = torch.optim.LBFGS([slopes, intercepts], max_iter=200, line_search_fn='strong_wolfe')

    def loss() -> Tensor:
        optimizer.zero_grad()
        error = (slopes[:, None] * x + intercepts[:, None]).amax(0) - y
        value = (weight * error ** 2).sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    order = slopes.detach().argsort(descending=True)
    return tuple(slopes.detach()[order].tolist()), tuple(intercepts.detach()[order].tolist())
