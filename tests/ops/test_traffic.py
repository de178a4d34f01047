"""The bytes that the Triton kernels move, against those that an operator has to move.

What that is stands in the record of the operator, ``operators.Benchmark``, in multiples of the input. It leaves out
what is small, and listed below; sizes at which that is not small are held against the sum of both.
"""
import math

import pytest
import torch
from support.kernels import LAYOUTS, ON_GPU, interpreter_loops

from timm_dyacts.operators import benchmarks

if ON_GPU or not interpreter_loops():
    pytest.skip('counts what the interpreter does, on a machine without a GPU', allow_module_level=True)

from support import audit  # noqa: E402
from support.traffic import count_bytes, full_runs, run_passes  # noqa: E402

# Inputs that no mask lets through are computed too.
pytestmark = pytest.mark.filterwarnings('ignore::RuntimeWarning:triton')

AIM = 1.02
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Whole tiles, in both layouts
WHOLE = {'act': (1, 16, 64, 64), 'pool': (1, 16, 16, 64)}
AWKWARD = [
    ((2, 5, 7, 9), 'slice'), ((2, 5, 7, 9), 'channels_last'), ((1, 3, 13, 14), 'contiguous'),
    ((2, 1, 2, 3), 'contiguous'), ((1, 70, 3, 2), 'channels_last'), ((1, 70, 3, 2), 'contiguous'),
]


def count(name, x):
    """Give what each pass moves."""
    torch.manual_seed(0)
    with full_runs(), count_bytes() as launches:
        return run_passes(benchmarks()[name].ours(x.shape[1]), x, launches)


def attention(name, x):
    """Bytes of what DyReLU-C keeps for each position in fp32: logits, shares, attention, and their gradients."""
    numbers = {'forward': 5, 'backward': 6} if name == 'dyrelu_c' else {}
    return {key: 4 * number * len(x) * math.prod(x.shape[2:]) for key, number in numbers.items()}


def winners(name, x):
    """Bytes of the numbers of the elements that have won, one for each window of max pooling."""
    if name != 'bipolar_max_pool':
        return {}
    windows = x[..., ::2, ::2][..., :x.shape[-2] // 2, :x.shape[-1] // 2].numel()
    return {'forward': windows, 'backward': windows}


def left_out(name, x):
    """Bytes of the zeros that the gradient is filled with where windows leave out elements."""
    return {'backward': x.nbytes} if name == 'softpool_2x2' and (x.shape[-2] % 2 or x.shape[-1] % 2) else {}


def sums(name, x):
    """Bytes of the second pass of SoftPool backward where windows overlap: the input, two numbers for each window."""
    if name != 'softpool_3x3':
        return {}
    return {'backward': x.nbytes + 2 * 2 * 4 * x[..., ::2, ::2].numel()}


def of_planes(name, x):
    """Bytes of the output of a global pool, or of its gradient, and of two numbers in fp32 for each plane."""
    planes = (x.element_size() + 8) * len(x) * x.shape[1]
    return {'forward': planes, 'backward': planes} if name == 'global_softpool' else {}


def coefficients(name, x):
    """Bytes of the coefficients of DyReLU, of all that they are computed from, and of their gradients."""
    if not name.startswith('dyrelu'):
        return {}
    module = benchmarks()[name].ours(x.shape[1])
    parameters = sum(p.nbytes for p in module.parameters())
    n, hidden, out, channels = len(x), len(module.fc1_bias), len(module.fc2_bias), x.shape[1]
    # Forward: summands of the means, written and read, the means, the hidden units, residuals and coefficients,
    # written, and coefficients, read. Backward: coefficients, read, summands of their gradients, written and read,
    # residuals, read, gradients of the outputs and the hidden units, written and read; hidden units, read twice, means,
    # read, and their gradients, written and read. In mode "c" also summands of the gradient of the 1x1 convolution.
    summands = 4 * 2 * 4 * n * channels if name == 'dyrelu_a' else 0
    return {
        'forward': parameters + 4 * n * (3 * channels + hidden + 3 * out) + 4 * n * out,
        'backward': 2 * parameters + summands + 4 * n * (3 * channels + 4 * hidden + 6 * out) + 8 * n * channels,
    }


def bounds(name, x, *others):
    """Give the bytes that each pass has to move."""
    benchmark = benchmarks()[name]
    planes = {'forward': benchmark.forward_bytes, 'backward': benchmark.backward_bytes}
    return {
        key: factor * x.nbytes + sum(other(name, x).get(key, 0) for other in others) for key, factor in planes.items()
    }


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
@pytest.mark.parametrize('name', benchmarks())
def test_whole_tiles_move_what_they_have_to(name, layout, dtype):
    shape = WHOLE['pool' if 'pool' in name else 'act']
    x = LAYOUTS[layout](torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype))
    counted = count(name, x)
    for key, bound in bounds(name, x, attention, winners, sums).items():
        moved = sum(launch.moved for launch in counted[key])
        # Not less either: what is moved is all that there is.
        assert 0.999 * bound <= moved <= AIM * bound, (key, moved / bound)


@pytest.mark.parametrize('shape, layout', AWKWARD, ids=str)
@pytest.mark.parametrize('name', benchmarks())
def test_awkward_sizes_move_little_more(name, shape, layout):
    """Elements beyond the end of a tensor, and tiles that are not full, cost time but no bytes."""
    x = LAYOUTS[layout](torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16())
    counted = count(name, x)
    for key, bound in bounds(name, x, attention, winners, sums, left_out, of_planes, coefficients).items():
        moved = sum(launch.moved for launch in counted[key])
        # Of an odd size, the output of a pool is more than a quarter of the input.
        assert moved <= (1.1 if 'pool' in name else AIM) * bound, (key, moved / bound)


@pytest.mark.parametrize('name', benchmarks())
def test_a_pass_keeps_little_more_than_it_writes(name):
    """Memory of a forward and backward pass, as a ratio to what the plain operator writes."""
    case = audit.Case(name, 'contiguous', 'bf16')
    assert 0 < audit.peak_bytes(case) < 1.05
