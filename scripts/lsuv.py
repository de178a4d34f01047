#!/usr/bin/env python3
"""Initialise a model with LSUV and print the standard deviation of each output, layer by layer, before and after.

The batch comes from the handwritten digits that come with scikit-learn, or from an image folder.
"""
import argparse
import sys

import timm
import torch
from timm.data import create_transform, resolve_data_config

import timm_dyacts  # noqa: F401  registers the variants
from timm_dyacts.data import create_dataset
from timm_dyacts.device import resolve_device
from timm_dyacts.evaluation.curves import require_matplotlib
from timm_dyacts.loading import resolve_model_name
from timm_dyacts.lsuv import LSUVReport, OutputStd, lsuv_

BEFORE_COLOR = '#9a9a9a'
AFTER_COLOR = '#1f6fb4'


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--model', default='resnet50_brelu_nobn', metavar='NAME', help='default: %(default)s')
    parser.add_argument('--data-dir', metavar='DIR', help='image folder to take the batch from (default: the digits)')
    parser.add_argument('-b', '--batch-size', type=int, default=32, metavar='N', help='default: %(default)s')
    parser.add_argument('--img-size', type=int, default=64, metavar='N', help='height and width (default: %(default)s)')
    parser.add_argument('--residual-std', type=float, metavar='STD',
                        help='standard deviation at the end of a residual branch; 1 is LSUV as published '
                             '(default: 1 / sqrt(number of branches))')
    parser.add_argument('--seed', type=int, default=42, metavar='S', help='default: %(default)s')
    parser.add_argument('--device', metavar='NAME', help='device (default: cuda if there is one, else cpu)')
    parser.add_argument('--plot', metavar='FILE', help='draw the table, e.g. as variance.png')
    return parser


def load_batch(args: argparse.Namespace, model: torch.nn.Module) -> torch.Tensor:
    """Randomly chosen training images, preprocessed for the model."""
    for option in ('batch_size', 'img_size'):
        if getattr(args, option) < 1:
            raise ValueError(f'--{option.replace("_", "-")} must be at least 1, got {getattr(args, option)}')
    in_chans = getattr(model, 'in_chans', model.pretrained_cfg['input_size'][0])
    dataset = create_dataset(
        '' if args.data_dir else 'digits', args.data_dir, split='train', input_img_mode='RGB' if in_chans == 3 else 'L')
    config = resolve_data_config(dict(img_size=args.img_size, in_chans=in_chans, crop_pct=1.0), model=model)
    dataset.transform = create_transform(**config)
    indices = torch.randperm(len(dataset))[:args.batch_size]
    return torch.stack([dataset[i][0] for i in indices.tolist()])


def plot(report: LSUVReport, path: str, title: str) -> None:
    """Draw the standard deviations over the depth of the network; the ending of the path gives the format."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(11, 4.2), dpi=150, layout='constrained')
    fig.suptitle(title, fontsize=11)
    axes = fig.subplots(1, 2, sharey=True)
    for ax, rows, label in (
            (axes[0], report.layers, 'Convolution or linear layer, in the order of execution'),
            (axes[1], report.activations, 'Activation, in the order of execution'),
    ):
        draw_stds(ax, rows)
        ax.set_xlabel(label)
    targets = sorted({row.target for row in report.layers})
    axes[0].set_title(f'targets: {", ".join(f"{target:.3g}" for target in targets)}', fontsize=9)
    axes[0].set_ylabel('Standard deviation of the output')
    axes[0].legend(frameon=False)
    fig.savefig(path)


def draw_stds(ax, rows: list[OutputStd]) -> None:
    index = range(1, len(rows) + 1)
    ax.set_yscale('log')
    for stds, color, label in (
            ([row.before for row in rows], BEFORE_COLOR, 'before'),
            ([row.after for row in rows], AFTER_COLOR, 'after LSUV'),
    ):
        ax.plot(index, [std or float('nan') for std in stds], 'o', color=color, markersize=4, label=label)
        zeros = [i for i, std in zip(index, stds, strict=True) if std == 0]
        if zeros:  # which have no place on a logarithmic axis
            ax.plot(zeros, [0.02] * len(zeros), 'v', color=color, markersize=5, label=f'{label}: zero',
                    transform=ax.get_xaxis_transform())
    ax.grid(alpha=0.25)
    ax.spines[['top', 'right']].set_visible(False)


def main() -> None:
    args = create_parser().parse_args()
    try:
        if args.plot:
            require_matplotlib()
        torch.manual_seed(args.seed)
        device = resolve_device(args.device)
        model = timm.create_model(resolve_model_name(args.model))
        batch = load_batch(args, model)
        report = lsuv_(model.to(device), batch.to(device), residual_std=args.residual_std)
        print(report)
        if args.plot:
            plot(report, args.plot, f'{args.model}, {len(batch)} images of {args.img_size} pixels')
    except (ImportError, OSError, RuntimeError, ValueError) as e:
        sys.exit(f'lsuv.py: error: {e}')


if __name__ == '__main__':
    main()
