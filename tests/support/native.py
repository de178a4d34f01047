"""What the tests of the native kernels share."""
import pytest
import torch

from timm_dyacts.ops import backends

__all__ = ['LAYOUTS', 'TOLERANCES', 'each_dtype', 'each_layout', 'needs_library', 'trained', 'values']

TOLERANCES = {torch.float32: 5e-6, torch.float64: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
LAYOUTS = {
    'contiguous': lambda x: x.contiguous(),
    'channels_last': lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    'slice': lambda x: torch.stack([x, x], 2).flatten(1, 2)[:, ::2],
}
each_layout = pytest.mark.parametrize('layout', LAYOUTS)
each_dtype = pytest.mark.parametrize('dtype', TOLERANCES, ids=str)


def _has_library():
    return next(backend for backend in backends.BACKENDS if backend.name == 'native').why_not() is None


needs_library = pytest.mark.skipif(not _has_library(), reason='needs the native library, or a C compiler')


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(module):
    with torch.no_grad():
        for i, param in enumerate(module.parameters()):
            param.copy_(values(*param.shape, seed=i) / param.shape[-1] ** 0.5)
    return module
