"""The operators as an ``nn.Module`` each, with their functions, which are those of ``ops``."""
from .affine import ChannelAffine
from .bipolar import BELU, BSELU, Bipolar, BipolarMaxPool2d, BLeakyReLU, BPReLU, BReLU
from .dyrelu import DyReLU, DyReLUA, DyReLUB, DyReLUC, LazyDyReLU, dyrelu
from .softpool import GlobalSoftPool2d, SoftPool1d, SoftPool2d, SoftPool2dSame, SoftPool3d
from .transition import Subsample, Transition

# isort: split
# After the modules of this folder: the function `bipolar` takes the name of one of them.
from ..ops.bipolar.functional import (
    belu,
    bipolar,
    bipolar_max_pool2d,
    bleaky_relu,
    bprelu,
    brelu,
    bselu,
    channel_signs,
)
from ..ops.softpool.functional import global_softpool2d, softpool1d, softpool2d, softpool3d

__all__ = [
    'BELU',
    'BLeakyReLU',
    'BPReLU',
    'BReLU',
    'BSELU',
    'Bipolar',
    'BipolarMaxPool2d',
    'DyReLU',
    'DyReLUA',
    'DyReLUB',
    'DyReLUC',
    'GlobalSoftPool2d',
    'SoftPool1d',
    'SoftPool2d',
    'SoftPool2dSame',
    'SoftPool3d',
    'Transition',
    'belu',
    'bipolar',
    'bipolar_max_pool2d',
    'bleaky_relu',
    'bprelu',
    'brelu',
    'bselu',
    'dyrelu',
    'global_softpool2d',
    'softpool1d',
    'softpool2d',
    'softpool3d',
]
