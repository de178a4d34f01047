"""BatchNorm, folded into the layer before it."""
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import ChannelAffine
from .arguments import Request
from .step import Step

__all__ = ['fold_norms']


def fold_norms(step: Step, request: Request) -> None:
    """Fold each BatchNorm into the layer before it; where there is none, into a scale and shift of its own.

    Args:
        step: The step to take.
        request: Not read: there is nothing to choose.
    """
    alone = 0
    for norm in step.find(lambda module: isinstance(module, _BatchNorm)):
        if not norm.track_running_stats:
            step.skip(norm, 'keeps no running statistics')
            continue
        layer = _layer_before(step, norm)
        alone += layer is None
        _fold(step, layer, norm)
    if alone:
        step.report.notes.append(
            f'{alone} norms follow no layer that could take them in: what is left of them is a scale and shift')


def _layer_before(step: Step, norm: _BatchNorm) -> nn.Module | None:
    """The convolution or linear layer whose output goes into the norm and nowhere else."""
    trace = step.trace
    if len(trace.calls_of(norm)) > 1:
        return None
    call, = trace.calls_of(norm)
    tensor, index = call.input, call.start
    while True:
        index = trace.find_producer(tensor, index)
        if index is None or trace.uses[id(tensor)] != 1:
            return None
        op = trace.ops[index]
        if op.name not in ('view', '_unsafe_view', 'reshape'):
            break
        tensor = op.args[0]
    layer = trace.layer_of(op)
    if layer is None or getattr(layer, 'transposed', False) or trace.uses[id(layer.weight)] != 1:
        return None
    channels = op.outputs[0].shape[1 if op.name == 'convolution' else -1]
    return layer if channels == norm.num_features else None


@torch.no_grad()
def _fold(step: Step, layer: nn.Module | None, norm: _BatchNorm) -> None:
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()

    # timm's norms with a built-in activation keep that
    rest = [m for m in (getattr(norm, 'drop', None), getattr(norm, 'act', None))
            if m is not None and not isinstance(m, nn.Identity)]
    if layer is None:
        like = norm.running_mean
        affine = ChannelAffine(norm.num_features, device=like.device, dtype=like.dtype)
        affine.weight.copy_(scale)
        affine.bias.copy_(shift)
        affine.requires_grad_(norm.weight is None or norm.weight.requires_grad)
        rest.insert(0, affine)
    else:
        weight, bias = layer.weight, layer.bias
        if bias is not None:
            shift = shift + bias.double() * scale
        folded = weight.double() * scale.view(-1, *[1] * (weight.ndim - 1))
        for name, value in (('weight', folded), ('bias', shift)):
            parameter = nn.Parameter(value.to(weight.dtype), requires_grad=weight.requires_grad)
            step.edits.set_attribute(layer, name, parameter)
    step.replace(norm, nn.Identity() if not rest else rest[0] if len(rest) == 1 else nn.Sequential(*rest), True)
