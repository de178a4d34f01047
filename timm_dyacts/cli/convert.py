"""Convert a model and keep its weights: a checkpoint in, a checkpoint out.

The new folder holds ``model.safetensors``, ``config.json`` and the report as ``conversion.json``. It is loaded back and
compared before it is put in place, so that ``timm.create_model('local-dir:FOLDER', pretrained=True)``, after ``import
timm_dyacts``, gives the converted model with the same logits. With ``--transition`` it is a model that computes what
the old one does, and that ``timm-dyacts train --transition-epochs`` leads to the new operators.
"""
import json
import os
import shutil
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import get_act_layer
from timm.models import parse_model_name
from torch import nn

from .. import zoo
from ..convert import ConversionReport, convert, get_transition, set_transition
from ..convert.arguments import Request
from ..convert.probe import input_sizes, probe_batch
from ..evaluation.config import LARGEST_NUM_CLASSES
from ..files import replace_text
from ..hub.pull import find_architecture
from ..loading import build_from_file, build_model, label_names_of, resolve_model_name
from ..modes import evaluating
from ..operators import OPERATORS
from ..ops.checks import check_int
from ..run_folder import CheckpointFolder, how_to_finish
from .parser import ArgumentParser, KeyValues, one_line_errors

__all__ = ['create_parser', 'main']

_REPORT = 'conversion.json'
# The options of ``convert`` that are arguments of the new architecture, by the argument that they belong to
_OPTIONS = dict(act=('where', 'layout', 'start', 'act_kwargs'), pool=('pool_kwargs',))
# What a configuration says of the weights that timm has for a name, and that does not hold for others
_ORIGIN = ('tag', 'license', 'origin_url', 'paper_ids', 'paper_name', 'notes')


def create_parser(prog: str) -> ArgumentParser:
    """Make the parser of the command."""
    parser = ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument('model', metavar='MODEL',
                        help="a name of timm's, 'hf-hub:ID', 'local-dir:FOLDER' or the folder of a checkpoint")
    parser.add_argument('--output', required=True, type=Path, metavar='FOLDER', help='new or empty folder to write')

    group = parser.add_argument_group('conversion')
    acts = [name for name, operator in OPERATORS.items() if operator.replaces == 'act']
    pools = [name for name, operator in OPERATORS.items() if operator.replaces == 'pool']
    group.add_argument('--act', metavar='NAME', help=f"activation: {', '.join(acts)}, or 'relu' for the way back")
    group.add_argument('--pool', choices=pools, help='what max pools become, of %(choices)s')
    group.add_argument('--norm', choices=['none'], help="'none' folds BatchNorm into the layer before it")
    group.add_argument('--where', metavar='WHERE',
                       help="places of Dynamic ReLU: 'inner', 'all' (behind the additions of bottlenecks too), 'late' "
                            "(in the second half of the network), or a wildcard such as 'layer4.*' (default: inner)")
    group.add_argument('--layout', choices=['interleaved', 'halves'],
                       help='channels of a bipolar activation that are mirrored (default: interleaved)')
    group.add_argument('--start', choices=['relu', 'fit'],
                       help='what a Dynamic ReLU starts as where it cannot be what it replaces (default: relu, and fit '
                            'with --transition)')
    group.add_argument('--act-kwargs', nargs='*', action=KeyValues, metavar='KEY=VALUE',
                       help='arguments of the new activations, e.g. reduction=16')
    group.add_argument('--pool-kwargs', nargs='*', action=KeyValues, metavar='KEY=VALUE',
                       help='arguments of the new pools, e.g. beta=2.0')
    group.add_argument('--transition', action='store_true',
                       help='start exactly where a new operator does not compute what was there, at the beginning of '
                            'the transition that train --transition-epochs makes')

    group = parser.add_argument_group('model')
    group.add_argument('--pretrained', action='store_true',
                       help='load the weights that timm has for the name; a folder and a repo have their own')
    group.add_argument('--checkpoint', metavar='FILE', help='file of weights to load')
    group.add_argument('--num-classes', type=int, metavar='N', help='classes, if others than those of the model')
    return parser


def main(argv: Sequence[str] | None = None, prog: str = 'timm-dyacts convert') -> None:
    """Run the command."""
    args = create_parser(prog).parse_args(argv)
    with one_line_errors(prog, AssertionError, RuntimeError, TypeError):
        report = convert_checkpoint(args)
    print(report)
    print(f'Written: {args.output}')
    if args.transition:
        print(f"Train it: timm-dyacts train --model '{args.output}' --pretrained --transition-epochs N")


def convert_checkpoint(args: Namespace) -> ConversionReport:
    """Do what the options ask for.

    Raises:
        ValueError: If the conversion has no name in the zoo, or the model cannot be converted, or does not come back
            from its folder as it is.
    """
    if args.output.exists() and not (args.output.is_dir() and not any(args.output.iterdir())):
        raise ValueError(f'--output must be a new or empty folder, got {str(args.output)!r}')
    if args.num_classes is not None:
        check_int('--num-classes', args.num_classes, 0, LARGEST_NUM_CLASSES)
    try:
        get_act_layer(args.act)
    except KeyError as e:
        raise ValueError(f'--act must be an activation of timm or of this package. {e}') from None
    name = resolve_model_name(args.model, option='MODEL')
    source = _architecture_of(name)
    asked = {key: getattr(args, key) for key in ('act', 'pool', 'norm') if getattr(args, key) is not None}
    if not asked:
        raise ValueError('One of --act, --pool and --norm must be given.')
    target = find_target(source, **asked)
    options = {key: getattr(args, key) for keys in _OPTIONS.values() for key in keys if getattr(args, key)}
    if args.transition:
        variant = zoo.find_variant(target.name)
        if variant is None:
            raise ValueError(f'--transition must be left out for the way back to {target.name}, which takes none.')
        options['transition'] = True
    Request(**asked, **options)  # what is wrong with them is said before the work

    pretrained = args.pretrained or ':' in name
    if args.checkpoint:
        model = build_from_file(name, args.checkpoint, '--checkpoint', {}, {}, num_classes=args.num_classes)
    else:
        model = build_model(name, {}, pretrained, {}, num_classes=args.num_classes)
    model.eval()
    _check_finished(model, args.model)
    pool_kwargs = {**(target.pool_kwargs if args.pool else {}), **options.get('pool_kwargs', {})}
    convert(model, **asked, **dict(options, pool_kwargs=pool_kwargs))
    if args.transition:
        if get_transition(model) is None:
            raise ValueError(f'--transition must be left out for {target.name}, which starts exactly without one.')
        if 'start' in variant.options:
            options.setdefault('start', 'fit')  # the default there, and no entry of the state dict
    # What the source was made with stays, but for the options of what has been replaced.
    stale = [key for kind, keys in _OPTIONS.items() if kind in asked for key in keys]
    made_with = getattr(model, '_model_args', {})  # which newer releases of timm note
    model._model_args = {key: value for key, value in made_with.items() if key not in stale}
    dropped = ('label_names',) if pretrained else ('label_names', *_ORIGIN)
    label_names = label_names_of(model)
    model.pretrained_cfg = model.default_cfg = {
        **{key: value for key, value in model.pretrained_cfg.items() if key not in dropped},
        'architecture': target.name,
        'num_classes': model.num_classes,
    }
    _save(model, label_names, options, args.output)
    return model.conversion


@dataclass(frozen=True)
class Target:
    """What a conversion leads to.

    Attributes:
        name: The architecture that gives the same when it is created.
        pool_kwargs: Arguments of the pools that belong to it.
    """
    name: str
    pool_kwargs: dict[str, Any]


def find_target(source: str, act: str | None = None, pool: str | None = None, norm: str | None = None) -> Target:
    """Find the architecture that a converted model is of.

    Args:
        source: The architecture of the model, of timm or of the zoo.
        act: As for ``convert``. A plain activation leads a variant of the zoo back to its base.
        pool: As for ``convert``.
        norm: As for ``convert``.

    Raises:
        ValueError: If there is none in the zoo.
    """
    base, nobn, operators = source, norm is not None, {}
    variant = zoo.find_variant(source)
    if variant is not None:
        base, nobn = variant.base, nobn or variant.nobn
        operators[OPERATORS[variant.operator].replaces] = variant.operator
    operators |= {kind: name for kind, name in dict(act=act, pool=pool).items() if name is not None}
    if act is not None and act not in OPERATORS:
        del operators['act']
    name = '_'.join([base, *operators.values(), *['nobn'] * nobn])
    target = zoo.find_variant(name)
    if target is not None:
        return Target(name, target.recipe.get('pool_kwargs', {}))
    if name == base and source != base:
        return Target(name, {})
    raise ValueError(
        f'The zoo must know the architecture that the converted model has, for config.json to name it, got {name!r}.'
        + zoo.suggest(name))


def _architecture_of(name: str) -> str:
    """The architecture behind a name that ``resolve_model_name`` gave."""
    source, place = parse_model_name(name)
    if source == 'local-dir':
        config = CheckpointFolder(Path(place)).config
        architecture = json.loads(config.read_text(encoding='utf-8')).get('architecture')
        if architecture is None:
            raise ValueError(f'{str(config)!r} names no architecture')
        return architecture
    if source == 'hf-hub':
        return find_architecture(place)
    return name.split('.')[0]


def _check_finished(model: nn.Module, name: str) -> None:
    t = get_transition(model)
    if t is not None:
        raise ValueError(
            f'MODEL must have no unfinished transition, got {name!r} at t = {t:.4g}. {how_to_finish(name, t)}')


def _save(model: nn.Module, label_names: list[str] | None, options: dict[str, Any], folder: Path) -> None:
    """Write the checkpoint beside, load it back, compare, and put it in place."""
    from ..training.checkpoint import save_checkpoint

    beside = folder.absolute().with_name(f'.{folder.absolute().name}.converting')
    shutil.rmtree(beside, ignore_errors=True)  # a killed process may have left it
    try:
        beside.mkdir(parents=True)
    except OSError as e:
        raise OSError(f'--output must be a folder that can be made, got {str(folder)!r} ({e.strerror}).') from e
    try:
        save_checkpoint(model, beside, label_names=label_names, model_args=options or None)
        replace_text(beside / _REPORT, json.dumps(model.conversion.to_dict(), indent=2) + '\n')
        _check_folder(model, beside)
        os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@torch.no_grad()
def _check_folder(model: nn.Module, folder: Path) -> None:
    """Load a checkpoint back, and compare it with the model."""
    architecture = model.pretrained_cfg['architecture']
    is_plain = get_transition(model) is None
    why = '' if is_plain else ' (a transition is made anew from the base, and has to start from a checkpoint of that)'
    try:
        loaded = timm.create_model(f'local-dir:{folder}', pretrained=True)
    except RuntimeError as e:
        raise ValueError(f'The checkpoint was not written: it does not load as {architecture!r}{why}. {e}') from e
    state, expected = loaded.state_dict(), model.state_dict()
    same = state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    x = probe_batch(model, input_sizes(model)[-1])
    with evaluating(model), evaluating(loaded):
        same = same and torch.equal(loaded(x), model(x))
        if same and not is_plain:  # what takes no part yet, too
            same = torch.equal(set_transition(loaded, 0.5)(x), set_transition(model, 0.5)(x))
            set_transition(model, 0)
    if not same:
        raise ValueError(
            f'The checkpoint was not written: loaded back as {architecture!r} it gives another model{why}')
