"""How tensors are cut into tiles: sizes, in plain Python."""
from torch import Tensor

__all__ = ['cdiv', 'channels_inner', 'power_of_2']

# Triton has the first two, for compiled code too, and slower than anything else here.


def cdiv(size: int, block: int) -> int:
    """Count the blocks that cover a size."""
    return -(-size // block)


def power_of_2(size: int) -> int:
    """Give the smallest power of 2 that is not smaller."""
    return 1 << (size - 1).bit_length()


def channels_inner(x: Tensor) -> bool:
    """Whether the channels of a tensor of shape (N, C, *spatial) are contiguous in memory."""
    return x.stride(1) == 1 and x.shape[1] > 1
