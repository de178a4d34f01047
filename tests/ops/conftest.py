"""Fixtures for the tests of kernels.

Imports are inside of the fixtures: ``pytest_configure`` of ``tests/conftest.py``, which runs later than this module,
has to set an environment variable before Triton is imported.
"""
import pytest


@pytest.fixture
def triton_kernels(monkeypatch):
    """Have the operators run their Triton kernels, whatever the device.

    With a GPU they run there. Without one, Triton's interpreter runs them on the CPU (see ``tests/conftest.py``).
    """
    pytest.importorskip('triton')
    import dataclasses

    from support.kernels import ON_GPU, interpreter_loops

    from timm_dyacts.ops import backends

    if not ON_GPU:
        if not interpreter_loops():
            pytest.skip('the interpreter of this Triton cannot loop with this NumPy')
        backend, = (backend for backend in backends.BACKENDS if backend.name == 'triton')
        try:
            backend.require()
        except backends.TooOld as e:
            pytest.skip(str(e))
        monkeypatch.setattr(backends, 'BACKENDS', (dataclasses.replace(backend, device_type='cpu'),))
    monkeypatch.setattr(backends, '_unusable', set())


@pytest.fixture
def launches(triton_kernels, monkeypatch):
    """The names of the kernels that are launched, in their order."""
    from support.kernels import replace_launch

    from timm_dyacts.ops import triton_tiles

    names = []

    def launch(planned, *tensors):
        names.append(planned.kernel.fn.__name__)
        triton_tiles.launch(planned, *tensors)

    replace_launch(monkeypatch, launch)
    return names


@pytest.fixture(params=['samples', 'channels'])
def far_apart(request):
    """An input whose samples, or channels, lie further apart than 32-bit numbers of elements reach."""
    import torch
    from support.kernels import DEVICE, values

    far = 2 ** 31 + 16
    try:
        memory = torch.empty(far + 64, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip('needs 4 GiB of address space')
    strides = (far, 16, 1) if request.param == 'samples' else (16, far, 1)
    return memory.as_strided((2, 2, 16), strides).copy_(values(2, 2, 16))
