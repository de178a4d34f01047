"""Data sets: the embedded digits, and everything that timm.data knows. Batches that do not depend on the past."""
from .digits import DigitsDataset
from .errors import DataError
from .factory import ImageFiles, class_names, create_dataset
from .resumable import ResumableLoader

__all__ = ['DataError', 'DigitsDataset', 'ImageFiles', 'ResumableLoader', 'class_names', 'create_dataset']
