"""The device of a run, and how it computes."""
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from timm.utils import NativeScaler

__all__ = ['build_amp', 'is_out_of_memory', 'resolve_device', 'set_numerics']


def resolve_device(name: str | None) -> torch.device:
    """Give the device of a name, or for ``None`` the GPU, if there is one.

    Raises:
        ValueError: The device is not there, or no device has such a name.
    """
    try:
        device = torch.device(name or ('cuda' if torch.cuda.is_available() else 'cpu'))
    except RuntimeError as e:
        raise ValueError(f'--device must be the name of a device such as cpu or cuda, got {name!r} ({e}).') from None
    if device.type == 'cuda' and device.index is not None and device.index >= torch.cuda.device_count() > 0:
        raise ValueError(f'--device {name} needs as many GPUs, and PyTorch sees {torch.cuda.device_count()}.')
    if device.type == 'cuda' and not torch.cuda.is_available():
        raise ValueError(f'--device {name} needs a GPU, and PyTorch {torch.__version__} sees none; use --device cpu.')
    if device.type != 'cuda':  # where a try would open a context on the first GPU in each process
        try:
            torch.ones(1, device=device).item()  # what is not there, or only pretends to be, as "meta" does
        except (AssertionError, ImportError, NotImplementedError, RuntimeError) as e:
            raise ValueError(
                f'--device must be a device that can compute here, such as cpu, got {name!r} ({e}).') from None
    return device


def is_out_of_memory(error: Exception) -> bool:
    """Say whether memory ran out, which PyTorch says on CPUs in the words of its allocator alone."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and 'DefaultCPUAllocator' in str(error))


def set_numerics(device: torch.device, deterministic: bool) -> None:
    """Let a GPU be fast, as timm's train.py does, or make it compute the same bits in each run."""
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
    elif device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


def build_amp(
        device: torch.device,
        enabled: bool,
        dtype: str = 'float16',
) -> tuple[Callable[[], AbstractContextManager[Any]], NativeScaler | None]:
    """Give the context of the forward pass and the scaler of the loss for mixed precision.

    Args:
        device: Where the model computes.
        enabled: Whether precision is to be mixed. Without it the context does nothing.
        dtype: ``'float16'``, which alone needs a scaler, or ``'bfloat16'``.
    """
    if not enabled:
        return nullcontext, None
    autocast = partial(torch.autocast, device_type=device.type, dtype=getattr(torch, dtype))
    return autocast, NativeScaler(device=device.type) if dtype == 'float16' else None
