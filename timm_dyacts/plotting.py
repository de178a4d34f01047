"""The one look of all pictures. matplotlib is an optional dependency, imported where something is drawn."""
import importlib.util
import io
import os
from typing import Any

from .files import write_output

__all__ = ['BLUE', 'COLORS', 'GREY', 'create_figure', 'require_matplotlib', 'save_figure', 'style_axes']

BLUE = '#1f6fb4'
GREY = '#9a9a9a'
# Of series that are alike; the first is ours
COLORS = (BLUE, '#d1615d', '#5a9a5a', '#8d6fb0')


def require_matplotlib(path: str | None = None) -> None:
    """Fail before the work and not after it, where nothing can be drawn.

    Args:
        path: The file to draw into, if that is known. Its ending gives the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: It does not know the format.
    """
    if importlib.util.find_spec('matplotlib') is None:
        raise ImportError("Pictures are drawn with matplotlib: pip install 'timm-dyacts[demo]'.")
    if path is not None:
        from matplotlib.backend_bases import FigureCanvasBase

        known = FigureCanvasBase.get_supported_filetypes()
        if os.path.splitext(path)[1].lower().removeprefix('.') not in known:
            raise ValueError(
                f'the file of a picture must end with one of {", ".join(f".{name}" for name in known)}, got {path!r}.')


def create_figure(width: float, height: float, title: str = '', dpi: int = 110) -> Any:
    """Create a figure of some inches. It needs no display, and leaves pyplot's global state alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout='constrained')
    if title:
        figure.suptitle(title, fontsize=11, wrap=True)
    return figure


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure as ``files.write_output`` does. The ending of the path gives the format."""
    content = io.BytesIO()
    figure.savefig(content, format=os.path.splitext(path)[1].lower().removeprefix('.'))
    write_output(path, content.getvalue())


def style_axes(ax: Any, grid: str = 'both') -> None:
    """Give axes a faint grid ('x', 'y' or 'both') and no frame on top and on the right."""
    ax.grid(alpha=0.25, axis=grid)
    ax.spines[['top', 'right']].set_visible(False)
