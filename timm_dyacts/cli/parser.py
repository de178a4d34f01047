"""What the commands share: their parser, and how they end."""
import argparse
import platform
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from ..messages import one_line
from ..options import KeyValues
from ..suggest import close_names
from ..version import __version__

__all__ = [
    'ArgumentParser',
    'KeyValues',
    'VersionAction',
    'describe_versions',
    'fail',
    'one_line_errors',
    'over_file',
]

# What a user can cause: the message says what to do about it. ImportError is a package that is not installed.
_FORESEEN = (ImportError, OSError, ValueError)


class ArgumentParser(argparse.ArgumentParser):
    """A parser that shows its description as written and suggests names for options that it does not know.

    Each has ``--traceback``, which is no option of the command but of how it fails, and not in the namespace.
    """
    with_traceback = False  # of the command that this process runs, as was asked for on its command line

    def __init__(self, **kwargs: Any) -> None:
        kwargs = dict(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False) | kwargs
        super().__init__(**kwargs)
        self.add_argument(
            '--traceback', action=_TracebackAction, help='show where in the program an error was raised')

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        ArgumentParser.with_traceback = False  # of a command that ran before in the same process
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r'unrecognized arguments: (--[\w-]+)', message)
        if unknown:
            message += f'.{close_names(unknown[1], self._option_string_actions)}'.removesuffix('.')
        super().error(one_line(message))


class _TracebackAction(argparse.Action):
    """Asks for the traceback of an error."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, *_: Any) -> None:
        ArgumentParser.with_traceback = True


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


def fail(prog: str, message: object) -> NoReturn:
    """End the program with exit status 1 and one line."""
    sys.exit(f'{prog}: error: {one_line(message)}')


@contextmanager
def one_line_errors(prog: str, *foreseen: type[Exception]) -> Iterator[None]:
    """Let a command end with exit status 1 and one line, whatever is raised; ``--traceback`` prints the rest above it.

    What a user can cause has a message of its own. Anything else is a bug, and the line says so. Its traceback goes
    into a file and not to the screen, where it would bury that line, but is always kept: a run of days is not repeated
    with ``--traceback`` to see where it broke.

    Args:
        prog: Name of the program, for the message.
        *foreseen: What a user can cause, beside ``ImportError``, ``OSError`` and ``ValueError``.
    """
    try:
        yield
    except Exception as e:
        from ..device import is_out_of_memory

        if ArgumentParser.with_traceback:
            traceback.print_exception(e)
        what = one_line(e) or type(e).__name__
        if is_out_of_memory(e):
            fail(prog, f'out of memory; a smaller --batch-size or --img-size needs less of it ({what})')
        fail(prog, what if isinstance(e, (*_FORESEEN, *foreseen)) else _describe_bug(e))


def _describe_bug(error: Exception) -> str:
    """Say what nobody foresaw, and keep its traceback."""
    text = f'this is a bug, please report it: {type(error).__name__}: {error}'.removesuffix(': ')
    try:
        with tempfile.NamedTemporaryFile(
                'w', prefix='timm-dyacts-', suffix='.txt', delete=False, encoding='utf-8', errors='replace') as file:
            file.write(f'{describe_versions()}\n\n{"".join(traceback.format_exception(error))}')
    except OSError:
        return f'{text} (--traceback shows where it was raised)'
    return f'{text} (its traceback: {file.name})'


def over_file(from_file: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Give the options of training from a file, with those of the command line over them."""
    if 'lr_base' in given:  # another way to ask for a learning rate, over which the file's own would win
        from_file = {name: value for name, value in from_file.items() if name != 'lr'}
    return from_file | given
