"""Models as ONNX graphs in onnxruntime, beside their base."""
import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..loading import create_model
from .measure import Clock, Row

__all__ = ['measure_onnx', 'require_onnxruntime']


def require_onnxruntime() -> None:
    """Raise an ``ImportError`` that says what to install, if what this takes is not there."""
    for name in ('onnxscript', 'onnxruntime'):
        try:
            importlib.import_module(name)
        except ImportError as e:
            raise ImportError(f"ONNX graphs need {name}: pip install 'timm-dyacts[onnx]'") from e


def measure_onnx(
        names: Sequence[str],
        batch_sizes: Sequence[int],
        img_size: int,
        clock: Clock,
) -> Iterator[Row]:
    """Measure the variants of a base model beside it, all exported by ``torch.onnx.export`` with a batch of any size.

    Args:
        names: Model names; ratios are taken to the first.
        batch_sizes: Images per run.
        img_size: Their height and width.
        clock: What measures. onnxruntime gets as many threads as PyTorch has, on the CPU.

    Yields:
        A row for each batch size and each model: beside the times, the number of nodes in the graph and the largest
        difference from eager mode, relative to the largest output.

    Raises:
        ImportError: If onnxscript or onnxruntime is not installed.
    """
    require_onnxruntime()
    models = {name: _create(name) for name in names}
    graphs = {name: _export(model, img_size) for name, model in models.items()}
    runs = {name: _load(graph) for name, graph in graphs.items()}
    for batch_size in batch_sizes:
        x = torch.randn(batch_size, 3, img_size, img_size, generator=torch.Generator().manual_seed(0))
        times = clock.medians({name: partial(run, x) for name, run in runs.items()})
        for name in names:
            with torch.no_grad():
                expected = models[name](x)
            difference = (runs[name](x) - expected).abs().max() / expected.abs().max()
            yield dict(
                name=name, shape='x'.join(map(str, x.shape)), layout='contiguous', dtype='fp32', measured='inference',
                variant='onnx', milliseconds=times[name], floor_ratio=times[name] / times[names[0]], bytes_ratio=None,
                peak_mib=None, nodes=len(graphs[name].graph.node), difference=difference.item(),
            )


def _create(name: str) -> nn.Module:
    """Create a model in which nothing that starts at zero still is zero."""
    torch.manual_seed(0)
    model = create_model(name).eval()
    for param in model.parameters():
        if param.ndim > 1 and not param.any():
            nn.init.normal_(param, std=0.1)
    return model


def _export(model: nn.Module, img_size: int) -> Any:
    program = torch.onnx.export(
        model, (torch.zeros(2, 3, img_size, img_size),), dynamo=True, verbose=False,
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    return program.model_proto


def _load(graph: Any) -> Callable[[Tensor], Tensor]:
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=['CPUExecutionProvider'])
    return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
