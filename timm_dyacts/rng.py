"""The global random generators of Python, NumPy and PyTorch, taken together."""
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ['get_rng_state', 'isolated_rng', 'set_rng_state']


def get_rng_state(device: torch.device | None = None) -> dict[str, Any]:
    """Give the states of the generators, of PyTorch those of the CPU and of ``device``.

    They are plain values and tensors, which ``torch.load(weights_only=True)`` reads.
    """
    name, keys, *rest = np.random.get_state()
    return dict(
        python=random.getstate(),
        numpy=(name, torch.from_numpy(keys.astype(np.int64)), *rest),
        torch=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state(device) if device is not None and device.type == 'cuda' else None,
    )


def set_rng_state(state: dict[str, Any], device: torch.device | None = None) -> None:
    """Set the generators to what ``get_rng_state`` gave."""
    random.setstate(state['python'])
    name, keys, *rest = state['numpy']
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state['torch'])
    if state['cuda'] is not None and device is not None and device.type == 'cuda':
        torch.cuda.set_rng_state(state['cuda'], device)


@contextmanager
def isolated_rng(device: torch.device | None = None) -> Iterator[None]:
    """Leave the generators as they were found."""
    state = get_rng_state(device)
    try:
        yield
    finally:
        set_rng_state(state, device)
