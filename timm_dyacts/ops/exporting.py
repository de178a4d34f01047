"""Whether a program is being exported, and which one: what runs it may want another form than eager mode does."""
import torch

from .compat import torch_exports

__all__ = ['is_exporting', 'is_exporting_onnx', 'is_recording']


def is_exporting() -> bool:
    """Tell whether ``torch.export`` or an exporter of ONNX records: the program is for inference elsewhere."""
    return torch_exports() or torch.jit.is_tracing() and torch.onnx.is_in_onnx_export()


def is_exporting_onnx() -> bool:
    """Tell whether ``torch.onnx.export`` records by way of ``torch.export``."""
    return torch_exports() and torch.onnx.is_in_onnx_export()


def is_recording() -> bool:
    """Tell whether a program is being recorded: compiled, exported or traced. Its sizes may be symbols."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()
