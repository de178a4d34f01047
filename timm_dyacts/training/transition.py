"""The transition of a run: from what the base computes to the new operators, moved by every update.

An update belongs to the ``t`` that its forward pass has: the first one to ``1 / N`` of the way, the ``N``-th to its
end. No update is thus made at ``t = 0``, where the new operators take no part, and the evaluation after the ``N``-th
sees them alone. What is at ``t = 1`` is saved as the plain variant.
"""
import copy
import math

from torch import nn

from ..convert import finish_transition, get_transition, set_transition
from ..convert.transition import idle_parameters
from .config import TrainConfig

__all__ = ['check_transition', 'create_arguments', 'move_transition', 't_of_update', 'to_save']


def create_arguments(config: TrainConfig) -> dict[str, object]:
    """Give the arguments of ``timm.create_model`` that the options ask for.

    Raises:
        ValueError: They ask for a transition twice.
    """
    kwargs = config.architecture_kwargs
    if kwargs.get('transition') is not None:
        raise ValueError('--model-kwargs must not hold transition: --transition-epochs asks for it, and says how long.')
    return dict(kwargs, transition=True) if config.transition_epochs else kwargs


def check_transition(config: TrainConfig, model: nn.Module) -> None:
    """Raise ``ValueError`` if a model and ``--transition-epochs`` do not fit each other."""
    t = get_transition(model)
    if config.transition_epochs:
        if t is None:
            raise ValueError(
                f'--transition-epochs must be left out for {config.model!r}, which starts exactly as its base without '
                f'a transition, got {config.transition_epochs:g}.')
        if t > 0:
            raise ValueError(
                f'--transition-epochs begins at t = 0, and {config.model!r} is at t = {t:.4g} of another transition: '
                f'go on with the run that it comes from (--resume).')
    elif t == 0:
        raise ValueError(
            f'--model {config.model!r} is at the start of a transition (t = 0): --transition-epochs leads it to its '
            f'end.')
    elif t is not None:
        raise ValueError(
            f'--model {config.model!r} has an unfinished transition (t = {t:.4g}), which no option leads to its end: '
            f'go on with the run that it comes from (--resume).')


def t_of_update(config: TrainConfig, update: int, updates_per_epoch: int) -> float:
    """Give the ``t`` of an update.

    Args:
        config: With ``transition_epochs`` above 0 and ``transition_sched``.
        update: Number of the update in the run, counted from 1.
        updates_per_epoch: Number of updates in an epoch.
    """
    number = max(round(config.transition_epochs * updates_per_epoch), 1)
    if update >= number:
        return 1.0
    way = update / number
    return way if config.transition_sched == 'linear' else (1 - math.cos(math.pi * way)) / 2


def move_transition(models: list[nn.Module], t: float) -> bool:
    """Set ``t`` of a model and its average.

    Args:
        models: The model that is trained first.
        t: From 0 to 1.

    Returns:
        Whether other parameters than before have no gradient. PyTorch's DDP has to be made anew then.
    """
    before = bool(idle_parameters(models[0]))
    for model in models:
        set_transition(model, t)
    return bool(idle_parameters(models[0])) != before


def to_save(model: nn.Module) -> nn.Module:
    """Give what is saved of a model: at ``t = 1`` a copy that is the plain variant, else the model."""
    return finish_transition(copy.deepcopy(model)) if get_transition(model) == 1 else model
