"""What it costs the host to launch kernels, measured on a machine without a GPU.

Kernels are compiled, but a driver that does nothing launches them: what is left is Python, Triton's and ours.
"""
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import triton
from torch import Tensor, nn

from support.compiled import Driver
from support.kernels import replace_launch
from timm_dyacts.layers import BipolarMaxPool2d, BReLU, DyReLU, GlobalSoftPool2d, SoftPool2d
from timm_dyacts.ops import backends

__all__ = ['OPERATORS', 'Cost', 'IdleDriver', 'idle_driver', 'measure', 'measure_all']

# The operator and the one of PyTorch that it replaces, of 16 channels
OPERATORS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    'dyrelu_a': (lambda: DyReLU(16, 'a'), nn.ReLU),
    'dyrelu_b': (lambda: DyReLU(16, 'b'), nn.ReLU),
    'dyrelu_c': (lambda: DyReLU(16, 'c'), nn.ReLU),
    'softpool_2x2': (lambda: SoftPool2d(2), lambda: nn.MaxPool2d(2)),
    'softpool_3x3': (lambda: SoftPool2d(3, 2, 1), lambda: nn.MaxPool2d(3, 2, 1)),
    'global_softpool': (GlobalSoftPool2d, lambda: nn.AdaptiveAvgPool2d(1)),
    'brelu': (BReLU, nn.ReLU),
    'bipolar_max_pool': (lambda: BipolarMaxPool2d(2), lambda: nn.MaxPool2d(2)),
}


class Cost(NamedTuple):
    """Microseconds of a forward pass, without and with gradients, and of a forward and backward pass."""
    inference: float
    forward: float
    step: float


class IdleDriver(Driver):
    """A driver whose launches do nothing."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {'max_shared_mem': 232448},
        load_binary=lambda name, kernel, shared, device: (0, 0, 32, 0, 1024),
        unload_module=lambda module: None,
    )

    @staticmethod
    def launcher_cls(source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *args: None


@contextmanager
def idle_driver(arch: int = 90) -> Iterator[None]:
    """Have CPU tensors take the path of CUDA tensors, to kernels that are compiled but not run."""
    backend, = (backend for backend in backends.BACKENDS if backend.name == 'triton')
    triton.runtime.driver.set_active(IdleDriver(arch))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, 'BACKENDS', (dataclasses.replace(backend, device_type='cpu'),))
        yield


def measure(module: nn.Module, x: Tensor, calls: int = 200, repeats: int = 15) -> Cost:
    """Measure a module: the the best of many repeats, in the time of this process: the host does other things too."""
    leaf = x.detach().requires_grad_()
    inputs = [leaf, *module.parameters()]
    dy = torch.empty_like(module(x).detach())

    def inference() -> None:
        with torch.no_grad():
            for _ in range(calls):
                module(x)

    def forward() -> None:
        for _ in range(calls):
            module(leaf)

    def step() -> None:
        for _ in range(calls):
            torch.autograd.grad(module(leaf), inputs, dy, allow_unused=True)

    return Cost(*(_best(run, repeats) / calls * 1e6 for run in (inference, forward, step)))


def _best(run: Callable[[], None], repeats: int) -> float:
    run()
    gc.disable()
    try:
        best = float('inf')
        for _ in range(repeats):
            start = time.process_time()
            run()
            best = min(best, time.process_time() - start)
        return best
    finally:
        gc.enable()


def measure_all(stubbed: bool) -> Iterator[tuple[str, Cost, Cost]]:
    """Measure each operator beside PyTorch's own, on a small input: what the host does is the same for any size.

    Args:
        stubbed: Whether launches are left out too, so that only what leads to them is left.
    """
    x = torch.randn(2, 16, 8, 8)
    with idle_driver(), pytest.MonkeyPatch.context() as patch:
        if stubbed:
            replace_launch(patch, lambda *args, **kwargs: None)
        for name, (ours, plain) in OPERATORS.items():
            yield name, measure(ours(), x), measure(plain(), x)
