"""Does it help? The same seeds, data and recipe for a base and its variants, and what the differences say."""
from .compare import ComparisonResult, compare
from .config import CompareConfig
from .runs import RunError

__all__ = ['CompareConfig', 'ComparisonResult', 'RunError', 'compare']
