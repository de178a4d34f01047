"""The window of a pooling."""
import itertools

import pytest

from timm_dyacts.ops.pooling.window import count_windows, trim


def places(size, kernel_size, stride, padding, dilation, ceil_mode):
    """Give where the elements of each window lie in an input."""
    return [
        [at for e in range(kernel_size) if 0 <= (at := window * stride - padding + e * dilation) < size]
        for window in range(count_windows(size, kernel_size, stride, padding, dilation, ceil_mode))
    ]


@pytest.mark.parametrize('ceil_mode', [False, True])
def test_trimmed_windows_hold_the_same_elements(ceil_mode):
    trimmed, strides, dilations = 0, (1, 2, 3, 7, 30), (1, 2, 3)
    for size, kernel_size, stride, dilation in itertools.product(range(1, 6), range(1, 13), strides, dilations):
        for padding in range(kernel_size // 2 + 1):
            window = kernel_size, stride, padding, dilation
            expected = places(size, *window, ceil_mode)
            if not expected or not all(expected):
                continue  # refused before
            (k,), (s,), (p,) = trim([size], *([part] for part in window), ceil_mode)
            assert places(size, k, s, p, dilation, ceil_mode) == expected
            assert 0 <= p <= k // 2 and 1 <= k <= kernel_size and 1 <= s <= stride
            trimmed += (k, s, p) != (kernel_size, stride, padding)
    assert trimmed


@pytest.mark.parametrize('window', [
    (2, 10 ** 9, 0, False), (10 ** 9, 10 ** 9, 0, True), (2 * 10 ** 9, 1, 10 ** 9, False),
])
def test_trimmed_windows_are_about_as_large_as_the_input(window):
    kernel_size, stride, padding, ceil_mode = window
    for part in trim([5], [kernel_size], [stride], [padding], [1], ceil_mode):
        assert part[0] <= 12
