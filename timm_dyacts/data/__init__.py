"""Data sets: the embedded digits, and everything that timm.data knows."""
from .digits import DigitsDataset
from .factory import class_names, create_dataset

__all__ = ['DigitsDataset', 'class_names', 'create_dataset']
