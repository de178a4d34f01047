"""Dynamic ReLU as a literal transcription of its definition, as in research code, for benchmarks to compare with."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ['literal_dyrelu']


def literal_dyrelu(module: nn.Module, x: Tensor) -> Tensor:
    """Compute the K functions of each element along a dimension of their own, and take their maximum.

    Args:
        module: The ``layers.DyReLU`` whose parameters are used.
        x: Input of shape (N, C, H, W).
    """
    mean = x.mean((2, 3), dtype=torch.float32)
    z = F.linear(F.relu(F.linear(mean, module.fc1_weight, module.fc1_bias)), module.fc2_weight, module.fc2_bias)
    start = torch.tensor([module.alpha, module.beta], device=x.device)
    scale = torch.tensor([[module.lambda_a], [module.lambda_b]], device=x.device)
    theta = start + scale * (2 * torch.sigmoid(z) - 1).reshape(len(x), -1, 2, module.k)
    slopes, intercepts = theta.to(x.dtype)[:, :, None, None].unbind(4)
    y = (x.unsqueeze(-1) * slopes + intercepts).amax(-1)
    if module.mode == 'c':
        logits = F.conv2d(x, module.spatial_weight[..., None, None].to(x.dtype), module.spatial_bias.to(x.dtype))
        share = torch.softmax(logits.flatten(1) / module.tau, 1).reshape(logits.shape)
        y = y * (share * share[0].numel()).clamp(max=3)
    return y
