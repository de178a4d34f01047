"""What each operator asks of the signs of its inputs, and which signs its outputs have: a rule for each operator.

A rule holds for every input x and all signs s that it lets pass: ``f(s * x) = t * f(x)``, to the last bit, with the
signs t that it gives to the output. An operator without a rule gets the one answer that is always right: its inputs
keep the sign +1 (``keep_sign``). What cannot be solved is therefore reported; it is never solved wrongly.

The rules of layers and norms, which have weights that can take signs, are in ``layers``.
"""
import math
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..leaves import tensors_in
from ..trace import Op
from .tensors import TensorSigns, compact, extent, narrow, reshape
from .unknowns import ANY, PLUS

__all__ = ['RULES', 'SHAPE_ONLY', 'Rule', 'constant', 'keep_sign', 'move']

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


def clamp(signs: TensorSigns, op: Op) -> None:
    """Between bounds that are as far from zero on either side, an odd function."""
    default = (-1, 1) if op.name == 'hardtanh' else (None, None)
    bounds = [*op.args[1:3], *default[len(op.args) - 1:]]
    low, high = (op.kwargs.get(name, bound) for name, bound in zip(('min', 'max'), bounds, strict=True))
    is_odd = all(isinstance(bound, (int, float)) for bound in (low, high)) and low == -high
    return odd(signs, op) if is_odd else keep_sign(signs, op)


def compare(signs: TensorSigns, op: Op) -> None:
    """Whether elements are zero does not depend on their sign; what they are otherwise does."""
    other = op.args[1]
    return even(signs, op) if not isinstance(other, Tensor) and other == 0 else keep_sign(signs, op)


def power(signs: TensorSigns, op: Op) -> None:
    """``x ** n``, for even n a function of magnitudes."""
    exponent = op.args[1]
    is_even = not isinstance(exponent, Tensor) and exponent % 2 == 0
    return even(signs, op) if is_even else keep_sign(signs, op)


def move(signs: TensorSigns, op: Op) -> None:
    """Moves elements and computes nothing: done to the unknowns, it says where each of them goes."""
    x, *arguments = op.args
    is_empty = any(not t.numel() for t in (x, *op.outputs))
    try:
        moved = op.func(signs.get(x), *arguments, **op.kwargs)
    except (IndexError, RuntimeError):  # its arguments may ask for sizes of zero, which unknowns do not have
        if is_empty:
            return keep_sign(signs, op)
        raise
    moved = [moved] if isinstance(moved, Tensor) else moved
    if any(ids.shape != extent(out) for out, ids in zip(op.outputs, moved, strict=True)):
        return keep_sign(signs, op)
    for out, ids in zip(op.outputs, moved, strict=True):
        _set_compact(signs, out, ids)


def join(signs: TensorSigns, op: Op) -> None:
    """Tensors one behind the other, or side by side. What all of them repeat is not written out."""
    tensors, dim = op.args[0], op.args[1] if len(op.args) > 1 else 0
    dim %= op.out.ndim
    if op.name == 'cat':
        # An empty one-dimensional tensor is left out, whatever the others are. One that the input decides about may
        # hold something the next time, unlike the placeholder of a stage that an encoder lacks.
        tensors = [
            t for t in tensors
            if t.shape != (0,) and (t.shape[dim] or signs.has(t) or signs.base(t) in signs.dependent)]
    if not tensors or any(not t.numel() for t in tensors):
        return keep_sign(signs, op)
    found = [signs.get(t) for t in tensors]
    if op.name == 'stack':
        found = [ids.unsqueeze(dim) for ids in found]
    for other in range(op.out.ndim):
        if other != dim and all(ids.stride(other) == 0 for ids in found):
            found = [ids.narrow(other, 0, 1) for ids in found]
    _set_compact(signs, op.out, torch.cat(found, dim))


def look_up(signs: TensorSigns, op: Op) -> None:
    """Elements by their places. Where these depend on the input, what is at all of them has to have the same sign.

    Otherwise the places are constants of the network, and the unknowns are found as the elements are.
    """
    x, *arguments = op.args
    dims = _looked_up_dims(op)
    if not signs.depends_on_input(*tensors_in(arguments)) and x.numel() and op.out.numel():
        return _set_compact(signs, op.out, op.func(signs.get(x), *arguments, **op.kwargs))
    ids = signs.tie_along(x, dims, f'{op.name} looks up elements of different signs')
    for tensor in tensors_in(arguments):
        signs.tie_to_plus(tensor, f'{op.name} needs its places unchanged')
    if op.name == 'gather':
        for dim, size in enumerate(extent(op.out)):
            ids = ids if dim in dims else ids.narrow(dim, 0, size)
    elif op.name != 'index_select':
        # In the place of the dimensions that are looked up, if they are neighbours, else in front: those of the result.
        first = dims[0] if dims == list(range(dims[0], dims[0] + len(dims))) else 0
        ids = ids.squeeze(tuple(dims))
        for _ in range(op.out.ndim - ids.ndim):
            ids = ids.unsqueeze(first)
    signs.set(op.out, ids.expand(extent(op.out)))


def _looked_up_dims(op: Op) -> list[int]:
    ndim = op.args[0].ndim
    if op.name in ('gather', 'index_select'):
        return [op.args[1] % ndim]
    if op.name == 'masked_select':
        return list(range(ndim))
    dims: list[int] = []
    dim = 0
    for index in op.args[1]:
        width = index.ndim if index is not None and index.dtype in (torch.bool, torch.uint8) else 1
        dims += range(dim, dim + width) if index is not None else []
        dim += width
    return dims


def masked_fill(signs: TensorSigns, op: Op) -> None:
    """A zero has every sign; another number is +1."""
    value = op.args[2]
    if isinstance(value, Tensor) or value != 0:
        return keep_sign(signs, op)
    signs.tie_to_plus(op.args[1], 'masked_fill needs its mask unchanged')
    signs.set(op.out, signs.get(op.args[0]).expand(extent(op.out)))


def select_either(signs: TensorSigns, op: Op) -> None:
    """``where``: as it may be the one or the other, both need the same sign."""
    condition, a, b = op.args
    signs.tie_to_plus(condition, 'where needs its condition unchanged')
    _join_signs(signs, op, a, b, 'the two choices of where have different signs')


def interpolate_between(signs: TensorSigns, op: Op) -> None:
    """``lerp``: a sum of the one and the other."""
    a, b, weight = op.args
    if isinstance(weight, Tensor):
        signs.tie_to_plus(weight, 'lerp needs its weight unchanged')
    _join_signs(signs, op, a, b, 'the ends of lerp have different signs')


def view(signs: TensorSigns, op: Op) -> None:
    """Another shape of the same elements."""
    ids = signs.get(op.args[0])
    if ids.numel() != math.prod(extent(op.out)):  # empty along more than one dimension
        return keep_sign(signs, op)
    signs.set(op.out, reshape(ids, extent(op.out)))


def restride(signs: TensorSigns, op: Op) -> None:
    """``as_strided``, where it changes nothing: torch marks a pooled (N, C, 1, 1) as channels_last with it."""
    if not op.out.is_contiguous() or op.args[0].shape != op.out.shape:
        return keep_sign(signs, op)
    signs.set(op.out, signs.get(op.args[0]))


def within_planes(signs: TensorSigns, op: Op) -> None:
    """Linear, and within each plane: over the last one, two or three dimensions, as its name says."""
    x = op.args[0]
    spatial = int(re.search(r'([123])d', op.name)[1])
    for tensor in op.inputs:
        if tensor is not x:
            signs.tie_to_plus(tensor, f'{op.name} needs its places unchanged')
    ids = signs.tie_along(x, range(x.ndim - spatial, x.ndim), 'one plane holds elements of different signs')
    signs.set(op.outputs[0], ids.expand(extent(op.outputs[0])))


def within_boxes(signs: TensorSigns, op: Op) -> None:
    """``roi_align``: means over boxes, channel by channel."""
    x, boxes = op.args[:2]
    signs.tie_to_plus(boxes, f'{op.name} needs its boxes unchanged')
    signs.set_channels(op.out, signs.channels(x, 1), 1)


def running_sum(signs: TensorSigns, op: Op) -> None:
    """Sums along one dimension."""
    x, dim = op.args[:2]
    ids = signs.tie_along(x, [dim], f'{op.name} runs over channels of different signs')
    signs.set(op.out, ids.expand(extent(op.out)))


def patches(signs: TensorSigns, op: Op) -> None:
    """``im2col``: (N, C, H, W) to (N, C * patch, L), with zeros around."""
    x, kernel = op.args[:2]
    if x.ndim != 4:
        return keep_sign(signs, op)
    signs.set_channels(op.out, signs.channels(x, 1).repeat_interleave(math.prod(kernel)), 1)


def patches_back(signs: TensorSigns, op: Op) -> None:
    """``col2im``: (N, C * patch, L) to (N, C, H, W), where the places of patches overlap they are summed."""
    x, _, kernel = op.args[:3]
    if x.ndim != 3:
        return keep_sign(signs, op)
    places = signs.channels(x, 1).view(-1, math.prod(kernel))
    signs.tie(places, places[:, :1], 'one channel holds elements of different signs')
    signs.set_channels(op.out, places[:, 0], 1)


def pad(signs: TensorSigns, op: Op) -> None:
    """A border of zeros has every sign; one of another constant is +1."""
    value = (op.args[2] if len(op.args) > 2 else 0) or 0
    ids, sizes = signs.get(op.args[0]), list(op.args[1])
    for dim in range(ids.ndim - len(sizes) // 2):
        ids = ids.narrow(dim, 0, 1) if ids.stride(dim) == 0 else ids
    ids = F.pad(ids, sizes, value=ANY if value == 0 else PLUS)
    _set_compact(signs, op.out, ids)


def add(signs: TensorSigns, op: Op) -> None:
    """Summands need the same sign. A zero takes that of the other."""
    a, b = op.args[:2]
    if not isinstance(b, Tensor):
        return keep_sign(signs, op) if b else signs.set(op.out, signs.get(a))
    _join_signs(signs, op, a, b, 'the summands have different signs')


def _join_signs(signs: TensorSigns, op: Op, a: Tensor, b: Tensor, reason: str) -> None:
    found = [torch.tensor(ANY) if signs.is_zero(t) else signs.get(t) for t in (a, b)]
    _join_unknowns(signs, op, *found, reason)


def _join_unknowns(signs: TensorSigns, op: Op, a: Tensor, b: Tensor, reason: str) -> None:
    a, b = (narrow(ids) for ids in torch.broadcast_tensors(a, b))
    signs.tie(a, b, reason)
    # Once they are tied, either tells the signs, and the smaller one in less memory.
    without_zeros = [ids for ids in sorted((a, b), key=Tensor.numel) if not bool((ids == ANY).any())]
    joined = without_zeros[0] if without_zeros else torch.where(a == ANY, b, a)
    signs.set(op.out, joined.expand(extent(op.out)))


def add_product(signs: TensorSigns, op: Op) -> None:
    """``addcmul``: a summand and a product, which need the same sign."""
    a, *factors = op.args[:3]
    _join_unknowns(signs, op, signs.get(a), _product(signs, *factors), 'the summands have different signs')


def multiply(signs: TensorSigns, op: Op) -> None:
    """Signs that are known multiply. Of two unknown factors the smaller one, a gate, keeps its sign."""
    a, b = op.args[:2]
    if op.kwargs.get('rounding_mode') == 'floor':
        return keep_sign(signs, op)
    if not isinstance(b, Tensor):
        return signs.set(op.out, signs.get(a))
    if a is b:
        return signs.forget(op.out)
    signs.set(op.out, _product(signs, a, b, commutes=op.name == 'mul').expand(extent(op.out)))


def _product(signs: TensorSigns, a: Tensor, b: Tensor, commutes: bool = True) -> Tensor:
    """Give the unknowns of a product, broadcastable."""
    known = signs.known(b)
    if known is None and commutes:
        known, a, b = signs.known(a), b, a
        if known is None and a.numel() < b.numel():
            a, b = b, a
    if known is None:
        signs.tie_to_plus(b, 'a gate needs its control input unchanged')
        known = torch.tensor(PLUS)
    return narrow(signs.get(a)) * known


def reduce(signs: TensorSigns, op: Op) -> None:
    """A sum of elements of one sign has that sign."""
    x = op.args[0]
    dims = op.args[1] if len(op.args) > 1 and op.args[1] else list(range(x.ndim))
    keepdim = bool(op.args[2]) if len(op.args) > 2 else op.kwargs.get('keepdim', False)
    ids = signs.tie_along(x, dims, f'{op.name} runs over channels of different signs')
    signs.set(op.out, ids if keepdim else ids.squeeze(tuple(dims)))


def matrix_product(signs: TensorSigns, op: Op) -> None:
    """With a matrix of known signs +1, a sum of elements of one sign has that sign."""
    for factor, other, dim in ((*op.args, -1), (*reversed(op.args), 1)):
        if not signs.has(other):
            ids = signs.get(factor)
            first = ids.narrow(dim, 0, 1)
            if bool((narrow(ids) == narrow(first)).all()):
                return signs.set(op.out, first.expand(extent(op.out)))
    keep_sign(signs, op)


def constant(signs: TensorSigns, op: Op) -> None:
    """Reads the shape, dtype or device of its input at most. Zeros have every sign, all else is as it is."""
    signs.forget(*op.outputs)
    value = 0 if op.name in _ZEROS else op.args[-1] if op.name in _FILLED else None
    if isinstance(value, (int, float)) and value == 0 and op.out.is_floating_point():
        signs.set(op.out, torch.tensor(ANY).expand(extent(op.out)))


def _set_compact(signs: TensorSigns, tensor: Tensor, ids: Tensor) -> None:
    signs.set(tensor, compact(ids).expand(extent(tensor)))


def _table(*rows: tuple[Rule, str]) -> dict[str, Rule]:
    return {name: rule for rule, names in rows for name in names.split()}


# The rules of operators that have an input of other signs than +1
RULES: dict[str, Rule] = _table(
    (odd, 'alias asinh atan clone contiguous detach dropout erf hardshrink lift_fresh native_dropout neg round sgn '
          'sign sin sinh softshrink tan tanh trunc'),
    (cast, '_to_copy'),
    (clamp, 'clamp hardtanh'),
    (even, 'abs all any count_nonzero isfinite isinf isnan linalg_vector_norm logical_not nonzero square'),
    (compare, 'eq ne'),
    (power, 'pow'),
    (move, 'channel_shuffle diagonal expand flip movedim narrow native_channel_shuffle permute pixel_shuffle '
           'pixel_unshuffle repeat roll select slice split split_with_sizes squeeze t transpose unbind unfold '
           'unsqueeze'),
    (join, 'cat stack'),
    (look_up, 'gather index index_select masked_select'),
    (view, 'view _unsafe_view reshape _reshape_alias'),
    (restride, 'as_strided'),
    (within_planes, '_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d avg_pool1d avg_pool2d avg_pool3d '
                    'grid_sampler_2d grid_sampler_3d '
                    'reflection_pad1d reflection_pad2d reflection_pad3d '
                    'replication_pad1d replication_pad2d replication_pad3d '
                    'upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d '
                    'upsample_nearest3d upsample_trilinear3d _upsample_nearest_exact1d _upsample_nearest_exact2d '
                    '_upsample_nearest_exact3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa'),
    (within_boxes, 'roi_align'),
    (patches, 'im2col'),
    (patches_back, 'col2im'),
    (pad, 'constant_pad_nd pad'),
    (add, 'add rsub sub'),
    (add_product, 'addcmul'),
    (select_either, 'where'),
    (interpolate_between, 'lerp'),
    (masked_fill, 'masked_fill'),
    (multiply, 'mul div'),
    (reduce, 'mean sum'),
    (running_sum, 'cumsum'),
    (matrix_product, 'bmm'),
)
_ZEROS = frozenset({'new_zeros', 'zeros', 'zeros_like'})
_FILLED = frozenset({'full', 'full_like', 'new_full', 'scalar_tensor'})
# Operators that read no element of their inputs
SHAPE_ONLY = _ZEROS | _FILLED | frozenset({
    '_assert_tensor_metadata', 'empty_like', 'is_same_size', 'new_empty', 'new_empty_strided', 'new_ones', 'ones_like',
     'rand_like', 'randint_like', 'randn_like', 'sym_is_contiguous', 'sym_numel', 'sym_size',
    'sym_storage_offset', 'sym_stride',
})
