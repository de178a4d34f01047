#!/usr/bin/env python3
"""Train or fine-tune a timm model, the variants of timm_dyacts among them.

Without arguments: a small variant on the handwritten digits that come with scikit-learn, in about a minute on 2 cores.
Options are named as in timm's train.py; the run folder is itself a checkpoint for 'local-dir:<folder>' and the Hub.
With --resume auto a run that was killed goes on to the end that it would have had. More processes: torchrun.

Exit status: 0 done, 1 error, 2 wrong usage, 130 stopped by Ctrl-C and 143 by SIGTERM, both with the state saved.
"""
import argparse
import sys

import timm_dyacts  # noqa: F401  registers the variants
from timm_dyacts.training import NonFiniteLossError, TrainingInterrupted, train
from timm_dyacts.training.options import (
    ArgumentParser,
    add_device_options,
    add_input_options,
    add_loader_options,
    parse_train_args,
)


def create_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__)
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
    group.add_argument('--initial-checkpoint', metavar='FILE', help='load this checkpoint file into the model as it is')
    group.add_argument('--init', default='default', choices=('default', 'lsuv'),
                       help='initialisation of the weights; lsuv for models without normalisation')
    group.add_argument('--drop', type=float, default=0.0, metavar='PCT', help='dropout rate')
    group.add_argument('--drop-path', type=float, metavar='PCT', help='stochastic depth rate')
    group.add_argument('--grad-checkpointing', action='store_true', help='recompute activations in the backward pass')
    add_device_options(parser)
    add_loader_options(parser)

    group = parser.add_argument_group('Fine-tuning')
    group.add_argument('--freeze', default='none', choices=('backbone', 'operators', 'none'),
                       help="do not train this part; 'backbone' trains the operators' parameters and the classifier "
                            'alone (default: %(default)s)')
    group.add_argument('--unfreeze-epoch', type=int, metavar='N', help='train all from this epoch on (default: never)')
    group.add_argument('--lr-ops', type=float, default=1.0, metavar='SCALE',
                       help="learning rate of the operators' parameters, as a multiple (default: %(default)s)")
    group.add_argument('--kd-model', '--kd-model-name', metavar='NAME',
                       help='teacher to distil from: name, Hub id or folder of a model with the same classes, such as '
                            'the base of a variant')
    group.add_argument('--kd-temperature', type=float, default=4.0, metavar='T', help='default: %(default)s')
    group.add_argument('--distill-loss-weight', type=float, metavar='W', help='default: 1, or 1 - --task-loss-weight')
    group.add_argument('--task-loss-weight', type=float, metavar='W', help='default: 1')

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
    group.add_argument('--clip-mode', default='norm', choices=('norm', 'value', 'agc'),
                       help='what --clip-grad bounds (default: %(default)s)')
    group.add_argument('--grad-accum-steps', type=int, default=1, metavar='N',
                       help='batches whose gradients make one update (default: %(default)s)')
    group.add_argument('--layer-decay', type=float, metavar='RATE', help='layer-wise learning rate decay')
    group.add_argument('--lr', type=float, default=1e-3, metavar='LR', help='learning rate (default: %(default)s)')
    group.add_argument('--sched', default='cosine', choices=('cosine', 'tanh', 'poly', 'step', 'wsd', 'constant'),
                       help='learning rate schedule, moved by every update (default: %(default)s)')
    group.add_argument('--warmup-epochs', type=int, default=3, metavar='N', help='default: %(default)s')
    group.add_argument('--warmup-lr', type=float, default=1e-5, metavar='LR', help='default: %(default)s')
    group.add_argument('--min-lr', type=float, default=0.0, metavar='LR', help='default: %(default)s')
    group.add_argument('--decay-epochs', type=float, default=10, metavar='N',
                       help='epochs between the steps of --sched step, of the decay of --sched wsd (default: '
                            '%(default)s)')
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
    group.add_argument('--train-interpolation', default='random', metavar='NAME',
                       help='interpolation of the random crop (default: %(default)s)')
    group.add_argument('--reprob', type=float, default=0.0, metavar='P', help='random erasing probability')
    group.add_argument('--remode', default='pixel', choices=('pixel', 'rand', 'const'),
                       help='random erasing mode (default: %(default)s)')
    group.add_argument('--recount', type=int, default=1, metavar='N', help='random erasing count (default: 1)')
    group.add_argument('--mixup', type=float, default=0.0, metavar='ALPHA', help='mixup if above 0')
    group.add_argument('--cutmix', type=float, default=0.0, metavar='ALPHA', help='cutmix if above 0')
    group.add_argument('--mixup-prob', type=float, default=1.0, metavar='P',
                       help='probability of either, where on (default: %(default)s)')
    group.add_argument('--mixup-switch-prob', type=float, default=0.5, metavar='P',
                       help='probability of cutmix where both are on (default: %(default)s)')
    group.add_argument('--mixup-mode', default='batch', choices=('batch', 'pair', 'elem'),
                       help='what shares the parameters of mixup (default: %(default)s)')
    group.add_argument('--smoothing', type=float, default=0.1, metavar='EPS', help='default: %(default)s')

    group = parser.add_argument_group('Exponential moving average of the model')
    group.add_argument('--model-ema', action='store_true', help='keep it, evaluate it, and save the best in ema/')
    group.add_argument('--model-ema-decay', type=float, default=0.9998, metavar='D', help='default: %(default)s')
    group.add_argument('--model-ema-warmup', action='store_true', help='let the decay grow from 0')
    group.add_argument('--model-ema-force-cpu', action='store_true', help='keep it in the memory of the host')

    group = parser.add_argument_group('Distributed training (start with torchrun)')
    group.add_argument('--sync-bn', action='store_true', help='synchronised BatchNorm')
    group.add_argument('--dist-bn', default='reduce', choices=('reduce', 'broadcast', 'none'),
                       help='what becomes of BatchNorm statistics before an evaluation: the mean of all processes, '
                            'those of the first, or each its own (default: %(default)s)')

    group = parser.add_argument_group('Run')
    group.add_argument('--seed', type=int, default=42, metavar='S', help='default: %(default)s')
    group.add_argument('--output', default='./output/train', metavar='DIR', help='default: %(default)s')
    group.add_argument('--experiment', metavar='NAME', help='name of the run folder (default: <time>-<model>-<size>)')
    group.add_argument('--eval-metric', default='top1', choices=('top1', 'top5', 'loss'),
                       help='what makes a checkpoint the best (default: %(default)s)')
    group.add_argument('--log-interval', type=int, default=50, metavar='N',
                       help='batches between two readings of the loss (default: %(default)s)')
    group.add_argument('--resume', metavar='auto|PATH',
                       help="'auto': go on with the run of the same --output and --experiment (without --experiment: "
                            'of the same options), or start it; or the folder of a run, or a state file in it. A path '
                            'alone is enough: the other options are those of the run')
    group.add_argument('--checkpoint-interval', default='1epoch', metavar='N[epochs]',
                       help='updates, or epochs, from one state that can be resumed to the next (default: %(default)s)')
    group.add_argument('--log-tensorboard', action='store_true', help='log to TensorBoard files in the run folder')
    group.add_argument('--log-wandb', action='store_true', help='log to Weights & Biases')
    group.add_argument('--wandb-project', metavar='NAME', help='project there')
    group.add_argument('--wandb-tags', nargs='+', default=[], metavar='TAG', help='tags there')
    group.add_argument('--wandb-resume-id', metavar='ID', help='id of the run there to go on with')
    return parser


def main() -> None:
    args = parse_train_args(create_parser())
    try:
        result = train(args)
    except TrainingInterrupted as e:
        if e.is_primary:
            print(f'train.py: {e}', file=sys.stderr)
        sys.exit(128 + e.signum)
    except KeyboardInterrupt:
        sys.exit(130)  # the second Ctrl-C: whoever presses it wants no words
    except (ImportError, NonFiniteLossError, OSError, ValueError) as e:
        sys.exit(f'train.py: error: {e}')
    if result.is_primary:
        print(
            f'Best top1 {result.best["top1"]:.2f} % (epoch {result.best_epoch}) in {result.folder}; '
            f'check it with: python scripts/validate.py --model {result.folder}')


if __name__ == '__main__':
    main()
