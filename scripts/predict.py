#!/usr/bin/env python3
"""Say which classes images may show, with the names and the preprocessing that the model's checkpoint keeps.

    python scripts/predict.py --model output/train/<run> photo.jpg more_photos/

The model is a run folder, 'local-dir:<folder>', 'hf-hub:<id>' or a name with pretrained weights.
"""
import argparse
import io
import sys

import timm_dyacts  # noqa: F401  registers the variants
from timm_dyacts.evaluation.predict import FORMATS, predict
from timm_dyacts.files import replace_text
from timm_dyacts.training.options import (
    ArgumentParser,
    add_device_options,
    add_loader_options,
    add_preprocessing_options,
)


def create_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('images', nargs='+', metavar='PATH', help='image files, and folders of images')
    parser.add_argument('-m', '--model', required=True, metavar='NAME', help='what to predict with')
    parser.add_argument('--checkpoint', metavar='FILE', help='load these weights in place of the pretrained ones')
    parser.add_argument('--topk', type=int, default=5, metavar='K', help='classes per image (default: %(default)s)')
    parser.add_argument('--results-format', default='table', choices=tuple(FORMATS), help='default: %(default)s')
    parser.add_argument('--results-file', metavar='FILE', help='where to write (default: standard output)')
    parser.add_argument('-b', '--batch-size', type=int, default=64, metavar='N', help='default: %(default)s')
    add_preprocessing_options(parser.add_argument_group('Preprocessing'))
    add_device_options(parser)
    add_loader_options(parser)
    return parser


def main() -> None:
    args = create_parser().parse_args()
    write = FORMATS[args.results_format]
    try:
        records = predict(args)
        if args.results_file:
            text = io.StringIO()
            write(records, text)
            replace_text(args.results_file, text.getvalue())
        else:
            write(records, sys.stdout)
    except (ImportError, OSError, ValueError) as e:
        sys.exit(f'predict.py: error: {e}')
    unreadable = [record['path'] for record in records if 'error' in record]
    if unreadable:
        more = ', ...' if len(unreadable) > 3 else ''
        print(f'{len(unreadable)} of {len(records)} images cannot be read: {", ".join(unreadable[:3])}{more}',
              file=sys.stderr)


if __name__ == '__main__':
    main()
