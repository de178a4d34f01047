#!/usr/bin/env python3
"""Write model_cards/guides/api.md, the reference of all public names, from their docstrings: run it from a checkout.

With --check, change nothing, and fail if the page is out of date.
"""
import argparse
import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from timm_dyacts.files import replace_text
from timm_dyacts.options import Options

PAGE = Path(__file__).parents[1] / 'model_cards' / 'guides' / 'api.md'

INTRODUCTION = """\
# Python API

`import timm_dyacts` registers operators and variants with timm. What is not named here may change in any release.

The page is made from the docstrings, by `scripts/api.py`; `help(timm_dyacts.convert)` shows the same.
"""

# What is public of each module, under headings
MODULES: dict[str, dict[str, list[str]]] = {
    'timm_dyacts': {
        'Conversion': ['convert', 'ConversionReport', 'Replacement', 'Skip', 'ConversionError'],
        'Transitions': ['set_transition', 'get_transition', 'finish_transition', 'Transition'],
        'Dynamic ReLU': ['DyReLU', 'DyReLUA', 'DyReLUB', 'DyReLUC', 'dyrelu'],
        'SoftPool': [
            'SoftPool1d', 'SoftPool2d', 'SoftPool3d', 'SoftPool2dSame', 'GlobalSoftPool2d', 'softpool1d', 'softpool2d',
            'softpool3d', 'global_softpool2d'],
        'Bipolar activations': [
            'Bipolar', 'BReLU', 'BELU', 'BSELU', 'BLeakyReLU', 'BPReLU', 'BipolarMaxPool2d', 'bipolar', 'brelu', 'belu',
            'bselu', 'bleaky_relu', 'bprelu', 'bipolar_max_pool2d'],
        'The rest': ['lsuv_', 'register', 'PretrainedWeightsError', 'hub', '__version__'],
    },
    'timm_dyacts.hub': {
        '': ['publish', 'load', 'verify', 'Publication', 'HubError', 'ChecksumError', 'MissingFileError']},
    'timm_dyacts.training': {
        '': ['train', 'TrainConfig', 'RunResult', 'find_lr', 'LrRange', 'NonFiniteLossError', 'TrainingInterrupted']},
    'timm_dyacts.evaluation': {
        '': ['validate', 'validate_models', 'ValidateConfig', 'predict', 'PredictConfig']},
    'timm_dyacts.study': {
        '': ['compare', 'CompareConfig', 'ComparisonResult', 'RunError']},
}
COMMANDS = dict(TrainConfig='train', ValidateConfig='validate', PredictConfig='predict', CompareConfig='compare')
SECTIONS = ('Shape', 'Args', 'Attributes', 'Returns', 'Raises')


def render() -> str:
    """Give the page."""
    parts = [INTRODUCTION]
    for name, groups in MODULES.items():
        linked = (f'[{heading}](#{heading.lower().replace(" ", "-")})' for heading in groups if heading)
        names = (f'`{public}`' for public in groups.get('', ()))
        parts.append(f'- [{name}](#{name.replace(".", "")}): {", ".join((*linked, *names))}')
    for module_name, groups in MODULES.items():
        module = importlib.import_module(module_name)
        parts.append(f'## {module_name}\n\n{_markdown(_paragraphs(module)[0])}\n')
        for heading, names in groups.items():
            if heading:
                parts.append(f'### {heading}\n')
            level = '####' if heading else '###'
            parts += [f'{level} `{name}`\n\n{_entry(name, getattr(module, name))}\n' for name in names]
    return '\n'.join(parts)


def _entry(name: str, value: Any) -> str:
    """Describe one name: how it is called, what it does, its arguments, what it raises."""
    if name == '__version__':
        return 'The version of the package, a string.'
    if inspect.ismodule(value):
        return f'The module [{value.__name__}](#{value.__name__.replace(".", "")}).'
    options = isinstance(value, type) and issubclass(value, Options)
    if isinstance(value, type) and issubclass(value, Exception):
        lines = [f'An exception, derived from `{value.__base__.__name__}`.']
    else:
        lines = [f'```text\n{name}{"(**options)" if options else _signature(value)}\n```']
    sections = []
    for paragraph in _paragraphs(value):
        title, _, body = paragraph.partition(':\n')
        if title in SECTIONS:
            sections.append(f'{title}:\n\n{_list(title, body)}')
        else:
            lines.append(_markdown(paragraph))
    if options:
        lines.append(f'The options are those that `timm-dyacts {COMMANDS[name]} --help` lists, with `_` for `-`.')
    return '\n\n'.join(lines + sections)


def _paragraphs(value: Any) -> list[str]:
    return (inspect.getdoc(value) or '').strip().split('\n\n')


def _markdown(text: str) -> str:
    return re.sub(r'``(.+?)``', r'`\1`', text)


def _list(title: str, body: str) -> str:
    """Write what stands under a title in Google's form, ``name: description`` or a sentence, as a list."""
    items = [body] if title == 'Returns' else re.split(r'\n(?=    \S)', body)
    lines = []
    for item in items:
        text = ' '.join(item.split()).removeprefix('- ')
        named = None if title == 'Returns' else re.fullmatch(r'([*\w., ]+): (.*)', text)
        lines.append(f'- `{named[1]}`: {_markdown(named[2])}' if named else f'- {_markdown(text)}')
    return '\n'.join(lines)


def _signature(value: Any) -> str:
    """Give the signature with types as a reader writes them, one argument a line if it would be long."""
    signature = inspect.signature(value)
    arguments, keyword_only = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            arguments.append('*')
        keyword_only |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        star = {parameter.VAR_POSITIONAL: '*', parameter.VAR_KEYWORD: '**'}.get(parameter.kind, '')
        text = f'{star}{parameter.name}'
        if parameter.annotation is not parameter.empty:
            text += f': {_type(parameter.annotation)}'
        if parameter.default is not parameter.empty:
            # A dataclass shows a stand-in for a default that it makes anew each time.
            text += ' = ...' if '<' in repr(parameter.default) else f' = {parameter.default!r}'
        arguments.append(text)
    returns = signature.return_annotation
    end = '' if returns in (signature.empty, None) or isinstance(value, type) else f' -> {_type(returns)}'
    short = f'({", ".join(arguments)}){end}'
    return short if len(short) <= 100 else '(\n' + ''.join(f'    {argument},\n' for argument in arguments) + f'){end}'


def _type(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    # Without their modules, but for torch.device and torch.dtype, whose short names are those of arguments
    return re.sub(r'\b(?!torch\.d(?:evice|type)\b)(?:\w+\.)+(?=\w)', '', text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='change nothing, fail if the page is out of date')
    if not parser.parse_args().check:
        replace_text(PAGE, render())
    elif PAGE.read_text(encoding='utf-8') != render():
        sys.exit(f'api.py: error: {PAGE} is out of date; run scripts/api.py')


if __name__ == '__main__':
    main()
