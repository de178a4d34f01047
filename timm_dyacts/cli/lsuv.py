"""Initialise a model with LSUV and print the standard deviation of each output, layer by layer, before and after.

The batch comes from the handwritten digits that come with scikit-learn, or from an image folder.
"""
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from timm.data import create_transform
from torch import Tensor, nn

from ..data import create_dataset
from ..device import resolve_device
from ..evaluation.config import LARGEST_SIDE
from ..files import check_output
from ..loading import create_model, resolve_input, resolve_model_name
from ..lsuv import LSUVReport, OutputStd, lsuv_
from ..ops.checks import check_int, check_positive
from ..plotting import BLUE, GREY, create_figure, require_matplotlib, save_figure, style_axes
from .parser import ArgumentParser, one_line_errors

__all__ = ['create_parser', 'main']


def create_parser(prog: str = 'timm-dyacts lsuv') -> ArgumentParser:
    """Create the parser of the command."""
    parser = ArgumentParser(prog=prog, description=__doc__)
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


def main(argv: Sequence[str] | None = None, prog: str = 'timm-dyacts lsuv') -> None:
    """Run the command.

    Args:
        argv: Its command line, that of the process for ``None``.
        prog: Name of the program, for messages.
    """
    args = create_parser(prog).parse_args(argv)
    with one_line_errors(prog, AssertionError, RuntimeError):
        _run(args)


def _run(args: Namespace) -> None:
    check_int('--batch-size', args.batch_size, 1)
    check_int('--img-size', args.img_size, 1, LARGEST_SIDE)
    check_int('--seed', args.seed, 0, 2 ** 32 - 1)
    if args.residual_std is not None:
        check_positive('--residual-std', args.residual_std)
    if args.plot:
        require_matplotlib(args.plot)
        check_output(args.plot, '--plot')
    torch.manual_seed(args.seed)
    device = resolve_device(args.device)
    model = create_model(resolve_model_name(args.model))
    batch = _load_batch(args, model)
    report = lsuv_(model.to(device), batch.to(device), residual_std=args.residual_std)
    print(report)
    if args.plot:
        _plot(report, args.plot, f'{args.model}, {len(batch)} images of {args.img_size} pixels')


def _load_batch(args: Namespace, model: nn.Module) -> Tensor:
    """Choose training images at random, and preprocess them for the model."""
    in_chans = getattr(model, 'in_chans', model.pretrained_cfg['input_size'][0])
    dataset = create_dataset(
        '' if args.data_dir else 'digits', args.data_dir, split='train', input_img_mode='RGB' if in_chans == 3 else 'L')
    config = resolve_input(model, dict(img_size=args.img_size, in_chans=in_chans, crop_pct=1.0))
    dataset.transform = create_transform(**config)
    indices = torch.randperm(len(dataset))[:args.batch_size]
    return torch.stack([dataset[i][0] for i in indices.tolist()])


def _plot(report: LSUVReport, path: str, title: str) -> None:
    """Draw the standard deviations over the depth of the network; the ending of the path gives the format."""
    figure = create_figure(11, 4.2, title, dpi=150)
    axes = figure.subplots(1, 2, sharey=True)
    for ax, rows, label in (
            (axes[0], report.layers, 'Convolution or linear layer, in the order of execution'),
            (axes[1], report.activations, 'Activation, in the order of execution'),
    ):
        _draw_stds(ax, rows)
        ax.set_xlabel(label)
    targets = sorted({row.target for row in report.layers})
    axes[0].set_title(f'targets: {", ".join(f"{target:.3g}" for target in targets)}', fontsize=9)
    axes[0].set_ylabel('Standard deviation of the output')
    axes[0].legend(frameon=False)
    save_figure(figure, path)


def _draw_stds(ax: Any, rows: Sequence[OutputStd]) -> None:
    index = range(1, len(rows) + 1)
    ax.set_yscale('log')
    for stds, color, label in (
            ([row.before for row in rows], GREY, 'before'),
            ([row.after for row in rows], BLUE, 'after LSUV'),
    ):
        ax.plot(index, [std or float('nan') for std in stds], 'o', color=color, markersize=4, label=label)
        zeros = [i for i, std in zip(index, stds, strict=True) if std == 0]
        if zeros:  # which have no place on a logarithmic axis
            ax.plot(zeros, [0.02] * len(zeros), 'v', color=color, markersize=5, label=f'{label}: zero',
                    transform=ax.get_xaxis_transform())
    style_axes(ax)
