"""The scale that SoftPool computes in, so that no finite input overflows."""

__all__ = ['scale_of', 'sharpness_of']


def scale_of(count: int) -> float:
    """Give the factor by which SoftPool with windows of ``count`` elements scales its input.

    It is a power of 2, so that scaling is exact, and so small that neither the difference of two elements nor the sum
    of a window's differences overflows.
    """
    scale = 0.5
    while scale * count > 0.5:
        scale *= 0.5
    return scale


def sharpness_of(count: int, beta: float) -> float:
    """Give what ``beta`` is for the scaled input. It is bounded: infinity times a difference of zero would be NaN."""
    return max(-1e38, min(beta / scale_of(count), 1e38))
