"""A fuzzer of the operators: random calls against their definitions in float64, values and gradients.

What fails says the seed and the number of the call. ``--fuzz 25`` makes 10,000 calls.
"""
import collections
import contextlib
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from support import reference
from support.native import trained
from torch import Tensor, nn

from timm_dyacts.layers import (
    BELU,
    BSELU,
    Bipolar,
    BipolarMaxPool2d,
    BLeakyReLU,
    BPReLU,
    BReLU,
    DyReLU,
    GlobalSoftPool2d,
    SoftPool1d,
    SoftPool2d,
    SoftPool3d,
)
from timm_dyacts.ops.backends import BACKENDS, use_backend
from timm_dyacts.ops.dyrelu.functional import dyrelu

CALLS = 400
# Rounding of a result, as a share of the largest number that it is made of
ROUNDING = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# Kinds of values that reach, or come near, the largest number
BIG = ('huge', 'max', 'large', 'mixed')
MODES = {
    'grad': contextlib.nullcontext,
    'no_grad': torch.no_grad,
    'inference_mode': torch.inference_mode,
    'autocast': lambda: torch.autocast('cpu', torch.bfloat16),
}
_USABLE = [b.name for b in BACKENDS if b.device_type == 'cpu' and b.why_not() is None]


@dataclass
class Call:
    """A call of an operator.

    Attributes:
        name: What is called, for messages.
        ours: The operator, of the input and its parameters.
        definition: The same in float64.
        x: The input.
        params: Tensors with a gradient beside it.
        kind: Of values the input has.
        is_pool: Windows with an infinity or NaN have none of the values that others have.
        gap: Gives for each element how far it is from a kink, where the gradient is anybody's.
    """
    name: str
    ours: object
    definition: object
    x: Tensor
    params: tuple
    kind: str
    gap: object = None


def draw_values(rng, shape, dtype):
    """Give a tensor of some kind of values, and the name of the kind."""
    generator = torch.Generator().manual_seed(rng.randrange(2 ** 31))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    kind = rng.choice((
        'normal', 'normal', 'normal', 'normal', 'spread', 'equal', 'zeros', 'tiny', 'denormal', *BIG, 'inf', 'nan'))
    info = torch.finfo(dtype)
    flat = x.view(-1)
    if kind == 'spread':
        x = x * 10 ** rng.uniform(-3, 3)
    elif kind == 'equal':
        x = x.round()
    elif kind == 'zeros':
        flat[::3], flat[1::3] = 0.0, -0.0
    elif kind == 'tiny':
        x = x * info.tiny
    elif kind == 'huge':
        x = x.sign() * torch.rand(shape, generator=generator, dtype=torch.float64) * info.max
    elif kind == 'denormal':
        x = x.sign() * torch.rand(shape, generator=generator, dtype=torch.float64) * info.tiny
    elif kind == 'max':
        x = x.sign() * info.max
    elif kind == 'large':
        x = x * (1e4 if dtype == torch.float16 else 1e30)
    elif kind == 'mixed':
        flat[::2], flat[1::5], flat[2::7] = 0.0, info.max, -info.max / 3
    elif kind == 'inf':
        flat[::5], flat[2::7] = float('inf'), float('-inf')
    elif kind == 'nan':
        flat[::5] = float('nan')
    return x.to(dtype), kind


def lay_out(rng, x):
    """Give the same values with other strides."""
    kind = rng.choice((
        'contiguous', 'channels_last', 'transposed', 'slice', 'offset', 'steps', 'expanded', 'expanded_channels',
        'expanded_positions', 'fortran'))
    if kind == 'channels_last':
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if kind == 'transposed':
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == 'slice':
        return torch.stack([x, x], -1).flatten(-2)[..., ::2]
    if kind == 'offset':
        return torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape)
    if kind == 'steps':
        larger = x.new_full([2 * size + 1 for size in x.shape], float('nan'))
        return larger[(slice(1, None, 2),) * x.dim()].copy_(x)
    if kind == 'expanded' and x.shape[0] > 0:
        return x[:1].expand(x.shape)
    if kind == 'expanded_channels':
        return x[:, :1].expand(x.shape)
    if kind == 'expanded_positions':
        return x[..., :1].expand(x.shape)
    if kind == 'fortran':
        return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    return x.contiguous()


def draw_input(rng, ranks, dtype, largest=(0, 20, 9, 5)):
    batch = rng.choice((0, 1, 1, 2, 3))
    channels = rng.choice((1, 2, 3, 4, 5, 7, 8, 16, 17, 33))
    rank = rng.choice(ranks)
    spatial = [rng.randint(1, largest[rank]) for _ in range(rank)]
    x, kind = draw_values(rng, (batch, channels, *spatial), dtype)
    return lay_out(rng, x), kind


def draw_window(rng, sizes):
    """Give arguments of a pooling that fit an input, one set for each dimension."""
    per_dim = []
    for size in sizes:
        while True:
            kernel, dilation = rng.choice((1, 2, 3, 4, size, size + 1, 2 * size + 2)), rng.choice((1, 1, 2, 3))
            padding = rng.randint(0, kernel // 2)
            # A window with nothing but padding in it has no average.
            if size + 2 * padding >= dilation * (kernel - 1) + 1 and (padding == 0 or size >= dilation):
                break
        per_dim.append((kernel, rng.choice((1, 2, 3, 4, kernel, 30)), padding, dilation))
    return (*zip(*per_dim, strict=True), rng.random() < 0.3)


def tame(x, kind, factor):
    """Take from the largest numbers what a definition, or PyTorch, needs not to overflow."""
    return x / factor if kind in BIG else x


def draw_softpool(rng, dtype):
    x, kind = draw_input(rng, (1, 2, 3), dtype, (0, 9, 4, 2))
    x = tame(x, kind, 1024 if dtype == torch.float64 else 1)
    rank = x.dim() - 2
    window = draw_window(rng, x.shape[2:])
    beta, detach = rng.choice((1.0, 1.0, 0.0, -2.0, 5.0)), rng.random() < 0.3
    module = (SoftPool1d, SoftPool2d, SoftPool3d)[rank - 1](*window[:4], window[4], beta=beta, detach_weights=detach)
    return Call(
        f'{module}', module, lambda x: reference.softpool(x, *window, beta=beta, detach_weights=detach), x, (), kind)


def draw_global_softpool(rng, dtype):
    x, kind = draw_input(rng, (2,), dtype)
    x = tame(x, kind, 1024 if dtype == torch.float64 else 1)
    beta, detach = rng.choice((1.0, 0.5, 0.0, -2.0)), rng.random() < 0.3
    window = (tuple(x.shape[2:]), (1, 1), (0, 0), (1, 1), False)
    return Call(
        f'global {beta} {detach}', GlobalSoftPool2d(beta=beta, detach_weights=detach),
        lambda x: reference.softpool(x, *window, beta=beta, detach_weights=detach), x, (), kind)


def draw_max_pool(rng, dtype):
    x, kind = draw_input(rng, (2,), dtype)
    window, layout = draw_window(rng, x.shape[2:]), rng.choice(('interleaved', 'halves'))
    module = BipolarMaxPool2d(*window[:4], window[4], layout=layout)

    def definition(x):
        signs = reference.bipolar(torch.ones(1, x.shape[1]), lambda x: x, layout).double()
        index = torch.arange(x.shape[1])
        positive = index % 2 == 0 if layout == 'interleaved' else index < x.shape[1] / 2
        signs = torch.where(positive, signs, -signs).view(1, -1, 1, 1)
        return signs * F.max_pool2d(signs * x, *window)

    return Call(f'{module}', module, definition, x, (), kind)


def draw_bipolar(rng, dtype):
    x, kind = draw_input(rng, (0, 1, 2, 3), dtype)
    layout = rng.choice(('interleaved', 'halves'))
    slope = rng.choice((0.1, -0.2, 0.0))
    module, plain = rng.choice((
        (BReLU(layout=layout), F.relu),
        (BReLU(max_value=6, layout=layout), F.relu6),
        (BELU(alpha=0.5, layout=layout), lambda x: F.elu(x, 0.5)),
        (BSELU(layout=layout), F.selu),
        (BLeakyReLU(slope, layout=layout), lambda x: F.leaky_relu(x, slope)),
        (Bipolar(nn.SiLU(), layout=layout), F.silu),
        (Bipolar(nn.Hardswish(), layout=layout), F.hardswish),
    ))
    if kind in BIG and plain is F.hardswish:
        x = x / x.abs().max().clamp(min=1) if x.numel() else x  # torch's own overflows
    return Call(f'{module}', module, lambda x: reference.bipolar(x, plain, layout), x, (), kind)


def draw_bprelu(rng, dtype):
    x, kind = draw_input(rng, (0, 1, 2, 3), dtype)
    layout = rng.choice(('interleaved', 'halves'))
    number = rng.choice((1, x.shape[1]))
    module = trained(BPReLU(number, layout=layout)).to(dtype)

    def definition(x, weight):
        weight = weight.expand(x.shape[1])
        parts = [reference.bipolar(x[:, [c, c]], lambda x, c=c: F.prelu(x, weight[c:c + 1]), 'interleaved')
                 for c in range(x.shape[1])]
        odd = [c % 2 if layout == 'interleaved' else int(c >= x.shape[1] / 2) for c in range(x.shape[1])]
        return torch.stack([part[:, o] for part, o in zip(parts, odd, strict=True)], 1)

    return Call(f'{module}', module, definition, x, tuple(module.parameters()), kind)


def draw_dyrelu(rng, dtype):
    x, kind = draw_input(rng, (0, 1, 2, 3), dtype)
    x = tame(x, kind, 64)  # the products with the slopes do not overflow
    generator = torch.Generator().manual_seed(rng.randrange(2 ** 31))
    k, shared, max_value = rng.randint(1, 4), rng.random() < 0.4, rng.choice((None, None, 0.5))
    wide = rng.choice((dtype, torch.promote_types(dtype, torch.float32)))
    theta = torch.randn(x.shape[0], 1 if shared else x.shape[1], 2 * k, generator=generator, dtype=wide)
    pi = torch.rand(x.shape[0], 1, *x.shape[2:], generator=generator, dtype=wide) if rng.random() < 0.4 else None
    params = (theta,) if pi is None else (theta, pi)

    def ours(x, theta, pi=None):
        return dyrelu(x, theta, pi, max_value)

    def definition(x, theta, pi=None):
        return reference.dyrelu(x, theta, pi, max_value)

    def gap(x):
        return kink_distance(x, theta.double(), max_value)

    return Call(f'dyrelu k={k} shared={shared} max_value={max_value}', ours, definition, x, params, kind, gap)


def draw_dyrelu_module(rng, dtype):
    x, kind = draw_input(rng, (0, 1, 2, 3), dtype)
    if kind in ('inf', 'nan'):  # a plane with one has no mean
        x, kind = x.nan_to_num(0, 1, -1).clamp(-9, 9), 'normal'
    x = tame(x, kind, 1 if dtype == torch.float16 else 2 ** 20)  # nor do the sums over planes and channels
    # Where sums are that large, their signs alone count, which rounding may change: there, of modules that start.
    module = (trained if kind not in BIG else lambda module: module)(DyReLU(
        x.shape[1], mode=rng.choice('abc'), k=rng.randint(1, 3), reduction=rng.choice((1, 4, 8)),
        max_value=rng.choice((None, None, 6)))).to(torch.float64 if dtype == torch.float64 else torch.float32)

    def definition(x, *params):
        return reference.dyrelu_module(module, x)

    def gap(x):
        return kink_distance(x, reference.dyrelu_coefficients(module, x), module.max_value)

    return Call(f'{module}', module, definition, x, tuple(module.parameters()), kind, gap)


def kink_distance(x, theta, max_value):
    """Give the smallest distance of two pieces that compete for being the largest, or of that from its bound."""
    k = theta.shape[2] // 2
    theta = theta.detach().expand(*x.shape[:2], 2 * k).reshape(*x.shape[:2], *[1] * (x.dim() - 2), 2 * k)
    pieces = (x.double().unsqueeze(-1) * theta[..., :k] + theta[..., k:]).sort(-1).values
    distance = (pieces[..., -1] - pieces[..., -2]).min() if k > 1 and x.numel() else torch.tensor(1.0)
    if max_value is not None and x.numel():
        distance = torch.minimum(distance, (pieces[..., -1] - max_value).abs().min())
    return float(distance)


DRAWS = (
    draw_softpool, draw_softpool, draw_global_softpool, draw_max_pool, draw_bipolar, draw_bipolar, draw_bprelu,
    draw_dyrelu, draw_dyrelu_module)


def results(function, x, params, dy, needed):
    """Give the output, and the gradients for ``dy`` of the operands that are ``needed``, None for the others."""
    operands = [t if isinstance(t, nn.Parameter) else t.detach() for t in (x, *params)]
    for t, need in zip(operands, needed, strict=True):
        t.requires_grad_(need)
    y = function(*operands)
    grads = iter(torch.autograd.grad(y, [t for t in operands if t.requires_grad], dy.to(y.dtype), allow_unused=True))
    return y.detach(), *(next(grads) if need else None for need in needed)


def compare(call, dtype, backend, mode, dy, needed):
    function = (lambda x, *_: call.ours(x)) if isinstance(call.ours, nn.Module) else call.ours
    with use_backend(backend):
        ours = results(function, call.x, call.params, dy, needed)
        with MODES[mode]():
            again = function(call.x.detach(), *(p.detach() for p in call.params)).clone()
    doubled = [p.detach().double() for p in call.params]
    if isinstance(call.ours, DyReLU):  # the definition reads the module
        doubled = list(call.params)
    expected = results(call.definition, call.x.double(), doubled, dy.double(), needed)
    assert ours[0].shape == expected[0].shape and ours[0].dtype == again.dtype == dtype
    special, big = call.kind in ('inf', 'nan'), call.kind in BIG
    has_gradient = not special and (
        call.gap is None or call.gap(call.x) > 1e-5 * max(1, float(call.x.abs().max()) if call.x.numel() else 1))
    magnitude = float(call.x.double().abs().nan_to_num(0, 0, 0).max()) if call.x.numel() else 0.0
    for which, a, b in ((0, again, expected[0]), *zip(range(len(ours)), ours, expected, strict=True)):
        if which and not has_gradient or a is None or b is None or not b.numel():
            continue
        if which > 1 and big:  # the sums of their products overflow
            continue
        a, b = a.double(), b.to(a.dtype).double()
        finite = b[b.isfinite()].abs()
        # Large elements may cancel out, and leave their rounding; slopes that are computed have one of their own.
        least = 1.0 if which else magnitude if big or isinstance(call.ours, DyReLU) else min(magnitude, 1.0)
        scale = max(float(finite.max()) if finite.numel() else 0.0, least, 1e-300)
        atol = ROUNDING[dtype] * scale
        if which:  # sums of many products, each rounded
            atol = ROUNDING[dtype] * max(scale, 1.0) * (1.0 if big else max(1.0, magnitude)) * 4
        if call.kind in ('tiny', 'denormal'):
            atol += 4 * torch.finfo(dtype).smallest_normal
        torch.testing.assert_close(a, b, rtol=0, atol=atol, equal_nan=True, msg=lambda m, w=which: (
            f'{"gradient " + str(w) if w else "output"}: {m}'))


def test_random_calls(tries, seed):
    counts = collections.Counter()
    wrong = []
    for number in range(tries(CALLS)):
        rng = random.Random(f'{seed} {number}')
        dtype = rng.choice((torch.float64, torch.float32, torch.float32, torch.float16, torch.bfloat16))
        draw = rng.choice(DRAWS)
        torch.manual_seed(number)
        call = draw(rng, dtype)
        backend = rng.choice(('reference', 'auto', *_USABLE))
        mode = rng.choice(tuple(MODES))
        with torch.no_grad():
            y_shape = call.definition(call.x.double(), *(p.double() for p in call.params)).shape
        dy = lay_out(rng, torch.randn(y_shape, generator=torch.Generator().manual_seed(number)).to(dtype))
        needed = [rng.random() < 0.8 for _ in (call.x, *call.params)]
        needed[rng.randrange(len(needed))] = True
        counts[draw.__name__.removeprefix('draw_')] += 1
        try:
            compare(call, dtype, backend, mode, dy, needed)
        except Exception as e:
            text = (
                f'seed {seed}, call {number}: {call.name}, {dtype}, {backend}, {mode}, {tuple(call.x.shape)} '
                f'{call.kind}, strides {call.x.stride()}: {type(e).__name__} {e}')
            wrong.append(text)
    print(f'{sum(counts.values())} calls: {dict(counts)}')
    assert not wrong, f'{len(wrong)} wrong:\n' + '\n'.join(wrong[:10])
