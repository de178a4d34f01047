#!/usr/bin/env python3
"""Evaluate models and print their records as JSON, the ones that timm's validate.py prints.

A model is a run folder, 'local-dir:<folder>', 'hf-hub:<id>' or a name with pretrained weights. A run folder is
evaluated on the data set that it was trained on, unless told otherwise; any other model on the digits.
"""
import argparse
import json
import sys

from timm_dyacts import hub  # which registers the variants, too
from timm_dyacts.evaluation.validate import validate_models
from timm_dyacts.training.options import ArgumentParser, add_device_options, add_input_options, add_loader_options


def create_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('-m', '--model', required=True, nargs='+', metavar='NAME', help='what to evaluate')
    parser.add_argument('--verify', action='store_true',
                        help="first compare the weights with the SHA-256 that was published with them ('hf-hub:<id>' "
                             'or a published folder)')
    parser.add_argument('--checkpoint', metavar='FILE', help='load these weights in place of the pretrained ones')
    parser.add_argument('--split', metavar='NAME', help='split to evaluate on (default: of the run, or validation)')
    parser.add_argument('-b', '--batch-size', type=int, default=256, metavar='N', help='default: %(default)s')
    parser.add_argument('--use-train-size', action='store_true',
                        help='use the training image size even where the model recommends another one for testing')
    parser.add_argument('--results-file', metavar='FILE', help='also write the records to this file')
    parser.add_argument('--results-format', default='csv', choices=('csv', 'json'), help='default: %(default)s')
    add_input_options(parser)
    add_device_options(parser)
    add_loader_options(parser)
    return parser


def main() -> None:
    args = create_parser().parse_args()
    try:
        if args.verify:
            for name in args.model:
                hub.verify(name)
        records, errors = validate_models(args)
    except (ImportError, OSError, ValueError) as e:
        sys.exit(f'validate.py: error: {e}')
    print(f'--result\n{json.dumps(records if len(args.model) > 1 else records[0], indent=4)}')
    if errors:
        sys.exit(f'validate.py: error: {len(errors)} of {len(args.model)} models failed: {", ".join(errors)}')


if __name__ == '__main__':
    main()
