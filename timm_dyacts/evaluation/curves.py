"""The learning curves of a run, as a picture."""
import csv
import importlib.util
import os

__all__ = ['plot_curves', 'require_matplotlib']

_TRAIN_COLOR = '#9a9a9a'
_EVAL_COLOR = '#1f6fb4'


def require_matplotlib() -> None:
    """Raise ImportError if curves cannot be drawn, so that a run fails before it trains rather than after."""
    if importlib.util.find_spec('matplotlib') is None:
        raise ImportError("The curves are drawn with matplotlib: pip install 'timm-dyacts[demo]'.")


def plot_curves(summary: str | os.PathLike, path: str | os.PathLike, title: str = '') -> None:
    """Draw loss and accuracy over the epochs.

    Args:
        summary: The ``summary.csv`` that ``timm.utils.update_summary`` wrote.
        path: Where to write the picture; its ending gives the format.
        title: Heading of the figure.
    """
    # The object interface draws without a display and without pyplot's global state.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with open(summary, newline='') as f:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]
    epochs = [row['epoch'] for row in rows]
    best = max(rows, key=lambda row: row['eval_top1'])

    fig = Figure(figsize=(9, 3.8), dpi=150, layout='constrained')
    fig.suptitle(title, fontsize=11)
    loss_ax, accuracy_ax = fig.subplots(1, 2)
    style = dict(marker='o', markersize=3, linewidth=1.6)

    train_style = dict(style, color=_TRAIN_COLOR, label='training objective')
    eval_style = dict(style, color=_EVAL_COLOR, label='validation cross entropy')
    loss_ax.plot(epochs, [row['train_loss'] for row in rows], **train_style)
    loss_ax.plot(epochs, [row['eval_loss'] for row in rows], **eval_style)
    loss_ax.set_ylabel('Loss')
    loss_ax.set_ylim(bottom=0)
    loss_ax.legend(frameon=False)

    accuracy_ax.plot(epochs, [row['eval_top1'] for row in rows], color=_EVAL_COLOR, **style)
    accuracy_ax.axhline(best['eval_top1'], color=_EVAL_COLOR, linewidth=0.8, linestyle=':')
    accuracy_ax.set_title(f'highest {best["eval_top1"]:.2f} % at epoch {best["epoch"]:.0f}', fontsize=9)
    accuracy_ax.set_ylabel('Validation top-1 accuracy (%)')

    for ax in (loss_ax, accuracy_ax):
        ax.set_xlabel('Epoch')
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(alpha=0.25)
        ax.spines[['top', 'right']].set_visible(False)
    fig.savefig(path)
