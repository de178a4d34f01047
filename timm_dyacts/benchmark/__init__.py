"""Measure operators and whole models side by side with what they replace, and say which aims of the project are met.

What is measured of an operator stands in its record, ``operators.Operator.benchmarks``.
"""
from .aims import PARTS, RESNETS, Aim, list_aims, measure_aims, print_aims
from .measure import DTYPES, LAYOUTS, VARIANTS, Clock, Row, measure_models, measure_operator
from .onnx_models import measure_onnx, require_onnxruntime
from .report import Report

__all__ = [
    'DTYPES',
    'LAYOUTS',
    'PARTS',
    'RESNETS',
    'VARIANTS',
    'Aim',
    'Clock',
    'Report',
    'Row',
    'list_aims',
    'measure_aims',
    'measure_models',
    'measure_onnx',
    'measure_operator',
    'print_aims',
    'require_onnxruntime',
]
