"""What a number was computed on."""
import platform

import numpy
import PIL
import timm
import torch
import torchvision

from ..ops.backends import backend_in_use
from ..version import __version__
from .config import DeviceOptions

__all__ = ['describe_environment', 'package_versions']


def package_versions() -> dict[str, str]:
    """Give the versions of what computes a model, by package."""
    return dict(
        timm_dyacts=__version__,
        timm=timm.__version__,
        torch=str(torch.__version__),
        python=platform.python_version(),
    )


def describe_environment(
        config: DeviceOptions,
        device: torch.device,
        batch_size: int,
        processes: int = 1,
) -> dict[str, str]:
    """Say on what, and how, a number was computed, as far as that may change its last digits.

    Args:
        config: The options.
        device: The device.
        batch_size: Number of images in a batch of a process.
        processes: Number of processes.

    Returns:
        Texts by name: the processor and its instructions or the GPU, the number of threads, the kernels of this package
        that ran, versions of libraries, and what the options ask for.
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
        processes=processes,
        precision=config.amp_dtype if config.amp else 'float32',
        memory_format='channels_last' if config.channels_last else 'contiguous',
        compiled=config.torchcompile or 'no',
        batch_size=batch_size,
    )
    if on_gpu:
        values['cuda'] = torch.version.cuda
    return {name: str(value) for name, value in values.items()}
