"""One epoch of training."""
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import NativeScaler, dispatch_clip_grad, unwrap_model
from torch import Tensor, nn
from tqdm import tqdm

from ..world import World
from .nonfinite import NonFiniteLossError, find_nonfinite
from .state import EpochMeter
from .task import Task

__all__ = ['train_one_epoch']

_ONE_PROCESS = World(torch.device('cpu'))


def train_one_epoch(
        task: Task,
        loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        epoch: int,
        scheduler: Scheduler | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        loss_scaler: NativeScaler | None = None,
        clip_grad: float | None = None,
        clip_mode: str = 'norm',
        channels_last: bool = False,
        grad_accum_steps: int = 1,
        log_interval: int = 50,
        progress: tqdm | None = None,
        world: World = _ONE_PROCESS,
        meter: EpochMeter | None = None,
        first_step: int = 0,
        in_eval_mode: Iterable[nn.Module] = (),
        before_update: Callable[[int], None] | None = None,
        after_update: Callable[[int, Callable[[], None]], None] | None = None,
        after_interval: Callable[[int], None] | None = None,
) -> OrderedDict[str, Any]:
    """Train for one epoch, or what is left of it, in place.

    Args:
        task: Model and loss, and the moving average of the model if there is one.
        loader: Batches (N, C, H, W) and their targets on the device, normalised (``timm.data.create_loader``). Its
            length is that of the whole epoch.
        optimizer: Updated after every ``grad_accum_steps`` batches, and after the last.
        epoch: Number of the epoch, counted from 0.
        scheduler: Learning rate schedule, told of each update.
        autocast: Context of the forward pass, for mixed precision.
        loss_scaler: For float16.
        clip_grad: Bound of the gradient; of its norm, unless ``clip_mode`` says otherwise.
        clip_mode: ``'norm'``, ``'value'`` or ``'agc'``.
        channels_last: Whether to give the images to the model in channels_last memory format.
        grad_accum_steps: Number of batches whose gradients make one update.
        log_interval: Number of batches between two readings of the losses. A GPU is waited for only then.
        progress: Bar that counts images.
        world: The processes that train together.
        meter: Sums over the part of the epoch that is done, added to in place.
        first_step: Number of the first batch that the loader will give.
        in_eval_mode: Modules of the model that stay in eval mode.
        before_update: Called before the first batch of each update with the number of the update in the run, counted
            from 1.
        after_update: Called after each update with the number of batches done in the epoch, and a function that
            brings ``meter`` up to date.
        after_interval: Called after each ``log_interval`` batches but the last ones of the epoch, with the number of
            batches done in it. ``meter`` is up to date, the learning rate is that of the batch.

    Returns:
        The mean training loss of the whole epoch as ``'loss'``.

    Raises:
        NonFiniteLossError: A loss was not finite, on some process.
    """
    module = task.get_trainable_module()
    module.train()
    for part in in_eval_mode:
        part.eval()
    meter = EpochMeter() if meter is None else meter
    num_steps = len(loader)
    updates_per_epoch = -(-num_steps // grad_accum_steps)
    losses = _Losses(meter, world)

    for step, (images, targets) in enumerate(loader, start=first_step):
        first = step // grad_accum_steps * grad_accum_steps
        group = range(max(first, first_step), min(first + grad_accum_steps, num_steps))
        is_update = step + 1 == group.stop
        num_updates = epoch * updates_per_epoch + step // grad_accum_steps + 1
        if step == group.start and before_update is not None:
            before_update(num_updates)
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)

        def read_losses(step=step, images=images) -> None:
            bad_loss = losses.read()
            if bad_loss is not None:
                raise NonFiniteLossError(
                    f'The training loss is {bad_loss} at epoch {epoch}, step {step + 1 - len(losses.pending)}. '
                    f'{find_nonfinite(unwrap_model(module), images, autocast)} Lower --lr, set --clip-grad, or train '
                    f'without --amp; the checkpoints before are kept.')

        with nullcontext() if is_update else task.no_sync():
            with autocast():
                result = task(images, targets)
            losses.add(result['loss'], result['output'], targets)
            # A loss on the CPU costs nothing to read, and a bad one must not reach the weights.
            reads_all = world.size == 1 and images.device.type == 'cpu'
            if reads_all or (step + 1) % log_interval == 0 or step + 1 == num_steps:
                read_losses()
            if step == group.start:
                optimizer.zero_grad()
            _backward(
                result['loss'] / len(group), optimizer, loss_scaler, clip_grad, clip_mode, task, update=is_update)

        if progress is not None:
            progress.set_postfix(
                epoch=epoch, loss=f'{meter.mean_loss:.3f}', top1=f'{meter.top1:.1f}',
                lr=f'{optimizer.param_groups[0]["lr"]:.1e}', refresh=False)
            progress.update(len(images) * world.size)
        if after_interval is not None and (step + 1) % log_interval == 0 and step + 1 < num_steps:
            after_interval(step + 1)
        if not is_update:
            continue
        task.update_ema(step=num_updates)
        if scheduler is not None:
            scheduler.step_update(num_updates=num_updates)
        if after_update is not None:
            after_update(step + 1, read_losses)

    optimizer.zero_grad()
    if hasattr(optimizer, 'sync_lookahead'):
        optimizer.sync_lookahead()
    return OrderedDict(loss=meter.mean_loss)


class _Losses:
    """Losses that are still on the device, to be read together.

    Args:
        meter: The sums that they are added to.
        world: The processes that train together.
    """

    def __init__(self, meter: EpochMeter, world: World) -> None:
        self.meter = meter
        self.world = world
        self.pending: list[tuple[Tensor, Tensor, int]] = []  # loss, number of hits and number of samples of each batch

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Keep the loss of a batch, and the number of samples whose likeliest class is the (dominant) target."""
        labels = targets.argmax(1) if targets.dim() == 2 else targets
        hits = (logits.detach().argmax(1) == labels).sum()
        self.pending.append((loss.detach(), hits, len(labels)))

    def read(self) -> float | None:
        """Add the pending losses to the sums, and stop at one that is not finite, which is given, and stays pending."""
        if not self.pending:
            return None
        values = torch.stack([torch.stack([loss.float(), hits.float()]) for loss, hits, _ in self.pending])
        values = values.cpu().double()
        counts = torch.tensor([[count] for *_, count in self.pending], dtype=torch.float64)
        values[:, :1] *= counts
        sums = self.world.sum(torch.cat([values, counts], dim=1))
        for loss, hits, count in sums.tolist():
            if not math.isfinite(loss):
                return loss
            del self.pending[0]
            self.meter.loss += loss
            self.meter.correct += int(hits)
            self.meter.count += int(count)
        return None


def _backward(
        loss: Tensor,
        optimizer: torch.optim.Optimizer,
        loss_scaler: NativeScaler | None,
        clip_grad: float | None,
        clip_mode: str,
        task: Task,
        update: bool,
) -> None:
    """Add the gradients of a loss, and update the parameters with them if it is time."""
    create_graph = getattr(optimizer, 'is_second_order', False)
    parameters = None if clip_grad is None else task.get_clip_parameters(exclude_head=clip_mode == 'agc')
    if loss_scaler is not None:
        loss_scaler(
            loss,
            optimizer,
            clip_grad=clip_grad,
            clip_mode=clip_mode,
            parameters=parameters,
            create_graph=create_graph,
            need_update=update,
        )
        return
    loss.backward(create_graph=create_graph)
    if update:
        if clip_grad is not None:
            dispatch_clip_grad(parameters, value=clip_grad, mode=clip_mode)
        optimizer.step()
