#!/usr/bin/env python3
"""Publish a run folder of scripts/train.py on the Hugging Face Hub: weights, config, card, recipe, in one commit.

The folder is loaded back before anything is sent. Log in first: hf auth login, or HF_TOKEN.
"""
import argparse
import sys

from timm_dyacts.hub import publish


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('run_folder', metavar='RUN_FOLDER', help='the run to publish')
    parser.add_argument('--repo-id', required=True, metavar='USER/NAME', help='where to publish it')
    parser.add_argument('--weights', default='best', choices=('best', 'ema', 'last'), help='default: %(default)s')
    parser.add_argument('--private', action='store_true', help='create a private repo')
    parser.add_argument('--revision', metavar='BRANCH', help='branch to publish to (default: main)')
    parser.add_argument('--create-pr', action='store_true', help='open a pull request instead')
    parser.add_argument('--overwrite', action='store_true',
                        help='also replace what is not from here, has another architecture or an edited card')
    parser.add_argument('--dry-run', action='store_true', help='send nothing, leave the files in RUN_FOLDER/publish')
    parser.add_argument('--license', metavar='ID', help="licence of weights that inherit none, e.g. 'apache-2.0'")
    parser.add_argument('--commit-message', metavar='TEXT', help='title of the commit')
    return parser


def main() -> None:
    args = vars(create_parser().parse_args())
    try:
        published = publish(**args)
    except (OSError, ValueError) as e:
        sys.exit(f'publish.py: error: {e}')
    for name, size in published.files.items():
        print(f'{size:>12,}  {name}')
    for remark in published.remarks:
        print(remark)
    if published.folder:
        print(f'Would be published as {published.repo_id}: {published.folder}')
    else:
        print(f'Published as {published.repo_id}: {published.url}')


if __name__ == '__main__':
    main()
