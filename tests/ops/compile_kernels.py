"""Compile every Triton kernel for an H200, on a machine with or without a GPU.

Print a line for each: dtype, memory format, columns of the input, size of the window, name of the kernel, the widths
in bytes of its loads from global memory and of its stores, the number of its accesses to shared memory, and the bytes
of each thread's stack, to which registers are spilled.
"""
import torch
from support.compiled import compile_for, compile_kernel

from timm_dyacts.ops.bipolar import triton as bipolar
from timm_dyacts.ops.dyrelu import triton as dyrelu
from timm_dyacts.ops.dyrelu import triton_hyper as hyper
from timm_dyacts.ops.dyrelu.settings import DyReLUParams, DyReLUSettings
from timm_dyacts.ops.pooling.window import Window
from timm_dyacts.ops.softpool import triton as softpool
from timm_dyacts.ops.softpool import triton_global


def widths(found):
    return ','.join(map(str, found))


def compile_and_print(planned, *tensors):
    compiled = compile_kernel(planned, tensors)
    print(*case, compiled.name, widths(compiled.loads), widths(compiled.stores), compiled.exchanges, compiled.stack)


SETTINGS = DyReLUSettings([1.0, 0.0], [0.0, 0.0], 1.0, 0.5, 10.0, False, 6.0)


def dyrelu_params(channels, hidden, spatial=False):
    layers = [torch.empty(size) for size in ((hidden, channels), hidden, (4 * channels, hidden), 4 * channels)]
    return DyReLUParams(*layers, *([torch.empty(1, channels), torch.empty(1)] if spatial else [None, None]))


def compile_dyrelu(x, hidden, spatial):
    params = dyrelu_params(x.shape[1], hidden, spatial)
    y, *saved = dyrelu.dynamic_relu(x, SETTINGS, *params)
    dyrelu.dynamic_relu_backward(y, x, SETTINGS, *params, saved=saved)


def compile_coefficients(channels, hidden, rows):
    params = dyrelu_params(channels, hidden)
    _, *saved = hyper.coefficients(torch.empty(4, rows, channels), params, SETTINGS)
    hyper.coefficients_backward(torch.empty(4, rows, channels, 4), *saved, params, SETTINGS)


compile_for(90)
for module in (bipolar, dyrelu, hyper, softpool, triton_global):
    module.launch = compile_and_print

case = 'bfloat16', 'channels_last', 28, '-'
x = torch.empty(4, 64, 28, 28, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
weight = torch.empty(64)
bipolar.activation(x, weight, 'prelu', 0.0, 'interleaved', False)
bipolar.activation_backward(x, x, weight, 'prelu', 0.0, 'interleaved', False)
bipolar.activation(x, None, 'elu', 1.0, 'halves', False)
compile_dyrelu(x, 8, True)

case = 'float32', 'contiguous', 14, '-'
x = torch.empty(4, 64, 14, 14)
bipolar.activation(x, None, 'relu', 6.0, 'interleaved', False)
bipolar.activation_backward(x, x, None, 'relu', 6.0, 'interleaved', False)
compile_dyrelu(x, 1024, False)
# Sizes at which ptxas is inclined to spill.
for channels, hidden, rows in ((8, 8, 64), (64, 16, 64), (128, 32, 64), (256, 2, 64), (1024, 1, 5)):
    compile_coefficients(channels, hidden, rows)

WINDOWS = {'2x2': (2, 2, 0), '3x3': (3, 2, 1), '5x5': (5, 3, 2)}


def window_of(size):
    return Window.of(*([number] * 2 for number in WINDOWS[size]), (1, 1))


def pool(x, size, backward=True):
    window = window_of(size)
    y = softpool.softpool(x, window, False, 1.0, False)
    if backward:
        softpool.softpool_backward(y, x, window, False, 1.0, False)


def pool_globally(x):
    y, kept = softpool.global_softpool(x, 1.0, False)
    softpool.global_softpool_backward(y, x, 1.0, False, saved=(kept,))


def max_pool(x, size):
    window = window_of(size)
    y, winner = bipolar.max_pool(x, window, False, 'interleaved')
    bipolar.max_pool_backward(y, winner, x.shape[2:], window)


for dtype in (torch.bfloat16, torch.float32):
    name = str(dtype).removeprefix('torch.')
    for columns in (112, 56, 28):
        x = torch.empty(4, 64, columns, columns, dtype=dtype)
        case = name, 'contiguous', columns, '2x2'
        pool(x, '2x2')
        case = name, 'channels_last', columns, '2x2'
        pool(x.to(memory_format=torch.channels_last), '2x2')
    case = name, 'slice', 28, '2x2'
    pool(torch.empty(4, 64, 28, 32, dtype=dtype)[..., 2:30], '2x2', backward=False)

x = torch.empty(4, 64, 56, 56, dtype=torch.bfloat16)
for size in WINDOWS:
    case = 'bfloat16', 'contiguous', 56, size
    max_pool(x, size)
    case = 'bfloat16', 'channels_last', 56, size
    max_pool(x.to(memory_format=torch.channels_last), size)
    for layout, planes in (('contiguous', x), ('channels_last', x.to(memory_format=torch.channels_last))):
        if size == '2x2':  # the window is the plane, whatever the size
            case = 'bfloat16', layout, 56, '-'
            pool_globally(planes)
    if size != '2x2':
        pool(x.to(memory_format=torch.channels_last), size)
        case = 'bfloat16', 'contiguous', 56, size
        pool(x, size)
