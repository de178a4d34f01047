"""Compiles every Triton kernel for an H200, on a machine with or without a GPU.

Prints a line for each: dtype, memory format, name of the kernel, the widest access to global memory in bytes, and the
bytes of each thread's stack, to which registers are spilled.
"""
import re
import subprocess
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget

from timm_dyacts.kernels import bipolar, dyrelu, hyper, softpool
from timm_dyacts.kernels.settings import DyReLUSettings
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
    asm = kernel.warmup(*args, grid=(programs,), enable_fp_fusion=True, **meta).asm
    widths = [
        int(count or 1) * int(bits) // 8
        for count, bits in re.findall(r'(?:ld|st)\.global(?:\.v(\d))?\.b(\d+)', asm['ptx'])
    ]
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(asm['cubin'])
        file.flush()
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, '--dump-resource-usage', file.name],
            check=True, capture_output=True, text=True).stdout
    print(*case, kernel.fn.__name__, max(widths), re.search(r'STACK:(\d+)', usage)[1])


def compile_dyrelu(x, hidden, spatial):
    channels = x.shape[1]
    params = [torch.empty(size) for size in ((hidden, channels), hidden, (4 * channels, hidden), 4 * channels)]
    params += [torch.empty(1, channels), torch.empty(1)] if spatial else [None, None]
    settings = DyReLUSettings([1.0, 0.0], [0.0, 0.0], 1.0, 0.5, 10.0, False, 6.0)
    y, *found = dyrelu.dynamic_relu(x, *params, settings)
    dyrelu.dynamic_relu_backward(y, x, *params, settings, found)


triton.runtime.driver.set_active(H200())
for module in (bipolar, dyrelu, hyper, softpool):
    module.launch = compile_and_print

case = 'bfloat16', 'channels_last'
x = torch.empty(4, 64, 28, 28, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
weight = torch.empty(64)
bipolar.activation(x, weight, 'prelu', 0.0, 'interleaved', False)
bipolar.activation_backward(x, x, weight, 'prelu', 0.0, 'interleaved', False)
bipolar.activation(x, None, 'elu', 1.0, 'halves', False)
compile_dyrelu(x, 8, True)
for kernel_size, padding in ((2, 0), (3, 1)):
    window = Window.of([kernel_size] * 2, (2, 2), [padding] * 2, (1, 1))
    softpool.softpool_backward(softpool.softpool(x, window, False, 1.0, False), x, window, False, 1.0, False)
y, winner = bipolar.max_pool(x, window, False, 'interleaved')
bipolar.max_pool_backward(y, winner, (28, 28), window)

case = 'float32', 'contiguous'
x = torch.empty(4, 64, 14, 14)
bipolar.activation(x, None, 'relu', 6.0, 'interleaved', False)
bipolar.activation_backward(x, x, None, 'relu', 6.0, 'interleaved', False)
compile_dyrelu(x, 1024, False)
