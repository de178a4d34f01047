"""The signs of layers and norms: what leaves the network's function as it is once their weights have taken them in.

With signs ``s_in`` at its input and ``s_out`` at its output a weight becomes ``s_out * W * s_in``, a bias ``s_out * b``
and a running mean ``s_in * m``.
"""
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..trace import Op, bases_of_views
from .rules import SHAPE_ONLY, Rule, constant, keep_sign, move
from .tensors import TensorSigns, narrow
from .unknowns import ANY, PLUS

__all__ = ['LAYER_RULES', 'SOURCE_RULES', 'NetworkSigns']


class Layer(NamedTuple):
    """A convolution or linear layer, and the unknowns of its channels on both sides."""
    weight: Tensor
    bias: Tensor | None
    ins: Tensor
    outs: Tensor
    groups: int
    transposed: bool

    def weight_factor(self, ins: Tensor, outs: Tensor) -> Tensor:
        """Give the signs of the weight, (out, in / groups, ...), or (in, out / groups, ...) if transposed.

        They are broadcastable to that, and not written out where they are the same along a dimension.
        """
        rows, cols = (ins, outs) if self.transposed else (outs, ins)
        ones = [1] * (self.weight.ndim - 1)
        if bool((cols == 1).all()):
            return rows.view(-1, *ones)
        if self.groups == 1 and bool((rows == 1).all()):
            return cols.view(1, -1, *ones[1:])
        factor = (rows.view(self.groups, -1, 1) * cols.view(self.groups, 1, -1)).flatten(0, 1)
        return factor.view(*factor.shape, *ones[1:])


class Norm(NamedTuple):
    """A normalisation, and the unknowns of its channels on both sides."""
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    ins: Tensor
    outs: Tensor


class NetworkSigns(TensorSigns):
    """The unknowns of all tensors of a network, and of the layers and norms that can take signs in.

    Args:
        ops: The operators of a forward pass.
        parameters: The tensors that may be changed, by ``id``.
        inputs: The tensors that the network was given.

    Attributes:
        layers: The layers found so far, by the ``id`` of their weight.
        norms: The norms found so far, by the ``id`` of one of their tensors.
        free: Further parameters, each with its unknowns, broadcastable.
        weight_views: The weights of linear layers, by the ``id`` of what was read of them transposed.
    """

    def __init__(
            self,
            ops: Sequence[Op],
            parameters: Mapping[int, Tensor],
            inputs: Iterable[Tensor] = (),
    ) -> None:
        super().__init__()
        inputs = list(inputs)
        self.computed.update(id(t) for t in inputs)
        self.computed.update(id(t) for op in ops for t in op.outputs)
        self.computed.update(parameters)
        self.bases.update(bases_of_views(ops))
        self.dependent.update(id(t) for t in inputs)
        for op in ops:
            if op.name not in SHAPE_ONLY and any(self.base(t) in self.dependent for t in op.inputs):
                self.dependent.update(self.base(t) for t in op.outputs)
        self.layers: dict[int, Layer] = {}
        self.norms: dict[int, Norm] = {}
        self.free: list[tuple[Tensor, Tensor]] = []
        self.weight_views: dict[int, Tensor] = {}
        private = _private_parameters(ops, parameters)
        self._rewritable = {key for key, is_private in private.items() if is_private}
        # What is read by other operators than layers and norms is a tensor like any other: a sign for each row.
        for key, is_private in private.items():
            tensor = parameters[key]
            if not is_private and tensor.is_floating_point() and tensor.numel() and tensor.ndim > 0:
                rows = self.unknowns.new(tensor.shape[0]).view([-1] + [1] * (tensor.ndim - 1))
                self.ids[key] = rows.expand(tensor.shape)
                self.free.append((tensor, rows))

    def can_rewrite(self, *tensors: Tensor | None) -> bool:
        """Whether tensors, those that are there, are parameters that nothing but layers and norms reads."""
        return all(tensor is None or id(tensor) in self._rewritable for tensor in tensors)

    def forget_zeros(self, written: Tensor) -> None:
        """Note that a tensor is written to: it and what shares its memory may hold something else than zeros now."""
        base = self.base(written)
        for key, ids in self.ids.items():
            if self.bases.get(key, key) == base:
                self.ids[key] = torch.where(narrow(ids) == ANY, PLUS, narrow(ids)).expand(ids.shape)

    def pass_through_norms(self) -> None:
        """Let norms pass signs on where they can, so that their scales stay as they are; elsewhere these take them."""
        for norm in self.norms.values():
            is_open = norm.ins != ANY
            self.unknowns.tie(norm.ins[is_open], norm.outs[is_open], skip_opposites=True)

    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """Give each parameter or buffer that changes, with the +-1 tensor that it is multiplied by (broadcastable)."""
        signs = self.unknowns.signs
        found: list[tuple[Tensor | None, Tensor]] = []
        for layer in self.layers.values():
            ins, outs = signs(layer.ins), signs(layer.outs)
            found += [(layer.weight, layer.weight_factor(ins, outs)), (layer.bias, outs)]
        found += [(tensor, signs(ids)) for tensor, ids in self.free]
        for norm in self.norms.values():
            ins, outs = signs(norm.ins), signs(norm.outs)
            found += [(norm.weight, ins * outs), (norm.bias, outs), (norm.mean, ins)]
        changed = {id(t): (t, factor) for t, factor in found if t is not None and bool((factor != 1).any())}
        return list(changed.values())


def convolution(signs: NetworkSigns, op: Op) -> None:
    """A convolution: free to have other signs at its output than at its input."""
    x, weight, bias = op.args[:3]
    _layer(signs, op, x, weight, bias, 1, op.args[8], op.args[6])


def linear(signs: NetworkSigns, op: Op) -> None:
    """A linear layer, as a convolution."""
    bias, x, weight = (op.args if op.name == 'addmm' else (None, *op.args))[:3]
    if op.name == 'linear':
        bias = op.args[2] if len(op.args) > 2 else None
    _layer(signs, op, x, signs.weight_views.get(id(weight), weight), bias, -1, 1, False)


def _layer(
        signs: NetworkSigns,
        op: Op,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dim: int,
        groups: int,
        transposed: bool,
) -> None:
    if not signs.can_rewrite(weight, bias):
        if transposed or op.name in ('addmm', 'mm'):
            return keep_sign(signs, op)
        return _computed_layer(signs, op, x, weight, bias, dim)
    ins = signs.channels(x, dim)
    layer = signs.layers.get(id(weight))
    if layer is None:
        layer = Layer(weight, bias, ins, signs.unknowns.new(op.out.shape[dim]), groups, transposed)
        signs.layers[id(weight)] = layer
    else:
        signs.tie(layer.ins, ins, 'the layer is shared by inputs of different signs')
    signs.set_channels(op.out, layer.outs, dim)


def _computed_layer(signs: NetworkSigns, op: Op, x: Tensor, weight: Tensor, bias: Tensor | None, dim: int) -> None:
    """A layer whose weight is computed, or read elsewhere too: only its rows, the output channels, have signs."""
    if not signs.has(weight) or weight.ndim < 2:
        return keep_sign(signs, op)
    outs = signs.channels(weight, 0)
    if bias is not None:
        if signs.has(bias):
            signs.tie(outs, signs.channels(bias, 0), 'a bias has other signs than its layer')
        elif signs.can_rewrite(bias):
            signs.free.append((bias, outs))
        else:
            return keep_sign(signs, op)
    signs.tie_to_plus(x, f'the computed weight of {op.name} needs its input unchanged')
    signs.set_channels(op.out, outs, dim)


def batch_norm(signs: NetworkSigns, op: Op) -> None:
    """BatchNorm: statistics of each channel by itself, so its mean, scale and shift can take signs in."""
    x, weight, bias, mean = op.args[:4]
    if weight is not None and bias is None and not signs.can_rewrite(weight):  # computed: it scales, no more
        signs.tie(signs.get(weight), torch.tensor(PLUS), 'the scale of a norm changes its sign')
        return signs.set_channels(op.outputs[0], signs.channels(x, 1), 1)
    if not signs.can_rewrite(weight, bias):
        return keep_sign(signs, op)
    ins = signs.channels(x, 1)
    key = next((id(t) for t in (mean, weight, bias) if t is not None), id(op))
    norm = signs.norms.get(key)
    if norm is None:
        outs = ins if weight is None else signs.unknowns.new(len(ins))
        norm = signs.norms[key] = Norm(weight, bias, mean, ins, outs)
    else:
        signs.tie(norm.ins, ins, 'the norm is shared by inputs of different signs')
    signs.set_channels(op.outputs[0], norm.outs, 1)


def mixing_norm(signs: NetworkSigns, op: Op) -> None:
    """Statistics over several channels need the signs as they are; scale and shift can give new ones."""
    is_layer_norm = op.name == 'native_layer_norm'
    weight, bias = op.args[2:4] if is_layer_norm else op.args[1:3]
    keep_sign(signs, op)
    if weight is None or weight.ndim > 1 or not signs.can_rewrite(weight, bias):
        return
    norm = signs.norms.get(id(weight))
    if norm is None:
        ins = torch.full((len(weight),), PLUS)
        norm = signs.norms[id(weight)] = Norm(weight, bias, None, ins, signs.unknowns.new(len(weight)))
    signs.set_channels(op.outputs[0], norm.outs, -1 if is_layer_norm else 1)


def transpose(signs: NetworkSigns, op: Op) -> None:
    """Of the weight of a linear layer a view for the multiplication; of anything else a move of elements."""
    source, = op.args
    if signs.can_rewrite(source):
        signs.weight_views[id(op.out)] = source
    elif signs.has(source):
        move(signs, op)
    else:
        signs.forget(op.out)


LAYER_RULES: dict[str, Rule] = {
    'convolution': convolution,
    '_convolution': convolution,
    'addmm': linear,
    'linear': linear,
    'mm': linear,
    '_native_batch_norm_legit_no_training': batch_norm,
    'cudnn_batch_norm': batch_norm,
    'native_batch_norm': batch_norm,
    'native_group_norm': mixing_norm,
    'native_layer_norm': mixing_norm,
}
# The rules of operators that give signs, or weights that can take them, also where no input has any
SOURCE_RULES: dict[str, Rule] = {**LAYER_RULES, **dict.fromkeys(SHAPE_ONLY, constant), 't': transpose}


def _private_parameters(ops: Iterable[Op], parameters: Mapping[int, Tensor]) -> dict[int, bool]:
    """Tell of the parameters that are read, by ``id``, whether only layers and norms read them."""
    private: dict[int, bool] = {}
    views: dict[int, int] = {}
    for op in ops:
        if op.name in SHAPE_ONLY:
            continue
        is_layer = op.name in LAYER_RULES
        for position, tensor in enumerate(op.args if is_layer else op.inputs):
            key = views.get(id(tensor), id(tensor))
            if key not in parameters:
                continue
            if op.name == 't':
                views[id(op.out)] = key
                private.setdefault(key, True)
            else:
                is_input = position == (1 if op.name == 'addmm' else 0)
                private[key] = private.get(key, True) and is_layer and not is_input
    return private
