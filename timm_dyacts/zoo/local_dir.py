"""Folders with safetensors for timm before 1.0.26, which takes every checkpoint of ``local-dir:`` for a pickle."""
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import timm
from packaging.version import Version
from safetensors.torch import load_file
from timm.models import _builder

__all__ = ['install']


def install() -> None:
    """Have timm read ``model.safetensors``, which is what it looks for first in a folder, as what it is."""
    if Version(timm.__version__) < Version('1.0.26') and not hasattr(_builder.load_state_dict_from_path, '__wrapped__'):
        _builder.load_state_dict_from_path = _reading_safetensors(_builder.load_state_dict_from_path)


def _reading_safetensors(load: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(load)
    def load_state_dict_from_path(path: str | Path, *args: Any, **kwargs: Any) -> Any:
        file = Path(path, 'model.safetensors')
        return load_file(file) if file.exists() else load(path, *args, **kwargs)

    return load_state_dict_from_path
