"""The one look of all pictures. matplotlib is an optional dependency, imported where something is drawn."""
import importlib.util
from typing import Any

__all__ = ['BLUE', 'COLORS', 'GREY', 'create_figure', 'require_matplotlib', 'style_axes']

BLUE = '#1f6fb4'
GREY = '#9a9a9a'
# Of series that are alike; the first is ours
COLORS = (BLUE, '#d1615d', '#5a9a5a', '#8d6fb0')


def require_matplotlib() -> None:
    """Raise ImportError if nothing can be drawn, so that work fails before it is done rather than after."""
    if importlib.util.find_spec('matplotlib') is None:
        raise ImportError("Pictures are drawn with matplotlib: pip install 'timm-dyacts[demo]'.")


def create_figure(width: float, height: float, title: str = '', dpi: int = 110) -> Any:
    """Create a figure of some inches. It needs no display, and leaves pyplot's global state alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout='constrained')
    if title:
        figure.suptitle(title, fontsize=11, wrap=True)
    return figure


def style_axes(ax: Any, grid: str = 'both') -> None:
    """Give axes a faint grid ('x', 'y' or 'both') and no frame on top and on the right."""
    ax.grid(alpha=0.25, axis=grid)
    ax.spines[['top', 'right']].set_visible(False)
