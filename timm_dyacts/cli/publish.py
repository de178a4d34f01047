"""``timm-dyacts publish``: publish a run on the Hugging Face Hub."""
from collections.abc import Sequence

from ..hub import publish
from ..messages import one_line
from ..run_folder import CHECKPOINTS
from .parser import ArgumentParser, one_line_errors

__all__ = ['create_parser', 'main']

_DESCRIPTION = """\
Publish the run folder of a training on the Hugging Face Hub: weights, config, card, recipe, in one commit.

The folder is loaded back before anything is sent. Log in first: hf auth login, or HF_TOKEN."""


def create_parser(prog: str = 'timm-dyacts publish') -> ArgumentParser:
    """Make the parser of the command."""
    parser = ArgumentParser(prog=prog, description=_DESCRIPTION)
    parser.add_argument('run_folder', metavar='RUN_FOLDER', help='the run to publish')
    parser.add_argument('--repo-id', required=True, metavar='USER/NAME', help='where to publish it')
    parser.add_argument('--weights', default='best', choices=tuple(CHECKPOINTS), help='default: %(default)s')
    parser.add_argument('--private', action='store_true', help='create a private repo')
    parser.add_argument('--revision', metavar='BRANCH', help='branch to publish to (default: main)')
    parser.add_argument('--create-pr', action='store_true', help='open a pull request instead')
    parser.add_argument('--overwrite', action='store_true',
                        help='also replace what is not from here, has another architecture or an edited card')
    parser.add_argument('--dry-run', action='store_true', help='send nothing, leave the files in RUN_FOLDER/publish')
    parser.add_argument('--license', metavar='ID', help="licence of weights that inherit none, e.g. 'apache-2.0'")
    parser.add_argument('--commit-message', metavar='TEXT', help='title of the commit')
    return parser


def main(argv: Sequence[str] | None = None, prog: str = 'timm-dyacts publish') -> None:
    """Run the command.

    Args:
        argv: The options, those of the process for None.
        prog: Name of the program, for messages.
    """
    args = vars(create_parser(prog).parse_args(argv))
    with one_line_errors(prog):
        published = publish(**args)
    for name, size in published.files.items():
        print(f'{size:>12,}  {name}')
    for remark in published.remarks:
        print(one_line(remark))  # which quotes the options of the run
    if published.folder:
        print(f'Would be published as {published.repo_id}: {published.folder}')
    else:
        print(f'Published as {published.repo_id}: {published.url}')
