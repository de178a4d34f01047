"""Compiles every Triton kernel for an H200, on a machine with or without a GPU.

Prints a line for each: dtype, memory format, columns of the input, size of the window, name of the kernel, the widths
in bytes of its loads from global memory and of its stores, and the number of its accesses to shared memory.
"""
import re

import torch
import triton
from triton.backends.compiler import GPUTarget

from timm_dyacts.kernels import bipolar, dyrelu, softpool
from timm_dyacts.kernels.window import Window


class H200:
    """As much of a driver as compilation asks for."""

    def get_current_target(self):
        return GPUTarget('cuda', 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def widths(ptx, instruction):
    """The widths in bytes, each once."""
    found = re.findall(rf'{instruction}\.global(?:\.v(\d))?\.b(\d+)', ptx)
    return ','.join(map(str, sorted({int(count or 1) * int(bits) // 8 for count, bits in found})))


def compile_and_print(kernel, programs, *args, **meta):
    ptx = kernel.warmup(*args, grid=(programs,), enable_fp_fusion=True, **meta).asm['ptx']
    shared = len(re.findall(r'(?:ld|st)\.shared|(?:ld|st)matrix|bar\.', ptx))
    print(*case, kernel.fn.__name__, widths(ptx, 'ld'), widths(ptx, 'st'), shared)


triton.runtime.driver.set_active(H200())
for module in (bipolar, dyrelu, softpool):
    module.launch = compile_and_print

case = 'bfloat16', 'channels_last', 28, '-'
x = torch.empty(4, 64, 28, 28, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
mean, theta, weight = torch.empty(4, 64), torch.empty(4, 64, 4), torch.empty(1, 64)
logits = torch.empty(4, 1, 28, 28)
bipolar.activation(x, weight[0], 'prelu', 0.0, 'interleaved', False)
bipolar.activation_backward(x, x, weight[0], 'prelu', 0.0, 'interleaved', False)
bipolar.activation(x, None, 'elu', 1.0, 'halves', False)
dyrelu.statistics(x, weight)
dyrelu.statistics_backward(x, mean, logits, x, weight)
dyrelu.apply(x, theta, logits, 6.0)
dyrelu.apply_backward(x, x, theta, logits, 6.0)

case = 'float32', 'contiguous', 14, '-'
x = torch.empty(4, 64, 14, 14)
bipolar.activation(x, None, 'relu', 6.0, 'interleaved', False)
bipolar.activation_backward(x, x, None, 'relu', 6.0, 'interleaved', False)
dyrelu.statistics(x, None)
dyrelu.statistics_backward(x, mean, None, x, None)
dyrelu.apply(x, theta, None, None)
dyrelu.apply_backward(x, x, theta, None, None)

WINDOWS = {'2x2': (2, 2, 0), '3x3': (3, 2, 1), '5x5': (5, 3, 2)}


def window_of(size):
    return Window.of(*([number] * 2 for number in WINDOWS[size]), (1, 1))


def pool(x, size, backward=True):
    window = window_of(size)
    y = softpool.softpool(x, window, False, 1.0, False)
    if backward:
        softpool.softpool_backward(y, x, window, False, 1.0, False)


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
    if size != '2x2':
        pool(x.to(memory_format=torch.channels_last), size)
        case = 'bfloat16', 'contiguous', 56, size
        pool(x, size)
