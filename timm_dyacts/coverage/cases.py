"""One case: a network of a library, converted with one operation and compared with what it was."""
import copy
import functools
import math
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..convert import ConversionError, convert
from ..convert.inputs import Inputs, probing
from ..convert.leaves import tensors_in
from ..convert.probe import REFUSALS, input_sizes
from ..operators import OPERATORS
from .libraries import LIBRARIES
from .survey import REPLACED, Survey
from .trained_like import trained_like_

__all__ = ['COLUMNS', 'RESULTS', 'TOLERANCE', 'Row', 'default_operations', 'measure', 'operations']

COLUMNS = (
    'library', 'architecture', 'operation', 'contains', 'relu_cnn', 'result', 'replaced', 'skipped', 'remaining',
    'difference', 'reason')
RESULTS = ('exact', 'approximate', 'unchecked', 'refused', 'absent', 'error', 'timeout')
TOLERANCE = 1e-4  # of the largest output; rounding in single precision stays below it

Row = dict[str, Any]


def operations() -> dict[str, dict[str, Any]]:
    """Give the arguments of ``convert`` for each operation by name: activations, pools, norms, other starts and places.

    The other starts tell what fitting and transitions gain where an operator cannot be what it replaces.
    """
    records = sorted(OPERATORS.values(), key=lambda operator: operator.replaces)
    found: dict[str, dict[str, Any]] = {operator.name: operator.recipe for operator in records}
    found['nobn'] = dict(norm='none')
    for operator in records:
        if operator.in_coverage and 'start' in operator.options:
            found[f'{operator.name}_fit'] = dict(operator.recipe, start='fit')
            found[f'{operator.name}_fit_k3'] = dict(operator.recipe, start='fit', act_kwargs=dict(k=3))
        if operator.in_coverage and 'where' in operator.options:
            found[f'{operator.name}_late'] = dict(operator.recipe, where='late')
        if operator.in_coverage:
            found[f'{operator.name}_transition'] = dict(operator.recipe, transition=True)
    return found


def default_operations() -> list[str]:
    """Give the names of the operations that are measured unless others are asked for."""
    return [name for name in operations() if name == 'nobn' or name in OPERATORS and OPERATORS[name].in_coverage]


def measure(library: str, name: str, operation: str, max_params: float, full_size: bool) -> Row:
    """Give the row of one case.

    Args:
        library: One of ``LIBRARIES``.
        name: The architecture.
        operation: One of ``operations()``.
        max_params: The size, in millions of parameters, up to which a model is run and not only converted.
        full_size: Probe at the size of the architecture's default config.
    """
    row = dict.fromkeys(COLUMNS, '') | dict(library=library, architecture=name, operation=operation)
    recipe = operations()[operation]
    replaced = next(iter(recipe))
    try:
        base, inputs, expected, survey = _reference(library, name, max_params, full_size)
        if len(inputs.args) > 1:  # nothing that ``convert`` can guess
            recipe = recipe | dict(example_inputs=_flipped(inputs))
        contains = survey.contains(replaced)
        row |= dict(contains=int(contains), relu_cnn=int(survey.is_relu_cnn()))
        model = convert(copy.deepcopy(base), **recipe)
        report = model.conversion
        row |= dict(result=report.function, replaced=len(report.replaced), skipped=len(report.skipped))
        with torch.no_grad(), probing(model, resize=True), Survey(model) as after:
            output = tensors_in(inputs.call(model))
        if replaced == 'norm':  # the new modules of the other operations call such functions as they replace
            row['remaining'] = after.count(REPLACED[replaced])
        if not inputs.is_meta:
            if report.flipped_output:
                row['reason'] = '; '.join(report.notes)
                output, expected = [t.abs() for t in output], [t.abs() for t in expected]
            moved = _difference(output, expected)
            if report.function == 'exact' and not moved <= TOLERANCE:
                row['reason'] = f'in double precision, since rounding is amplified; {moved:.2g} in single'
                moved = _difference_in_double(base, inputs, recipe)
                if not moved <= TOLERANCE:
                    row |= dict(result='error', reason='reported as exact, but the outputs differ')
            row['difference'] = f'{moved:.2g}'
    except ConversionError as e:
        is_absent = row['contains'] == 0 and str(e).startswith('Nothing in this model can be replaced')
        row |= dict(result='absent') if is_absent else dict(result='refused', reason=str(e))
    except Exception as e:  # whatever a model or its conversion may raise is a finding
        frame = traceback.extract_tb(e.__traceback__)[-1]
        where = f'{Path(frame.filename).name}:{frame.lineno}'
        row |= dict(result='error', reason=f'{type(e).__name__} at {where}: {e}')
    row['reason'] = ' '.join(row['reason'].split())[:500]
    return row


@functools.lru_cache(maxsize=1)
def _reference(
        library: str,
        name: str,
        max_params: float,
        full_size: bool,
) -> tuple[nn.Module, Inputs, list[Tensor], Survey]:
    """Give the architecture as if trained (on the meta device if large), a probe, its output and a survey.

    The operations on one architecture come one after the other and share this.
    """
    build, arguments = LIBRARIES[library].build, LIBRARIES[library].arguments
    try:
        with torch.device('meta'):
            model = build(name).eval()
        is_large = sum(p.numel() for p in model.parameters()) > max_params * 1e6
    except (NotImplementedError, RuntimeError):  # it runs while it is made, as YOLO does
        is_large = False
    if not is_large:
        torch.manual_seed(0)
        model = build(name)
    sizes = input_sizes(model, at_least=96)[-1 if full_size else 0:]
    for size in sizes:
        x = torch.randn(4, *size, generator=torch.Generator().manual_seed(1))
        try:
            with probing(model, resize=True):
                inputs = arguments(name, x[:2])
                if is_large:
                    inputs = inputs.map(lambda t: t.to('meta'))
                else:
                    # The statistics are those of the batch: with statistics, or with scales above 1, drawn at will a
                    # deep network becomes chaotic. It amplifies the rounding of a single operation to the size of its
                    # outputs, and no comparison tells anything.
                    generator = torch.Generator().manual_seed(0)
                    trained_like_(
                        model, [arguments(name, x)], generator, scales=(0.1, 0.5), exact_statistics=True)
                    inputs = _flipped(inputs)  # not what settled the statistics
                with torch.no_grad(), Survey(model) as survey:
                    return model, inputs, tensors_in(inputs.call(model)), survey
        except REFUSALS:  # too small for this architecture
            if size == sizes[-1]:
                raise
    raise AssertionError('unreachable')


def _flipped(inputs: Inputs) -> Inputs:
    return inputs.map(lambda t: t.flip(-1))


def _difference(output: list[Tensor], expected: list[Tensor]) -> float:
    """Give the largest absolute difference, relative to the largest absolute element expected."""
    pairs = [(a.double(), b.double()) for a, b in zip(output, expected, strict=True) if a.numel() or b.numel()]
    if any(a.shape != b.shape for a, b in pairs):
        return math.inf
    scale = max((b.abs().max().item() for _, b in pairs), default=1)
    return max(((a - b).abs().max().item() for a, b in pairs), default=0) / scale


def _difference_in_double(base: nn.Module, inputs: Inputs, recipe: dict[str, Any]) -> float:
    model, inputs = copy.deepcopy(base).double(), inputs.double()
    if 'example_inputs' in recipe:
        recipe = recipe | dict(example_inputs=_flipped(inputs))
    with torch.no_grad(), probing(model, resize=True):
        expected = tensors_in(inputs.call(model))
        return _difference(tensors_in(inputs.call(convert(model, **recipe))), expected)
