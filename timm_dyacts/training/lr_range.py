"""A range test of the learning rate: it grows from update to update until the loss explodes.

As L. N. Smith, "Cyclical Learning Rates for Training Neural Networks" (arXiv:1506.01186), has it; exponential, as in
fastai's ``lr_find``.
"""
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from timm.utils import get_outdir

from ..device import resolve_device, set_numerics
from ..files import format_csv, replace_text
from ..loading import resolve_model_name
from ..plotting import BLUE, GREY, create_figure, require_matplotlib, save_figure, style_axes
from ..world import World
from .config import TrainConfig
from .loop import train_one_epoch
from .nonfinite import NonFiniteLossError
from .setup import Setup, build_setup
from .state import EpochMeter, Progress
from .trainer import make_ready

__all__ = ['LrRange', 'find_lr', 'plot_lr', 'suggest']

_LOWEST, _HIGHEST = 1e-6, 10.0
_UPDATES = 100
# The share of the past in the smoothed loss, and the multiple of its least value at which it has exploded
_MEMORY = 0.9
_EXPLODED = 3.0


@dataclass(frozen=True)
class LrRange:
    """What a range test found.

    Attributes:
        folder: Where ``lr.csv`` and ``lr.png`` are.
        lrs: The learning rate of each update.
        losses: The training loss of each update, before the weights were changed by it.
        suggestion: The learning rate that is suggested, ``None`` if the loss never fell.
        is_primary: Whether this process is the one that writes and prints.
    """
    folder: str
    lrs: Sequence[float]
    losses: Sequence[float]
    suggestion: float | None
    is_primary: bool = True

    @property
    def smoothed(self) -> list[float]:
        """The losses, each averaged with those before it."""
        return _smooth(self.losses)


def find_lr(config: TrainConfig) -> LrRange:
    """Train a model that is thrown away for a hundred updates, with learning rates from 1e-6 to 10.

    Nothing is left but a folder with a table and a picture.

    Args:
        config: The options of the run that the rate is for. Its schedule and its epochs are not used.

    Raises:
        OSError: Something could not be read or written.
        ValueError: Options that do not fit each other, the model or the data.
    """
    if config.resume is not None:
        raise ValueError(f'--find-lr starts anew: --resume must be left out, got {config.resume!r}.')
    require_matplotlib()
    resolve_model_name(config.model)
    world = World.join(resolve_device(config.device))
    set_numerics(world.device, config.deterministic)
    setup = build_setup(config, world, initialize=True)
    lrs, losses = _train(setup)
    result = LrRange('', lrs, losses, suggest(lrs, _smooth(losses)), world.is_primary)
    if world.is_primary:
        result = _write(result, setup)
    world.leave()
    return result


class _Enough(Exception):
    """Ends an epoch of which the rest is not needed."""


def _train(setup: Setup) -> tuple[list[float], list[float]]:
    """Give the learning rates and the losses of the updates, up to where the loss explodes."""
    loader, optimizer = setup.loader, setup.optimizer
    frozen = make_ready(setup, Progress())
    lrs: list[float] = []
    losses: list[float] = []
    meter, mark = EpochMeter(), EpochMeter()

    def before_update(update: int) -> None:
        lrs.append(_LOWEST * (_HIGHEST / _LOWEST) ** (len(lrs) / (_UPDATES - 1)))
        for group in optimizer.param_groups:
            group['lr'] = lrs[-1] * group.get('lr_scale', 1.0)

    def after_update(steps: int, read_losses: Callable[[], None]) -> None:
        read_losses()
        losses.append((meter.loss - mark.loss) / (meter.count - mark.count))
        mark.loss, mark.count = meter.loss, meter.count
        smoothed = _smooth(losses)
        if len(losses) == _UPDATES or smoothed[-1] > _EXPLODED * min(smoothed):
            raise _Enough  # in all processes, which know the same losses

    for epoch in range(_UPDATES):  # each has at least one
        loader.set_position(epoch)
        try:
            train_one_epoch(
                setup.task,
                loader,
                optimizer,
                epoch,
                log_interval=1,
                meter=meter,
                in_eval_mode=frozen or (),
                before_update=before_update,
                after_update=after_update,
                **setup.step_options,
            )
        except (_Enough, NonFiniteLossError):
            break
    return lrs[:len(losses)], losses


def _smooth(losses: Sequence[float]) -> list[float]:
    """Average each loss with those before it, the farther away the less."""
    smoothed, average = [], 0.0
    for number, loss in enumerate(losses, start=1):
        average = _MEMORY * average + (1 - _MEMORY) * loss
        smoothed.append(average / (1 - _MEMORY ** number))
    return smoothed


def suggest(lrs: Sequence[float], smoothed: Sequence[float]) -> float | None:
    """Give a tenth of the learning rate at which the smoothed loss is least, ``None`` if that is at the beginning."""
    best = min(range(len(smoothed)), key=smoothed.__getitem__, default=0)
    return lrs[best] / 10 if best else None


def _write(result: LrRange, setup: Setup) -> LrRange:
    """Write the table and the picture to a folder of their own, and give the result with its place."""
    folder = Path(get_outdir(setup.config.output, f'{setup.new_name()}-lr', inc=True))
    rows = [
        dict(lr=lr, loss=loss, smoothed=smoothed)
        for lr, loss, smoothed in zip(result.lrs, result.losses, result.smoothed, strict=True)]
    replace_text(folder / 'lr.csv', format_csv(rows, ('lr', 'loss', 'smoothed')))
    plot_lr(result, folder / 'lr.png', setup.title)
    return LrRange(str(folder), result.lrs, result.losses, result.suggestion)


def plot_lr(result: LrRange, path: str | os.PathLike[str], title: str = '') -> None:
    """Draw the loss over the learning rate.

    Args:
        result: What was found.
        path: Where to write the picture; its ending gives the format.
        title: Heading of the figure.
    """
    figure = create_figure(6.5, 4, title, dpi=130)
    ax = figure.subplots()
    ax.plot(result.lrs, result.losses, color=GREY, linewidth=1, alpha=0.7, label='of an update')
    ax.plot(result.lrs, result.smoothed, color=BLUE, linewidth=1.8, label='smoothed')
    if result.suggestion is not None:
        ax.axvline(
            result.suggestion, color='black', linewidth=1, linestyle='--',
            label=f'suggested: {result.suggestion:.1e}')
    ax.set_xscale('log')
    # The last losses of an explosion would flatten all others.
    low, high = min(result.losses), max(result.smoothed[0], min(result.smoothed))
    ax.set_ylim(low - 0.1 * (high - low) - 0.01, high + 0.6 * (high - low) + 0.01)
    ax.set_xlabel('Learning rate')
    ax.set_ylabel('Training loss')
    ax.legend(frameon=False)
    style_axes(ax)
    save_figure(figure, path)
