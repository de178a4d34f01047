"""Model cards: what a model is, how good it was measured to be, and nothing that nobody measured."""
from .checkpoint import render_model_card, resolve_start
from .render import TIMM_CITATION, render
from .size import Size, measure_size

__all__ = [
    'TIMM_CITATION',
    'Size',
    'measure_size',
    'render',
    'render_model_card',
    'resolve_start',
]
