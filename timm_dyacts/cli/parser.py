"""What the commands share: their parser, and how they end."""
import argparse
import platform
import re
import sys
from typing import Any, NoReturn

from timm.utils import ParseKwargs

from ..messages import one_line
from ..suggest import close_names
from ..version import __version__

__all__ = ['ArgumentParser', 'KeyValues', 'VersionAction', 'describe_versions', 'fail', 'over_file']


class ArgumentParser(argparse.ArgumentParser):
    """A parser that shows its description as written and suggests names for options that it does not know."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs = dict(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False) | kwargs
        super().__init__(**kwargs)

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r'unrecognized arguments: (--[\w-]+)', message)
        if unknown:
            message += f'.{close_names(unknown[1], self._option_string_actions)}'.removesuffix('.')
        super().error(one_line(message))


class KeyValues(ParseKwargs):
    """timm's ``ParseKwargs``, with an error of the parser where an equals sign is missing."""

    def __call__(
            self,
            parser: argparse.ArgumentParser,
            namespace: argparse.Namespace,
            values: Any,
            option_string: str | None = None,
    ) -> None:
        wrong = [value for value in values if '=' not in value]
        if wrong:
            parser.error(f'argument {option_string}: must be KEY=VALUE, got {wrong[0]!r}')
        super().__call__(parser, namespace, values, option_string)


class VersionAction(argparse.Action):
    """Prints ``describe_versions()`` and ends the program."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(describe_versions())
        parser.exit()


def describe_versions() -> str:
    """What a report of a bug needs: versions, back ends and what works of them, the GPU."""
    import huggingface_hub
    import timm
    import torch

    from ..ops.backends import backend_in_use, current_backend, describe_backends

    lines = {
        'timm_dyacts': __version__,
        'timm': timm.__version__,
        'torch': torch.__version__,
        'huggingface_hub': huggingface_hub.__version__,
        'python': f'{platform.python_version()} on {platform.platform()}',
        'GPU': torch.cuda.get_device_name() if torch.cuda.is_available() else 'none',
        'TIMM_DYACTS_BACKEND': current_backend(),
        'kernels on CPUs': backend_in_use('cpu') or 'none',
        **{f'back end {name}': state for name, state in describe_backends().items()},
    }
    width = max(map(len, lines))
    return '\n'.join(f'{name:{width}}  {value}' for name, value in lines.items())


def fail(prog: str, error: object) -> NoReturn:
    """End the program with exit status 1 and one line."""
    sys.exit(one_line(f'{prog}: error: {error}'))


def over_file(from_file: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Give the options of training from a file, with those of the command line over them."""
    if 'lr_base' in given:  # another way to ask for a learning rate, over which the file's own would win
        from_file = {name: value for name, value in from_file.items() if name != 'lr'}
    return from_file | given
