"""What every plot begins with: matplotlib, without a display, when the extra is installed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from ..engines.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_matplotlib(what: str) -> None:
    """Raises UserError when nothing could be drawn, before any work is done. what: `--plot needs`, for its message."""
    if find_spec("matplotlib") is None:
        raise UserError(
            f"{what} the package matplotlib, which comes with the plot extra: "
            'pip install -c constraints.txt -e ".[plot]" in a clone of dit-trt'
        )


def new_figure(height: float, width: float = 8.0) -> Figure:
    """In inches; it belongs to no window, and is freed with its last reference."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
