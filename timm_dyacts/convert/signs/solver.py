"""The sign flip that turns a network of plain activations into a network of bipolar ones, and back.

A bipolar activation obeys `f_B(s * x) = s * f(x)` with `s_c = (-1)^c`. So if the tensors of a network are rewritten as
`s * x`, one sign per channel, every plain activation must become its bipolar form, every weight `s_out * W * s_in`, and
the network computes the same function to the last bit. This module finds the signs. Every channel of every tensor is an
unknown; activations and max pools fix some of them, additions and concatenations tie some together, convolutions and
linear layers leave both of their sides free. The unknowns of a whole network are solved as one system, on the
record of a forward pass (see ``trace``), so it does not matter how a model was written.

An operator that is not known to commute with signs gets the one answer that is always right: its inputs keep
the sign `+1`. What cannot be solved is therefore reported as a conflict; it is never solved wrongly.
"""
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..trace import Call, Op, Trace

__all__ = ['SignConflict', 'SignFlip', 'solve_signs']

_PLUS = 1  # the unknown that is known to be +1
_ANY = 0  # a zero: it has every sign
_STRIDE = 2 ** 31

# f(-x) = -f(x), element by element
_ODD = frozenset({
    'alias', 'asinh', 'atan', 'clone', 'contiguous', 'detach', 'dropout', 'erf', 'lift_fresh', 'native_dropout', 'neg',
    'round', 'sgn', 'sign', 'sin', 'sinh', 'tan', 'tanh', 'trunc', '_to_copy',
})
# Of magnitudes only
_EVEN = frozenset({'abs', 'linalg_vector_norm', 'square'})
# Moves elements and computes nothing.
_MOVES = frozenset({
    '_reshape_alias', '_unsafe_view', 'cat', 'channel_shuffle', 'expand', 'flip', 'index', 'index_select', 'movedim',
    'narrow', 'native_channel_shuffle', 'permute', 'pixel_shuffle', 'pixel_unshuffle', 'repeat', 'reshape', 'roll',
    'select', 'slice', 'split', 'split_with_sizes', 'squeeze', 'stack', 't', 'transpose', 'unbind', 'unsqueeze', 'view',
})
_ZEROS = frozenset({'new_zeros', 'zeros', 'zeros_like'})
# Linear, within each plane of (N, C, *spatial).
_PLANE_LINEAR = frozenset({
    '_adaptive_avg_pool2d', '_adaptive_avg_pool3d', 'adaptive_avg_pool1d', 'avg_pool1d', 'avg_pool2d', 'avg_pool3d',
    'reflection_pad2d', 'replication_pad2d', 'upsample_bicubic2d', 'upsample_bilinear2d', 'upsample_nearest2d',
    '_upsample_nearest_exact2d', '_upsample_bilinear2d_aa', '_upsample_bicubic2d_aa',
})


class SignConflict(ValueError):
    """No assignment of signs keeps the network's function.

    Attributes:
        module: Path of the module where the signs contradict each other.
    """

    def __init__(self, module: str, reason: str):
        super().__init__(f"'{module or 'the model'}': {reason}")
        self.module = module


class _Contradiction(Exception):
    pass


class SignFlip(NamedTuple):
    """A solution.

    Attributes:
        factors: Each parameter or buffer that changes, with the +-1 tensor that it is multiplied by (broadcastable).
        pools: The +-1 vectors of channel signs at the input and the output of each call of a pool.
        output: The +-1 tensor that the model's output is multiplied by, ``None`` where the output does not change.
    """
    factors: list[tuple[torch.Tensor, torch.Tensor]]
    pools: list[tuple[Call, torch.Tensor, torch.Tensor]]
    output: torch.Tensor | None

    @torch.no_grad()
    def apply_(self) -> None:
        """Multiply the factors in. Doing it twice restores the network bit for bit."""
        for tensor, factor in self.factors:
            tensor.mul_(factor.to(device=tensor.device, dtype=tensor.dtype))


class _Unknowns:
    """Signs as a union-find with parity. Unknown ``-i`` is the opposite of unknown ``i``."""

    def __init__(self):
        self.parent = [0, 1]
        self.parity = [1, 1]

    def new(self, count: int) -> torch.Tensor:
        first = len(self.parent)
        self.parent.extend(range(first, first + count))
        self.parity.extend([1] * count)
        return torch.arange(first, first + count)

    def find(self, i: int) -> tuple[int, int]:
        sign, i, path = (1 if i > 0 else -1), abs(i), []
        while self.parent[i] != i:
            path.append(i)
            i = self.parent[i]
        parity = 1
        for node in reversed(path):  # compress
            parity *= self.parity[node]
            self.parent[node], self.parity[node] = i, parity
        return i, sign * parity

    def tie(self, a: int, b: int) -> bool:
        """Make `a = b`. False if they are already known to be opposite."""
        (a, sign_a), (b, sign_b) = self.find(a), self.find(b)
        if a == b:
            return sign_a == sign_b
        if b == _PLUS:  # keep the known sign at the root
            a, b = b, a
        self.parent[b], self.parity[b] = a, sign_a * sign_b
        return True

    def signs(self, ids: torch.Tensor) -> torch.Tensor:
        """The solved signs. An unknown that nothing fixes is +1."""
        flat = [1 if i == _ANY else self.find(i)[1] for i in ids.flatten().tolist()]
        return torch.tensor(flat, dtype=torch.int8).view(ids.shape)


class _Layer(NamedTuple):
    """A convolution or linear layer: its sign vectors on both sides."""
    weight: torch.Tensor
    bias: torch.Tensor | None
    ins: torch.Tensor
    outs: torch.Tensor
    groups: int
    transposed: bool


class _Norm(NamedTuple):
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    mean: torch.Tensor | None
    ins: torch.Tensor
    outs: torch.Tensor


def solve_signs(
        trace: Trace,
        anchors: Sequence[tuple[Call, torch.Tensor]],
        pools: Sequence[Call],
        parameters: dict[int, torch.Tensor],
) -> SignFlip:
    """Find the signs under which the anchored calls see and give their wanted pattern and the output is unchanged.

    Args:
        trace: Record of a forward pass.
        anchors: Activation calls that will commute with a channel sign, each with the ``(C,)`` vector of +-1 by
            which its input (and so its output) is to be multiplied.
        pools: Calls of max pools, and of other modules that can be given a bipolar form after the signs are known.
            They are seen as one operator that keeps the signs of its channels.
        parameters: The tensors that may be changed (parameters and buffers), by ``id``.

    Returns:
        The solution; nothing has been changed yet.

    Raises:
        SignConflict: If there is none. Names the module where the signs contradict each other.
    """
    return _Solver(trace, anchors, pools, parameters).solve()


class _Solver:
    def __init__(self, trace, anchors, pools, parameters):
        self.trace = trace
        self.parameters = parameters
        self.unknowns = _Unknowns()
        self.ids: dict[int, torch.Tensor] = {}  # id(tensor) -> unknowns, same shape; absent: all +1
        self.layers: dict[int, _Layer] = {}
        self.norms: dict[int, _Norm] = {}
        self.transposed: dict[int, torch.Tensor] = {}  # id(weight.t()) -> weight
        self.spans: dict[int, tuple[Call, torch.Tensor | None]] = {}  # first op -> call seen as one operator
        self.pools: list[tuple[Call, torch.Tensor, torch.Tensor]] = []
        for call, pattern in anchors:
            self.spans[call.start] = call, pattern
        for call in pools:
            self.spans[call.start] = call, None
        self.private = self._private_parameters()
        # What is read by other operators than layers and norms is a tensor like any other: a sign for each row.
        self.free: list[tuple[torch.Tensor, torch.Tensor]] = []
        for key, private in self.private.items():
            tensor = parameters[key]
            if not private and tensor.is_floating_point() and tensor.ndim > 0:
                rows = self.unknowns.new(tensor.shape[0]).view([-1] + [1] * (tensor.ndim - 1))
                self.ids[key] = rows.expand(tensor.shape)
                self.free.append((tensor, rows))

    def solve(self) -> SignFlip:
        index = 0
        while index < len(self.trace.ops):
            op = self.trace.ops[index]
            try:
                span = self.spans.get(index)
                if span is not None:
                    self._whole_call(*span)
                    index = span[0].stop
                else:
                    self._step(op)
                    index += 1
            except _Contradiction as e:
                raise SignConflict(op.module, str(e)) from None

        output = self._settle_output()
        # BatchNorm passes signs on with its scale untouched where it can; elsewhere its scale takes the difference.
        for norm in self.norms.values():
            for a, b in zip(norm.ins.tolist(), norm.outs.tolist(), strict=True):
                if a != _ANY:
                    self.unknowns.tie(a, b)
        return SignFlip(self._factors(), [(c, *map(self.unknowns.signs, v)) for c, *v in self.pools], output)

    # What each operator asks of the signs

    def _step(self, op: Op) -> None:
        if op.name in ('convolution', '_convolution'):
            return self._convolution(op)
        if op.name in ('addmm', 'mm', 'linear'):
            return self._linear(op)
        if op.name in ('native_batch_norm', 'cudnn_batch_norm', '_native_batch_norm_legit_no_training'):
            return self._batch_norm(op)
        if op.name in ('native_group_norm', 'native_layer_norm'):
            return self._mixing_norm(op)
        if op.name == 't' and id(op.args[0]) in self.parameters:
            self.transposed[id(op.out)] = op.args[0]
            return
        if op.name in _ZEROS:
            return self._set(op.out, torch.tensor(_ANY).expand(op.out.shape))
        if not any(id(t) in self.ids for t in op.inputs):
            return self._forget(op)
        if not op.func._schema.is_mutable:
            return self._compute(op)
        # Other views of the memory that is written to must stay right: what was there keeps its signs.
        before = self._get(op.args[0])
        if bool((_narrow(before) == _ANY).any()):
            return self._keep_sign(op)
        self._compute(op)
        self._tie(self._get(op.args[0]), before, f'{op.name} in place changes the signs')

    def _compute(self, op: Op) -> None:
        if op.name in _ODD:
            return self._set(op.outputs[0], self._get(op.args[0]))
        if op.name in _EVEN or op.name == 'pow' and not isinstance(op.args[1], torch.Tensor) and op.args[1] % 2 == 0:
            return self._forget(op)
        if op.name in _MOVES:
            return self._move(op)
        if op.name in _PLANE_LINEAR:
            return self._set_planes(op.outputs[0], self._planes(op.args[0]))
        if op.name in ('constant_pad_nd', 'pad'):
            return self._pad(op)
        if op.name in ('add', 'sub'):
            return self._add(op)
        if op.name in ('mul', 'div'):
            return self._scale(op)
        if op.name in ('mean', 'sum'):
            return self._reduce(op)
        if op.name == 'bmm':
            return self._matrix_product(op)
        if op.name == 'as_strided' and op.out.is_contiguous() and self._get(op.args[0]).shape == op.out.shape:
            return self._set(op.out, self._get(op.args[0]))  # how torch marks a pooled (N, C, 1, 1) as channels_last
        self._keep_sign(op)

    def _keep_sign(self, op: Op) -> None:
        for tensor in op.inputs:
            if id(tensor) in self.ids:
                self._tie(self.ids.pop(id(tensor)), torch.tensor(_PLUS), f'{op.name} needs its input unchanged')
        self._forget(op)

    def _forget(self, op: Op) -> None:
        """What comes out is the same whatever the signs of the input."""
        for out in op.outputs:
            self.ids.pop(id(out), None)

    def _whole_call(self, call: Call, pattern: torch.Tensor | None) -> None:
        dim = 1 if pattern is None else call.channel_dim
        channels = self._channels(call.input, dim)
        if pattern is not None:
            self._tie(channels, pattern.long() * _PLUS, 'the activation asks for other signs than its input can have')
        outs = channels
        if pattern is None:
            if call.output.shape[1] != call.shape[1]:  # another number of channels: free to have signs of their own
                outs = self.unknowns.new(call.output.shape[1])
            self.pools.append((call, channels, outs))
        self._set_channels(call.output, outs, dim)

    def _convolution(self, op: Op) -> None:
        x, weight, bias = op.args[:3]
        transposed, groups = op.args[6], op.args[8]
        self._layer(op, x, weight, bias, 1, op.out.shape[1], groups, transposed)

    def _linear(self, op: Op) -> None:
        bias, x, weight = (op.args if op.name == 'addmm' else (None, *op.args))[:3]
        if op.name == 'linear':
            bias = op.args[2] if len(op.args) > 2 else None
        else:
            weight = self.transposed.get(id(weight), weight)
        self._layer(op, x, weight, bias, -1, op.out.shape[-1], 1, False)

    def _layer(
            self,
            op: Op,
            x: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor | None,
            dim: int,
            out_channels: int,
            groups: int,
            transposed: bool,
    ) -> None:
        if not self._rewritable(weight) or not (bias is None or self._rewritable(bias)):
            return self._computed_layer(op, x, weight, bias, dim, groups, transposed)
        ins = self._channels(x, dim)
        layer = self.layers.get(id(weight))
        if layer is None:
            layer = _Layer(weight, bias, ins, self.unknowns.new(out_channels), groups, transposed)
            self.layers[id(weight)] = layer
        else:
            self._tie(layer.ins, ins, 'the layer is shared by inputs of different signs')
        self._set_channels(op.out, layer.outs, dim)

    def _computed_layer(
            self,
            op: Op,
            x: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor | None,
            dim: int,
            groups: int,
            transposed: bool,
    ) -> None:
        """A layer whose weight is computed, or read elsewhere too: only its rows, the output channels, have signs."""
        if id(weight) not in self.ids or weight.ndim < 2 or transposed or op.name in ('addmm', 'mm'):
            return self._keep_sign(op)
        outs = self._channels(weight, 0)
        if bias is not None:
            if id(bias) in self.ids:
                self._tie(outs, self._channels(bias, 0), 'a bias has other signs than its layer')
            elif self._rewritable(bias):
                self.free.append((bias, outs))
            else:
                return self._keep_sign(op)
        if id(x) in self.ids:
            reason = f'the computed weight of {op.name} needs its input unchanged'
            self._tie(self.ids[id(x)], torch.tensor(_PLUS), reason)
        self._set_channels(op.out, outs, dim)

    def _batch_norm(self, op: Op) -> None:
        x, weight, bias, mean = op.args[:4]
        if weight is not None and bias is None and not self._rewritable(weight):  # computed: it scales, no more
            self._tie(self._get(weight), torch.tensor(_PLUS), 'the scale of a norm changes its sign')
            return self._set_channels(op.outputs[0], self._channels(x, 1), 1)
        if not all(p is None or self._rewritable(p) for p in (weight, bias)):
            return self._keep_sign(op)
        ins = self._channels(x, 1)
        key = next((id(t) for t in (mean, weight, bias) if t is not None), id(op))
        norm = self.norms.get(key)
        if norm is None:
            outs = ins if weight is None else self.unknowns.new(len(ins))
            norm = self.norms[key] = _Norm(weight, bias, mean, ins, outs)
        else:
            self._tie(norm.ins, ins, 'the norm is shared by inputs of different signs')
        self._set_channels(op.outputs[0], norm.outs, 1)

    def _mixing_norm(self, op: Op) -> None:
        """Statistics over several channels need the signs as they are; scale and shift can give new ones."""
        x = op.args[0]
        weight, bias = op.args[2:4] if op.name == 'native_layer_norm' else op.args[1:3]
        self._keep_sign(op)
        if weight is None or weight.ndim > 1 or not all(p is None or self._rewritable(p) for p in (weight, bias)):
            return
        norm = self.norms.get(id(weight))
        if norm is None:
            ins = torch.full((len(weight),), _PLUS)
            norm = self.norms[id(weight)] = _Norm(weight, bias, None, ins, self.unknowns.new(len(weight)))
        self._set_channels(op.outputs[0], norm.outs, x.ndim - 1 if op.name == 'native_layer_norm' else 1)

    def _move(self, op: Op) -> None:
        def replace(arg: Any) -> Any:
            if isinstance(arg, torch.Tensor) and (arg.is_floating_point() or id(arg) in self.ids):
                return self._get(arg)
            return [replace(a) for a in arg] if isinstance(arg, (list, tuple)) else arg

        if op.name in ('view', '_unsafe_view', 'reshape', '_reshape_alias'):
            return self._set(op.out, _reshape(self._get(op.args[0]), op.out.shape))
        if any(t.is_meta and not t.is_floating_point() for t in op.inputs):  # moved nobody knows where
            return self._keep_sign(op)
        moved = op.func(*[replace(a) for a in op.args], **op.kwargs)
        for out, ids in zip(op.outputs, [moved] if isinstance(moved, torch.Tensor) else moved, strict=True):
            self._set(out, ids)

    def _pad(self, op: Op) -> None:
        value = (op.args[2] if len(op.args) > 2 else 0) or 0
        ids = torch.nn.functional.pad(self._get(op.args[0]), list(op.args[1]), value=_ANY if value == 0 else _PLUS)
        self._set(op.out, ids)

    def _add(self, op: Op) -> None:
        a, b = op.args[:2]
        if not isinstance(b, torch.Tensor):
            return self._keep_sign(op) if b else self._set(op.out, self._get(a))
        a, b = torch.broadcast_tensors(self._get(a), self._get(b))
        self._tie(a, b, 'the summands have different signs')
        self._set(op.out, torch.where(_narrow(a) == _ANY, _narrow(b), _narrow(a)).expand(op.out.shape))

    def _scale(self, op: Op) -> None:
        a, b = op.args[:2]
        if not isinstance(b, torch.Tensor):
            return self._set(op.out, self._get(a))
        if a is b:
            return self._forget(op)
        # Signs that are known multiply. Of two unknown factors the smaller one, a gate, keeps its sign.
        known = self._known(b)
        if known is None and op.name == 'mul':
            known, a, b = self._known(a), b, a
            if known is None and a.numel() < b.numel():
                a, b = b, a
        if known is None:
            self._tie(self.ids[id(b)], torch.tensor(_PLUS), 'a gate needs its control input unchanged')
            known = torch.tensor(_PLUS)
        self._set(op.out, (_narrow(self._get(a)) * known).expand(op.out.shape))

    def _matrix_product(self, op: Op) -> None:
        """The product with a matrix of known positive signs: sums over elements of one sign keep that sign."""
        for factor, other, dim in ((*op.args, -1), (*reversed(op.args), 1)):
            if id(other) not in self.ids:
                ids = self._get(factor)
                first = ids.narrow(dim, 0, 1)
                if bool((_narrow(ids) == _narrow(first)).all()):
                    return self._set(op.out, first.expand(op.out.shape))
        self._keep_sign(op)

    def _reduce(self, op: Op) -> None:
        ids = self._get(op.args[0])
        dims = op.args[1] if len(op.args) > 1 and op.args[1] else list(range(ids.ndim))
        keepdim = bool(op.args[2]) if len(op.args) > 2 else op.kwargs.get('keepdim', False)
        for dim in dims:
            first = ids.narrow(dim, 0, 1)
            self._tie(ids, first, f'{op.name} runs over channels of different signs')
            ids = first
        if not keepdim:
            ids = ids.squeeze(tuple(dims))
        self._set(op.out, ids)

    # Unknowns of tensors

    def _get(self, tensor: torch.Tensor) -> torch.Tensor:
        ids = self.ids.get(id(tensor))
        if ids is None:
            ids = torch.tensor(_PLUS).expand(tensor.shape)
        return ids

    def _known(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The signs of a tensor if all of them are settled already."""
        ids = _narrow(self._get(tensor))
        unknowns, positions = torch.unique(ids, return_inverse=True)
        found = [(_PLUS, 1) if i == _ANY else self.unknowns.find(i) for i in unknowns.tolist()]
        if any(root != _PLUS for root, _ in found):
            return None
        return torch.tensor([sign for _, sign in found])[positions]

    def _set(self, tensor: torch.Tensor, ids: torch.Tensor) -> None:
        self.ids[id(tensor)] = ids

    def _channels(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """One unknown for each index along ``dim``, after tying the elements that share it."""
        ids = self._get(tensor).movedim(dim, 0).flatten(1) if tensor.ndim > 1 else self._get(tensor)[:, None]
        known = _narrow(ids) if tensor.numel() else ids
        first = known.abs().argmax(1, keepdim=True)  # not a padded zero
        vector = known.gather(1, first)
        self._tie(known, vector, 'one channel holds elements of different signs')
        return vector[:, 0].expand(ids.shape[0])

    def _set_channels(self, tensor: torch.Tensor, vector: torch.Tensor, dim: int) -> None:
        shape = [1] * tensor.ndim
        shape[dim] = -1
        self._set(tensor, vector.view(shape).expand(tensor.shape))

    def _planes(self, tensor: torch.Tensor) -> torch.Tensor:
        ids = _narrow(self._get(tensor).flatten(2))
        first = ids.gather(2, ids.abs().argmax(2, keepdim=True))
        self._tie(ids, first, 'one plane holds elements of different signs')
        return first.squeeze(2).expand(tensor.shape[:2])

    def _set_planes(self, tensor: torch.Tensor, planes: torch.Tensor) -> None:
        self._set(tensor, planes.view(*planes.shape, *[1] * (tensor.ndim - 2)).expand(tensor.shape))

    def _tie(self, a: torch.Tensor, b: torch.Tensor, reason: str) -> None:
        a, b = torch.broadcast_tensors(_narrow(a), _narrow(b))
        open_ = (a != _ANY) & (b != _ANY) & (a != b)
        pairs = torch.unique(a[open_] * _STRIDE + b[open_])  # both in one number: sorted much faster than rows
        for pair in pairs.tolist():
            i = (pair + _STRIDE // 2) // _STRIDE
            if not self.unknowns.tie(i, pair - i * _STRIDE):
                raise _Contradiction(reason)

    # What is changed once the signs are known

    def _private_parameters(self) -> dict[int, bool]:
        """The parameters that only layers and norms read."""
        private: dict[int, bool] = {}
        views: dict[int, int] = {}
        for op in self.trace.ops:
            layer = op.name in ('convolution', '_convolution', 'linear', 'addmm', 'mm', 'native_batch_norm',
                                'cudnn_batch_norm', '_native_batch_norm_legit_no_training', 'native_group_norm',
                                'native_layer_norm')
            for position, tensor in enumerate(op.args if layer else op.inputs):
                key = views.get(id(tensor), id(tensor))
                if key not in self.parameters:
                    continue
                if op.name == 't':
                    views[id(op.out)] = key
                    private.setdefault(key, True)
                else:
                    is_input = position == (1 if op.name == 'addmm' else 0)
                    private[key] = private.get(key, True) and layer and not is_input
        return private

    def _rewritable(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self.parameters and self.private.get(id(tensor), False)

    def _settle_output(self) -> torch.Tensor | None:
        output = self.trace.output
        if not isinstance(output, torch.Tensor) or id(output) not in self.ids:
            return None
        ids = _narrow(self.ids[id(output)])
        for i in torch.unique(ids[ids != _ANY]).tolist():
            self.unknowns.tie(i, _PLUS)
        signs = self.unknowns.signs(ids)
        return None if bool((signs == 1).all()) else signs

    def _factors(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        signs = self.unknowns.signs
        factors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def add(tensor: torch.Tensor | None, factor: torch.Tensor) -> None:
            if tensor is not None and bool((factor != 1).any()):
                factors[id(tensor)] = tensor, factor

        for layer in self.layers.values():
            ins, outs = signs(layer.ins), signs(layer.outs)
            add(layer.weight, _weight_factor(layer, ins, outs))
            add(layer.bias, outs)
        for tensor, ids in self.free:
            add(tensor, signs(ids))
        for norm in self.norms.values():
            ins, outs = signs(norm.ins), signs(norm.outs)
            add(norm.weight, ins * outs)
            add(norm.bias, outs)
            add(norm.mean, ins)
        return list(factors.values())


def _weight_factor(layer: _Layer, ins: torch.Tensor, outs: torch.Tensor) -> torch.Tensor:
    """The signs of a weight: (out, in / groups, ...), or (in, out / groups, ...) if transposed."""
    rows, cols = (ins, outs) if layer.transposed else (outs, ins)
    cols = cols.view(layer.groups, 1, -1)
    rows = rows.view(layer.groups, -1, 1)
    factor = (rows * cols).flatten(0, 1)
    return factor.view(*factor.shape, *[1] * (layer.weight.ndim - 2))


def _reshape(ids: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A reshape that does not write out what broadcasting repeats along the first dimensions, or after the second."""
    narrow = _narrow(ids)
    if narrow.numel() == narrow.shape[min(1, ids.ndim - 1)] and len(shape) > 1 and ids.shape[:2] == shape[:2]:
        return narrow.view([1, -1] + [1] * (len(shape) - 2)).expand(shape)
    first = next((i for i, size in enumerate(narrow.shape) if size > 1), ids.ndim)
    block = math.prod(ids.shape[first:])  # as many last elements make up all of it
    for i in range(len(shape), -1, -1):
        if math.prod(shape[i:]) == block:
            last = ids[(0,) * first].reshape(shape[i:])
            return last.expand(shape)
    return ids.reshape(shape)


def _narrow(ids: torch.Tensor) -> torch.Tensor:
    """Drop the copies that broadcasting made."""
    for dim, (size, stride) in enumerate(zip(ids.shape, ids.stride(), strict=True)):
        if size > 1 and stride == 0:
            ids = ids.narrow(dim, 0, 1)
    return ids
