"""The command line: ``timm-dyacts <command> ...``, or ``python -m timm_dyacts``. One module for each command.

A module has ``create_parser(prog)`` and ``main(argv, prog)``. The wrappers in ``scripts/`` call the same ``main``. Only
the module of the command that is asked for is imported.
"""
import sys
from collections.abc import Sequence
from importlib import import_module

from ..suggest import close_names
from .parser import ArgumentParser, VersionAction

__all__ = ['COMMANDS', 'create_parser', 'main']

COMMANDS = dict(
    train='train or fine-tune a model',
    validate='evaluate models',
    predict='say which classes images may show',
    publish='publish a run on the Hugging Face Hub',
    convert='convert a model, or a checkpoint, and keep its weights',
    compare='find out whether a variant helps: many seeds, paired differences',
    benchmark='measure operators and models beside what they replace',
    coverage="convert timm's architectures, and write down what came of it",
    lsuv='initialise a model without normalisation, and show the size of its outputs',
    zoo='list the variants, with what they cost',
    cards='render the model cards of the zoo',
    demo='get real weights and real pictures to try things with',
    run="run a script, such as timm's train.py, with the variants registered",
)


def create_parser(prog: str = 'timm-dyacts') -> ArgumentParser:
    """Create the parser of the program; what follows the command is the command's own."""
    commands = '\n'.join(f'  {name:10} {text}' for name, text in COMMANDS.items())
    parser = ArgumentParser(
        prog=prog,
        usage='%(prog)s [-h] [--version] COMMAND ...',
        description=f'Dynamic ReLU, SoftPool and bipolar activations in any timm model.\n\ncommands:\n{commands}\n\n'
                    f'"{prog} COMMAND --help" lists the options of a command.',
    )
    parser.add_argument('--version', action=VersionAction, help='print the versions and back ends that there are')
    # Optional for argparse only, which would otherwise report a misspelt option as a missing command
    parser.add_argument('command', nargs='?', metavar='COMMAND', help='one of the above')
    return parser


def main(argv: Sequence[str] | None = None, prog: str = 'timm-dyacts') -> None:
    """Run a command.

    Args:
        argv: The command line without the program, that of the process for ``None``.
        prog: Name of the program, for messages.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = create_parser(prog)
    command = parser.parse_args(argv[:1]).command
    if command is None:
        parser.print_help(sys.stderr)
        parser.exit(2)
    if command not in COMMANDS:
        parser.error(f'unknown command {command!r}.{close_names(command, COMMANDS)} Known: {", ".join(COMMANDS)}')
    import_module(f'.{command}', __name__).main(argv[1:], prog=f'{prog} {command}')
