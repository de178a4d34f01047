"""Dynamic ReLU, SoftPool and bipolar activations in any timm model, without throwing a trained checkpoint away.

Importing this package registers its operators and its model variants with timm::

    import timm
    import timm_dyacts

    model = timm.create_model('resnet50_dyrelu_b', pretrained=True)
"""
from . import hub, layers, zoo
from .convert import (
    ConversionError,
    ConversionReport,
    Replacement,
    Skip,
    convert,
    finish_transition,
    get_transition,
    set_transition,
)
from .layers import *  # noqa: F403
from .layers import factory as _factory
from .lsuv import lsuv_
from .operators import OPERATORS as _OPERATORS
from .version import __version__
from .zoo import PretrainedWeightsError

__all__ = [
    'ConversionError',
    'ConversionReport',
    'PretrainedWeightsError',
    'Replacement',
    'Skip',
    '__version__',
    'convert',
    'finish_transition',
    'get_transition',
    'hub',
    'lsuv_',
    'register',
    'set_transition',
]
__all__ += layers.__all__


def register() -> None:
    """Make the operators and variants known to timm. Importing the package does it; doing it again changes nothing."""
    activations = {name: operator for name, operator in _OPERATORS.items() if operator.replaces == 'act'}
    _factory.register(
        {name: operator.module for name, operator in activations.items()},
        {name: operator.function for name, operator in activations.items() if operator.function is not None},
    )
    zoo.register()


register()
