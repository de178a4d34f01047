"""Dynamic ReLU in plain operations, which autograd, TorchScript, ``torch.compile`` and export understand."""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autocast import without_autocast
from ..checks import reachable_bound
from .settings import DyReLUParams, DyReLUSettings

__all__ = [
    'attention_reference',
    'coefficients_reference',
    'dynamic_relu_reference',
    'dyrelu_reference',
    'hyper_reference',
    'static_coefficients_reference',
    'statistics_reference',
]


def dyrelu_reference(x: Tensor, theta: Tensor, pi: Tensor | None, max_value: float | None) -> Tensor:
    """Compute what ``functional.dyrelu`` does."""
    k = theta.shape[2] // 2
    theta = theta.to(torch.promote_types(theta.dtype, torch.float32))  # products leave the fp16 range
    shape = [theta.shape[0], theta.shape[1]] + [1] * (x.dim() - 2)
    coefs = [coef.reshape(shape) for coef in theta.unbind(2)]
    # Products and sums, as in the kernels for CPUs: the results are the same to the last bit.
    y = x * coefs[0] + coefs[k]
    for i in range(1, k):
        piece = x * coefs[i] + coefs[k + i]
        if not torch.jit.is_scripting() and torch.compiler.is_compiling() and not torch.is_grad_enabled():
            y = torch.maximum(y, piece)
        else:
            # The same in two passes more, but pieces that tie do not share the gradient.
            y = torch.where((y > piece) | (y != y), y, piece)
    if not torch.jit.is_scripting():
        max_value = reachable_bound(max_value, y.dtype)
    if max_value is not None:
        # The function that ReLU6 calls, so that the gradient at the bound itself is the same too.
        y = F.hardtanh(y, -math.inf, max_value)
    if pi is not None:
        y = y * pi
    return y.to(x.dtype)


def dynamic_relu_reference(x: Tensor, params: DyReLUParams, settings: DyReLUSettings) -> Tensor:
    """Compute what ``functional.dynamic_relu`` does."""
    mean, logits = statistics_reference(x, params.spatial_weight)
    theta = coefficients_reference(mean, params, settings)
    pi: Tensor | None = None
    spatial_bias = params.spatial_bias
    if logits is not None and spatial_bias is not None:
        pi = attention_reference(logits, spatial_bias, settings)
    return dyrelu_reference(x, theta, pi, settings.max_value)


def statistics_reference(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Reduce the input to what coefficients and attention are computed from.

    Returns:
        The mean of each plane, (N, C), and, given a spatial weight of shape (1, C), the product of that and ``x``, of
        shape (N, 1, *spatial). In fp32 for half-precision inputs.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean = x.unsqueeze(-1).flatten(2).mean(2, dtype=dtype)
    logits: Tensor | None = None
    if weight is not None:
        # Product and sum, not a convolution: autograd keeps x in its own dtype, autocast and TF32 keep out, and
        # torch.compile makes one pass of it.
        product = x * weight.to(dtype).reshape([1, weight.shape[1]] + [1] * (x.dim() - 2))
        logits = product.sum(1, keepdim=True)
    return mean, logits


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply a linear layer in the dtype of ``x``, under autocast too: a sum over channels easily leaves the fp16 range.

    Scripted modules are the exception, as TorchScript applies autocast itself.
    """
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if not torch.jit.is_scripting():
        return without_autocast(F.linear, x, weight, bias)
    return F.linear(x, weight, bias)


def coefficients_reference(mean: Tensor, params: DyReLUParams, settings: DyReLUSettings) -> Tensor:
    """Compute the coefficients, (N, C or 1, 2K), from the means, (N, C)."""
    return _bounded_coefficients(hyper_reference(mean, params), settings)


def hyper_reference(mean: Tensor, params: DyReLUParams) -> Tensor:
    """Compute the outputs of the hyper function, (N, 2KC or 2K), from the means, (N, C)."""
    hidden = _linear(mean, params.fc1_weight, params.fc1_bias).relu()
    return _linear(hidden, params.fc2_weight, params.fc2_bias)


def static_coefficients_reference(bias: Tensor, settings: DyReLUSettings) -> Tensor:
    """Compute the coefficients, (1, C, 2K), that a bias of shape (2KC,) alone gives, in at least fp32."""
    return _bounded_coefficients(bias.to(torch.promote_types(bias.dtype, torch.float32)).unsqueeze(0), settings)


def _bounded_coefficients(z: Tensor, settings: DyReLUSettings) -> Tensor:
    """Compute the coefficients from the output of the hyper function, (N, 2KC or 2K)."""
    k = len(settings.alpha)
    # 2 * sigmoid(z) - 1 = tanh(z / 2)
    residuals = torch.tanh(z / 2).reshape(z.shape[0], z.shape[1] // (2 * k), 2 * k).unbind(2)
    # The constants enter as scalars: a tensor made of them here would be a synchronising copy to the device.
    slopes = [settings.alpha[i] + settings.lambda_a * residuals[i] for i in range(k)]
    intercepts = [settings.beta[i] + settings.lambda_b * residuals[k + i] for i in range(k)]
    # In memory the channels are last, for kernels that read those of many at once.
    return torch.stack(slopes + intercepts, 1).transpose(1, 2)


def attention_reference(logits: Tensor, bias: Tensor, settings: DyReLUSettings) -> Tensor:
    """Compute the attention of mode "c" from its logits without bias, both of shape (N, 1, *spatial)."""
    z = (logits + bias.to(logits.dtype)).flatten(1) / settings.tau
    # exp / mean(exp) is HW * softmax, and exactly 1 where the attention is uniform.
    e = torch.exp(z - z.detach().amax(1, keepdim=True))
    pi = torch.clamp(e / e.mean(1, keepdim=True), max=3.0)
    if settings.paper_scale:
        pi = pi / 3
    return pi.reshape(logits.shape)
