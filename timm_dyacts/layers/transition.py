"""From one module to another without a jump: the output moves from that of the old one to that of the new one."""
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .forms import Form, static_form

__all__ = ['Subsample', 'Transition', 'check_t']

# t in the buffer is a whole number of these units. Floats from 2 ** -9 up to 1 have one without rounding.
_UNITS = 2 ** 62
_OLD, _BOTH, _NEW = 0, 1, 2


class Transition(nn.Module):
    """``(1 - t) * old(x) + t * new(x)``. ``t`` starts at 0.

    At ``t = 0`` only ``old`` is computed and the output is its output, to the last bit; at ``t = 1`` only ``new``. A
    compiled model is compiled anew when it leaves 0 and when it reaches 1, and not in between, where ``t`` is read
    from a buffer.

    The buffer ``ticks`` holds ``t`` in units of ``2 ** -62``. It is an integer so that what averages the weights of a
    model (timm's ``ModelEmaV3``) copies it, and so that a cast to half precision does not round it. Set it with
    ``set``, or load it with a state dict; after it was written to in another way, ``train()`` or ``eval()`` takes
    note of it.

    At ``t = 0`` the parameters of ``new`` have no gradient, and at ``t = 1`` those of ``old``. Whoever wraps the model
    in PyTorch's ``DistributedDataParallel`` while ``t`` is there sets ``find_unused_parameters=True``, or sets ``t``
    first and wraps the model again when it gets to 1.

    Shape:
        - Input: what ``old`` and ``new`` take.
        - Output: of the same shape for both.

    Args:
        old: The module that is there, or a function.
        new: The module that is to take its place.
        device: Device of ``t``.

    Raises:
        AssertionError: On forward, if the outputs of ``old`` and ``new`` differ in shape.
    """

    def __init__(self, old: nn.Module, new: nn.Module, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.old = old
        self.new = new
        self.layout: Any = getattr(new, 'layout', None)
        self.stage = _OLD
        # Where both are computed, neither may overwrite the input of the other.
        self.clone_for_old: bool = _works_in_place(old)
        self.clone_for_new: bool = _works_in_place(new)
        self.register_buffer('ticks', torch.zeros((), dtype=torch.int64, device=device))

    def set(self, t: float) -> None:
        """Set ``t``.

        Args:
            t: From 0 to 1.

        Raises:
            ValueError: ``t`` is anything else.
        """
        ticks = round(check_t(t) * _UNITS)
        self.ticks.fill_(ticks)
        self.stage = _stage(ticks)

    def get(self) -> float:
        """Give ``t``. Waits for the device if the module is on a GPU."""
        return int(self.ticks) / _UNITS

    def static_form(self) -> Form:
        """Give the form of the module that is computed, ``'dynamic'`` where both are."""
        if self.stage == _BOTH:
            return Form('dynamic', {}, self.layout)
        return static_form(self.old if self.stage == _OLD else self.new)

    def forward(self, x: Tensor) -> Tensor:
        if self.stage == 0:
            return self.old(x)
        if self.stage == 2:
            return self.new(x)
        old = self.old(x.clone() if self.clone_for_old else x)
        new = self.new(x.clone() if self.clone_for_new else x)
        torch._assert(old.shape == new.shape, 'the outputs of the old and the new module must have the same shape')
        # Literals, for TorchScript. Not all devices have double precision.
        ticks = self.ticks.float() if self.ticks.device.type == 'mps' else self.ticks.double()
        difference = new - old
        return old + difference * (ticks * 2.0 ** -62).type_as(difference)

    def train(self, mode: bool = True) -> 'Transition':
        self._read_stage()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._read_stage()

    def _read_stage(self) -> None:
        if not self.ticks.is_meta:
            self.stage = _stage(int(self.ticks))

    def extra_repr(self) -> str:
        return 't=?' if self.ticks.is_meta else f't={self.get():.4g}'


class Subsample(nn.Module):
    """Every n-th row and column of (N, C, H, W): what a strided convolution gives, from one with stride 1.

    Which rows those are depends on how the convolution pads. With TensorFlow's "SAME" padding, it depends on the size
    of the input too.

    Args:
        stride: Distance of the rows, and of the columns.
        phases: For each group of channels the number of its channels, and for each axis a list: at index
            ``size % stride`` is the first row (column) that is taken where there are ``size`` of them. A single group
            has all channels, whatever its number.
    """

    def __init__(self, stride: tuple[int, int], phases: list[tuple[int, list[int], list[int]]]) -> None:
        super().__init__()
        self.stride = stride
        self.channels: list[int] = [channels for channels, _, _ in phases]
        self.rows: list[list[int]] = [rows for _, rows, _ in phases]
        self.columns: list[list[int]] = [columns for _, _, columns in phases]

    def forward(self, x: Tensor) -> Tensor:
        if len(self.channels) == 1:
            return self._take(x, 0)
        return torch.cat([self._take(part, i) for i, part in enumerate(x.split(self.channels, dim=1))], dim=1)

    def _take(self, x: Tensor, group: int) -> Tensor:
        top = self.rows[group][x.shape[-2] % self.stride[0]]
        left = self.columns[group][x.shape[-1] % self.stride[1]]
        # A mean of one element, which keeps the memory format and, unlike slices, needs one step back.
        return F.avg_pool2d(x[..., top:, left:], 1, self.stride)

    def extra_repr(self) -> str:
        return f'stride={self.stride}, rows={self.rows}, columns={self.columns}'


def check_t(t: float) -> float:
    """Give a value for ``t`` as a float.

    Raises:
        ValueError: It is no number from 0 to 1.
    """
    is_number = isinstance(t, (int, float)) and not isinstance(t, bool) and math.isfinite(t)
    if not is_number or not 0 <= t <= 1:
        raise ValueError(f't must be a number from 0 to 1, got {t!r}')
    return float(t)


def _stage(ticks: int) -> int:
    return _OLD if ticks <= 0 else _NEW if ticks >= _UNITS else _BOTH


def _works_in_place(branch: Any) -> bool:
    modules = branch.modules() if isinstance(branch, nn.Module) else [branch]
    return any(bool(getattr(module, 'inplace', False)) for module in modules)
