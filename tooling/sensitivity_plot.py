"""The errors of Linears, kinds or blocks as a bar chart, PNG or SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..engines.errors import UserError
from .plots import check_matplotlib, new_figure

FORMATS = (".png", ".svg")
SHOWN = 60  # bars: more cannot be read
_LONGEST = 1e4  # %, of errors that are infinite


def check_plot(path: Path) -> None:
    """Raises UserError when `plot_errors` could not write there, before any work is done."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"--plot {path}: only {' and '.join(FORMATS)} are written; end the name so")
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"cannot write {path}; give --plot a file in a folder that exists")
    check_matplotlib("--plot needs")


def plot_errors(path: Path, names: Sequence[str], errors: Mapping[str, Sequence[float]], title: str) -> None:
    """Relative errors as bars, those of a name side by side: errors by label (`w8a8`, ...), each in order of `names`.

    The first `SHOWN` names are drawn, from the top; the axis is logarithmic.
    """
    names = names[:SHOWN]
    figure = new_figure(1.5 + 0.2 * len(names) * max(1, len(errors) * 0.7))
    axes = figure.subplots()
    height = 0.8 / len(errors)
    for number, (label, values) in enumerate(errors.items()):
        places = [place + (number + 0.5) * height - 0.4 for place in range(len(names))]
        axes.barh(places, [min(100 * value, _LONGEST) for value in values[: len(names)]], height, label=label)
    axes.set_yticks(range(len(names)), [name.removeprefix("transformer.layers.") for name in names], fontsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("relative error of the guided velocity, quantized alone, %")
    axes.set_title(title, fontsize=9)
    if len(errors) > 1:
        axes.legend()
    figure.savefig(path, dpi=150)
