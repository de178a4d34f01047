#!/usr/bin/env python3
"""Measures the operators, or whole models, side by side with what they replace.

All that is compared is measured in one process in turns, so that what disturbs the machine disturbs everything alike,
and printed as ratios of medians:

  floor           the plain operator of PyTorch, such as nn.ReLU or nn.MaxPool2d
  floor_compiled  the same under torch.compile
  ours            the operator of this package in eager mode
  compiled        the same under torch.compile
  literal         its definition, written down in PyTorch operations as one finds it in research code

"bytes" relates the time to that in which the machine copies the bytes that the operator has to move: 1 is the memory
limit. `aims` measures what this project has set itself for the device and tells which aims are met.
"""
import argparse
import datetime
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import timm_dyacts
from timm_dyacts.device import resolve_device
from timm_dyacts.evaluation.curves import require_matplotlib
from timm_dyacts.files import format_csv, replace_text
from timm_dyacts.layers import BELU, BipolarMaxPool2d, BReLU, DyReLU, SoftPool2d, channel_signs

DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
LAYOUTS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
VARIANTS = ('floor', 'floor_compiled', 'ours', 'compiled', 'literal')
COLORS = {'ours': '#1f6fb4', 'compiled': '#8fbfe0', 'floor_compiled': '#d9d9d9', 'literal': '#9a9a9a'}
COLUMNS = ('name', 'shape', 'layout', 'dtype', 'measured', 'variant', 'milliseconds', 'floor_ratio', 'bytes_ratio',
           'peak_mib', 'device', 'torch', 'timm', 'timm_dyacts', 'date')


# The definitions


def literal_dyrelu(module: DyReLU, x: Tensor) -> Tensor:
    """The K functions of each element along a dimension of their own, and their maximum."""
    mean = x.mean((2, 3), dtype=torch.float32)
    z = F.linear(F.relu(F.linear(mean, module.fc1_weight, module.fc1_bias)), module.fc2_weight, module.fc2_bias)
    start = torch.tensor([module.alpha, module.beta], device=x.device)
    scale = torch.tensor([[module.lambda_a], [module.lambda_b]], device=x.device)
    theta = start + scale * (2 * torch.sigmoid(z) - 1).reshape(len(x), -1, 2, module.k)
    slopes, intercepts = theta.to(x.dtype)[:, :, None, None].unbind(4)
    y = (x.unsqueeze(-1) * slopes + intercepts).amax(-1)
    if module.mode == 'c':
        logits = F.conv2d(x, module.spatial_weight[..., None, None].to(x.dtype), module.spatial_bias.to(x.dtype))
        share = torch.softmax(logits.flatten(1) / module.tau, 1).reshape(logits.shape)
        y = y * (share * share[0].numel()).clamp(max=3)
    return y


def literal_softpool(module: SoftPool2d, x: Tensor) -> Tensor:
    """Two average poolings, of the weighted elements and of the weights. It overflows, and is short."""
    weights = torch.exp(module.beta * x)
    window = module.kernel_size, module.stride, module.padding
    return F.avg_pool2d(weights * x, *window) / F.avg_pool2d(weights, *window)


def literal_bipolar(plain: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    """``s * f(s * x)``."""
    def f_bipolar(module: nn.Module, x: Tensor) -> Tensor:
        signs = channel_signs(x.shape[1], device=x.device, dtype=x.dtype).reshape(-1, 1, 1)
        return signs * plain(signs * x)
    return f_bipolar


@dataclass(frozen=True)
class Operator:
    """What is compared, and the bytes that it has to move in multiples of those of its input."""

    ours: Callable[[int], nn.Module]
    floor: Callable[[], nn.Module]
    literal: Callable[[nn.Module, Tensor], Tensor]
    forward_bytes: float
    backward_bytes: float


def _dyrelu(mode: str, backward_bytes: float) -> Operator:
    # Forward: read for the mean, read, write. Backward: read both for the sums, write; read, write for the mean.
    return Operator(lambda c: DyReLU(c, mode), nn.ReLU, literal_dyrelu, 3, backward_bytes)


def _softpool(*window: int) -> Operator:
    return Operator(lambda c: SoftPool2d(*window), lambda: nn.MaxPool2d(*window), literal_softpool, 1.25, 2.25)


OPERATORS = {
    'dyrelu_a': _dyrelu('a', 5),
    'dyrelu_b': _dyrelu('b', 5),
    'dyrelu_c': _dyrelu('c', 6),
    'softpool_2x2': _softpool(2),
    'softpool_3x3': _softpool(3, 2, 1),
    'brelu': Operator(lambda c: BReLU(), nn.ReLU, literal_bipolar(F.relu), 2, 3),
    'belu': Operator(lambda c: BELU(), nn.ELU, literal_bipolar(F.elu), 2, 3),
    'bipolar_max_pool': Operator(
        lambda c: BipolarMaxPool2d(2), lambda: nn.MaxPool2d(2),
        literal_bipolar(lambda x: F.max_pool2d(x, 2)), 1.25, 1.25),
}


# Measuring


class Clock:
    """Times functions in turns."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device = device
        self.repeats = repeats
        self.flush = torch.empty(2 ** 28, dtype=torch.int8, device=device) if device.type == 'cuda' else None

    def medians(self, functions: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Milliseconds of each."""
        for function in functions.values():
            for _ in range(2):  # compiles, fills caches
                function()
        times = {name: [] for name in functions}
        for _ in range(self.repeats):
            for name, function in functions.items():
                times[name].append(self._time(function))
        return {name: statistics.median(values) for name, values in times.items()}

    def _time(self, function: Callable[[], object]) -> float:
        if self.flush is None:
            start = time.perf_counter()
            function()
            return 1000 * (time.perf_counter() - start)
        # No function finds its input in the cache of the GPU. And as in training, where the CPU runs ahead, the
        # launches of a single operator are queued while the GPU is still at this, for a millisecond or more.
        for _ in range(16):
            self.flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def peak_mib(self, function: Callable[[], object]) -> float | None:
        """Memory that a function takes beyond what there is before it; None on CPUs, where nobody counts it."""
        if self.device.type != 'cuda':
            return None
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        function()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2 ** 20


def environment(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'CPU {platform.machine()}'
    if device.type == 'cpu' and Path('/proc/cpuinfo').exists():
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        name = next((line.split(': ')[1] for line in lines if 'model name' in line), name)
    if device.type == 'cpu':
        name += f', {torch.get_num_threads()} thread(s)'
    return dict(
        device=name,
        torch=torch.__version__,
        timm=timm.__version__,
        timm_dyacts=timm_dyacts.__version__,
        date=datetime.datetime.now(datetime.timezone.utc).strftime('%Y-%m-%d'),
    )


def measure_operator(
        name: str,
        shape: tuple[int, ...],
        layout: str,
        dtype: str,
        variants: list[str],
        clock: Clock,
) -> Iterator[dict]:
    torch.compiler.reset()  # or it would compile for shapes of any size from the second on, and give up after some
    operator = OPERATORS[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(clock.device, DTYPES[dtype], memory_format=LAYOUTS[layout])
    x.requires_grad_()
    ours = operator.ours(shape[1]).to(clock.device)
    for param in ours.parameters():
        nn.init.normal_(param, std=0.1)
    functions = {
        'floor': operator.floor(),
        'floor_compiled': torch.compile(operator.floor()),
        'ours': ours,
        'compiled': torch.compile(ours),
        'literal': lambda x: operator.literal(ours, x),
    }
    functions = {variant: functions[variant] for variant in VARIANTS if variant in variants}
    params = list(ours.parameters())
    dy = torch.randn_like(functions['floor'](x).detach())

    def forward(f: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return torch.no_grad()(lambda: f(x))

    def step(f: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(f(x), [x, *params], dy, allow_unused=True)

    copy = torch.empty_like(x)
    moved = {'forward': operator.forward_bytes, 'forward+backward': operator.forward_bytes + operator.backward_bytes}
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


def measure_models(
        names: Sequence[str],
        batch_size: int,
        img_size: int,
        layout: str,
        dtype: str,
        compiled: bool,
        clock: Clock,
        measured: Sequence[str] = ('training step', 'inference'),
) -> Iterator[dict]:
    """The variants of one base, beside it."""
    torch.compiler.reset()
    device = clock.device
    x = torch.randn(batch_size, 3, img_size, img_size, device=device).to(memory_format=LAYOUTS[layout])
    target = torch.randint(10, (batch_size,), device=device)
    calls = {'training step': {}, 'inference': {}}

    def prepare(name: str) -> None:
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=10).to(device, memory_format=LAYOUTS[layout])
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

        calls['training step'][name], calls['inference'][name] = train, infer

    for name in names:
        prepare(name)
    for what in measured:
        times = clock.medians(calls[what])
        for name, call in calls[what].items():
            yield dict(
                name=name, shape='x'.join(map(str, x.shape)), layout=layout, dtype=dtype, measured=what,
                variant='compiled' if compiled else 'ours', milliseconds=times[name],
                floor_ratio=times[name] / times[names[0]], bytes_ratio=None, peak_mib=clock.peak_mib(call),
            )


# Reporting


@dataclass
class Report:
    """Rows as they come: printed at once, saved and drawn at the end."""

    device: torch.device
    rows: list[dict] = field(default_factory=list)

    def add(self, rows: Iterator[dict]) -> None:
        for row in rows:
            self.rows.append(row | environment(self.device))
            if len(self.rows) == 1:
                print(f"{'':26}{'shape':20}{'layout':15}{'dtype':6}{'measured':18}{'variant':16}"
                      f"{'ms':>9}{'floor':>8}{'bytes':>8}{'MiB':>8}")
            numbers = ''.join(
                f'{row[column]:{width}.2f}' if row[column] is not None else f"{'':{width}}"
                for column, width in (('milliseconds', 9), ('floor_ratio', 8), ('bytes_ratio', 8), ('peak_mib', 8)))
            print(f"{row['name']:26}{row['shape']:20}{row['layout']:15}{row['dtype']:6}{row['measured']:18}"
                  f"{row['variant']:16}{numbers}", flush=True)

    def save(self, path: Path) -> None:
        """Writes the rows and, beside them, the chart."""
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, format_csv(self.rows, COLUMNS))
        self.draw(path.with_suffix('.png'))
        print(f'{path} and {path.with_suffix(".png").name} written')

    def draw(self, path: Path) -> None:
        """Times relative to the floor, the median over shapes, layouts and dtypes."""
        from matplotlib.figure import Figure

        measured = list(dict.fromkeys(row['measured'] for row in self.rows))
        names = list(dict.fromkeys(row['name'] for row in self.rows))
        fig = Figure(figsize=(11, 1.4 + 0.45 * len(names)), dpi=150, layout='constrained')
        fig.suptitle(f"Time relative to the plain operator or base model\n{self.rows[0]['device']}, "
                     f"torch {self.rows[0]['torch']}, {self.rows[0]['date']}", fontsize=11)
        for ax, what in zip(fig.subplots(1, len(measured), sharey=True, squeeze=False)[0], measured, strict=True):
            draw_ratios(ax, [row for row in self.rows if row['measured'] == what], names)
            ax.set_title(what, fontsize=9)
        ax.legend(frameon=False, loc='best')
        fig.savefig(path)


def draw_ratios(ax, rows: list[dict], names: list[str]) -> None:
    variants = [variant for variant in COLORS if any(row['variant'] == variant for row in rows)]
    height = 0.8 / len(variants)
    for i, variant in enumerate(variants):
        ratios = [[r['floor_ratio'] for r in rows if (r['name'], r['variant']) == (name, variant)] for name in names]
        places = [n + (i - (len(variants) - 1) / 2) * height for n in range(len(names))]
        medians = [statistics.median(values) if values else 0 for values in ratios]
        bars = ax.barh(places, medians, height, color=COLORS[variant], label=variant)
        ax.bar_label(bars, [f'{median:.2f}' if median else '' for median in medians], fontsize=7, padding=2)
    ax.axvline(1, color='black', linewidth=0.8)
    ax.set_yticks(range(len(names)), names)
    ax.set_xlabel('ratio (1: the plain one)')
    ax.margins(x=0.12)
    if not ax.yaxis_inverted():
        ax.invert_yaxis()
    ax.grid(alpha=0.25, axis='x')
    ax.spines[['top', 'right']].set_visible(False)


# What the project has set itself


@dataclass(frozen=True)
class Aim:
    """An upper bound of a ratio: to the floor, the time that the bytes take, the floor's memory, or the literal."""

    name: str
    measured: str
    against: str
    bound: float
    variant: str = 'ours'

    def worst(self, rows: list[dict]) -> float | None:
        """The largest ratio measured, None if there is none."""
        own = [row for row in rows if (row['name'], row['measured'], row['variant']) == (
            self.name, self.measured, self.variant)]
        return max((self._ratio(row, rows) for row in own), default=None)

    def _ratio(self, row: dict, rows: list[dict]) -> float:
        if self.against in ('floor', 'bytes'):
            return row[f'{self.against}_ratio']
        case = ('name', 'shape', 'layout', 'dtype', 'measured')
        other, column = ('floor', 'peak_mib') if self.against == 'memory' else ('literal', 'milliseconds')
        partner = next(r for r in rows if r['variant'] == other and all(r[key] == row[key] for key in case))
        return row[column] / partner[column]


BOTH = 'forward+backward'
AIMS = {
    'cuda': [
        *(Aim(name, measured, 'bytes', 1.15) for name in OPERATORS for measured in ('forward', BOTH)),
        Aim('brelu', BOTH, 'floor', 1.05),
        Aim('dyrelu_b', BOTH, 'floor', 1.8),
        Aim('softpool_2x2', BOTH, 'floor', 1.0),
        *(Aim(name, BOTH, 'memory', 1.05) for name in ('brelu', 'dyrelu_b', 'softpool_2x2')),
        Aim('dyrelu_b', BOTH, 'literal', 1 / 5),
        Aim('softpool_2x2', BOTH, 'literal', 1 / 3),
        *(Aim(name, 'training step', 'floor', bound, variant)
          for name, bound in (('resnet50_softpool', 1.03), ('resnet50_brelu', 1.03), ('resnet50_dyrelu_b', 1.15),
                              ('mobilenetv2_100_dyrelu_b', 1.25))
          for variant in ('ours', 'compiled')),
    ],
    'cpu': [
        Aim('dyrelu_b', 'forward', 'floor', 2.5),
        Aim('dyrelu_b', 'forward', 'floor', 1.15, 'compiled'),
        Aim('softpool_2x2', 'forward', 'floor', 1.5),
        Aim('softpool_2x2', 'forward', 'floor', 0.7, 'compiled'),
        Aim('brelu', 'forward', 'floor', 1.3),
    ],
}


PARTS = ('operators', 'models', 'compiled-models')


def measure_aims(parts: Sequence[str], clock: Clock, report: Report) -> None:
    """Parts of what there are aims for: `PARTS` on CUDA; on CPUs there are only operators."""
    if clock.device.type == 'cpu':
        for name in dict.fromkeys(aim.name for aim in AIMS['cpu']):
            report.add(measure_operator(name, (32, 64, 112, 112), 'contiguous', 'fp32', list(VARIANTS), clock))
        return
    if 'operators' in parts:
        # 64 MiB in bf16, and more
        for shape in ((168, 64, 56, 56), (64, 256, 112, 112)):
            for layout in LAYOUTS:
                for dtype in ('bf16', 'fp32'):
                    for name in OPERATORS:
                        report.add(measure_operator(name, shape, layout, dtype, ['floor', 'ours', 'literal'], clock))
    for part in ('models', 'compiled-models'):
        if part in parts:
            for models in (('resnet50', 'resnet50_softpool', 'resnet50_brelu', 'resnet50_dyrelu_b'),
                           ('mobilenetv2_100', 'mobilenetv2_100_dyrelu_b')):
                report.add(measure_models(
                    models, 256, 224, 'channels_last', 'bf16', part != 'models', clock, ['training step']))


def print_aims(aims: list[Aim], rows: list[dict]) -> None:
    print()
    for aim in aims:
        worst = aim.worst(rows)
        verdict = 'not measured' if worst is None else 'met' if worst <= aim.bound else 'MISSED'
        ratio = '' if worst is None else f'{worst:.2f}'
        print(f'{aim.name:26}{aim.measured:18}{aim.variant:10}{aim.against:8}<= {aim.bound:<6.3g}{ratio:>7}  {verdict}')


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest='command', required=True)
    ops = commands.add_parser('ops', help='measure operators', allow_abbrev=False)
    models = commands.add_parser('models', help='measure models beside their base', allow_abbrev=False)
    aims = commands.add_parser('aims', help='measure what has an aim, and tell whether it is met', allow_abbrev=False)
    ops.add_argument('--ops', nargs='+', choices=OPERATORS, default=list(OPERATORS), help='default: all')
    ops.add_argument('--shapes', nargs='+', metavar='NxCxHxW',
                     default=['32x64x56x56', '32x64x112x112', '32x256x112x112'],
                     help='shapes of the input (default: %(default)s)')
    ops.add_argument('--layouts', nargs='+', choices=LAYOUTS, default=list(LAYOUTS), help='default: all')
    ops.add_argument('--dtypes', nargs='+', choices=DTYPES, default=list(DTYPES), help='default: all')
    ops.add_argument('--variants', nargs='+', choices=VARIANTS, default=list(VARIANTS),
                     help='what to measure beside the floor (default: all)')
    models.add_argument('--models', nargs='+', metavar='NAME',
                        default=['resnet50', 'resnet50_softpool', 'resnet50_brelu', 'resnet50_dyrelu_b'],
                        help='a base and its variants (default: %(default)s)')
    models.add_argument('-b', '--batch-size', type=int, default=256, metavar='N', help='default: %(default)s')
    models.add_argument('--img-size', type=int, default=224, metavar='N', help='default: %(default)s')
    models.add_argument('--layout', choices=LAYOUTS, default='channels_last', help='default: %(default)s')
    models.add_argument('--dtype', choices=DTYPES, default='bf16', help='of autocast (default: %(default)s)')
    models.add_argument('--compile', action='store_true', help='under torch.compile')
    aims.add_argument('--parts', nargs='+', choices=PARTS, default=list(PARTS),
                      help='of what is measured on CUDA, where compiling the models takes longest (default: all)')
    for command in (ops, models, aims):
        command.add_argument('--repeats', type=int, default=20, metavar='N', help='of each measurement (default: 20)')
        command.add_argument('--device', metavar='NAME', help='device (default: cuda if there is one, else cpu)')
        command.add_argument('--output', type=Path, metavar='FILE', help='CSV (default: benchmark-<command>.csv); '
                             'the chart is written beside it, as PNG')
    return parser


def parse_shape(text: str) -> tuple[int, ...]:
    sizes = text.split('x')
    if len(sizes) != 4 or not all(size.isdigit() and int(size) > 1 for size in sizes):
        raise ValueError(f'--shapes must be four sizes above 1 such as 32x64x56x56, got {text}')
    return tuple(map(int, sizes))


def main() -> None:
    args = create_parser().parse_args()
    try:
        require_matplotlib()
        for option in ('repeats', 'batch_size', 'img_size'):
            if getattr(args, option, 1) < 1:
                raise ValueError(f'--{option.replace("_", "-")} must be at least 1, got {getattr(args, option)}')
        clock = Clock(resolve_device(args.device), args.repeats)
        report = Report(clock.device)
        if args.command == 'ops':
            shapes = [parse_shape(text) for text in args.shapes]
            variants = ['floor', *args.variants]
            for name in args.ops:
                for shape in shapes:
                    for layout in args.layouts:
                        for dtype in args.dtypes:
                            report.add(measure_operator(name, shape, layout, dtype, variants, clock))
        elif args.command == 'models':
            report.add(measure_models(
                args.models, args.batch_size, args.img_size, args.layout, args.dtype, args.compile, clock))
        else:
            measure_aims(args.parts, clock, report)
        report.save(args.output or Path(f'benchmark-{args.command}.csv'))
        if args.command == 'aims':
            print_aims(AIMS[clock.device.type], report.rows)
    except (ImportError, OSError, RuntimeError, ValueError) as e:
        sys.exit(f'benchmark.py: error: {e}')


if __name__ == '__main__':
    main()
