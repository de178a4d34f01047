"""The probe batch: an input that a model takes, to see what the model does and to compare outputs."""
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from .inputs import Inputs, as_inputs
from .leaves import numbers_in, tensors_in
from .report import ConversionError
from .trace import Trace, trace_forward

__all__ = ['REFUSALS', 'Difference', 'compare_outputs', 'dry_run', 'input_sizes', 'probe_batch']

# What a model raises that was given an input of another kind
REFUSALS = (AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def input_sizes(model: nn.Module, at_least: int = 64) -> list[tuple[int, ...]]:
    """Give the input sizes to try, without the batch dimension, the smallest one first.

    Args:
        model: A model, of timm or not. Its first convolution tells whether it takes images, signals or volumes, and of
            how many channels; one without convolutions is given what its first linear layer takes.
        at_least: Height and width of the smallest input, where the model is not made for one size or a smaller one.

    Returns:
        One size, or several where a model may need a larger input than the smallest: the last one is that which a timm
        model was made for.
    """
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    convs = [m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    if 'input_size' not in cfg and not all(isinstance(conv, nn.Conv2d) for conv in convs[:1]):
        if isinstance(convs[0], nn.Conv1d):
            return [(convs[0].in_channels, at_least * factor) for factor in (1, 16, 256)]
        # Volumes first, then clips of 16 frames, as networks for videos may need them
        sides = [[side] * 3 for side in (max(at_least // 2, 1), at_least)] + [[16, 112, 112], [16, 224, 224]]
        return [(convs[0].in_channels, *size) for size in sides]
    linear = next((m for m in model.modules() if isinstance(m, nn.Linear)), None)
    if 'input_size' not in cfg and not convs and linear is not None:
        return [(linear.in_features,)]

    channels, height, width = cfg.get('input_size', (3, 224, 224))
    img_size = getattr(getattr(model, 'patch_embed', None), 'img_size', None)  # a timm model may be built for another
    if isinstance(img_size, (int, tuple)):
        height, width = to_2tuple(img_size)
    conv = next((m for m in convs if isinstance(m, nn.Conv2d)), None)
    if conv is not None:
        channels = getattr(model, 'in_chans', conv.in_channels)
    full = (channels, height, width)
    small = (channels, min(height, at_least), min(width, at_least))
    return [full] if cfg.get('fixed_input_size', False) or small == full else [small, full]


def probe_batch(model: nn.Module, size: Sequence[int]) -> Tensor:
    """Draw two inputs of a size, always the same, on the device and in the dtype of the model."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    # A generator of its own: the user's random state stays as it is.
    x = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    return x.to(device=like.device, dtype=like.dtype)


def dry_run(
        model: nn.Module,
        input_size: Sequence[int] | None = None,
        example_inputs: Any = None,
        most_flops: float = float('inf'),
) -> Trace:
    """Record a forward pass of the probe batch.

    Args:
        model: The model.
        input_size: Size of its input without the batch dimension, of any rank. Default: the first of ``input_sizes``
            that it takes.
        example_inputs: What to call the model with instead, as ``convert`` takes it.
        most_flops: The most floating-point operations that the pass may take. One that would take more is recorded
            with meta tensors, which takes none.

    Raises:
        ValueError: If ``input_size`` or ``example_inputs`` is none.
        ConversionError: If the model does not take the input.
    """
    if example_inputs is not None:
        try:
            return _record(model, as_inputs(example_inputs), most_flops)
        except REFUSALS as e:
            raise ConversionError(
                f'example_inputs must be what the model takes in eval mode ({type(e).__name__}: {e})') from e
    if input_size is not None:
        sizes = [tuple(input_size)]
        if not sizes[0] or any(not isinstance(n, int) or n < 1 for n in sizes[0]):
            raise ValueError(f'input_size must be a positive (C, H, W), (C, L) or the like, got {input_size!r}')
    else:
        sizes = input_sizes(model)
    for size in sizes:
        try:
            return _record(model, Inputs((probe_batch(model, size),), {}), most_flops)
        except REFUSALS as e:
            refusal = e
    reason = f'{type(refusal).__name__}: {refusal}'
    if input_size is not None:
        raise ConversionError(
            'input_size must be a positive (C, H, W), or (C, L) for signals, (C, D, H, W) for volumes, that the model '
            f'takes, got {sizes[0]!r} ({reason})') from refusal
    tried = ' or '.join(map(str, sizes))
    raise ConversionError(
        f'The model takes no probe batch of size {tried}: pass input_size, the size of its input without the batch '
        f'dimension, e.g. (C, H, W), (C, L) or (C, D, H, W), or example_inputs, what it is called with ({reason})'
    ) from refusal


def _record(model: nn.Module, inputs: Inputs, most_flops: float) -> Trace:
    weights, elements = (sum(t.numel() for t in tensors) for tensors in (model.parameters(), inputs.tensors))
    # A weight is hardly ever used more often than there are positions: most networks need no closer look.
    if 2 * weights * elements > most_flops:
        try:
            trace = trace_forward(model, inputs.map(lambda t: t.to('meta')))
            if trace.flops > most_flops:
                return trace
        except REFUSALS:  # what it does depends on values
            pass
    return trace_forward(model, inputs)


class Difference(NamedTuple):
    """How far two outputs differ.

    Attributes:
        largest: The largest absolute difference of an element. Infinite if the shapes differ.
        scale: The largest absolute element before.
        tolerance: The difference that rounding explains.
    """
    largest: float
    scale: float
    tolerance: float

    @property
    def is_rounding(self) -> bool:
        """Whether the difference is within the tolerance; what is not a number is not."""
        return self.largest <= self.tolerance


def compare_outputs(
        before: Any,
        after: Any,
        signs: Sequence[Tensor | None] | None = None,
) -> Difference | None:
    """Compare each tensor and each number of an output with the one that was there before.

    Args:
        before: The output before, tensors and numbers in any nesting.
        after: The output after.
        signs: The +-1 tensor that each tensor is now multiplied by, ``None`` for no change.

    Returns:
        The difference of the tensor that moved most for its size, infinite if shapes or the number of tensors differ,
        ``None`` if nothing could be compared.
    """
    old, new = tensors_in(before), tensors_in(after)
    old_numbers, new_numbers = numbers_in(before), numbers_in(after)
    if len(old) != len(new) or len(old_numbers) != len(new_numbers):
        return Difference(float('inf'), 0.0, 0.0)
    pairs = [
        *zip(old, new, signs or [None] * len(old), strict=True),
        # A number with a fraction was computed in single precision, for all that can be known.
        *((torch.tensor(a), torch.tensor(b), None) for a, b in zip(old_numbers, new_numbers, strict=True)),
    ]
    found = [
        _difference(*pair) for pair in pairs
        if not pair[0].is_meta and (pair[0].numel() or pair[0].shape != pair[1].shape)]
    # What is not a number is the worst of all.
    return max(found, key=lambda d: (d.largest != d.largest, d.largest / max(d.scale, 1e-6)), default=None)


def _difference(before: Tensor, after: Tensor, signs: Tensor | None) -> Difference:
    # As many ulps in either precision would be too strict in double, where amplified rounding must pass.
    tolerance = 0.0
    if before.is_floating_point() or before.is_complex():
        eps = torch.finfo(before.dtype).eps
        tolerance = 1e-9 if eps < 1e-12 else 1e3 * eps
    if before.shape != after.shape:
        scale = before.double().abs().max().item() if before.numel() and not before.is_complex() else 0.0
        return Difference(float('inf'), scale, 0.0)
    if signs is not None:
        before = before * signs.to(before)
    if before.is_complex():
        before, after = torch.view_as_real(before), torch.view_as_real(after)
    before, after = before.double(), after.double()
    scale = before.abs().max().item()
    largest = torch.where(before == after, 0.0, (before - after).abs()).max().item()
    return Difference(largest, scale, tolerance * max(scale, 1e-6))
