#!/usr/bin/env python3
"""Train or fine-tune a timm model, the variants of timm_dyacts among them.

Without arguments: a small variant on the handwritten digits that come with scikit-learn, in about a minute on 2 cores.
Options are named as in timm's train.py; the run folder is itself a checkpoint for 'local-dir:<folder>' and the Hub.
"""
import argparse
import sys

import timm_dyacts  # noqa: F401  registers the variants
from timm_dyacts.training import NonFiniteLossError, train
from timm_dyacts.training.options import add_device_options, add_input_options, parse_train_args


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add_input_options(parser)
    group = parser.add_argument_group('Splits')
    group.add_argument('--train-split', default='train', metavar='NAME', help='default: %(default)s')
    group.add_argument('--val-split', default='validation', metavar='NAME', help='default: %(default)s')

    group = parser.add_argument_group('Model')
    group.add_argument('--model', default='resnet18_dyrelu_b', metavar='NAME',
                       help="name, 'hf-hub:<id>', or folder of a checkpoint (default: %(default)s)")
    group.add_argument('--pretrained', action='store_true', help='start from the pretrained weights')
    group.add_argument('--pretrained-path', metavar='FILE',
                       help='start from this checkpoint file as if it held the pretrained weights')
    group.add_argument('--drop', type=float, default=0.0, metavar='PCT', help='dropout rate')
    group.add_argument('--drop-path', type=float, metavar='PCT', help='stochastic depth rate')
    add_device_options(parser)

    group = parser.add_argument_group('Optimizer and schedule')
    group.add_argument('-b', '--batch-size', type=int, default=128, metavar='N', help='default: %(default)s')
    group.add_argument('-vb', '--validation-batch-size', type=int, metavar='N', help='default: --batch-size')
    group.add_argument('--epochs', type=int, default=30, metavar='N', help='default: %(default)s')
    group.add_argument('--opt', default='adamw', metavar='NAME', help='any of timm.optim (default: %(default)s)')
    group.add_argument('--opt-eps', type=float, metavar='EPS', help='default: of the optimizer')
    group.add_argument('--opt-betas', type=float, nargs='+', metavar='BETA', help='default: of the optimizer')
    group.add_argument('--momentum', type=float, default=0.9, metavar='M', help='default: %(default)s')
    group.add_argument('--weight-decay', type=float, default=0.05, metavar='WD', help='default: %(default)s')
    group.add_argument('--clip-grad', type=float, metavar='NORM', help='largest gradient norm (default: no limit)')
    group.add_argument('--layer-decay', type=float, metavar='RATE', help='layer-wise learning rate decay')
    group.add_argument('--lr', type=float, default=1e-3, metavar='LR', help='learning rate (default: %(default)s)')
    group.add_argument('--sched', default='cosine', choices=('cosine', 'tanh', 'poly', 'step'),
                       help='learning rate schedule, moved by every update (default: %(default)s)')
    group.add_argument('--warmup-epochs', type=int, default=3, metavar='N', help='default: %(default)s')
    group.add_argument('--warmup-lr', type=float, default=1e-5, metavar='LR', help='default: %(default)s')
    group.add_argument('--min-lr', type=float, default=0.0, metavar='LR', help='default: %(default)s')
    group.add_argument('--decay-epochs', type=float, default=10, metavar='N',
                       help='epochs between the steps of --sched step (default: %(default)s)')
    group.add_argument('--decay-rate', type=float, default=0.1, metavar='RATE',
                       help='factor of --sched step, power of --sched poly (default: %(default)s)')

    group = parser.add_argument_group('Augmentation and regularization')
    group.add_argument('--no-aug', action='store_true', help='no augmentation at all')
    group.add_argument('--scale', type=float, nargs=2, default=[0.08, 1.0], metavar='PCT',
                       help='area of the random crop (default: 0.08 1)')
    group.add_argument('--ratio', type=float, nargs=2, default=[3 / 4, 4 / 3], metavar='RATIO',
                       help='aspect ratio of the random crop (default: 0.75 1.33)')
    group.add_argument('--hflip', type=float, default=0.5, metavar='P', help='default: %(default)s')
    group.add_argument('--vflip', type=float, default=0.0, metavar='P', help='default: %(default)s')
    group.add_argument('--color-jitter', type=float, default=0.4, metavar='PCT', help='default: %(default)s')
    group.add_argument('--aa', metavar='NAME', help="AutoAugment policy, e.g. 'rand-m9-mstd0.5'")
    group.add_argument('--reprob', type=float, default=0.0, metavar='P', help='random erasing probability')
    group.add_argument('--mixup', type=float, default=0.0, metavar='ALPHA', help='mixup if above 0')
    group.add_argument('--cutmix', type=float, default=0.0, metavar='ALPHA', help='cutmix if above 0')
    group.add_argument('--smoothing', type=float, default=0.1, metavar='EPS', help='default: %(default)s')

    group = parser.add_argument_group('Run')
    group.add_argument('--seed', type=int, default=42, metavar='S', help='default: %(default)s')
    group.add_argument('--output', default='./output/train', metavar='DIR', help='default: %(default)s')
    group.add_argument('--experiment', metavar='NAME', help='name of the run folder (default: <time>-<model>-<size>)')
    group.add_argument('--eval-metric', default='top1', choices=('top1', 'top5', 'loss'),
                       help='what makes a checkpoint the best (default: %(default)s)')
    group.add_argument('--log-interval', type=int, default=50, metavar='N',
                       help='updates between two readings of the loss (default: %(default)s)')
    return parser


def main() -> None:
    args = parse_train_args(create_parser())
    try:
        result = train(args)
    except (ImportError, NonFiniteLossError, OSError, ValueError) as e:
        sys.exit(f'train.py: error: {e}')
    print(
        f'Best top1 {result.best["top1"]:.2f} % (epoch {result.best_epoch}) in {result.folder}; '
        f'check it with: python scripts/validate.py --model {result.folder}')


if __name__ == '__main__':
    main()
