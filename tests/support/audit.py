"""What is known of the Triton kernels without a GPU: bytes moved, compiled code, a prediction of the benchmark's aims.

Under Triton's interpreter ``count_cases`` counts bytes, in a process of its own ``compile_cases`` compiles, and
``predict`` makes of both the rows that a benchmark on a GPU would measure.
"""
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from support.compiled import Compiled, compile_for, compile_kernel
from support.memory import Memory
from support.roofline import GPU, LAUNCH
from support.traffic import Moved, Operations, count_bytes, full_runs, kernels_on_cpus, run_passes
from timm_dyacts.benchmark import DTYPES, LAYOUTS, Row
from timm_dyacts.operators import Benchmark, benchmarks
from timm_dyacts.ops.triton_tiles import Launch

__all__ = ['SHAPES', 'Case', 'cases', 'compile_cases', 'count_cases', 'peak_bytes', 'predict', 'predict_models']

# Those of the aims, see ``benchmark.measure_aims``, and a sample of the first, to count at
SHAPES = ((168, 64, 56, 56), (64, 256, 112, 112))
_SAMPLE = (1, 64, 56, 56)
PASSES = ('forward', 'backward')


class Case(NamedTuple):
    """What the benchmark measures."""
    name: str
    layout: str
    dtype: str


@dataclass(frozen=True)
class Counted:
    """What was counted of a case, by pass: launches of ours, of the plain operator and of the literal definition."""
    ours: dict[str, list[Moved]]
    floor: dict[str, list[Moved]]
    literal: dict[str, list[Moved]]
    elements: int


def cases(names: Sequence[str]) -> list[Case]:
    """Give the cases of the benchmark's aims, of some of ``operators.benchmarks()``."""
    return [Case(*case) for case in itertools.product(names, LAYOUTS, ('bf16', 'fp32'))]


def _input(case: Case, shape: tuple[int, ...]) -> Tensor:
    # Not filled: large ones take no memory before.
    return torch.empty(shape, dtype=DTYPES[case.dtype], memory_format=LAYOUTS[case.layout])


def count_cases(names: Sequence[str]) -> Iterator[tuple[Case, Counted]]:
    """Count what all variants move in each case, in an interpreter."""
    for case in cases(names):
        benchmark, x = benchmarks()[case.name], _input(case, _SAMPLE).normal_()
        ours = benchmark.ours(_SAMPLE[1])
        with full_runs(), count_bytes() as launches:
            counted = run_passes(ours, x, launches)
        yield case, Counted(
            counted, _count_operations(benchmark.plain(), x), _count_operations(_Literal(benchmark, ours), x),
            x.numel())


class _Literal(nn.Module):
    """The literal definition as a module."""

    def __init__(self, benchmark: Benchmark, ours: nn.Module) -> None:
        super().__init__()
        self.benchmark = benchmark
        self.ours = ours

    def forward(self, x: Tensor) -> Tensor:
        return self.benchmark.literal(self.ours, x)


def _count_operations(module: nn.Module, x: Tensor) -> dict[str, list[Moved]]:
    launches: list[Moved] = []
    with Operations(launches):
        return run_passes(module, x, launches)


def compile_cases(
        names: Sequence[str],
        arch: int,
) -> Iterator[tuple[Case, tuple[int, ...], dict[str, list[tuple[Compiled, int]]]]]:
    """Compile the kernels of each case and shape for a GPU. Give for each launch the kernel and its programs."""
    compile_for(arch)
    known: dict[Any, Compiled] = {}
    launches: list[tuple[Compiled, int]] = []

    def launch(planned: Launch, *tensors: Tensor | None) -> None:
        launches.append((compile_kernel(planned, tensors, known), planned.programs))

    for case, shape in itertools.product(cases(names), SHAPES):
        launches.clear()
        with kernels_on_cpus(launch):
            passes = run_passes(benchmarks()[case.name].ours(shape[1]), _input(case, shape), launches)
        yield case, shape, passes


def peak_bytes(case: Case) -> float:
    """Give the memory that a forward and backward pass of ours takes, as a ratio to that of the plain operator."""
    benchmark, x = benchmarks()[case.name], _input(case, SHAPES[0]).requires_grad_()
    module, dy = benchmark.ours(x.shape[1]), None
    with kernels_on_cpus(lambda *args, **kwargs: None):
        dy = torch.empty_like(module(x))
        with Memory(x, dy, *module.parameters()) as memory:
            y = module(x)
            node, gradient = y.grad_fn, dy
            with torch.no_grad():
                while not hasattr(node, 'apply'):  # a view of what the operator gives
                    gradient, node = node(gradient), node.next_functions[0][0]
                node.apply(gradient)
    floor = _count_operations(benchmark.plain(), _input(case, _SAMPLE))
    written = sum(launch.written for launches in floor.values() for launch in launches)
    return memory.peak / (written / math.prod(_SAMPLE) * x.numel())


@dataclass(frozen=True)
class Time:
    """The predicted time of a pass.

    Attributes:
        seconds: The time.
        bounds: What bounds its launches, those that take the most first.
    """
    seconds: float
    bounds: tuple[str, ...]


def time_of(
        launches: list[Moved],
        scale: float,
        gpu: GPU,
        compiled: list[tuple[Compiled, int]] = (),
) -> Time:
    """Predict the time of a pass.

    Args:
        launches: What it moves, counted for a sample.
        scale: The number of samples.
        gpu: Where.
        compiled: Its kernels and their programs, not of a sample but of the whole.
    """
    kernels = iter(compiled)
    total, shares = 0.0, {}
    for launch in launches:
        instructions = {}
        if launch.programs and compiled:
            kernel, programs = next(kernels)
            assert kernel.name == launch.kernel, (kernel.name, launch.kernel)
            instructions = {pipe: n * kernel.threads * programs for pipe, n in kernel.instructions.items()}
        seconds, bound = gpu.seconds(scale * launch.moved, scale * launch.issued, instructions)
        shares[bound] = shares.get(bound, 0) + seconds
        total += seconds
    # The first launch of all waits for no other.
    return Time(total + (len(launches) - 1) * LAUNCH, tuple(sorted(shares, key=shares.get, reverse=True)))


def predict(
        counted: dict[Case, Counted],
        compiled: dict[tuple[Case, tuple[int, ...]], dict[str, list[tuple[Compiled, int]]]],
        memory: dict[Case, float],
        gpu: GPU,
) -> Iterator[Row]:
    """Give the rows that ``timm-dyacts benchmark aims`` would measure for the operators, with what bounds ours."""
    for (case, shape), kernels in compiled.items():
        benchmark, of_case = benchmarks()[case.name], counted[case]
        scale = math.prod(shape) / of_case.elements
        x_bytes = math.prod(shape) * DTYPES[case.dtype].itemsize
        moved = {'forward': benchmark.forward_bytes, 'backward': benchmark.backward_bytes}
        times = {
            'ours': [time_of(of_case.ours[key], scale, gpu, kernels[key]) for key in PASSES],
            'floor': [time_of(of_case.floor[key], scale, gpu) for key in PASSES],
            'literal': [time_of(of_case.literal[key], scale, gpu) for key in PASSES],
        }
        for measured, passes in (('forward', 1), ('forward+backward', 2)):
            seconds = {
                variant: sum(time.seconds for time in both[:passes]) + (passes - 1) * LAUNCH
                for variant, both in times.items()
            }
            bound = sum(list(moved.values())[:passes]) * x_bytes / gpu.bandwidth
            for variant in times:
                yield dict(
                    name=case.name, shape='x'.join(map(str, shape)), layout=case.layout, dtype=case.dtype,
                    measured=measured, variant=variant, milliseconds=1000 * seconds[variant],
                    floor_ratio=seconds[variant] / seconds['floor'], bytes_ratio=seconds[variant] / bound,
                    peak_mib=memory[case] if variant == 'ours' else 1.0,
                    bounds=', '.join(dict.fromkeys(b for time in times['ours'][:passes] for b in time.bounds[:1])),
                )


class _Step(TorchDispatchMode):
    """Adds up the time that the operations of a model take, at the rates of a GPU."""

    def __init__(self, gpu: GPU) -> None:
        super().__init__()
        self.gpu = gpu
        self.launches: list[Moved] = []
        self.operations = Operations(self.launches)
        self.seconds = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.launches.clear()
        out = self.operations.__torch_dispatch__(function, types, args, kwargs)
        for launch in self.launches:
            flops = flop_registry.get(function.overloadpacket)
            computed = 0 if flops is None else flops(*args, **(kwargs or {}), out_val=out)
            self.seconds += max(launch.moved / self.gpu.bandwidth, computed / self.gpu.tensor_flops) + LAUNCH
        return out


def predict_models(
        names: tuple[str, ...],
        counted: dict[Case, Counted],
        compiled: dict[tuple[Case, tuple[int, ...]], dict[str, list[tuple[Compiled, int]]]],
        gpu: GPU,
) -> Iterator[Row]:
    """Give the rows that the benchmark would measure for training steps of models, of which the first is the base.

    The base takes the time of its operations, each at the full rate of the memory or the tensor cores, of which real
    ones reach less. A variant takes as much longer as its operators take longer than the plain ones.
    """
    base = 0.0
    for name in names:
        model = timm.create_model(name, num_classes=10).to('meta', torch.bfloat16).train()
        x = torch.empty(256, 3, 224, 224, device='meta', dtype=torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last)
        more = 0.0
        if name == names[0]:
            with _Step(gpu) as step:
                model(x).float().square().mean().backward()
            # SGD with momentum: parameter, gradient and momentum are read, parameter and momentum written, in fp32.
            parameters = 4 * sum(p.numel() for p in model.parameters())
            base = step.seconds + 5 * parameters / gpu.bandwidth
        else:
            places = [(Case(operator, 'channels_last', 'bf16'), elements) for operator, elements in _places(model, x)]
            if any(case not in counted for case, _ in places):
                continue
            for case, elements in places:
                shape = SHAPES[0]
                scale, whole = elements / counted[case].elements, elements / math.prod(shape)
                for key in PASSES:
                    kernels = [(kernel, math.ceil(n * whole)) for kernel, n in compiled[case, shape][key]]
                    ours, floor = counted[case].ours[key], counted[case].floor[key]
                    more += time_of(ours, scale, gpu, kernels).seconds - time_of(floor, scale, gpu).seconds
        yield dict(
            name=name, shape='256x3x224x224', layout='channels_last', dtype='bf16', measured='training step',
            variant='ours', milliseconds=1000 * (base + more), floor_ratio=(base + more) / base, bytes_ratio=None,
            peak_mib=None)


def _places(model: nn.Module, x: Tensor) -> list[tuple[str, int]]:
    """Find the operators of a model: their names in the benchmark, and the elements of their inputs."""
    types = {type(benchmark.ours(4)): name for name, benchmark in benchmarks().items() if name != 'softpool_3x3'}
    found: list[tuple[str, int]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append((types[type(module)], args[0].numel()))

    for module in model.modules():
        if type(module) in types:
            module.register_forward_pre_hook(note)
    with torch.no_grad():
        model(x)
    return found
