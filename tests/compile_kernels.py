"""Compiles every Triton kernel for an H200, on a machine with or without a GPU.

Prints a line for each: dtype, memory format, name of the kernel, and the widest access to global memory in bytes.
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


def compile_and_print(kernel, programs, *args, **meta):
    ptx = kernel.warmup(*args, grid=(programs,), enable_fp_fusion=True, **meta).asm['ptx']
    widths = [
        int(count or 1) * int(bits) // 8
        for count, bits in re.findall(r'(?:ld|st)\.global(?:\.v(\d))?\.b(\d+)', ptx)
    ]
    print(*case, kernel.fn.__name__, max(widths))


triton.runtime.driver.set_active(H200())
for module in (bipolar, dyrelu, softpool):
    module.launch = compile_and_print

case = 'bfloat16', 'channels_last'
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
for kernel_size, padding in ((2, 0), (3, 1)):
    window = Window.of([kernel_size] * 2, (2, 2), [padding] * 2, (1, 1))
    softpool.softpool_backward(softpool.softpool(x, window, False, 1.0, False), x, window, False, 1.0, False)
y, winner = bipolar.max_pool(x, window, False, 'interleaved')
bipolar.max_pool_backward(y, winner, (28, 28), window)

case = 'float32', 'contiguous'
x = torch.empty(4, 64, 14, 14)
bipolar.activation(x, None, 'relu', 6.0, 'interleaved', False)
bipolar.activation_backward(x, x, None, 'relu', 6.0, 'interleaved', False)
dyrelu.statistics(x, None)
dyrelu.statistics_backward(x, mean, None, x, None)
dyrelu.apply(x, theta, None, None)
dyrelu.apply_backward(x, x, theta, None, None)
