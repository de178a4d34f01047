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
