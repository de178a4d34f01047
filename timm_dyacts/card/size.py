"""What a model costs: parameters and multiply-adds."""
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..modes import evaluating

__all__ = ['Size', 'measure_size']


@dataclass(frozen=True)
class Size:
    """What a model costs.

    Attributes:
        params: Number of parameters.
        macs: Multiply-adds of the convolutions and matrix products for one image.
        input_size: Channels, height and width of that image.
    """
    params: int
    macs: int
    input_size: tuple[int, int, int]

    def __str__(self) -> str:
        """Give millions of parameters / GMACs, for tables."""
        return f'{self.params / 1e6:.2f} / {self.macs / 1e9:.2f}'


@torch.no_grad()
def measure_size(model: nn.Module) -> Size:
    """Count the parameters and, with torch's ``FlopCounterMode``, the multiply-adds of a timm model.

    The image has the size of the pretrained config. A model on the meta device is counted without computing anything.
    """
    input_size = tuple(model.pretrained_cfg['input_size'])
    image = torch.zeros(1, *input_size, device=next(model.parameters()).device)
    with evaluating(model), FlopCounterMode(display=False) as counter:
        model(image)
    return Size(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2, input_size)
