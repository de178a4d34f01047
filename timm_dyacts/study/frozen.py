"""A control: is it being dynamic that helps, or having learned other slopes?

The coefficients of a trained Dynamic ReLU are replaced by their mean over the training images. The accuracy that this
costs is what a network owes to coefficients that follow the image.
"""
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..device import build_amp, resolve_device
from ..evaluation.loop import evaluate
from ..layers import DyReLU
from ..loading import build_model, resolve_input
from ..modes import evaluating
from ..run_folder import RunFolder
from ..training import TrainConfig
from ..training.setup import build_datasets, build_validation_loader
from ..world import World
from .plan import Run

__all__ = ['can_be_frozen', 'freeze_coefficients', 'measure_frozen']

# Residuals of exactly 1 would need an infinite parameter.
_LARGEST_RESIDUAL = 1 - 1e-7


@torch.no_grad()
def freeze_coefficients(model: nn.Module, loader: Iterable[Any]) -> int:
    """Replace each Dynamic ReLU, in place, by the static one whose coefficients are the mean of its own.

    Args:
        model: A model.
        loader: Batches of images (N, C, H, W) and labels over which the mean is taken.

    Returns:
        The number of modules that were replaced.

    Raises:
        ValueError: There is none, or one has a weight for each position (mode "c"), which has no static form.
    """
    names = [name for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, DyReLU) and not m.static]
    modules = {model.get_submodule(name) for name in names}
    if not modules:
        raise ValueError('model must have a Dynamic ReLU whose coefficients can be frozen, and has none.')
    if any(module.mode == 'c' for module in modules):
        raise ValueError("model must have no Dynamic ReLU of mode 'c': its weight for each position cannot be frozen.")
    sums: dict[nn.Module, Tensor] = {}
    images_seen: dict[nn.Module, int] = {}

    def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0] if module.channel_dim == 1 else args[0].movedim(-1, 1)
        theta = module.coefficients(x).double().sum(0)
        sums[module] = sums.get(module, 0) + theta.expand(x.shape[1], -1)
        images_seen[module] = images_seen.get(module, 0) + len(x)

    handles = [module.register_forward_pre_hook(record) for module in modules]
    try:
        with evaluating(model):
            for images, _ in loader:
                model(images)
    finally:
        for handle in handles:
            handle.remove()
    frozen = {module: _static(module, sums[module] / images_seen[module]) for module in modules}
    for name in names:
        parent, _, child = name.rpartition('.')
        setattr(model.get_submodule(parent), child, frozen[model.get_submodule(name)])
    return len(modules)


def _static(old: DyReLU, theta: Tensor) -> DyReLU:
    """Make the static Dynamic ReLU with given coefficients (C, 2K)."""
    new = DyReLU(
        len(theta), k=old.k, lambda_a=old.lambda_a, lambda_b=old.lambda_b, alpha=old.alpha, beta=old.beta,
        max_value=old.max_value, static=True, channel_dim=old.channel_dim, device=theta.device)
    start = torch.tensor(new.alpha + new.beta, dtype=theta.dtype, device=theta.device)
    reach = torch.tensor([new.lambda_a] * new.k + [new.lambda_b] * new.k, dtype=theta.dtype, device=theta.device)
    residual = torch.where(reach == 0, 0.0, (theta - start) / reach).clamp(-_LARGEST_RESIDUAL, _LARGEST_RESIDUAL)
    new.fc2_bias.copy_((2 * torch.atanh(residual)).flatten())  # tanh(z / 2) is the residual
    return new.train(old.training)


def can_be_frozen(config: TrainConfig) -> bool:
    """Say whether the model of a run has Dynamic ReLU, and only such whose coefficients can be frozen."""
    with torch.device('meta'):
        model = build_model(config.model, config.preprocessing, False, config.model_kwargs)
    modules = [module for module in model.modules() if isinstance(module, DyReLU)]
    return any(not module.static for module in modules) and all(module.mode != 'c' for module in modules)


def measure_frozen(run: Run, config: TrainConfig, at: str) -> dict[str, float]:
    """Evaluate a finished run with frozen coefficients.

    Args:
        run: The run.
        config: Its options.
        at: Which of its checkpoints, ``'last'`` or ``'best'``.

    Returns:
        ``'top1'``, ``'top5'`` and ``'loss'`` on the split to evaluate on.

    Raises:
        FileNotFoundError: The weights of the run are gone.
    """
    checkpoint = RunFolder(run.folder).checkpoint(at)
    if checkpoint.missing():
        raise FileNotFoundError(f'--freeze-coefficients needs the weights in {checkpoint.path}, and they are gone.')
    model = build_model(f'local-dir:{checkpoint.path}', config.preprocessing, pretrained=True, model_kwargs={})
    world = World(resolve_device(config.device))
    datasets, config = build_datasets(config, world)
    data_config = resolve_input(model, config.preprocessing)
    model.to(device=world.device)
    freeze_coefficients(model, build_validation_loader(config, datasets.train, data_config, world))
    autocast, _ = build_amp(world.device, config.amp, config.amp_dtype)
    return dict(evaluate(model, build_validation_loader(config, datasets.validation, data_config, world), autocast))
