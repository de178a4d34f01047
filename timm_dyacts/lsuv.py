"""Layer-sequential unit-variance (LSUV) initialisation, for networks without normalisation.

Without BatchNorm nothing holds the size of the activations: it has to be right from the start. LSUV makes every weight
orthonormal and then scales it until the layer's output has unit variance on a batch of real data, first layer first.

In a residual network that is not enough. With branches of unit variance, 40 steps of SGD on the digits (momentum 0.9)
leave ``resnet50_brelu_nobn`` and ``resnet101_brelu_nobn`` near chance with learning rates of 0.003 and 0.01; they
diverge with 0.1 and 0.03, respectively. The branches therefore end smaller, so that all of them together add as much
variance as one layer has: the same steps with 0.003 then learn. It is the idea of Fixup, with LSUV's measured scale in
place of its rule.

Papers:
    `All you need is a good init` (Mishkin & Matas, 2015)
        - https://arxiv.org/abs/1511.06422
    `Fixup Initialization: Residual Learning Without Normalization` (Zhang et al., 2019)
        - https://arxiv.org/abs/1901.09321
"""
import math
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .convert import Skip
from .convert.trace import Trace, trace_forward
from .modes import evaluating
from .operators import activation_types
from .ops.checks import check_int, check_positive

__all__ = ['LSUVReport', 'OutputStd', 'lsuv_']

# A convolution follows the scale of its weight up to rounding; one that is off by more after a rescaling does not.
_FOLLOWS = 0.1


@dataclass(frozen=True)
class OutputStd:
    """Standard deviation of the output of one layer or activation, over all of its elements.

    Attributes:
        name: Path of the module.
        kind: Class name of the module.
        before: Value before ``lsuv_``.
        after: Value after it, measured in a separate forward pass.
        target: Value aimed at, ``None`` for activations.
        iterations: How often the weight was rescaled, ``None`` for activations.
    """
    name: str
    kind: str
    before: float
    after: float
    target: float | None = None
    iterations: int | None = None


@dataclass(frozen=True)
class LSUVReport:
    """What ``lsuv_`` did. Prints as a table.

    Attributes:
        rows: Layers that were initialised and activations, in the order in which they run. A layer that runs
            several times appears once, with its first output.
        skipped: The layers that were left alone, with the reason.
    """
    rows: tuple[OutputStd, ...]
    skipped: tuple[Skip, ...]

    @property
    def layers(self) -> list[OutputStd]:
        """The rows of convolutions and linear layers."""
        return [row for row in self.rows if row.target is not None]

    @property
    def activations(self) -> list[OutputStd]:
        """The rows of activations."""
        return [row for row in self.rows if row.target is None]

    def __str__(self) -> str:
        table = [('name', 'kind', 'std before', 'std after', 'target', 'iterations')]
        for row in self.rows:
            goal = ('', '') if row.target is None else (f'{row.target:.3g}', str(row.iterations))
            table.append((row.name, row.kind, f'{row.before:.3g}', f'{row.after:.3g}', *goal))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            '  '.join(cell.ljust(width) if i < 2 else cell.rjust(width)
                      for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
            for row in table
        ]
        lines += [f'left alone: {s.name} ({s.kind}): {s.reason}' for s in self.skipped]
        return '\n'.join(lines)


def lsuv_(
        model: nn.Module,
        batch: Tensor,
        target_std: float = 1.0,
        tol: float = 0.05,
        max_iters: int = 10,
        residual_std: float | None = None,
        generator: torch.Generator | None = None,
) -> LSUVReport:
    """Initialise all convolutions and linear layers of a model, in place, so that each has an output of unit variance.

    Weights become orthonormal (each group of a grouped convolution by itself), biases zero. Then, in the order in which
    the layers run, each weight is scaled to the target. Whatever the weights held before is lost, be it trained or, at
    the end of a residual branch, zero. The classifier is a layer like any others: its logits start with ``target_std``.

    Left as they are: layers inside gates (squeeze-excite, the coefficients of Dynamic ReLU, attention maps), whose
    output is a factor and not a signal, and which often start at zero on purpose; layers that do not run; layers whose
    output does not follow the scale of their weight (weight standardisation).

    All layers are done in a single forward pass, each of them measured again after it was rescaled. Three more passes
    find the gates and branches and measure all outputs before and after. The model runs in eval mode; its training
    flags are kept, and no gradient is recorded.

    Args:
        model: Model on its device, of any floating-point dtype. Statistics are taken in float32 at least.
        batch: Input (N, ...) with the dtype and on the device of the model: preprocessed images, some tens of them.
        target_std: Standard deviation of the outputs.
        tol: Accepted relative deviation from it.
        max_iters: Largest number of rescalings per layer. One is enough, except with a ``tol`` close to the precision
            of the dtype.
        residual_std: Standard deviation of the layer that ends a residual branch: of two summands, the one that passed
            more layers. Default: ``target_std / sqrt(B)`` in a network with B of them. LSUV as published is
            ``residual_std=target_std``.
        generator: Source of the random weights, on any device. Default: torch's global one, of the model's device.

    Returns:
        The standard deviations before and after.

    Raises:
        ValueError: If an argument is out of range; if ``batch`` is empty, not finite, no input of the model, or gives a
            layer a constant output; if no layer can be initialised. The model is then as it was.
        TypeError: If an argument has another type.
    """
    _check_arguments(model, batch, target_std, tol, max_iters, residual_std, generator)
    try:
        trace = trace_forward(model, batch[:2])
    except (AssertionError, IndexError, RuntimeError) as e:
        raise ValueError(f'batch must be an input of the model, got shape {tuple(batch.shape)}: {e}') from e
    layers, skipped = _find_layers(model, trace)
    if not layers:
        raise ValueError(f'model must have a convolution or linear layer to initialise, got {type(model).__name__}')
    branch_ends = _find_branch_ends(trace, layers)
    if residual_std is None:
        residual_std = target_std / math.sqrt(max(len(branch_ends), 1))
    targets = {layer: residual_std if layer in branch_ends else target_std for layer in layers}

    watched = {**layers, **_find_activations(model, trace)}
    stds_before = _measure(model, batch, watched, once=layers)
    originals = {p: p.detach().clone() for layer in layers for p in layer.parameters(recurse=False)}
    try:
        for layer in layers:
            _orthonormal_(layer, generator)
        iterations = _scale(model, batch, layers, targets, tol, max_iters, originals)
        stds_after = _measure(model, batch, watched, once=layers)
    except BaseException:
        _put_back(originals, layers)
        raise

    rows = []
    for (module, before), (_, after) in zip(stds_before, stds_after, strict=True):
        name, kind = watched[module], type(module).__name__
        if module not in layers:
            rows.append(OutputStd(name, kind, before, after))
        elif iterations[module] is not None:
            rows.append(OutputStd(name, kind, before, after, targets[module], iterations[module]))
        else:
            skipped.append(Skip(name, kind, 'its output does not follow the scale of its weight'))
    return LSUVReport(tuple(rows), tuple(skipped))


def _check_arguments(
        model: nn.Module,
        batch: Tensor,
        target_std: float,
        tol: float,
        max_iters: int,
        residual_std: float | None,
        generator: torch.Generator | None,
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f'model must be a module, got {type(model).__name__}')
    if not isinstance(batch, Tensor):
        raise TypeError(f'batch must be a tensor, got {type(batch).__name__}')
    check_positive('target_std', target_std)
    check_positive('tol', tol)
    check_int('max_iters', max_iters, 1)
    if residual_std is not None:
        check_positive('residual_std', residual_std)
    if not isinstance(generator, (torch.Generator, type(None))):
        raise TypeError(f'generator must be a torch.Generator or None, got {generator!r}')

    like = next((p for p in model.parameters() if p.is_floating_point()), batch)
    if batch.dtype != like.dtype or not batch.is_floating_point():
        raise TypeError(f'batch must have the floating-point dtype of the model, {like.dtype}, got {batch.dtype}')
    if batch.device != like.device or batch.is_meta:
        raise ValueError(
            f'batch must hold data on the device of the model, got {batch.device} for a model on {like.device}')
    if batch.numel() == 0:
        raise ValueError(f'batch must not be empty, got shape {tuple(batch.shape)}')
    if not batch.isfinite().all():
        raise ValueError(f'batch must be finite, got {(~batch.isfinite()).sum().item()} elements that are not')


def _find_layers(model: nn.Module, trace: Trace) -> tuple[dict[nn.Module, str], list[Skip]]:
    """The layers to initialise, in the order in which they run, with their names; and those to leave alone."""
    candidates = [m for m in model.modules() if isinstance(m, (_ConvNd, nn.Linear))]
    ran = [m for m in trace.calls_by_module if m in set(candidates)]
    layers: dict[nn.Module, str] = {}
    owners: dict[Tensor, str] = {}
    skipped = []
    for module in [*ran, *(m for m in candidates if not trace.calls_of(m))]:
        name, weight = trace.name(module), module._parameters.get('weight')
        if not trace.calls_of(module):
            reason = 'not called in a forward pass in eval mode'
        elif weight is None:
            reason = 'its weight is computed, not a parameter'
        elif not trace.is_on_main_path(module):
            reason = 'inside a gate'
        elif weight in owners:
            reason = f"has the weight of '{owners[weight]}'"
        else:
            layers[module] = owners[weight] = name
            continue
        skipped.append(Skip(name, type(module).__name__, reason))
    return layers, skipped


def _find_branch_ends(trace: Trace, layers: Iterable[nn.Module]) -> set[nn.Module]:
    """The last layer of each residual branch: of the summand that passed more layers than the other one."""
    last_op = {call.stop - 1: call.module for call in trace.calls if call.module in layers}
    # What each tensor that depends on the input has passed, by id: the number of layers, the last of them
    passed: dict[int, tuple[int, nn.Module | None]] = {id(trace.input): (0, None)}
    ends = set()
    for index, op in enumerate(trace.ops):
        inputs = [t for t in op.inputs if id(t) in passed]
        if not inputs:
            continue
        deepest = max((passed[id(t)] for t in inputs), key=itemgetter(0))
        if op.name == 'add' and len(inputs) == 2 and inputs[0].shape == inputs[1].shape:
            if any(passed[id(t)][0] < deepest[0] for t in inputs):
                ends.add(deepest[1])
        if index in last_op:
            deepest = deepest[0] + 1, last_op[index]
        passed.update((id(t), deepest) for t in op.outputs)
    return ends


def _find_activations(model: nn.Module, trace: Trace) -> dict[nn.Module, str]:
    """The activations outside gates that are not part of another one, with their names."""
    types = activation_types()
    found: dict[nn.Module, str] = {}
    parts: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, types) and module not in parts and trace.is_on_main_path(module):
            found[module] = name
            parts.update(module.modules())
    return found


@torch.no_grad()
def _orthonormal_(layer: nn.Module, generator: torch.Generator | None) -> None:
    weight = layer.weight
    # QR knows no half precision, and a generator draws on its own device only.
    draft = torch.empty_like(
        weight,
        dtype=torch.promote_types(weight.dtype, torch.float32),
        device=weight.device if generator is None else generator.device,
        memory_format=torch.contiguous_format,
    )
    for group in draft.chunk(getattr(layer, 'groups', 1)):
        nn.init.orthogonal_(group, generator=generator)
    weight.copy_(draft)
    if layer.bias is not None:
        layer.bias.zero_()


def _scale(
        model: nn.Module,
        batch: Tensor,
        layers: dict[nn.Module, str],
        targets: dict[nn.Module, float],
        tol: float,
        max_iters: int,
        originals: dict[Tensor, Tensor],
) -> dict[nn.Module, int | None]:
    """Scale the weights in one forward pass.

    Returns:
        How often each layer was rescaled; ``None`` for one whose output does not follow, which has its original weight.
    """
    iterations: dict[nn.Module, int | None] = {}

    def scale(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if layer in iterations:  # called again
            return output
        target, std, count = targets[layer], _std(output), 0
        if not 0 < std < math.inf:
            raise ValueError(
                f'batch must give each layer a finite output that is not constant, got shape {tuple(batch.shape)}, '
                f"for which the output of '{layers[layer]}' has standard deviation {std}")
        while abs(std / target - 1) > tol and count < max_iters:
            layer.weight.mul_(target / std)
            output = layer.forward(*args, **kwargs)  # without the hooks, of which this is one
            std, count = _std(output), count + 1
            if not abs(std / target - 1) <= max(tol, _FOLLOWS):
                _put_back(originals, [layer])
                iterations[layer] = None
                return layer.forward(*args, **kwargs)
        iterations[layer] = count
        return output

    _run(model, batch, layers, scale)
    return iterations


def _measure(
        model: nn.Module,
        batch: Tensor,
        modules: Iterable[nn.Module],
        once: Container[nn.Module],
) -> list[tuple[nn.Module, float]]:
    """The standard deviation of each output of each module, of the first one only for those in ``once``."""
    stds: list[tuple[nn.Module, float]] = []
    seen = set()

    def measure(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if module not in seen or module not in once:
            stds.append((module, _std(output)))
        seen.add(module)

    _run(model, batch, modules, measure)
    return stds


@torch.no_grad()
def _run(model: nn.Module, batch: Tensor, modules: Iterable[nn.Module], hook: Callable[..., Tensor | None]) -> None:
    """A forward pass in eval mode with a hook on some modules."""
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
    try:
        with evaluating(model):
            model(batch)
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _put_back(originals: dict[Tensor, Tensor], layers: Iterable[nn.Module]) -> None:
    for layer in layers:
        for parameter in layer.parameters(recurse=False):
            parameter.copy_(originals[parameter])


def _std(x: Tensor) -> float:
    return x.to(torch.promote_types(x.dtype, torch.float32)).std(correction=0).item()
