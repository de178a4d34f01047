"""Each rule of signs, on the operator itself: flip the input, run it, compare with the signs that the rule predicts."""
import pytest
import torch
import torchvision.ops  # noqa: F401 - registers its operators
from torch import nn
from torch.utils._pytree import tree_map

from timm_dyacts.convert.signs.layers import SOURCE_RULES, NetworkSigns
from timm_dyacts.convert.signs.rules import RULES, SHAPE_ONLY
from timm_dyacts.convert.signs.solver import apply_rule
from timm_dyacts.convert.signs.tensors import Contradiction, extent, narrow, reshape
from timm_dyacts.convert.signs.unknowns import ANY, PLUS
from timm_dyacts.convert.trace import Op, tensors_in

aten = torch.ops.aten


def draw(*shape):
    # integers: sums of them do not depend on the order, so that signs are compared to the last bit
    return torch.randint(1, 9, shape, generator=torch.Generator().manual_seed(sum(shape))).float()


def random_signs(shape, *groups):
    """A sign for each element, or the same along the dimensions of ``groups``."""
    size = [1 if dim in groups else n for dim, n in enumerate(shape)]
    signs = 2 * torch.randint(0, 2, size, generator=torch.Generator().manual_seed(5)) - 1
    signs.view(-1)[0], signs.view(-1)[-1] = 1, -1
    return signs.expand(shape)


class Case:
    """An operator with its arguments, of which the first tensor (or the tensors in the first list) take signs.

    Args:
        func: The operator.
        args: Its arguments; shapes, as tuples in a list, stand for inputs that take signs.
        same: Dimensions along which the signs must not change for the operator to pass them on.
    """

    def __init__(self, func, *args, same=(), **kwargs):
        self.func, self.args, self.same, self.kwargs = func, args, same, kwargs

    @property
    def inputs(self):
        """The tensors that take signs: the first one that is of floating point, or all in the first list."""
        first = next(arg for arg in self.args if isinstance(arg, list) or arg.is_floating_point())
        return tensors_in(first)


def shapes(*shapes_):
    return [draw(*shape) for shape in shapes_]


x4 = draw(2, 6, 4, 4)
x5 = draw(2, 3, 4, 4, 4)
PLANES = (2, 3)


def places(*shape):
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 1


CASES = {
    **{name: Case(getattr(aten, name).default, x4 / 10) for name in (
        'alias asinh atan clone detach erf hardshrink lift_fresh neg sgn sign sin sinh softshrink tan tanh trunc '
        'abs all any count_nonzero isfinite isinf isnan logical_not nonzero square'.split())},
    'clamp': Case(aten.clamp.default, x4, -3, 3),
    'hardtanh': Case(aten.hardtanh.default, x4),
    'eq': Case(aten.eq.Scalar, x4, 0),
    'ne': Case(aten.ne.Scalar, x4, 0),
    'round': Case(aten.round.default, x4 / 3),
    'contiguous': Case(aten.contiguous.default, x4),
    'dropout': Case(aten.dropout.default, x4, 0.5, False),
    'native_dropout': Case(aten.native_dropout.default, x4, 0.5, False),
    '_to_copy': Case(aten._to_copy.default, x4, dtype=torch.float64),
    'linalg_vector_norm': Case(aten.linalg_vector_norm.default, x4, 2.0, [2, 3], True),
    'pow': Case(aten.pow.Tensor_Scalar, x4, 2),
    'cat': Case(aten.cat.default, shapes((2, 3, 4), (2, 5, 4)), 1),
    'stack': Case(aten.stack.default, shapes((2, 3), (2, 3)), 1),
    'channel_shuffle': Case(aten.channel_shuffle.default, x4, 3),
    'native_channel_shuffle': Case(aten.native_channel_shuffle.default, x4, 3),
    'diagonal': Case(aten.diagonal.default, x4, 0, 2, 3),
    'expand': Case(aten.expand.default, draw(2, 1, 3), [2, 5, 3]),
    'flip': Case(aten.flip.default, x4, [1]),
    'index': Case(aten.index.Tensor, x4, [None, torch.tensor([3, 0, 3])]),
    'gather': Case(aten.gather.default, x4, 1, torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4) % 6),
    'masked_select': Case(aten.masked_select.default, x4, x4 > 3),
    'index_select': Case(aten.index_select.default, x4, 1, torch.tensor([5, 2])),
    'movedim': Case(aten.movedim.int, x4, 1, -1),
    'narrow': Case(aten.narrow.default, x4, 1, 2, 3),
    'permute': Case(aten.permute.default, x4, [0, 2, 3, 1]),
    'pixel_shuffle': Case(aten.pixel_shuffle.default, draw(2, 8, 2, 2), 2),
    'pixel_unshuffle': Case(aten.pixel_unshuffle.default, x4, 2),
    'repeat': Case(aten.repeat.default, x4, [1, 2, 1, 1]),
    'roll': Case(aten.roll.default, x4, [1], [1]),
    'select': Case(aten.select.int, x4, 1, 3),
    'slice': Case(aten.slice.Tensor, x4, 1, 1, 5, 2),
    'split': Case(aten.split.Tensor, x4, 4, 1),
    'split_with_sizes': Case(aten.split_with_sizes.default, x4, [1, 5], 1),
    'squeeze': Case(aten.squeeze.dim, draw(2, 1, 3), 1),
    't': Case(aten.t.default, draw(3, 5)),
    'transpose': Case(aten.transpose.int, x4, 1, 2),
    'unbind': Case(aten.unbind.int, draw(2, 3, 4), 1),
    'unfold': Case(aten.unfold.default, x4, 1, 2, 2),
    'unsqueeze': Case(aten.unsqueeze.default, x4, 1),
    'view': Case(aten.view.default, x4, [2, 3, 32]),
    '_unsafe_view': Case(aten._unsafe_view.default, x4, [12, 16]),
    'reshape': Case(aten.reshape.default, x4, [4, 3, 4, 4]),
    '_reshape_alias': Case(aten._reshape_alias.default, x4, [2, 96], [96, 1]),
    'as_strided': Case(aten.as_strided.default, draw(2, 3, 1, 1), [2, 3, 1, 1], [3, 1, 1, 1]),
    '_adaptive_avg_pool2d': Case(aten._adaptive_avg_pool2d.default, x4, [2, 2], same=PLANES),
    '_adaptive_avg_pool3d': Case(aten._adaptive_avg_pool3d.default, draw(2, 3, 4, 4, 4), [2, 2, 2], same=(2, 3, 4)),
    'adaptive_avg_pool1d': Case(aten.adaptive_avg_pool1d.default, draw(2, 3, 4), [2], same=(2,)),
    'avg_pool1d': Case(aten.avg_pool1d.default, draw(2, 3, 4), [2], same=(2,)),
    'avg_pool2d': Case(aten.avg_pool2d.default, x4, [2, 2], same=PLANES),
    'avg_pool3d': Case(aten.avg_pool3d.default, draw(2, 3, 4, 4, 4), [2, 2, 2], same=(2, 3, 4)),
    'reflection_pad2d': Case(aten.reflection_pad2d.default, x4, [1, 1, 1, 1], same=PLANES),
    'replication_pad2d': Case(aten.replication_pad2d.default, x4, [1, 1, 1, 1], same=PLANES),
    'upsample_nearest2d': Case(aten.upsample_nearest2d.default, x4, [8, 8], same=PLANES),
    '_upsample_nearest_exact2d': Case(aten._upsample_nearest_exact2d.default, x4, [8, 8], same=PLANES),
    **{name: Case(getattr(aten, name).default, x4, [8, 8], False, same=PLANES) for name in (
        'upsample_bicubic2d', 'upsample_bilinear2d', '_upsample_bilinear2d_aa', '_upsample_bicubic2d_aa')},
    'reflection_pad1d': Case(aten.reflection_pad1d.default, draw(2, 3, 4), [1, 1], same=(2,)),
    'replication_pad1d': Case(aten.replication_pad1d.default, draw(2, 3, 4), [1, 1], same=(2,)),
    'upsample_nearest1d': Case(aten.upsample_nearest1d.default, draw(2, 3, 4), [8], same=(2,)),
    '_upsample_nearest_exact1d': Case(aten._upsample_nearest_exact1d.default, draw(2, 3, 4), [8], same=(2,)),
    'upsample_linear1d': Case(aten.upsample_linear1d.default, draw(2, 3, 4), [8], False, same=(2,)),
    **{name: Case(getattr(aten, name).default, x5, [1] * 6, same=(2, 3, 4)) for name in (
        'reflection_pad3d', 'replication_pad3d')},
    **{name: Case(getattr(aten, name).default, x5, [8, 8, 8], same=(2, 3, 4)) for name in (
        'upsample_nearest3d', '_upsample_nearest_exact3d')},
    'upsample_trilinear3d': Case(aten.upsample_trilinear3d.default, x5, [8, 8, 8], False, same=(2, 3, 4)),
    'grid_sampler_2d': Case(aten.grid_sampler_2d.default, x4, places(2, 5, 5, 2), 0, 0, False, same=PLANES),
    'grid_sampler_3d': Case(aten.grid_sampler_3d.default, x5, places(2, 5, 5, 5, 3), 0, 0, False, same=(2, 3, 4)),
    'roi_align': Case(
        torch.ops.torchvision.roi_align.default, x4, torch.tensor([[0., 0, 0, 3, 3], [1, 1, 0, 2, 3]]), 1.0, 2, 2, -1,
        False, same=(0, *PLANES)),
    'im2col': Case(aten.im2col.default, x4, [3, 3], [1, 1], [1, 1], [1, 1], same=(0, *PLANES)),
    'col2im': Case(aten.col2im.default, draw(2, 24, 9), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1], same=(0, 1, 2)),
    'cumsum': Case(aten.cumsum.default, x4, 2, same=(2,)),
    'constant_pad_nd': Case(aten.constant_pad_nd.default, x4, [1, 1, 0, 0, 2, 1], 0.0),
    'pad': Case(aten.pad.default, x4, [1, 1, 0, 0, 2, 1], 'constant', 0.0),
    'mul': Case(aten.mul.Tensor, x4, draw(2, 6, 1, 1)),
    'div': Case(aten.div.Tensor, x4, draw(2, 6, 1, 1)),
    'add': Case(aten.add.Scalar, x4, 0),
    'rsub': Case(aten.rsub.Scalar, x4, 0),
    'sub': Case(aten.sub.Scalar, x4, 0),
    'addcmul': Case(aten.addcmul.default, x4, x4, draw(6, 1, 1), value=2),
    'lerp': Case(aten.lerp.Scalar, x4, x4, 0.25),
    'masked_fill': Case(aten.masked_fill.Scalar, x4, x4 > 3, 0),
    'where': Case(aten.where.self, x4 > 3, x4, x4),
    'mean': Case(aten.mean.dim, x4, [2, 3], True, same=PLANES),
    'sum': Case(aten.sum.dim_IntList, x4, [2, 3], same=PLANES),
    'bmm': Case(aten.bmm.default, draw(2, 3, 4), draw(2, 4, 5), same=(2,)),
}


def op_of(func, args, kwargs, out):
    name = func._schema.name.split('::')[-1]
    return Op(name.removesuffix('_') if func._schema.is_mutable else name, func, args, kwargs, out, '')


def apply(func, args, kwargs, given, parameters=()):
    """Run an operator and its rule.

    Args:
        func: The operator.
        args: Its arguments.
        kwargs: Its keyword arguments.
        given: Pairs of an input and its signs.
        parameters: Tensors that may be rewritten.

    Returns:
        The signs object, the outputs, and the predicted signs of each; 0 where any sign is right.
    """
    with torch.no_grad():
        out = func(*args, **kwargs)
    op = op_of(func, args, kwargs, out)
    signs = NetworkSigns([op], {id(p): p for p in parameters})
    for tensor, pattern in given:
        signs.set(tensor, pattern.long() * PLUS)
    apply_rule(signs, op)
    return signs, op, [solved(signs, t) for t in op.outputs]


def solved(signs, tensor):
    ids = signs.get(tensor)
    return torch.where(ids == ANY, 0, signs.unknowns.signs(ids).long())


def assert_predicted(outputs, flipped, predicted):
    for y, z, s in zip(outputs, flipped, predicted, strict=True):
        assert torch.equal(torch.where(s == 0, y, s * y), z)
        assert not ((s == 0) & (y != 0)).any(), 'only a zero has any sign'


def test_every_rule_has_a_case():
    assert CASES.keys() == RULES.keys()


@pytest.mark.parametrize('name', CASES)
def test_the_predicted_signs_are_those_of_the_result(name):
    case = CASES[name]
    assert case.func._schema.name.split('::') == [case.func.namespace, name]
    inputs = case.inputs
    given = [(x, random_signs(x.shape, *case.same)) for x in inputs]
    signs, op, predicted = apply(case.func, case.args, case.kwargs, given)
    flipped = {id(x): x * s for x, s in given}
    args = tree_map(lambda arg: flipped.get(id(arg), arg), list(case.args))
    with torch.no_grad():
        out = tensors_in(case.func(*args, **case.kwargs))
    assert_predicted(op.outputs, out, predicted)
    if RULES[name].__name__ not in ('compare', 'even', 'power'):
        assert any((s == -1).any() for s in predicted), 'or nothing was followed'


@pytest.mark.parametrize('name', [name for name, case in CASES.items() if case.same])
def test_signs_that_do_not_pass_are_refused(name):
    case = CASES[name]
    x, = case.inputs
    with pytest.raises(Contradiction):
        apply(case.func, case.args, case.kwargs, [(x, random_signs(x.shape))])


@pytest.mark.parametrize('func, args', [
    (aten.exp.default, ()),
    (aten.pow.Tensor_Scalar, (3,)),
    (aten.add.Scalar, (1,)),
    (aten.max_pool2d_with_indices.default, ([2, 2],)),
    (aten.as_strided.default, ([2, 2], [4, 1])),
    (aten.mul.Tensor, (draw(6, 4, 4),)),
], ids=lambda value: getattr(value, '__name__', ''))
def test_what_is_unknown_needs_its_input_unchanged(func, args):
    ones = torch.ones_like(x4)
    given = [(x4, ones)]
    if func is aten.mul.Tensor:  # the smaller factor, whose sign is free, is the gate
        signs = NetworkSigns([], {})
        gate = args[0]
        signs.set(gate, signs.unknowns.new(6).view(6, 1, 1).expand(gate.shape))
        signs.set(x4, signs.unknowns.new(6).view(1, 6, 1, 1).expand(x4.shape))
        apply_rule(signs, op_of(func, (x4, gate), {}, func(x4, gate)))
        assert (signs.known(gate) == 1).all() and signs.known(x4) is None
        return
    _, _, predicted = apply(func, (x4, *args), {}, given)
    assert all((s == 1).all() for s in predicted)
    with pytest.raises(Contradiction, match='needs its input unchanged'):
        apply(func, (x4, *args), {}, [(x4, random_signs(x4.shape))])


# Where the places that are looked up depend on the input, all that is there must have the same sign


def look_up(func, args, pattern):
    """As ``apply``, of a network whose second argument is computed from its input."""
    x, image = args[0], draw(2)
    places = tensors_in(args[1:])[0]
    with torch.no_grad():
        out = func(*args)
    ops = [op_of(aten.nonzero.default, (image,), {}, places), op_of(func, args, {}, out)]
    signs = NetworkSigns(ops, {}, [image])
    signs.set(x, pattern.long() * PLUS)
    for op in ops:
        apply_rule(signs, op)
    return ops[1], solved(signs, out)


MASK = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 0, 1, 0, 1, 1]]).bool()
LOOK_UPS = dict(
    gather=(aten.gather.default, (x4, 2, torch.arange(2 * 6 * 2 * 4).view(2, 6, 2, 4) % 4), (2,)),
    gather_fewer=(aten.gather.default, (x4, 2, torch.arange(2 * 3 * 2 * 4).view(2, 3, 2, 4) % 4), (2,)),
    index_select=(aten.index_select.default, (x4, 0, torch.tensor([1, 0, 1])), (0,)),
    nothing=(aten.index_select.default, (x4, 0, torch.tensor([], dtype=torch.long)), (0,)),
    rows=(aten.index.Tensor, (x4, [torch.tensor([1, 1, 0])]), (0,)),
    pairs=(aten.index.Tensor, (x4, [None, None, torch.tensor([[1, 0, 3]]), torch.tensor([[2, 2, 0]])]), (2, 3)),
    apart=(aten.index.Tensor, (x4, [torch.tensor([1, 0, 1]), None, torch.tensor([1, 3, 0])]), (0, 2)),
    in_the_middle=(aten.index.Tensor, (x4, [None, None, torch.tensor([[1, 0, 3]])]), (2,)),
    mask=(aten.index.Tensor, (x4, [MASK]), (0, 1)),
    mask_of_rows=(aten.index.Tensor, (x4, [None, MASK[0]]), (1,)),
    masked_select=(aten.masked_select.default, (draw(2, 6), MASK), (0, 1)),
)


@pytest.mark.parametrize('name', LOOK_UPS)
def test_looking_up_places_that_depend_on_the_input(name):
    func, (x, *rest), dims = LOOK_UPS[name]
    pattern = random_signs(x.shape, *dims) if len(dims) < x.ndim else -torch.ones_like(x).long()
    op, predicted = look_up(func, (x, *rest), pattern)
    assert predicted.shape == extent(op.out) and (predicted == -1).any()
    if op.out.numel():
        assert torch.equal(predicted * op.out, func(x * pattern, *rest))
    with pytest.raises(Contradiction, match='looks up elements of different signs'):
        look_up(func, (x, *rest), random_signs(x.shape))
    fixed = NetworkSigns([op], {})
    fixed.set(x, random_signs(x.shape))
    if op.out.numel():
        apply_rule(fixed, op)
        assert torch.equal(solved(fixed, op.out) * op.out, func(x * random_signs(x.shape), *rest)), 'or constants'


def test_what_was_looked_up_once_in_a_buffer_that_is_written_to_depends_on_the_input():
    image, buffer, x = draw(2, 3), torch.zeros(2, 3), draw(6, 4)
    view = buffer[:1]
    places = torch.tensor([1, 0])
    ops = [op_of(aten.slice.Tensor, (buffer, 0, 0, 1), {}, view), op_of(aten.copy_.default, (view, image), {}, view)]
    ops.append(op_of(aten.argmax.default, (buffer, 1), {}, places))
    signs = NetworkSigns(ops, {}, [image])
    assert signs.depends_on_input(view) and signs.depends_on_input(buffer) and signs.depends_on_input(places)
    assert not signs.depends_on_input(x)


# Operators that read no element


SHAPE_ARGS = dict(
    _assert_tensor_metadata=(x4,), empty_like=(x4,), is_same_size=(x4, x4), new_empty=(x4, [2, 3]),
    new_empty_strided=(x4, [2, 3], [3, 1]), new_ones=(x4, [2, 3]), ones_like=(x4,), rand_like=(x4,),
    randint_like=(x4, 5), randn_like=(x4,), new_full=(x4, [2, 3], 2.0), full_like=(x4, 2.0),
)


@pytest.mark.parametrize('name', SHAPE_ARGS)
def test_what_reads_only_a_shape_binds_no_sign(name):
    func, args = getattr(aten, name).default, SHAPE_ARGS[name]
    assert name in SHAPE_ONLY
    pattern = random_signs(x4.shape)
    signs, op, predicted = apply(func, args, {}, [(x4, pattern)])
    assert all((s == 1).all() for s in predicted) and (signs.known(x4) == pattern).all()
    signs = NetworkSigns([op], {}, [x4])
    assert not signs.depends_on_input(*op.outputs)
    weight = draw(6, 6)
    read = op_of(func, tuple(weight if arg is x4 else arg for arg in args), {}, op.out)
    product = op_of(aten.linear.default, (x4, weight), {}, op.out)
    assert NetworkSigns([read, product], {id(weight): weight}).can_rewrite(weight)


def test_only_torchs_own_operators_mean_what_their_names_say():
    with torch.library._scoped_library('timm_dyacts_test', 'DEF') as library:
        library.define('neg(Tensor x) -> Tensor')
        library.impl('neg', lambda x: x + 1, 'CompositeExplicitAutograd')
        with pytest.raises(Contradiction, match='neg needs its input unchanged'):
            apply(torch.ops.timm_dyacts_test.neg.default, (x4,), {}, [(x4, random_signs(x4.shape))])


def test_zeros_that_are_written_to_are_zeros_no_more():
    zeros, x, other = torch.zeros(2, 6), draw(2, 3), draw(2, 6)
    view = zeros[:, :3]
    ops = [
        op_of(aten.zeros_like.default, (other,), {}, zeros),
        op_of(aten.slice.Tensor, (zeros, 1, 0, 3), {}, view),
        op_of(aten.copy_.default, (view, x), {}, view),
        op_of(aten.add.Tensor, (zeros, other), {}, zeros + other),
    ]
    signs = NetworkSigns(ops, {}, [x, other])
    signs.set(other, random_signs(other.shape))
    for op in ops[:3]:
        apply_rule(signs, op)
    assert (solved(signs, zeros) == 1).all()
    with pytest.raises(Contradiction, match='the summands have different signs'):
        apply_rule(signs, ops[3])


@pytest.mark.parametrize('value, fits', [(0., True), (1., False)])
@pytest.mark.parametrize('func', [aten.full.default, aten.new_full.default, aten.full_like.default])
def test_full_of_zeros(func, value, fits):
    args = dict(full=([2, 6], value), new_full=(x4, [2, 6], value), full_like=(draw(2, 6), value))
    name, x, pattern = func._schema.name.split('::')[1], draw(2, 6), random_signs((2, 6))
    signs, op, _ = apply(func, args[name], {}, [(x, pattern)])
    total = op_of(aten.add.Tensor, (op.out, x), {}, op.out + x)
    if fits:
        apply_rule(signs, total)
        assert torch.equal(solved(signs, total.out), pattern)
    else:
        with pytest.raises(Contradiction):
            apply_rule(signs, total)


def test_one_of_two_choices():
    a, b, s = draw(2, 6), draw(2, 6) + 1, random_signs((2, 6))
    mask, zero = a > 4, torch.tensor(0.)
    _, op, (predicted,) = apply(aten.where.self, (mask, a, b), {}, [(a, s), (b, s)])
    assert torch.equal(predicted * op.out, torch.where(mask, a * s, b * s))
    _, op, (predicted,) = apply(aten.where.self, (mask, a, zero), {}, [(a, s)])
    assert torch.equal(predicted * op.out, torch.where(mask, a * s, zero))
    for other in (torch.tensor(1.), b):
        with pytest.raises(Contradiction, match='the two choices of where have different signs'):
            apply(aten.where.self, (mask, a, other), {}, [(a, s)])
    with pytest.raises(Contradiction):  # a parameter that is zero today
        apply(aten.where.self, (mask, a, zero), {}, [(a, s)], parameters=[zero])


@pytest.mark.parametrize('func, args', [
    (aten.clamp.default, (0, 3)),
    (aten.clamp.default, (-3,)),
    (aten.hardtanh.default, (0, 6)),
    (aten.eq.Scalar, (1,)),
    (aten.eq.Tensor, (draw(2, 6),)),
    (aten.gt.Scalar, (0,)),
    (aten.rsub.Scalar, (1,)),
    (aten.masked_fill.Scalar, (draw(2, 6) > 3, 1)),
    (aten.sort.default, (1,)),
    (aten.topk.default, (2, 1)),
    (aten.amax.default, ([1],)),
], ids=lambda value: getattr(value, '__name__', ''))
def test_what_is_no_odd_function(func, args):
    x = draw(2, 6)
    with pytest.raises(Contradiction, match='needs its input unchanged'):
        apply(func, (x, *args), {}, [(x, random_signs(x.shape))])


@pytest.mark.parametrize('shape', [(3, 4, 4), (6, 4, 4)])
def test_planes_without_a_batch(shape):
    x, pattern = draw(*shape), random_signs(shape, 1, 2)
    _, op, (predicted,) = apply(aten.reflection_pad2d.default, (x, [1, 1, 1, 1]), {}, [(x, pattern)])
    assert torch.equal(predicted * op.out, aten.reflection_pad2d(x * pattern, [1, 1, 1, 1]))
    with pytest.raises(Contradiction):
        apply(aten.reflection_pad2d.default, (x, [1, 1, 1, 1]), {}, [(x, random_signs(shape, 2))])


# Empty tensors: their channels have signs, which the next input will show


def test_channels_of_an_empty_tensor():
    x, weight, bias = torch.zeros(0, 6, 4, 4), draw(12, 6 * 16), draw(12)
    pattern = random_signs((1, 6, 1, 1), 0, 2, 3)
    flat = aten.view(x, [0, 96])
    back = aten.permute(x, [0, 2, 3, 1])
    joined = aten.cat([x, draw(2, 6, 4, 4)])
    ops = [
        op_of(aten.view.default, (x, [0, 96]), {}, flat),
        op_of(aten.permute.default, (x, [0, 2, 3, 1]), {}, back),
        op_of(aten.linear.default, (flat, weight, bias), {}, aten.linear(flat, weight, bias)),
        op_of(aten.cat.default, ([x, joined],), {}, joined),
    ]
    signs = NetworkSigns(ops, {id(weight): weight, id(bias): bias})
    signs.set(x, pattern.expand(extent(x)))
    for op in ops[:3]:
        apply_rule(signs, op)
    assert torch.equal(signs.channels(back, 3), pattern.flatten())
    factor = next(f for t, f in signs.factors() if t is weight)
    assert torch.equal(factor.expand(weight.shape)[0], pattern.expand(1, 6, 4, 4).flatten())
    with pytest.raises(Contradiction, match='cat needs its input unchanged'):
        apply_rule(signs, ops[3])


@pytest.mark.parametrize('dtype', [torch.bool, torch.uint8])
def test_dtypes_without_negative_numbers(dtype):
    x, pattern = draw(2, 6), random_signs((2, 6))
    if dtype == torch.bool:
        _, op, (predicted,) = apply(aten._to_copy.default, (x,), dict(dtype=dtype), [(x, pattern)])
        assert (predicted == 1).all() and torch.equal(op.out, (x * pattern).to(dtype))
        return
    with pytest.raises(Contradiction, match='_to_copy needs its input unchanged'):
        apply(aten._to_copy.default, (x,), dict(dtype=dtype), [(x, pattern)])


def test_division_that_rounds_down_is_not_odd():
    x, pattern = draw(2, 6), random_signs((2, 6))
    with pytest.raises(Contradiction, match='div needs its input unchanged'):
        apply(aten.div.Scalar_mode, (x, 4), dict(rounding_mode='floor'), [(x, pattern)])


def test_a_border_of_another_constant_is_positive():
    x, pattern = x4, random_signs(x4.shape)
    _, op, (predicted,) = apply(aten.constant_pad_nd.default, (x, [1, 1], 2.0), {}, [(x, pattern)])
    assert torch.equal(predicted * op.out, aten.constant_pad_nd(x * pattern, [1, 1], 2.0))


def test_summands():
    a, b, pattern = draw(2, 6, 4), draw(2, 6, 4), random_signs((2, 6, 4))
    _, op, (predicted,) = apply(aten.add.Tensor, (a, b), {}, [(a, pattern), (b, pattern)])
    assert torch.equal(predicted * op.out, a * pattern + b * pattern)
    with pytest.raises(Contradiction, match='the summands have different signs'):
        apply(aten.add.Tensor, (a, b), {}, [(a, pattern), (b, -pattern)])
    with pytest.raises(Contradiction, match='the summands have different signs'):
        apply(aten.add.Tensor, (a, b), {}, [(a, pattern)])


def test_summands_with_a_padded_zero_take_the_other_sign():
    a, b = torch.cat([draw(2, 3), torch.zeros(2, 3)], 1), draw(2, 6)
    ids_a = torch.cat([random_signs((2, 3)), torch.zeros(2, 3, dtype=torch.long)], 1)
    ids_b = torch.cat([random_signs((2, 3)), -torch.ones(2, 3, dtype=torch.long)], 1)
    op = op_of(aten.add.Tensor, (a, b), {}, a + b)
    signs = NetworkSigns([], {})
    signs.set(a, ids_a)
    signs.set(b, ids_b)
    apply_rule(signs, op)
    assert torch.equal(solved(signs, op.out) * op.out, a * ids_a + b * ids_b)


def test_products_of_known_signs():
    a, b, s, t = draw(2, 6), draw(2, 6), random_signs((2, 6)), random_signs((2, 6), 0)
    _, op, (predicted,) = apply(aten.mul.Tensor, (a, b), {}, [(a, s), (b, t)])
    assert torch.equal(predicted * op.out, (a * s) * (b * t))
    _, op, (predicted,) = apply(aten.mul.Tensor, (a, a), {}, [(a, s)])
    assert torch.equal(predicted * op.out, (a * s) * (a * s))


def test_a_matrix_product_from_either_side():
    a, b = draw(2, 3, 4), draw(2, 4, 5)
    pattern = random_signs(b.shape, 1)
    _, op, (predicted,) = apply(aten.bmm.default, (a, b), {}, [(b, pattern)])
    assert torch.equal(predicted * op.out, a @ (b * pattern))
    with pytest.raises(Contradiction):
        apply(aten.bmm.default, (a, b), {}, [(b, random_signs(b.shape))])


@pytest.mark.parametrize('name', ['new_zeros', 'zeros', 'zeros_like'])
def test_zeros_have_every_sign(name):
    args = dict(new_zeros=(x4, [2, 3]), zeros=([2, 3],), zeros_like=(x4,))[name]
    signs, op, (predicted,) = apply(getattr(aten, name).default, args, {}, [])
    assert op.out.numel() and (predicted == 0).all() and not op.out.any()


def test_in_place_operators_keep_the_signs_of_other_views():
    x = draw(2, 6)
    pattern = random_signs(x.shape)
    _, op, (predicted,) = apply(aten.mul_.Scalar, (x, 2), {}, [(x, pattern)])
    assert op.out is x and torch.equal(predicted, pattern)
    y = draw(2, 6)
    with pytest.raises(Contradiction, match='abs in place changes the signs'):
        apply(aten.abs_.default, (y,), {}, [(y, pattern)])


# Layers and norms: with the factors of their weights taken in


def check_layer(func, args, weights, dim, pattern):
    """Channels of the input flipped at random, and of the output: the weights take both in, to the last bit."""
    x = next(t for t in tensors_in(args) if all(t is not w for w in weights))
    shape = [1] * x.ndim
    shape[dim] = -1
    given = random_signs((x.shape[dim],)) if pattern else torch.ones(x.shape[dim], dtype=torch.long)
    signs, op, _ = apply(func, args, {}, [(x, given.view(shape).expand(x.shape))], weights)
    y = op.outputs[0]
    wanted = random_signs((y.shape[dim],)).flip(0)
    signs.tie(signs.channels(y, dim), wanted * PLUS, 'outputs')
    factors = {id(t): factor for t, factor in signs.factors()}
    assert factors, 'or nothing was followed'
    new = [t * factors[id(t)] if id(t) in factors else t for t in weights]
    flipped = {id(x): x * given.view(shape)} | {id(t): n for t, n in zip(weights, new, strict=True)}
    out = func(*[flipped.get(id(a), a) if isinstance(a, torch.Tensor) else a for a in args])
    shape = [1] * y.ndim
    shape[dim] = -1
    assert torch.equal(tensors_in(out)[0], y * wanted.view(shape))


CONV = ([1, 1], [1, 1], [1, 1])


@pytest.mark.parametrize('groups, transposed', [(1, False), (2, False), (6, False), (1, True), (2, True)])
@pytest.mark.parametrize('name', ['convolution', '_convolution'])
def test_convolution(name, groups, transposed):
    shape = (6, 12 // groups, 3, 3) if transposed else (12, 6 // groups, 3, 3)
    weight, bias = draw(*shape), draw(12)
    args = (draw(2, 6, 5, 5), weight, bias, *CONV, transposed, [0, 0], groups)
    if name == '_convolution':
        args += (False, False, True, True)
    check_layer(getattr(aten, name).default, args, [weight, bias], 1, pattern=True)


def test_linear():
    weight, bias = draw(7, 6), draw(7)
    check_layer(aten.linear.default, (draw(2, 3, 6), weight, bias), [weight, bias], -1, pattern=True)


@pytest.mark.parametrize('name', ['mm', 'addmm'])
def test_linear_layers_read_their_weight_transposed(name):
    x, weight, bias = draw(4, 6), draw(7, 6), draw(7)
    view = weight.t()
    args = (bias, x, view) if name == 'addmm' else (x, view)
    ops = [op_of(aten.t.default, (weight,), {}, view)]
    ops.append(op_of(getattr(aten, name).default, args, {}, getattr(aten, name)(*args)))
    signs = NetworkSigns(ops, {id(weight): weight, id(bias): bias})
    ins, outs = random_signs((6,)), random_signs((7,))
    signs.set(x, ins.expand(x.shape))
    for op in ops:
        apply_rule(signs, op)
    y = ops[1].out
    signs.tie(signs.channels(y, -1), outs, 'outputs')
    factors = {id(t): factor for t, factor in signs.factors()}
    new = (x * ins) @ (weight * factors[id(weight)]).t() + (bias * factors[id(bias)] if name == 'addmm' else 0)
    assert torch.equal(new, y * outs)


@pytest.mark.parametrize('name', ['native_batch_norm', '_native_batch_norm_legit_no_training', 'cudnn_batch_norm'])
def test_batch_norm(name):
    weights = [draw(6), draw(6) - 4, draw(6)]
    x, var = draw(2, 6, 4, 4), draw(6)
    args = (x, *weights, var)
    if name == 'cudnn_batch_norm':  # runs on GPUs only: the rule reads the same arguments
        args, name = (*args, False, 0.1, 1e-5), 'native_batch_norm'
        assert SOURCE_RULES['cudnn_batch_norm'] is SOURCE_RULES[name]
    else:
        args += (False, 0.1, 1e-5) if name == 'native_batch_norm' else (0.1, 1e-5)
    check_layer(getattr(aten, name).default, args, weights, 1, pattern=True)


def test_batch_norm_passes_signs_on_with_its_scale_untouched_where_it_can():
    weights = [draw(6), draw(6) - 4, draw(6)]
    x = draw(2, 6, 4, 4)
    pattern = random_signs((6,))
    signs, op, _ = apply(
        aten.native_batch_norm.default, (x, *weights, draw(6), False, 0.1, 1e-5), {},
        [(x, pattern.view(1, 6, 1, 1).expand(x.shape))], weights)
    signs.pass_through_norms()
    factors = {id(t): factor for t, factor in signs.factors()}
    assert id(weights[0]) not in factors
    assert torch.equal(factors[id(weights[1])].long(), pattern)
    assert (solved(signs, op.outputs[0]) == pattern.view(1, 6, 1, 1)).all()


@pytest.mark.parametrize('name', ['native_layer_norm', 'native_group_norm'])
def test_norms_over_channels_need_their_input_unchanged(name):
    weights = [draw(6), draw(6) - 4]
    if name == 'native_layer_norm':
        args, dim = (draw(2, 3, 6), [6], *weights, 1e-5), -1
    else:
        args, dim = (draw(2, 6, 4), *weights, 2, 6, 4, 3, 1e-5), 1
    check_layer(getattr(aten, name).default, args, weights, dim, pattern=False)
    with pytest.raises(Contradiction, match='needs its input unchanged'):
        check_layer(getattr(aten, name).default, args, weights, dim, pattern=True)


def test_the_rows_of_a_weight_that_is_computed():
    """What it is computed from is a parameter, with a free sign for each row."""
    parameter, bias, x = draw(12, 6, 3, 3), draw(12), draw(2, 6, 5, 5)
    weight = parameter * 2
    ops = [op_of(aten.mul.Scalar, (parameter, 2), {}, weight)]
    args = (x, weight, bias, *CONV, False, [0, 0], 1)
    ops.append(op_of(aten.convolution.default, args, {}, aten.convolution(*args)))
    signs = NetworkSigns(ops, {id(parameter): parameter, id(bias): bias})
    for op in ops:
        apply_rule(signs, op)
    wanted = random_signs((12,))
    signs.tie(signs.channels(ops[1].out, 1), wanted, 'outputs')
    factors = {id(t): factor for t, factor in signs.factors()}
    new = aten.convolution(x, parameter * factors[id(parameter)] * 2, bias * factors[id(bias)], *args[3:])
    assert torch.equal(new, ops[1].out * wanted.view(1, 12, 1, 1))


def test_a_linear_weight_that_is_read_elsewhere_keeps_its_sign():
    """As embeddings tied to a classifier."""
    weight, x = draw(7, 6), draw(4, 6)
    view, double = weight.t(), weight * 2
    ops = [
        op_of(aten.mul.Scalar, (weight, 2), {}, double),
        op_of(aten.t.default, (weight,), {}, view),
        op_of(aten.mm.default, (x, view), {}, x @ view),
    ]
    signs = NetworkSigns(ops, {id(weight): weight})
    for op in ops:
        apply_rule(signs, op)
    assert (signs.known(weight) == 1).all()


def test_a_layer_shared_by_inputs_of_different_signs_is_refused():
    conv = nn.Conv2d(3, 4, 1)
    a, b = draw(2, 3, 5, 5), draw(2, 3, 5, 6)
    ops = []
    for x in (a, b):
        args = (x, conv.weight, conv.bias, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
        with torch.no_grad():
            ops.append(op_of(aten.convolution.default, args, {}, aten.convolution(*args)))
    signs = NetworkSigns(ops, {id(p): p for p in conv.parameters()})
    signs.set(b, torch.tensor([1, -1, 1]).view(1, 3, 1, 1).expand(b.shape))
    apply_rule(signs, ops[0])
    with pytest.raises(Contradiction, match='the layer is shared by inputs of different signs'):
        apply_rule(signs, ops[1])


# Shapes of unknowns


@pytest.mark.parametrize('ids, shape', [
    (torch.arange(6).view(1, 6, 1, 1).expand(2, 6, 4, 4), (2, 6, 16)),
    (torch.arange(6).view(1, 6, 1, 1).expand(2, 6, 4, 4), (2, 3, 2, 4, 4)),
    (torch.arange(6).view(1, 6).expand(5, 6), (5, 2, 3)),
    (torch.arange(6).view(1, 1, 6).expand(2, 5, 6), (10, 6)),
    (torch.arange(12).view(2, 6, 1).expand(2, 6, 4), (12, 4)),
    (torch.arange(48).view(2, 6, 4), (8, 6)),
    (torch.tensor(3), (1,)),
])
def test_reshaping_unknowns(ids, shape):
    assert torch.equal(reshape(ids, torch.Size(shape)), ids.reshape(shape))


def test_narrow_drops_copies_only():
    ids = torch.arange(6).view(1, 6, 1).expand(2, 6, 4)
    assert narrow(ids).shape == (1, 6, 1)
    assert torch.equal(narrow(ids).expand(ids.shape), ids)
    assert narrow(ids.contiguous()).shape == (2, 6, 4)
