"""What ``convert`` makes of the networks of libraries: each with every operation, one row of a table for each case."""
from .cases import COLUMNS, RESULTS, default_operations, measure, operations
from .libraries import LIBRARIES
from .table import read_rows, summarise, write_rows
from .workers import run

__all__ = [
    'COLUMNS',
    'LIBRARIES',
    'RESULTS',
    'default_operations',
    'measure',
    'operations',
    'read_rows',
    'run',
    'summarise',
    'write_rows',
]
