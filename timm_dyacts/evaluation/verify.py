"""Whether what is on record of a checkpoint can be measured again."""
import dataclasses

import torch

from ..device import resolve_device
from ..run_folder import CheckpointFolder, Results, RunFolder
from .config import ValidateConfig
from .environment import describe_environment, package_versions
from .validate import measure

__all__ = ['ResultsError', 'verify_results']

# Options of a run that say how it was evaluated, where they are not given anew
_HOW = ('amp', 'amp_dtype', 'channels_last', 'torchcompile', 'torchcompile_mode', 'device')
# What results may differ by on another machine, or in other versions: a share of the images and of the loss
_IMAGES, _LOSS, _LOSS_IN_HALF = 0.005, 1e-3, 2e-2


class ResultsError(ValueError):
    """What is on record of a checkpoint is not what it gives."""


def verify_results(config: ValidateConfig, name: str) -> str | None:
    """Evaluate a checkpoint of a run as the run did, and compare with its ``results.json``.

    Args:
        config: The options. Those that are not given are those of the run.
        name: The folder of a checkpoint, with ``'local-dir:'`` or without.

    Returns:
        What was found, in a sentence; ``None`` where there is nothing on record: no run, or no results.

    Raises:
        ResultsError: Accuracy or loss differ: at all on the same stack, by more than rounding on another one.
    """
    folder = CheckpointFolder(name.removeprefix('local-dir:'))
    run = RunFolder.containing(folder.path)
    results = folder.read_results() if run is not None else None
    options = run.read_options() if results is not None else None
    if options is None:
        return None
    how = {option: options[option] for option in _HOW if option in options and not config.is_given(option)}
    batch_size = options.get('validation_batch_size') or options['batch_size']
    if not config.is_given('batch_size'):
        how['batch_size'] = batch_size
    if how.get('device') == 'cuda' and not torch.cuda.is_available():
        how['device'] = 'cpu'
    size = results.preprocessing.input_size
    config = dataclasses.replace(config, **how, input_size=size, use_train_size=True)
    measured = measure(config, name)
    differences = _differences(config, results)
    exact = not differences and not options.get('transition_epochs')
    found = {key: (getattr(results, key), measured.metrics[key]) for key in ('top1', 'top5', 'loss')}
    tolerance = dict(top1=100 * _IMAGES, top5=100 * _IMAGES)
    tolerance['loss'] = abs(results.loss) * (_LOSS_IN_HALF if config.amp else _LOSS)
    wrong = [
        f'{key} is {now!r} where {before!r} is on record' for key, (before, now) in found.items()
        if abs(now - before) > (0 if exact else tolerance[key]) or now != now]
    if measured.num_images != results.num_images:
        wrong.append(f'there are {measured.num_images} images where {results.num_images} are on record')
    other = f' ({"; ".join(differences)})' if differences else ''
    if wrong:
        raise ResultsError(f'{folder} does not give its results: {", ".join(wrong)}{other}.')
    if exact:
        return f'{folder}: top1, top5 and loss are those on record, to the last digit.'
    return f'{folder}: top1, top5 and loss are those on record, within rounding: the stack is another one{other}.'


def _differences(config: ValidateConfig, results: Results) -> list[str]:
    """Say in what the stack of today is another one than that of the record."""
    now = describe_environment(config, resolve_device(config.device), config.batch_size) | package_versions()
    before = {**results.environment, **results.versions}
    before.pop('seed', None)
    names = sorted(before.keys() | now.keys())
    return [
        f'{name} {now.get(name, "unknown")} for {before.get(name, "unknown")}' for name in names
        if now.get(name) != before.get(name)]
