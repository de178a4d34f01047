"""What the tests of kernels share: inputs in every layout of memory, and comparisons with the references in float64."""
import functools
import importlib
import pkgutil

import pytest
import torch
import torch.nn.functional as F

from timm_dyacts import ops

triton = pytest.importorskip('triton')
tl = triton.language

__all__ = [
    'COLUMN_LAYOUTS',
    'DEVICE',
    'HALVES',
    'LAYOUTS',
    'ON_GPU',
    'check',
    'each_layout',
    'forget_plans',
    'interpreter_loops',
    'kernel_modules',
    'moderate',
    'plans',
    'replace_launch',
    'run',
    'saved_bytes',
    'set_constant',
    'trained',
    'values',
]

ON_GPU = torch.cuda.is_available()
DEVICE = 'cuda' if ON_GPU else 'cpu'
HALVES = (torch.float16, torch.bfloat16)

# Each gives an equal tensor in another layout of memory.
LAYOUTS = {
    'contiguous': lambda x: x.contiguous(),
    'channels_last': lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    'slice': lambda x: torch.stack([x, x], 2).flatten(1, 2)[:, ::2],
    'transposed': lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
}
each_layout = pytest.mark.parametrize('layout', LAYOUTS)
# Layouts that matter to kernels that read columns in pairs.
COLUMN_LAYOUTS = {
    'from an odd column': lambda x: F.pad(x, (1, 0))[..., 1:],
    'from an even column': lambda x: F.pad(x, (2, 4))[..., 2:-4],
    'odd rows': lambda x: F.pad(x, (0, 1))[..., :-1],
    'every other column': lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    'some rows': lambda x: F.pad(x, (0, 0, 1, 2))[..., 1:-2, :],
    'batch inside': lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


@triton.jit
def _count(total_ptr, n):
    total = 0
    for _ in range(n):
        total += 1
    tl.store(total_ptr, total)


@functools.cache
def interpreter_loops():
    """Tell whether Triton's interpreter can loop: some of its versions cannot, with some versions of NumPy."""
    total = torch.zeros(1, dtype=torch.int32)
    try:
        _count[(1,)](total, 3)
    except triton.runtime.errors.InterpreterError:
        return False
    return total.item() == 3


@functools.cache
def kernel_modules():
    """Import all modules of the operators that launch Triton kernels."""
    names = [
        module.name for module in pkgutil.walk_packages(ops.__path__, f'{ops.__name__}.')
        if module.name.count('.') == 3 and module.name.rsplit('.')[-1].startswith('triton')
    ]
    modules = [importlib.import_module(name) for name in names]
    return [module for module in modules if hasattr(module, 'launch')]


def replace_launch(monkeypatch, launch):
    """Have all kernels launched by another function."""
    for module in kernel_modules():
        monkeypatch.setattr(module, 'launch', launch)


def plans():
    """Give the plans of each function that keeps them, by its name."""
    return {
        f'{module.__name__}.{name}': function.plans
        for module in kernel_modules() for name, function in vars(module).items() if hasattr(function, 'plans')
    }


def forget_plans():
    """Have all launches planned anew."""
    for of_function in plans().values():
        of_function.clear()


def set_constant(monkeypatch, module, name, value):
    """Set a constant that launches are planned by. What is planned with it is to be forgotten with it."""
    monkeypatch.setattr(module, name, value)
    forget_plans()


def values(*shape, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x.view(-1)[::7] = 0
    return x.to(DEVICE)


def trained(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in module.parameters():
            param.normal_(generator=generator)
    return module.to(DEVICE)


def moderate(module):
    """Give the module parameters that leave the residuals of DyReLU well within their bounds."""
    with torch.no_grad():
        for i, param in enumerate(module.parameters()):
            param.copy_(values(*param.shape, seed=i) / param.shape[-1] ** 0.5)
    return module.to(DEVICE)


def run(f, x, params=(), seed=1):
    """Compute the output of ``f`` and the gradients of ``x`` and of parameters."""
    x = x.detach().requires_grad_()
    y = f(x)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y)
    return y.detach(), *torch.autograd.grad((y * weight).sum(), [x, *params])


def check(module, reference, x, tolerance=1e-5):
    """Compare a module with its reference, which computes in float64."""
    params = list(module.parameters())
    for ours, expected in zip(run(module, x, params), run(reference, x, params), strict=True):
        assert ours.dtype in (x.dtype, torch.float32)
        scale = expected.abs().max().item() if expected.numel() else 0
        torch.testing.assert_close(ours.double(), expected.double(), rtol=0, atol=tolerance * max(scale, 1))


def saved_bytes(module, x):
    """Run a module forward and backward.

    Returns:
        The bytes that it keeps for the backward pass besides its parameters. A storage that is kept twice counts once.
    """
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    z = x.detach().requires_grad_() * 1
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(z)
    params = {p.untyped_storage().data_ptr() for p in module.parameters()}
    y.sum().backward()
    return sum(size for pointer, size in storages.items() if pointer not in params)
