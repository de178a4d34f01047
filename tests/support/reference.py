"""The operators written out from their definitions: float64, one element, window or channel at a time, no tricks.

Everything is made of differentiable operations, so gradients can be compared as well as values.
"""
import itertools

import torch
import torch.nn.functional as F


def _max_pool(x, *window):
    """Max pooling in as many dimensions as `x` of shape (N, C, *spatial) has."""
    return (F.max_pool1d, F.max_pool2d, F.max_pool3d)[x.dim() - 3](x, *window)


def dyrelu(x, theta, pi=None, max_value=None):
    """``pi * min(max_k(a_k * x + b_k), max_value)``, the pieces stacked along a last dimension."""
    k = theta.shape[2] // 2
    n, c = x.shape[:2]
    theta = theta.double().expand(n, c, 2 * k).reshape(n, c, *[1] * (x.dim() - 2), 2 * k)
    y = (x.double().unsqueeze(-1) * theta[..., :k] + theta[..., k:]).amax(-1)
    if max_value is not None:
        y = torch.minimum(y, torch.full_like(y, max_value))
    return y if pi is None else y * pi.double()


def dyrelu_coefficients(module, x):
    """``(alpha, beta) + (lambda_a, lambda_b) * (2 * sigmoid(fc2(relu(fc1(mean(x))))) - 1)`` of a DyReLU module."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = (
        getattr(module, name).double() for name in ('fc1_weight', 'fc1_bias', 'fc2_weight', 'fc2_bias')
    )
    mean = x.double()[..., None].flatten(2).mean(2)
    hidden = torch.relu(mean @ fc1_weight.T + fc1_bias)
    residual = 2 * torch.sigmoid(hidden @ fc2_weight.T + fc2_bias) - 1
    residual = residual.unflatten(1, (-1, 2, module.k))
    start = torch.tensor([module.alpha, module.beta], dtype=torch.float64)
    scale = torch.tensor([[module.lambda_a], [module.lambda_b]], dtype=torch.float64)
    return (start + scale * residual).flatten(2)


def dyrelu_attention(module, x):
    """``min(HW * softmax(conv1x1(x) / tau), 3)`` of a DyReLU-C module, or the paper's ``min(HW / 3 * softmax, 1)``."""
    rows = x.double()[..., None].flatten(2)
    logits = (module.spatial_weight.double() @ rows).squeeze(1) + module.spatial_bias.double()
    share = torch.softmax(logits / module.tau, 1)
    positions = rows.shape[2]
    pi = (positions / 3 * share).clamp(max=1) if module.paper_scale else (positions * share).clamp(max=3)
    return pi.reshape(x.shape[0], 1, *x.shape[2:])


def dyrelu_module(module, x):
    """The output of a DyReLU module."""
    pi = dyrelu_attention(module, x) if module.mode == 'c' else None
    return dyrelu(x, dyrelu_coefficients(module, x), pi, module.max_value)


def _windows(x, kernel_size, stride, padding, dilation, ceil_mode):
    """Yields the elements of each window of `x`, shape (N, C, *spatial), as a tensor of shape (N, C, elements)."""
    spatial = x.shape[2:]
    out = _max_pool(x.detach(), kernel_size, stride, padding, dilation, ceil_mode).shape[2:]
    for window in itertools.product(*map(range, out)):
        indices = []
        for w, size, k, s, p, d in zip(window, spatial, kernel_size, stride, padding, dilation, strict=True):
            positions = [w * s - p + offset * d for offset in range(k)]
            indices.append([position for position in positions if 0 <= position < size])
        yield torch.stack([x[(slice(None), slice(None), *index)] for index in itertools.product(*indices)], 2)


def softpool(x, kernel_size, stride, padding, dilation, ceil_mode=False, beta=1.0, detach_weights=False):
    """``sum_i softmax(beta * x)_i * x_i`` over the elements of each window that are not padding.

    Relative to the element that has the largest weight, or the gradient would be a difference of large numbers.
    """
    x = x.double()
    pooled = []
    for elements in _windows(x, kernel_size, stride, padding, dilation, ceil_mode):
        top = (elements.amin if beta < 0 else elements.amax)(2, keepdim=True).detach()
        weights = torch.softmax(beta * (elements - top), 2)
        if detach_weights:
            weights = weights.detach()
        pooled.append((top + (weights * (elements - top)).sum(2, keepdim=True)).squeeze(2))
    shape = _max_pool(x.detach(), kernel_size, stride, padding, dilation, ceil_mode).shape
    return torch.stack(pooled, 2).reshape(shape)


def bipolar(x, f, layout='interleaved'):
    """``f(x)`` on the positive channels, ``-f(-x)`` on the negative ones."""
    channels = x.shape[1]
    if layout == 'interleaved':
        positive = [c % 2 == 0 for c in range(channels)]
    else:
        positive = [c < channels / 2 for c in range(channels)]
    return torch.stack([f(x[:, c]) if positive[c] else -f(-x[:, c]) for c in range(channels)], 1)
