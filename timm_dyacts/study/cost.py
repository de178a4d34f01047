"""What the models of a comparison cost, measured in one process, one step of each in turn."""
import statistics
import time
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from ..card.size import Size, measure_size
from ..device import build_amp, resolve_device
from ..loading import build_model, resolve_input
from ..training import TrainConfig
from ..training.finetune import build_optimizer
from .report import Cost

__all__ = ['measure_costs']

_WARM_UP = 2


def measure_costs(
        configs: Mapping[str, TrainConfig],
        num_classes: int,
        peaks: Mapping[str, float],
        repeats: int = 10,
) -> dict[str, Cost]:
    """Measure parameters, multiply-adds and the median time of a training step on random images.

    What disturbs the machine disturbs all models alike, as each step of one is followed by a step of the next. So the
    relative times mean something, the absolute ones belong to this machine at this moment.

    Args:
        configs: How each model is trained.
        num_classes: Number of classes of the data.
        peaks: Peak memory in MiB, by label.
        repeats: Steps of each model that are timed.
    """
    steps = {label: _Step(config, num_classes) for label, config in configs.items()}
    times: dict[str, list[float]] = {label: [] for label in steps}
    for turn in range(_WARM_UP + repeats):
        for label, step in steps.items():
            seconds = step.run()
            if turn >= _WARM_UP:
                times[label].append(seconds)
    return {
        label: Cost(  # the time to microseconds, as the files have it
            step.size.params, step.size.macs, round(statistics.median(times[label]), 6), step.batch_size,
            peaks.get(label))
        for label, step in steps.items()
    }


class _Step:
    """A training step of a model: forward, backward, and the update."""

    def __init__(self, config: TrainConfig, num_classes: int) -> None:
        self.device = resolve_device(config.device)
        self.batch_size = config.batch_size
        classes = config.num_classes or num_classes
        model = build_model(config.model, config.preprocessing, False, config.model_kwargs, num_classes=classes)
        input_size = resolve_input(model, config.preprocessing)['input_size']
        model.pretrained_cfg = dict(model.pretrained_cfg, input_size=input_size)
        self.size: Size = measure_size(model)
        memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model: nn.Module = model.to(device=self.device, memory_format=memory_format).train()
        self.optimizer = build_optimizer(config, self.model)
        self.autocast, self.scaler = build_amp(self.device, config.amp, config.amp_dtype)
        images = torch.randn(config.batch_size, *input_size, device=self.device)
        self.images = images.contiguous(memory_format=memory_format)
        self.labels = torch.randint(model.num_classes, (config.batch_size,), device=self.device)

    def run(self) -> float:
        """Take a step, and give its time in seconds."""
        self._synchronize()
        start = time.perf_counter()
        with self.autocast():
            loss = F.cross_entropy(self.model(self.images).float(), self.labels)
        self.optimizer.zero_grad()
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler(loss, self.optimizer)
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)
