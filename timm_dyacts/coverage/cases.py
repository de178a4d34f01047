"""One case: one of timm's architectures, converted with one operation and compared with what it was."""
import copy
import functools
import traceback
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..convert import ConversionError, convert
from ..convert.probe import input_sizes
from ..operators import OPERATORS
from .survey import REPLACED, Survey
from .trained_like import trained_like_

__all__ = ['COLUMNS', 'RESULTS', 'TOLERANCE', 'Row', 'default_operations', 'measure', 'operations']

COLUMNS = (
    'architecture', 'operation', 'contains', 'relu_cnn', 'result', 'replaced', 'skipped', 'remaining', 'difference',
    'reason')
RESULTS = ('exact', 'approximate', 'refused', 'absent', 'error', 'timeout')
TOLERANCE = 1e-4  # of the largest output; rounding in single precision stays below it

Row = dict[str, Any]


def operations() -> dict[str, dict[str, Any]]:
    """Give the arguments of ``convert`` for each operation by name: activations, pools, norms, other starts and places.

    The other starts tell what fitting gains where an operator cannot be the activation that it replaces.
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
    return found


def default_operations() -> list[str]:
    """Give the names of the operations that are measured unless others are asked for."""
    return [name for name in operations() if name == 'nobn' or name in OPERATORS and OPERATORS[name].in_coverage]


def measure(name: str, operation: str, max_params: float, full_size: bool) -> Row:
    """Give the row of one case.

    Args:
        name: The architecture.
        operation: One of ``operations()``.
        max_params: The size, in millions of parameters, up to which a model is run and not only converted.
        full_size: Probe at the size of the architecture's default config.
    """
    row = dict.fromkeys(COLUMNS, '') | dict(architecture=name, operation=operation)
    recipe = operations()[operation]
    replaced = next(iter(recipe))
    try:
        base, x, expected, survey = _reference(name, max_params, full_size)
        contains = survey.contains(replaced)
        row |= dict(contains=int(contains), relu_cnn=int(survey.is_relu_cnn()))
        model = convert(copy.deepcopy(base), **recipe)
        report = model.conversion
        row |= dict(result=report.function, replaced=len(report.replaced), skipped=len(report.skipped))
        with torch.no_grad(), Survey(model) as after:
            output = model(x)
        if replaced == 'norm':  # the new modules of the other operations call such functions as they replace
            row['remaining'] = after.count(REPLACED[replaced])
        if not x.is_meta:
            if report.flipped_output:
                row['reason'], output, expected = '; '.join(report.notes), output.abs(), expected.abs()
            moved = _difference(output, expected)
            if report.function == 'exact' and not moved <= TOLERANCE:
                row['reason'] = f'in double precision, since rounding is amplified; {moved:.2g} in single'
                moved = _difference_in_double(base, x, recipe)
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
def _reference(name: str, max_params: float, full_size: bool) -> tuple[nn.Module, Tensor, Any, Survey]:
    """Give the architecture as if trained (on the meta device if large), a probe batch, its output and a survey.

    The operations on one architecture come one after the other and share this.
    """
    with torch.device('meta'):
        model = timm.create_model(name).eval()
    is_large = sum(p.numel() for p in model.parameters()) > max_params * 1e6
    if not is_large:
        torch.manual_seed(0)
        model = timm.create_model(name)
    sizes = input_sizes(model, at_least=96)[-1 if full_size else 0:]
    for size in sizes:
        x = torch.randn(4, *size, generator=torch.Generator().manual_seed(1))
        try:
            if is_large:
                x = x[:2].to('meta')
            else:
                # The statistics are those of the batch: with statistics, or with scales above 1, drawn at will a deep
                # network becomes chaotic. It amplifies the rounding of a single operation to the size of its outputs,
                # and no comparison tells anything.
                generator = torch.Generator().manual_seed(0)
                trained_like_(model, [x], generator, scales=(0.1, 0.5), exact_statistics=True)
                x = x[:2].flip(-1)  # not what settled the statistics
            with torch.no_grad(), Survey(model) as survey:
                return model, x, model(x), survey
        except (AssertionError, RuntimeError, ValueError):  # too small for this architecture
            if size == sizes[-1]:
                raise
    raise AssertionError('unreachable')


def _difference(output: Any, expected: Any) -> float:
    """Give the largest absolute difference, relative to the largest absolute element expected."""
    pairs = list(zip(tree_leaves(output), tree_leaves(expected), strict=True))
    scale = max(b.abs().max().item() for _, b in pairs)
    return max((a - b).abs().max().item() for a, b in pairs) / scale


def _difference_in_double(base: nn.Module, x: Tensor, recipe: dict[str, Any]) -> float:
    model, x = copy.deepcopy(base).double(), x.double()
    with torch.no_grad():
        expected = model(x)
        return _difference(convert(model, **recipe)(x), expected)
