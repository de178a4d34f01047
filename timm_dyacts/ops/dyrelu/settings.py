"""The numbers that make a Dynamic ReLU what it is, in plain Python."""
from typing import NamedTuple

__all__ = ['DyReLUSettings']


class DyReLUSettings(NamedTuple):
    """The attributes of `layers.DyReLU` of the same names."""

    alpha: list[float]
    beta: list[float]
    lambda_a: float
    lambda_b: float
    tau: float
    paper_scale: bool
    max_value: float | None

    @property
    def starts(self) -> tuple[float, ...]:
        """The 2K coefficients of a channel without what is added to them."""
        return (*self.alpha, *self.beta)

    @property
    def ranges(self) -> tuple[float, ...]:
        """The most that is added to each."""
        k = len(self.alpha)
        return (self.lambda_a,) * k + (self.lambda_b,) * k

    @property
    def divisor(self) -> float:
        """What the attention is divided by."""
        return 3.0 if self.paper_scale else 1.0
