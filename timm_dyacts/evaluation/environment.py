"""What a number was computed on."""
import platform

import numpy
import PIL
import torch
import torchvision

from ..ops.backends import backend_in_use

__all__ = ['describe_environment']


def describe_environment(device: torch.device, **more: object) -> dict[str, str]:
    """Say on what a number was computed, as far as that may change its last digits.

    Args:
        device: The device.
        **more: How it was computed, such as the precision.

    Returns:
        Texts by name: the processor and its instructions or the GPU, the number of threads, the kernels of this package
        that ran, versions of libraries, and ``more``.
    """
    on_gpu = device.type == 'cuda'
    computed_on = torch.cuda.get_device_name(device) if on_gpu else (
        f'{platform.machine()} {torch.backends.cpu.get_cpu_capability()}')
    values = dict(
        device=device.type,
        processor=computed_on,
        threads=torch.get_num_threads(),
        kernels=backend_in_use(device.type) or 'none',
        torchvision=torchvision.__version__,
        numpy=numpy.__version__,
        pillow=PIL.__version__,
        **more,
    )
    if on_gpu:
        values['cuda'] = torch.version.cuda
    return {name: str(value) for name, value in values.items()}
