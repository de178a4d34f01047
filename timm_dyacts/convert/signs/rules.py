"""What each operator asks of the signs of its inputs, and which signs its outputs have: a rule for each operator.

A rule holds for every input x and all signs s that it lets pass: ``f(s * x) = t * f(x)``, to the last bit, with the
signs t that it gives to the output. An operator without a rule gets the one answer that is always right: its inputs
keep the sign +1 (``keep_sign``). What cannot be solved is therefore reported; it is never solved wrongly.

The rules of layers and norms, which have weights that can take signs, are in ``layers``.
"""
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..trace import Op
from .tensors import TensorSigns, narrow, reshape
from .unknowns import ANY, PLUS

__all__ = ['RULES', 'ZEROS', 'Rule', 'keep_sign', 'move', 'zeros']

Rule = Callable[[TensorSigns, Op], None]


def keep_sign(signs: TensorSigns, op: Op) -> None:
    """Anything: right where the inputs are left as they are."""
    for tensor in op.inputs:
        signs.tie_to_plus(tensor, f'{op.name} needs its input unchanged')
        signs.forget(tensor)
    signs.forget(*op.outputs)


def odd(signs: TensorSigns, op: Op) -> None:
    """``f(-x) = -f(x)``, element by element."""
    signs.set(op.outputs[0], signs.get(op.args[0]))


def even(signs: TensorSigns, op: Op) -> None:
    """``f(-x) = f(x)``: a function of magnitudes."""
    signs.forget(*op.outputs)


def cast(signs: TensorSigns, op: Op) -> None:
    """Another dtype. One without negative numbers has no signs; as a mask it tells zeros from the rest."""
    rule = odd if op.out.is_floating_point() else even if op.out.dtype == torch.bool else keep_sign
    rule(signs, op)


def power(signs: TensorSigns, op: Op) -> None:
    """``x ** n``, for even n a function of magnitudes."""
    exponent = op.args[1]
    is_even = not isinstance(exponent, Tensor) and exponent % 2 == 0
    return even(signs, op) if is_even else keep_sign(signs, op)


def move(signs: TensorSigns, op: Op) -> None:
    """Moves elements and computes nothing: done to the unknowns, it says where each of them goes."""
    if any(t.is_meta and not t.is_floating_point() for t in op.inputs):  # indices that nobody knows
        return keep_sign(signs, op)

    def unknowns_of(arg: Any) -> Any:
        if isinstance(arg, Tensor) and (arg.is_floating_point() or signs.has(arg)):
            return signs.get(arg)
        return [unknowns_of(a) for a in arg] if isinstance(arg, (list, tuple)) else arg

    moved = op.func(*[unknowns_of(arg) for arg in op.args], **op.kwargs)
    for out, ids in zip(op.outputs, [moved] if isinstance(moved, Tensor) else moved, strict=True):
        signs.set(out, ids)


def view(signs: TensorSigns, op: Op) -> None:
    """Another shape of the same elements."""
    signs.set(op.out, reshape(signs.get(op.args[0]), op.out.shape))


def restride(signs: TensorSigns, op: Op) -> None:
    """``as_strided``, where it changes nothing: torch marks a pooled (N, C, 1, 1) as channels_last with it."""
    if not op.out.is_contiguous() or op.args[0].shape != op.out.shape:
        return keep_sign(signs, op)
    signs.set(op.out, signs.get(op.args[0]))


def within_planes(signs: TensorSigns, op: Op) -> None:
    """Linear, and within each plane of an (N, C, *spatial) tensor."""
    signs.set_planes(op.outputs[0], signs.planes(op.args[0]))


def pad(signs: TensorSigns, op: Op) -> None:
    """A border of zeros has every sign; one of another constant is +1."""
    value = (op.args[2] if len(op.args) > 2 else 0) or 0
    signs.set(op.out, F.pad(signs.get(op.args[0]), list(op.args[1]), value=ANY if value == 0 else PLUS))


def add(signs: TensorSigns, op: Op) -> None:
    """Summands need the same sign. A zero takes that of the other."""
    a, b = op.args[:2]
    if not isinstance(b, Tensor):
        return keep_sign(signs, op) if b else signs.set(op.out, signs.get(a))
    a, b = torch.broadcast_tensors(signs.get(a), signs.get(b))
    signs.tie(a, b, 'the summands have different signs')
    signs.set(op.out, torch.where(narrow(a) == ANY, narrow(b), narrow(a)).expand(op.out.shape))


def multiply(signs: TensorSigns, op: Op) -> None:
    """Signs that are known multiply. Of two unknown factors the smaller one, a gate, keeps its sign."""
    a, b = op.args[:2]
    if op.kwargs.get('rounding_mode') == 'floor':
        return keep_sign(signs, op)
    if not isinstance(b, Tensor):
        return signs.set(op.out, signs.get(a))
    if a is b:
        return signs.forget(op.out)
    known = signs.known(b)
    if known is None and op.name == 'mul':
        known, a, b = signs.known(a), b, a
        if known is None and a.numel() < b.numel():
            a, b = b, a
    if known is None:
        signs.tie_to_plus(b, 'a gate needs its control input unchanged')
        known = torch.tensor(PLUS)
    signs.set(op.out, (narrow(signs.get(a)) * known).expand(op.out.shape))


def reduce(signs: TensorSigns, op: Op) -> None:
    """A sum of elements of one sign has that sign."""
    ids = signs.get(op.args[0])
    dims = op.args[1] if len(op.args) > 1 and op.args[1] else list(range(ids.ndim))
    keepdim = bool(op.args[2]) if len(op.args) > 2 else op.kwargs.get('keepdim', False)
    for dim in dims:
        first = ids.narrow(dim, 0, 1)
        signs.tie(ids, first, f'{op.name} runs over channels of different signs')
        ids = first
    if not keepdim:
        ids = ids.squeeze(tuple(dims))
    signs.set(op.out, ids)


def matrix_product(signs: TensorSigns, op: Op) -> None:
    """With a matrix of known signs +1, a sum of elements of one sign has that sign."""
    for factor, other, dim in ((*op.args, -1), (*reversed(op.args), 1)):
        if not signs.has(other):
            ids = signs.get(factor)
            first = ids.narrow(dim, 0, 1)
            if bool((narrow(ids) == narrow(first)).all()):
                return signs.set(op.out, first.expand(op.out.shape))
    keep_sign(signs, op)


def zeros(signs: TensorSigns, op: Op) -> None:
    """Zeros have every sign."""
    signs.set(op.out, torch.tensor(ANY).expand(op.out.shape))


def _table(*rows: tuple[Rule, str]) -> dict[str, Rule]:
    return {name: rule for rule, names in rows for name in names.split()}


# The rules of operators that have an input of other signs than +1
RULES: dict[str, Rule] = _table(
    (odd, 'alias asinh atan clone contiguous detach dropout erf lift_fresh native_dropout neg round sgn sign sin sinh '
          'tan tanh trunc'),
    (cast, '_to_copy'),
    (even, 'abs linalg_vector_norm square'),
    (power, 'pow'),
    (move, 'cat channel_shuffle expand flip index index_select movedim narrow native_channel_shuffle permute '
           'pixel_shuffle pixel_unshuffle repeat roll select slice split split_with_sizes squeeze stack t transpose '
           'unbind unsqueeze'),
    (view, 'view _unsafe_view reshape _reshape_alias'),
    (restride, 'as_strided'),
    (within_planes, '_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d avg_pool1d avg_pool2d avg_pool3d '
                    'reflection_pad2d replication_pad2d upsample_bicubic2d upsample_bilinear2d upsample_nearest2d '
                    '_upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa'),
    (pad, 'constant_pad_nd pad'),
    (add, 'add sub'),
    (multiply, 'mul div'),
    (reduce, 'mean sum'),
    (matrix_product, 'bmm'),
)
# Makers of zeros, whatever their inputs are
ZEROS = frozenset({'new_zeros', 'zeros', 'zeros_like'})
