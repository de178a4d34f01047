"""The Triton kernels in the hands of Triton's compiler, which needs no GPU."""
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from timm_dyacts.ops import backends

pytest.importorskip('triton')


def test_kernels_compile_for_a_gpu_that_is_not_there(tmp_path):
    """The interpreter accepts what the compiler may not.

    Activations have to move 16 bytes at a time, and so does SoftPool 2x2, the smaller output in as many steps. Threads
    have to keep to themselves what they have read, and no register is spilled. SoftPool 3x3 of contiguous tensors loads
    pairs of columns, 16 bytes at a time but for those that neighbouring windows share.
    """
    triton_backend, = (backend for backend in backends.BACKENDS if backend.name == 'triton')
    try:
        triton_backend.require()
    except backends.TooOld as e:
        pytest.skip(str(e))
    env = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    script = Path(__file__).with_name('compile_kernels.py')
    env['PYTHONPATH'] = os.pathsep.join([str(script.parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, str(script)], env=dict(env, TRITON_CACHE_DIR=str(tmp_path)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len({kernel for *_, kernel, _, _, _, _ in lines}) == 23
    # What has one number for each coefficient moves little.
    small = {
        '_global_join_kernel', '_coefficients_kernel', '_parameters_backward_kernel', '_head_kernel',
        '_head_backward_kernel'}
    for dtype, layout, columns, window, kernel, loads, stores, shared, stack in lines:
        case = dtype, layout, columns, window, kernel, loads, stores, shared, stack
        assert stack == '0', case
        if window == '-' and kernel not in small:
            assert '16' in (loads + ',' + stores).split(','), case
        if window == '2x2' and 'max_pool' not in kernel:
            assert shared == '0', case
            assert (loads, stores) == expected_widths(dtype, layout, int(columns), 'backward' in kernel), case
        if (layout, window, kernel) == ('contiguous', '3x3', '_forward_kernel'):
            assert loads in ('4,16', '4,8,16'), case


def expected_widths(dtype, layout, columns, backward):
    """Of the loads and stores of SoftPool 2x2 of 64 channels."""
    if layout == 'channels_last':
        return '16', '16'
    item = 2 if dtype == 'bfloat16' else 4
    if layout == 'slice':  # its rows begin at an odd word
        return str(2 * item), str(2 * item)
    x, y = math.gcd(columns, 16 // item) * item, math.gcd(columns, 16 // item) * item // 2
    return (f'{y},{x}', str(x)) if backward else (str(x), str(y))
