"""Fully sharded data parallel training: each process keeps a share of every parameter, of its gradient and of what the
optimizer knows of it, and the whole of a block only while the block computes. PyTorch's ``fully_shard`` does it.

What leaves the run is whole: checkpoints and states are those of a run in which every process has the whole model.
"""
import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..rng import isolated_rng
from ..version import needs
from ..world import World
from .config import TrainConfig
from .state import broadcast_outline, map_tensors

try:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor
except ImportError:
    _TORCH_SHARDS = False
else:
    _TORCH_SHARDS = True  # since torch 2.6

__all__ = ['ShardedModel', 'ShardedOptimizer', 'Sharding', 'blocks_of']

# A block with more than this share of the parameters is split where it consists of blocks: the whole parameters that
# lie in memory at a time are to be a small part of the model. One with less than the other share is not worth a message
# of its own.
_LARGE, _SMALL = 1 / 8, 1 / 1000
_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# What a sharded and a whole optimizer may differ by after three steps, as a multiple of the learning rate
_ROUNDING = 1e-3


class Sharding:
    """How the processes of a run share its model.

    Args:
        config: The options of the run, filled in.
        world: The processes.

    Raises:
        ImportError: PyTorch is too old.
        ValueError: There is a single process, or an option does not go together with a shared model.
    """

    def __init__(self, config: TrainConfig, world: World) -> None:
        if not _TORCH_SHARDS:
            raise needs('--dist-strategy fsdp', 'torch', '2.6', torch.__version__)
        _check_options(config, world)
        self.config = config
        self.world = world
        self.mesh: Any = init_device_mesh(world.device.type, (world.size,))
        self._outline: nn.Module | None = None

    def shard(self, model: nn.Module, average: ModelEmaV3 | None) -> None:
        """Spread a model over the devices of the processes, in place, and its moving average likewise.

        Args:
            model: The model, on the CPU. That of the primary process counts. Its parameters become other objects.
            average: Its average, if there is one.

        Raises:
            ValueError: A parameter is a single number.
        """
        scalar = next((name for name, parameter in model.named_parameters() if parameter.dim() == 0), None)
        if scalar is not None:
            raise ValueError(
                f'--dist-strategy fsdp shares parameters along their first dimension, and {scalar} of '
                f'{self.config.model!r} has none.')
        if self.world.is_primary:
            self._outline = _outline_of(model)
        self._shard(model)
        if average is not None:
            self._shard(average.module)
            # One operation takes either shares or whole tensors, such as the statistics of BatchNorm, not both.
            average.foreach = not any(buffer.is_floating_point() for buffer in model.buffers())

    def _shard(self, model: nn.Module) -> None:
        dtype = getattr(torch, self.config.amp_dtype) if self.config.amp else None
        if any(getattr(module, 'running_mean', None) is not None for module in model.modules()):
            dtype = None  # BatchNorm needs parameters in the dtype of its statistics
        # Autocast chooses the dtype of each operation, as it always does. It makes no copy of parameters that arrive in
        # the lower one, which autograd would keep, whole, for the backward pass.
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None, cast_forward_inputs=False)
        for parameter in model.parameters():
            parameter.data = parameter.data.contiguous()
        for value in (*model.parameters(), *model.buffers()):  # LSUV alone makes a difference, by its images
            dist.broadcast(value.data, 0, group=self.world.control)
        modules = [*blocks_of(model), model]
        for module in modules:
            fully_shard(module, mesh=self.mesh, reshard_after_forward=True, mp_policy=policy)
        # The memory of the whole parameters is that of the first pass. It must not be one of inference mode.
        for module in modules:
            module.unshard()
            module.reshard()

    def check_optimizer(self) -> None:
        """Raise ``ValueError`` if the optimizer does not do with shares of parameters what it does with whole ones."""
        kwargs = {**optimizer_kwargs(self.config), **self.config.opt_kwargs}
        kwargs = {name: value for name, value in kwargs.items() if not name.startswith('layer_decay')}
        generator = torch.Generator().manual_seed(0)
        device = self.world.device
        even, uneven = 16 * self.world.size, self.world.size + 1  # numbers of rows: PyTorch treats them differently
        shapes = [(rows, *rest) for rows in (even, uneven, 1) for rest in ((24,), (2, 3, 3), ())]
        values = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
        whole = [nn.Parameter(value.clone()) for value in values]
        shared = [nn.Parameter(self._share(value)) for value in values]
        try:
            with isolated_rng(device):
                optimizers = [create_optimizer_v2(parameters, **kwargs) for parameters in (whole, shared)]
                for step in range(3):
                    if step == 1:  # a run that is resumed
                        part = ShardedOptimizer(optimizers[1], self.world)
                        state = broadcast_outline(dict(optimizer=part.state_dict()), self.world)
                        part.load_state_dict(state['optimizer'])
                    for ours, theirs in zip(whole, shared, strict=True):
                        ours.grad = torch.randn(ours.shape, generator=generator).to(device)
                        theirs.grad = self._share(ours.grad)
                    for optimizer in optimizers:
                        optimizer.step()
            pairs = zip(whole, shared, strict=True)
            error = max((ours - theirs.full_tensor()).abs().max().item() for ours, theirs in pairs)
            reason = f'its steps differ by {error:.2g} with --lr {self.config.lr:g}'
        except Exception as e:  # PyTorch has many ways to say that an operation does not take shares
            error, reason = float('inf'), f'{type(e).__name__} in its step'
        if error > _ROUNDING * self.config.lr:
            raise ValueError(
                f'--opt {self.config.opt} does not work on shares of parameters as on whole ones ({reason}): it must '
                f'be another one with --dist-strategy fsdp, such as adamw, lamb, lion or sgd.')

    def _share(self, value: Tensor) -> Tensor:
        return distribute_tensor(value, self.mesh, [Shard(0)])

    def share_statistics(self, model: nn.Module) -> None:
        """Give all processes the statistics of BatchNorm that the first one has, as DDP does before each update."""
        names = ('running_mean', 'running_var')
        buffers = [buffer for name, buffer in model.named_buffers() if name.endswith(names)]
        if buffers:
            flat = torch.cat([buffer.flatten() for buffer in buffers])
            dist.broadcast(flat, 0)
            for buffer, values in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
                buffer.copy_(values.view_as(buffer))

    def in_step(self, loader: Iterable[Any], input_size: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Give the batches of a loader, to be computed with a shared model, which all processes must do equally often.

        Args:
            loader: The batches of this process.
            input_size: Shape of an image, (C, H, W).

        Yields:
            Images and labels. Where other processes have more batches, one image, and ``None`` in place of labels.
        """
        batches = (batch for batch in loader if len(batch[0]))
        while True:
            batch = next(batches, None)
            if not self.world.sum(torch.tensor(float(batch is not None), dtype=torch.float64)):
                return
            yield (torch.zeros(1, *input_size, device=self.world.device), None) if batch is None else batch

    def parts(self, models: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Give objects that stand for shared ones where their states are asked for.

        Args:
            models: The model, and its average if there is one, by name.
            optimizer: The optimizer, which becomes ``'optimizer'``.
        """
        parts: dict[str, Any] = {name: ShardedModel(model) for name, model in models.items()}
        return dict(parts, optimizer=ShardedOptimizer(optimizer, self.world))

    def outline(self) -> nn.Module:
        """Give a model of the same architecture, on the CPU, whose parameters have no values. Primary process only."""
        return copy.deepcopy(self._outline)

    def whole(self, model: nn.Module) -> nn.Module | None:
        """Give a whole copy of a shared model, on the CPU, to the primary process, ``None`` to the others.

        All of them must call this.
        """
        state = ShardedModel(model).state_dict()
        if not self.world.is_primary:
            return None
        whole = self.outline()
        whole.load_state_dict(state, assign=True)
        return whole


class ShardedModel:
    """The state of a shared model, which is that of the whole one. All processes must ask for it.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Tensor]:
        """Give the state to the primary process, nothing to the others."""
        return get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Set the model to a state, of which that of the primary process counts."""
        set_model_state_dict(
            self.model,
            dict(state) if dist.get_rank() == 0 else {},
            options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


class ShardedOptimizer:
    """The state of an optimizer of a shared model, which is that of the whole one. All processes must ask for it.

    PyTorch's ``get_optimizer_state_dict`` and its inverse make a step where there is no state yet, and do not take
    parameters without a state, such as frozen ones that are trained again.

    Args:
        optimizer: The optimizer.
        world: The processes.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, world: World) -> None:
        self.optimizer = optimizer
        self.world = world

    def state_dict(self) -> dict[str, Any]:
        """Give the state to the primary process, and what is of no use to the others."""
        return map_tensors(self.optimizer.state_dict(), self._gather)

    def _gather(self, value: Tensor) -> Tensor | None:
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        return whole.cpu() if self.world.is_primary else None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the optimizer to a state. Tensors are those of the primary process, whatever the others have there."""
        numbers = [number for group in state['param_groups'] for number in group['params']]
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group['params']]
        shared = dict(state['state'])
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in shared:
                shared[number] = map_tensors(shared[number], lambda value, p=parameter: self._share(value, p))
        groups = map_tensors(state['param_groups'], self.world.broadcast)  # some count their steps in a tensor there
        self.optimizer.load_state_dict(dict(state, state=shared, param_groups=groups))

    def _share(self, value: Tensor, parameter: Tensor) -> Tensor:
        if value.dim() == 0 or value.shape != parameter.shape:
            return self.world.broadcast(value)
        if value.is_meta:
            value = torch.empty(value.shape, dtype=value.dtype)
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def _check_options(config: TrainConfig, world: World) -> None:
    if world.size == 1:
        raise ValueError(
            '--dist-strategy fsdp shares the model among several processes, got one: start them with torchrun.')
    if config.torchcompile:
        raise ValueError(
            f'--torchcompile must be left out with --dist-strategy fsdp, which gathers parameters while the model '
            f'computes, got {config.torchcompile!r}.')
    if config.clip_grad is not None and config.clip_mode == 'agc':
        raise ValueError(
            "--clip-mode must be norm or value with --dist-strategy fsdp, which spreads the units of agc, got 'agc'.")
    if config.model_ema_force_cpu:
        raise ValueError(
            '--model-ema-force-cpu must be left out with --dist-strategy fsdp: the average is shared as the model is.')


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Choose the modules of a model whose parameters are gathered together; the rest is gathered for the whole pass.

    They are the members of its lists (``nn.Sequential`` and the like), and what it has several of, as far out as they
    are not too large: the blocks of a transformer, the early stages of a convolutional network. These are sure to be
    called as modules, while of others the weights alone may be used.
    """
    size = _size(model)
    return [block for block in _blocks_in(model, _LARGE * size) if _size(block) > _SMALL * size]


def _blocks_in(module: nn.Module, large: float) -> list[nn.Module]:
    found = []
    kinds = Counter(type(child) for child in module.children() if next(child.children(), None) is not None)
    for child in module.children():
        inside = _blocks_in(child, large)
        is_member = (isinstance(module, _LISTS) or kinds[type(child)] > 1) and not isinstance(child, _LISTS)
        # Lists with but a little of a block, such as its shortcut, are no reason to split it.
        is_split = _size(child) > large and sum(map(_size, inside)) > _size(child) / 2
        found += [child] if is_member and not is_split else inside
    return found


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _outline_of(model: nn.Module) -> nn.Module:
    """Copy a model without the values of its parameters."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device='meta'), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)
