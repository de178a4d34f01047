"""A training task for timm before 1.0.27, with what a run asks of those that later releases have (``timm.task``)."""
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.utils import ModelEmaV3, unwrap_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ['PlainTask']


class PlainTask(nn.Module):
    """Classification: a model, its loss and, if asked for, the moving average of its weights.

    Args:
        model: Maps images (N, C, H, W) to logits (N, num_classes). Its device is that of the task.
        criterion: The loss, a function of logits and targets.
    """

    def __init__(self, model: nn.Module, criterion: nn.Module) -> None:
        super().__init__()
        self.trainable_module = model
        self.trainable_module_ema: ModelEmaV3 | None = None
        self.criterion = criterion

    def forward(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        logits = self.trainable_module(images)
        return dict(loss=self.criterion(logits, targets), output=logits)

    def get_trainable_module(self, ema: bool = False) -> nn.Module | None:
        """Give the model as it is trained, perhaps wrapped, or the moving average."""
        return self.trainable_module_ema if ema else self.trainable_module

    def setup_ema(self, **kwargs: Any) -> None:
        """Keep a moving average from now on, with arguments of ``ModelEmaV3``."""
        self.trainable_module_ema = ModelEmaV3(self.trainable_module, **kwargs)

    def update_ema(self, step: int | None = None) -> None:
        """Move the average towards the weights, after update number ``step``."""
        if self.trainable_module_ema is not None:
            self.trainable_module_ema.update(unwrap_model(self.trainable_module), step=step)

    def compile(self, backend: str = 'inductor', mode: str | None = None) -> None:
        """Compile the model; what is evaluated is then ``eval_model``."""
        self.trainable_module = self.eval_model = torch.compile(self.trainable_module, backend=backend, mode=mode)

    def prepare_distributed(self, **kwargs: Any) -> 'PlainTask':
        """Wrap the model, with arguments of ``DistributedDataParallel``, and return the task."""
        self.trainable_module = DistributedDataParallel(self.trainable_module, **kwargs)
        return self

    def no_sync(self) -> AbstractContextManager[Any]:
        """Leave gradients on their process meanwhile."""
        return getattr(self.trainable_module, 'no_sync', nullcontext)()

    def get_clip_parameters(self, exclude_head: bool = False) -> Iterable[nn.Parameter]:
        """Give the parameters whose gradients are clipped, perhaps without the last layer, a weight and a bias."""
        parameters = list(self.trainable_module.parameters())
        return parameters[:-2] if exclude_head else parameters
