"""Times and memory of operators and models, each relative to what it replaces."""
import ctypes
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..loading import create_model
from ..operators import Benchmark, benchmarks

__all__ = ['DTYPES', 'LAYOUTS', 'VARIANTS', 'Clock', 'Row', 'measure_models', 'measure_operator']

DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
LAYOUTS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
VARIANTS = ('floor', 'floor_compiled', 'ours', 'compiled', 'literal')

# What was measured of one variant in one case: see the columns of ``report.COLUMNS``
Row: TypeAlias = dict[str, Any]


class Clock:
    """Times functions in turns, so that what disturbs the machine disturbs all of them alike.

    Args:
        device: Where they compute.
        repeats: How often each is timed.
    """

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device = device
        self.repeats = repeats
        self._flush = torch.empty(2 ** 28, dtype=torch.int8, device=device) if device.type == 'cuda' else None

    def medians(self, functions: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """Give the median of the milliseconds that each function takes."""
        for function in functions.values():
            for _ in range(2):  # compiles, fills caches
                function()
        times: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(self.repeats):
            for name, function in functions.items():
                times[name].append(self._time(function))
        return {name: statistics.median(values) for name, values in times.items()}

    def _time(self, function: Callable[[], object]) -> float:
        if self._flush is None:
            start = time.perf_counter()
            function()
            return 1000 * (time.perf_counter() - start)
        # No function finds its input in the cache of the GPU. And as in training, where the CPU runs ahead, the
        # launches of a single operator are queued while the GPU is still busy with this, for a millisecond or more.
        for _ in range(16):
            self._flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def peak_mib(self, function: Callable[[], object]) -> float | None:
        """Give the memory that a function takes beyond what is in use before.

        On CPUs that is the memory which is resident, as Linux counts it; elsewhere ``None``.
        """
        if self.device.type == 'cpu':
            return _peak_resident_mib(function)
        if self.device.type != 'cuda':
            return None
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        function()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2 ** 20


def _peak_resident_mib(function: Callable[[], object]) -> float | None:
    process = Path('/proc/self')
    try:
        ctypes.CDLL(None).malloc_trim(0)  # gives back what is free, or it would be used unseen
        (process / 'clear_refs').write_text('5')  # forgets the peak so far
        before = _status_kib(process, 'VmRSS')
    except (OSError, AttributeError, TypeError):
        return None
    function()
    return (_status_kib(process, 'VmHWM') - before) / 1024


def _status_kib(process: Path, field: str) -> int:
    lines = (process / 'status').read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f'{field}:')))


def measure_operator(
        name: str,
        shape: tuple[int, ...],
        layout: str,
        dtype: str,
        variants: Sequence[str],
        clock: Clock,
) -> Iterator[Row]:
    """Measure an operator beside the plain one, forward and with its backward pass.

    Args:
        name: A key of ``operators.benchmarks()``.
        shape: Shape of the input, (N, C, H, W).
        layout: A key of ``LAYOUTS``.
        dtype: A key of ``DTYPES``.
        variants: Which of ``VARIANTS``; ``'floor'`` must be among them, as all ratios are taken to it.
        clock: What measures.

    Yields:
        A row for each pass and variant.
    """
    torch.compiler.reset()  # or it would compile for shapes of any size from the second on, and give up after some
    benchmark = benchmarks()[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(clock.device, DTYPES[dtype], memory_format=LAYOUTS[layout])
    x.requires_grad_()
    ours = benchmark.ours(shape[1]).to(clock.device)
    functions = _build_variants(benchmark, ours, variants)
    params = list(ours.parameters())
    dy = torch.randn_like(functions['floor'](x).detach())

    def forward(f: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return torch.no_grad()(lambda: f(x))

    def step(f: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(f(x), [x, *params], dy, allow_unused=True)

    copy = torch.empty_like(x)
    moved = {'forward': benchmark.forward_bytes, 'forward+backward': benchmark.forward_bytes + benchmark.backward_bytes}
    for measured, wrap in (('forward', forward), ('forward+backward', step)):
        calls = {variant: wrap(f) for variant, f in functions.items()}
        times = clock.medians({**calls, 'copy': torch.no_grad()(lambda: copy.copy_(x))})
        for variant, call in calls.items():
            yield dict(
                name=name, shape='x'.join(map(str, shape)), layout=layout, dtype=dtype, measured=measured,
                variant=variant, milliseconds=times[variant], floor_ratio=times[variant] / times['floor'],
                # A copy moves twice the bytes of its input.
                bytes_ratio=times[variant] / (times['copy'] * moved[measured] / 2),
                peak_mib=clock.peak_mib(call),
            )


def _build_variants(
        benchmark: Benchmark,
        ours: nn.Module,
        variants: Sequence[str],
) -> dict[str, Callable[[Tensor], Tensor]]:
    """The functions to compare, in the order of ``VARIANTS``."""
    functions = {
        'floor': benchmark.plain(),
        'floor_compiled': torch.compile(benchmark.plain()),
        'ours': ours,
        'compiled': torch.compile(ours),
        'literal': lambda x: benchmark.literal(ours, x),
    }
    return {variant: functions[variant] for variant in VARIANTS if variant in variants}


def measure_models(
        names: Sequence[str],
        batch_size: int,
        img_size: int,
        layout: str,
        dtype: str,
        compiled: bool,
        clock: Clock,
        measured: Sequence[str] = ('training step', 'inference'),
) -> Iterator[Row]:
    """Measure the variants of a base model beside it.

    Args:
        names: Model names; ratios are taken to the first.
        batch_size: Images per step.
        img_size: Their height and width.
        layout: A key of ``LAYOUTS``.
        dtype: A key of ``DTYPES``, for autocast.
        compiled: Measure under ``torch.compile``.
        clock: What measures.
        measured: What to measure of ``'training step'`` and ``'inference'``.

    Yields:
        A row for each of ``measured`` and each model.
    """
    torch.compiler.reset()
    device = clock.device
    x = torch.randn(batch_size, 3, img_size, img_size, device=device).to(memory_format=LAYOUTS[layout])
    target = torch.randint(10, (batch_size,), device=device)

    def build_calls(name: str) -> dict[str, Callable[[], None]]:
        torch.manual_seed(0)
        model = create_model(name, num_classes=10).to(device, memory_format=LAYOUTS[layout])
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        run = torch.compile(model) if compiled else model

        def train() -> None:
            model.train()
            with torch.autocast(device.type, DTYPES[dtype], enabled=dtype != 'fp32'):
                loss = F.cross_entropy(run(x).float(), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        @torch.no_grad()
        def infer() -> None:
            model.eval()
            with torch.autocast(device.type, DTYPES[dtype], enabled=dtype != 'fp32'):
                run(x)

        return {'training step': train, 'inference': infer}

    calls = {name: build_calls(name) for name in names}
    for what in measured:
        times = clock.medians({name: calls[name][what] for name in names})
        for name in names:
            yield dict(
                name=name, shape='x'.join(map(str, x.shape)), layout=layout, dtype=dtype, measured=what,
                variant='compiled' if compiled else 'ours', milliseconds=times[name],
                floor_ratio=times[name] / times[names[0]], bytes_ratio=None, peak_mib=clock.peak_mib(calls[name][what]),
            )
