"""Run a script, such as timm's train.py or validate.py, with the variants and operators of this package registered.

timm has no option that imports a plugin. This runs the script as Python itself does, except that timm_dyacts has been
imported before: the script finds its own arguments, its exit status and its exceptions are those of this program. All
that follows SCRIPT is the script's own.

  timm-dyacts run train.py --model resnet50_dyrelu_b --data-dir photos
  timm-dyacts run -m my_package.train --epochs 3
  torchrun --nproc-per-node 2 --no-python timm-dyacts run train.py ...
  torchrun --nproc-per-node 2 -m timm_dyacts run train.py ...

Processes that the script starts with multiprocessing (fork, spawn, forkserver) know the variants as well. Programs that
it starts afresh, by subprocess or loky, do not, unless they import timm_dyacts. The timm in use is the one that
timm_dyacts finds, not one that lies beside the script; to use that of a checkout of timm, run
"python -m timm_dyacts run train.py" in the folder of the checkout.
"""
import multiprocessing.spawn
import os
import runpy
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import timm

from .parser import ArgumentParser

__all__ = ['create_parser', 'main']


def create_parser(prog: str = 'timm-dyacts run') -> ArgumentParser:
    """Create the parser of what stands before the arguments of the script."""
    parser = ArgumentParser(prog=prog, usage='%(prog)s [-h] [-m] SCRIPT ...', description=__doc__)
    parser.add_argument('-m', '--module', action='store_true', help='SCRIPT is the name of a module, as for python -m')
    parser.add_argument('script', metavar='SCRIPT', help='what to run, followed by its own arguments')
    return parser


def main(argv: Sequence[str] | None = None, prog: str = 'timm-dyacts run') -> None:
    """Run the command.

    Args:
        argv: Its command line, that of the process for ``None``.
        prog: Name of the program, for messages.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    # Whatever follows the script is not ours to read, --help included.
    stop = next((i for i, arg in enumerate(argv) if not arg.startswith('-')), len(argv)) + 1
    parser = create_parser(prog)
    args = parser.parse_args(argv[:stop])

    sys.argv = [args.script, *argv[stop:]]
    # In its first place Python has put the folder of this program, unless it was told not to (-I, -P).
    if not (sys.flags.isolated or getattr(sys.flags, 'safe_path', False)):
        sys.path[0] = os.getcwd() if args.module else _folder_of(args.script)
    problem = _find_problem_of_module(args.script) if args.module else _find_problem_of_script(args.script)
    if problem:
        parser.exit(2, f'{prog}: error: {problem}\n')
    _warn_of_another_timm(sys.path[0], prog)
    _register_in_spawned_processes()
    if args.module:
        runpy.run_module(args.script, run_name='__main__', alter_sys=True)
    else:
        # Absolute, as ``__file__`` of a script is
        runpy.run_path(os.path.abspath(args.script), run_name='__main__')


def _folder_of(script: str) -> str:
    path = os.path.realpath(script)
    return path if os.path.isdir(path) else os.path.dirname(path)


def _find_problem_of_script(script: str) -> str | None:
    if os.path.isdir(script):
        script = os.path.join(script, '__main__.py')
    try:
        with open(script, 'rb'):
            return None
    except OSError as e:
        return f'cannot open script {script!r}: {e.strerror}'


def _find_problem_of_module(name: str) -> str | None:
    """Look for a module before it runs, so as not to mistake an ImportError of its own for a missing module."""
    try:
        spec = None if name.startswith('.') else find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            name = f'{name}.__main__'
            spec = find_spec(name)
    except ModuleNotFoundError as e:
        if e.name is None or not f'{name}.'.startswith(f'{e.name}.'):
            raise  # raised by a package that was imported on the way
        spec = None
    except ValueError:  # a module without a spec, such as __main__
        spec = None
    return f'no module named {name!r}' if spec is None else None


def _warn_of_another_timm(folder: str, prog: str) -> None:
    beside = os.path.join(folder, 'timm', '__init__.py')
    if os.path.isfile(beside) and not os.path.samefile(beside, timm.__file__):
        print(
            f'{prog}: warning: timm {timm.__version__} of {os.path.dirname(timm.__file__)} is used, not the one in '
            f'{folder}. To use that one: cd {folder}, then python -m timm_dyacts run ...',
            file=sys.stderr,
        )


def _register_in_spawned_processes() -> None:
    """Let processes that start afresh import this package before they import the script."""
    get_data = multiprocessing.spawn.get_preparation_data

    def get_preparation_data(name: str) -> dict[str, Any]:
        return {'timm_dyacts': _Plugin(), **get_data(name)}

    multiprocessing.spawn.get_preparation_data = get_preparation_data


class _Plugin:
    """Is unpickled by doing in the new process what was done in this one, which imports the package to begin with."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _register_in_spawned_processes, ()
