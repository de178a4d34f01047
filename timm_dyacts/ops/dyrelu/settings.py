"""What defines a Dynamic ReLU, and what its forward pass keeps: the types that all implementations share."""
from typing import NamedTuple

from torch import Tensor

__all__ = ['DyReLUParams', 'DyReLUSaved', 'DyReLUSettings']


class DyReLUParams(NamedTuple):
    """The parameters of ``layers.DyReLU``, in this order wherever they are passed one by one."""
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor
    spatial_weight: Tensor | None
    spatial_bias: Tensor | None


class DyReLUSettings(NamedTuple):
    """The attributes of ``layers.DyReLU`` of the same names; with ``inplace``, a kernel may overwrite its input."""
    alpha: list[float]
    beta: list[float]
    lambda_a: float
    lambda_b: float
    tau: float
    paper_scale: bool
    max_value: float | None
    inplace: bool = False

    @property
    def starts(self) -> tuple[float, ...]:
        """The 2K coefficients that the residuals are added to."""
        return (*self.alpha, *self.beta)

    @property
    def ranges(self) -> tuple[float, ...]:
        """The factors of the 2K residuals, which lie between -1 and 1."""
        k = len(self.alpha)
        return (self.lambda_a,) * k + (self.lambda_b,) * k

    @property
    def divisor(self) -> float:
        """What the attention is divided by."""
        return 3.0 if self.paper_scale else 1.0


class DyReLUSaved(NamedTuple):
    """What the kernels keep for the backward pass besides the arguments.

    Attributes:
        theta: The coefficients, (N, C or 1, 2K).
        mean: The mean of each plane, (N, C).
        hidden: The hidden units, (N, hidden).
        residual: The residuals of the coefficients, (N, C * 2K or 2K).
        pi: The attention, (N, 1, *spatial), in mode "c".
        share: The attention before it is bounded and divided.
    """
    theta: Tensor
    mean: Tensor
    hidden: Tensor
    residual: Tensor
    pi: Tensor | None
    share: Tensor | None
