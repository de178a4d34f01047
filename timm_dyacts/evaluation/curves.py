"""The learning curves of a run, as a picture."""
import os

from ..plotting import BLUE, GREY, create_figure, save_figure, style_axes
from ..run_folder import read_rows

__all__ = ['plot_curves']


def plot_curves(summary: str | os.PathLike[str], path: str | os.PathLike[str], title: str = '') -> None:
    """Draw loss and accuracy over the epochs, and ``t`` where there was a transition.

    Args:
        summary: The ``summary.csv`` of a run.
        path: Where to write the picture; its ending gives the format.
        title: Heading of the figure.
    """
    from matplotlib.ticker import MaxNLocator

    rows = read_rows(summary)
    epochs = [row['epoch'] for row in rows]
    evaluated = [row for row in rows if 'eval_loss' in row]
    # Within a transition the model is not yet the one that is trained for.
    finished = [row for row in evaluated if row.get('t', 1) == 1]
    best = max(finished, key=lambda row: row['eval_top1'], default=None)

    figure = create_figure(9, 3.8, title, dpi=150)
    loss_ax, accuracy_ax = figure.subplots(1, 2)
    style = dict(marker='o', markersize=3, linewidth=1.6)

    loss_ax.plot(epochs, [row['train_loss'] for row in rows], color=GREY, label='training objective', **style)
    at = [row['epoch'] for row in evaluated]
    loss_ax.plot(at, [row['eval_loss'] for row in evaluated], color=BLUE, label='validation cross entropy', **style)
    loss_ax.set_ylabel('Loss')
    loss_ax.set_ylim(bottom=0)
    loss_ax.legend(frameon=False)

    accuracy_ax.plot(at, [row['eval_top1'] for row in evaluated], color=BLUE, **style)
    if best is not None:
        accuracy_ax.axhline(best['eval_top1'], color=BLUE, linewidth=0.8, linestyle=':')
        accuracy_ax.set_title(f'highest {best["eval_top1"]:.2f} % at epoch {best["epoch"]:.0f}', fontsize=9)
    if 't' in rows[0]:
        t_ax = accuracy_ax.twinx()
        t_ax.plot(epochs, [row['t'] for row in rows], color=GREY, linewidth=1.0, linestyle='--')
        t_ax.set_ylim(-0.02, 1.02)
        t_ax.set_ylabel('Transition, t')
    accuracy_ax.set_ylabel('Validation top-1 accuracy (%)')

    for ax in (loss_ax, accuracy_ax):
        ax.set_xlabel('Epoch')
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        style_axes(ax)
    save_figure(figure, path)
