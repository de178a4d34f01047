"""A remark on models that are on their way to what their name says."""
import logging
from pathlib import Path

from torch import nn

from ..convert import get_transition
from ..run_folder import CheckpointFolder, how_to_finish

__all__ = ['remark_on_transition']

_logger = logging.getLogger(__name__)


def remark_on_transition(model: nn.Module, name: str, checkpoint: str | None = None) -> None:
    """Log, in one line, that a model that is evaluated has an unfinished transition, and how to finish it.

    Args:
        model: The model.
        name: What it was loaded as.
        checkpoint: The file of its weights, if they are other than those of ``name``.
    """
    t = get_transition(model)
    if t is None:
        return
    place: str | None = name
    if checkpoint:
        folder = CheckpointFolder(Path(checkpoint).parent)
        place = str(folder) if folder.config.is_file() else None
    _logger.warning(
        "'%s' has an unfinished transition (t = %.4g), so it is not yet the model that its name says. %s",
        checkpoint or name, t, how_to_finish(place, t))
