"""The sign flip that turns a network of plain activations into a network of bipolar ones, and back.

A bipolar activation obeys ``f_B(s * x) = s * f(x)`` with ``s_c = (-1)^c``. So if the tensors of a network are rewritten
as ``s * x``, one sign per channel, every plain activation must become its bipolar form, every weight
``s_out * W * s_in``, and the network computes the same function to the last bit. This module finds the signs. Every
channel of every tensor is an unknown; activations and max pools fix some of them, additions and concatenations tie some
together, convolutions and linear layers leave both of their sides free. The unknowns of a whole network are solved as
one system, on the record of a forward pass (see ``trace``), so it does not matter how a model was written.
"""
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..leaves import tensors_in
from ..trace import Call, Op, Trace
from .layers import SOURCE_RULES, NetworkSigns
from .rules import RULES, keep_sign
from .tensors import Contradiction, narrow
from .unknowns import ANY, PLUS

# Whose operators mean what their names say
_NAMESPACES = frozenset({'aten', 'torchvision'})

__all__ = ['SignConflict', 'SignFlip', 'apply_rule', 'solve_signs']


class SignConflict(ValueError):
    """No assignment of signs keeps the network's function.

    Attributes:
        module: Path of the module where the signs contradict each other.
    """

    def __init__(self, module: str, reason: str) -> None:
        super().__init__(f"'{module or 'the model'}': {reason}")
        self.module = module


class SignFlip(NamedTuple):
    """A solution.

    Attributes:
        factors: Each parameter or buffer that changes, with the +-1 tensor that it is multiplied by (broadcastable).
        pools: The +-1 vectors of channel signs at the input and the output of each call of a pool.
        outputs: The +-1 tensor that each tensor of the model's output is multiplied by (broadcastable), ``None`` for
            one that does not change.
    """
    factors: list[tuple[Tensor, Tensor]]
    pools: list[tuple[Call, Tensor, Tensor]]
    outputs: list[Tensor | None]

    @property
    def flips_output(self) -> bool:
        """Whether channels of the output change their sign."""
        return any(signs is not None for signs in self.outputs)


def solve_signs(
        trace: Trace,
        anchors: Sequence[tuple[Call, Tensor]],
        pools: Sequence[Call],
        parameters: Mapping[int, Tensor],
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
    ops = _with_norms_of_empty_tensors(trace)
    signs = NetworkSigns([op for op in ops if op is not None], parameters, trace.inputs.tensors)
    anchored = {call.start: (call, pattern) for call, pattern in anchors}
    whole = {call.start: call for call in pools}
    seen: list[tuple[Call, Tensor, Tensor]] = []
    index = 0
    while index < len(ops):
        op = ops[index]
        try:
            if index in whole:
                seen.append(_pass_pool(signs, whole[index]))
                index = whole[index].stop
            elif index in anchored:
                call, pattern = anchored[index]
                _pass_activation(signs, call, pattern)
                index = call.stop
            else:
                if op is not None:
                    apply_rule(signs, op)
                index += 1
        except Contradiction as e:
            raise SignConflict(op.module, str(e)) from None

    outputs = _settle_outputs(signs, tensors_in(trace.output))
    signs.pass_through_norms()
    solved = signs.unknowns.signs
    return SignFlip(signs.factors(), [(call, solved(ins), solved(outs)) for call, ins, outs in seen], outputs)


def _with_norms_of_empty_tensors(trace: Trace) -> list[Op | None]:
    """Give the operators, and for each BatchNorm that saw an empty tensor the one that it calls otherwise.

    Torch computes something else there, with the first of the channels.
    """
    ops: list[Op | None] = list(trace.ops)
    for call in trace.calls:
        norm = call.module
        is_norm = isinstance(norm, _BatchNorm) and not any(norm.children())  # some hold an activation
        if is_norm and call.span and call.input is not None and not call.input.numel():
            arguments = (call.input, norm.weight, norm.bias, norm.running_mean, norm.running_var, False, 0., norm.eps)
            ops[call.start:call.stop] = [None] * len(call.span)
            ops[call.start] = Op(
                'native_batch_norm', torch.ops.aten.native_batch_norm.default, arguments, {}, call.output,
                trace.name(norm))
    return ops


def apply_rule(signs: NetworkSigns, op: Op) -> None:
    """Apply the rule of an operator.

    Raises:
        Contradiction: If its inputs cannot have the signs that it needs.
    """
    is_known = op.func.namespace in _NAMESPACES
    if is_known and op.name in SOURCE_RULES:
        return SOURCE_RULES[op.name](signs, op)
    if not any(signs.has(t) for t in op.inputs):
        return signs.forget(*op.outputs)
    rule = RULES.get(op.name, keep_sign) if is_known else keep_sign
    if not op.func._schema.is_mutable:
        return rule(signs, op)
    # Other views of the memory that is written to must stay right: what was there keeps its signs.
    before = signs.get(op.args[0])
    if bool((narrow(before) == ANY).any()):
        signs.forget_zeros(op.args[0])
        return keep_sign(signs, op)
    rule(signs, op)
    signs.tie(signs.get(op.args[0]), before, f'{op.name} in place changes the signs')


def _pass_activation(signs: NetworkSigns, call: Call, pattern: Tensor) -> None:
    """Multiply the channels of an activation's input, and so of its output, by its pattern."""
    channels = signs.channels(call.input, call.channel_dim)
    signs.tie(channels, pattern.long() * PLUS, 'the activation asks for other signs than its input can have')
    signs.set_channels(call.output, channels, call.channel_dim)


def _pass_pool(signs: NetworkSigns, call: Call) -> tuple[Call, Tensor, Tensor]:
    """Let the signs of channels pass. Give the call and the unknowns at its input and its output."""
    ins = outs = signs.channels(call.input, 1)
    if call.output.shape[1] != call.shape[1]:  # another number of channels: free to have signs of their own
        outs = signs.unknowns.new(call.output.shape[1])
    signs.set_channels(call.output, outs, 1)
    return call, ins, outs


def _settle_outputs(signs: NetworkSigns, outputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Leave the output as it is wherever something is free to choose. Give the signs of what is not."""
    for tensor in outputs:
        if signs.has(tensor):
            ids = narrow(signs.get(tensor))
            signs.unknowns.tie(*torch.broadcast_tensors(ids[ids != ANY], torch.tensor(PLUS)), skip_opposites=True)
    settled = [signs.unknowns.signs(narrow(signs.get(t))) if signs.has(t) else None for t in outputs]
    return [None if s is None or bool((s == 1).all()) else s for s in settled]
