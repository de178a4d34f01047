"""A scale and a shift per channel: what remains of a normalisation layer whose statistics are fixed."""
import torch
from torch import Tensor, nn

__all__ = ['ChannelAffine']


class ChannelAffine(nn.Module):
    """``y_c = weight_c * x_c + bias_c`` for an input of shape (N, C, *spatial).

    Args:
        channels: Number of channels.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            channels: int,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight: nn.Parameter = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))
        self.bias: nn.Parameter = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        shape = [-1] + [1] * (x.dim() - 2)
        return torch.addcmul(self.bias.view(shape), x, self.weight.view(shape))

    def extra_repr(self) -> str:
        return f'{self.weight.shape[0]}'
