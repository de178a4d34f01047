"""What a model is called with to see what it does: a batch of ours, or example inputs of the user's."""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from .leaves import map_tensors, tensors_in

__all__ = ['Inputs', 'as_inputs', 'probing']

# What the detectors of torchvision are set to while they are probed: detections of every score, since what a threshold
# leaves of those in random images is nothing, and nothing cannot be compared; but few, since each costs time.
_DETECTORS = dict(score_thresh=-1.0, detections_per_img=8, topk_candidates=32)
_PROPOSALS = ('_pre_nms_top_n', '_post_nms_top_n')
_SIZE = (128,)  # of the shorter side of an image


class Inputs(NamedTuple):
    """The arguments of a call of a model.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def first(self) -> Tensor | None:
        """The first tensor among the arguments."""
        return next(iter(self.tensors), None)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return tensors_in((self.args, self.kwargs))

    @property
    def is_meta(self) -> bool:
        """Whether there is a tensor without values among the arguments."""
        return any(t.is_meta for t in self.tensors)

    def call(self, model: nn.Module) -> Any:
        """Call a model with them."""
        return model(*self.args, **self.kwargs)

    def map(self, function: Callable[[Tensor], Tensor]) -> 'Inputs':
        """Give the arguments with each tensor as a function makes it."""
        return Inputs(*map_tensors(function, tuple(self)))

    def clone(self) -> 'Inputs':
        """Copy the tensors: a model may write to what it is given."""
        return self.map(Tensor.clone)

    def double(self) -> 'Inputs':
        """Copy to the CPU, and numbers with a fraction to double precision."""
        return self.map(lambda t: t.to('cpu', torch.float64) if t.is_floating_point() else t.cpu())


def as_inputs(example_inputs: Any) -> Inputs:
    """Read ``example_inputs`` as ``convert`` takes it.

    Args:
        example_inputs: A tensor or a list of tensors is the only argument; a tuple holds the positional arguments, a
            dictionary the keyword arguments, and a pair of a tuple and a dictionary both.

    Raises:
        ValueError: If it is none of these, or holds no tensor.
    """
    if isinstance(example_inputs, Inputs):
        return example_inputs
    if isinstance(example_inputs, (Tensor, list)):
        inputs = Inputs((example_inputs,), {})
    elif isinstance(example_inputs, dict):
        inputs = Inputs((), dict(example_inputs))
    elif isinstance(example_inputs, tuple):
        is_pair = [type(part) for part in example_inputs] == [tuple, dict]
        inputs = Inputs(*example_inputs) if is_pair else Inputs(example_inputs, {})
    else:
        inputs = Inputs((), {})
    if not inputs.tensors or not all(isinstance(name, str) for name in inputs.kwargs):
        raise ValueError(
            'example_inputs must be a tensor, a list of tensors, a tuple of positional arguments, a dictionary of '
            f'keyword arguments or a pair of both, with a tensor in it, got {type(example_inputs).__name__}')
    return inputs


@contextmanager
def probing(model: nn.Module, resize: bool) -> Iterator[None]:
    """Set the detectors of torchvision to what suits a probe, and at the end back.

    Args:
        model: A model, of whatever kind.
        resize: Also have images resized to a small size, where they are resized anyway.
    """
    settings: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        if isinstance(getattr(module, 'score_thresh', None), (int, float)):
            settings += [(module, name, value) for name, value in _DETECTORS.items() if hasattr(module, name)]
        if isinstance(module, RegionProposalNetwork):
            settings += [(module, name, dict(training=32, testing=32)) for name in _PROPOSALS if hasattr(module, name)]
        if resize and isinstance(module, GeneralizedRCNNTransform) and module.fixed_size is None:
            settings.append((module, 'min_size', _SIZE))
    before = [(module, name, getattr(module, name)) for module, name, _ in settings]
    try:
        for module, name, value in settings:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
