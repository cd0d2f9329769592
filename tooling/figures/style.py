"""How every figure looks, and how it becomes a PNG and an SVG file. Colours are Okabe and Ito's and cividis."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#8c8c8c"
MAP = "cividis"
DPI = 144  # 8 inches are 1152 pixels: sharp at the 800 a page shows
_RC: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.hashsalt": "dit-trt",  # the same numbers are the same bytes
}


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Figures are made and saved in this block."""
    import matplotlib

    with matplotlib.rc_context(_RC):
        yield


def magnitudes(axis: Axes) -> None:
    """A logarithmic y axis whose labels are plain numbers, three a decade at most; linear where all is zero."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    if max(one.dataLim.y1 for one in axis.get_shared_y_axes().get_siblings(axis)) <= 0:
        return
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 300 else (1.0,)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def save(figure: Figure, folder: Path, name: str) -> None:
    """`name`.png and `name`.svg in `folder`, without a date."""
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    figure.savefig(png, dpi=DPI, metadata={"Software": None}, pil_kwargs={"optimize": True})
    figure.savefig(svg, dpi=DPI, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
