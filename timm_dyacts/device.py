"""The device of a run, and how it computes."""
import os
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from timm.utils import NativeScaler

__all__ = ['build_amp', 'resolve_device', 'set_numerics']


def resolve_device(name: str | None) -> torch.device:
    """The device called ``name``, or the GPU if there is one for None."""
    device = torch.device(name or ('cuda' if torch.cuda.is_available() else 'cpu'))
    if device.type == 'cuda' and not torch.cuda.is_available():
        raise ValueError(f'--device {name} needs a GPU, and PyTorch {torch.__version__} sees none; use --device cpu.')
    return device


def set_numerics(device: torch.device, deterministic: bool) -> None:
    """Let a GPU be fast, as timm's train.py does, or make it compute the same bits in each run."""
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
    elif device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


def build_amp(
        args: Namespace,
        device: torch.device,
) -> tuple[Callable[[], AbstractContextManager], NativeScaler | None]:
    """Context of the forward pass and scaler of the loss for ``--amp``; only float16 needs a scaler."""
    if not args.amp:
        return nullcontext, None
    autocast = partial(torch.autocast, device_type=device.type, dtype=getattr(torch, args.amp_dtype))
    return autocast, NativeScaler(device=device.type) if args.amp_dtype == 'float16' else None
