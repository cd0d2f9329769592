"""The figures: what an `Analysis` holds in, matplotlib's figures out. No number is made here but bins and colours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..plots import new_figure
from .analysis import Analysis
from .channels import pooled
from .style import BLUE, GREY, MAP, ORANGE, magnitudes, save, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SURFACE = (72, 256)  # tokens and channels that can be told apart
MOST_SPREAD = 1e4  # between the least and the largest error that colours tell apart


def draw_all(analysis: Analysis, folder: Path) -> list[str]:
    """Every figure as PNG and SVG into `folder`; their names, in the report's order."""
    figures = {
        "activations": activations,
        "ranges": ranges,
        "smoothing": smoothing,
        "layer-errors": layer_errors,
        "velocity": velocity,
    }
    with styled():
        for name, draw in figures.items():
            save(draw(analysis), folder, name)
    return list(figures)


def activations(analysis: Analysis) -> Figure:
    """|X| of the prompt's half over tokens and channels, a surface of at most `SURFACE` points."""
    magnitude = np.abs(analysis.input[0])
    tokens, channels = magnitude.shape
    binned = pooled(magnitude, *SURFACE)
    y = np.linspace(0, tokens - 1, binned.shape[0])
    x = np.linspace(0, channels - 1, binned.shape[1])
    figure = new_figure(5.0)
    axes = figure.add_subplot(projection="3d", computed_zorder=False)
    grid = np.meshgrid(x, y)
    surface = axes.plot_surface(
        *grid, binned, cmap=MAP, rstride=1, cstride=1, linewidth=0, antialiased=False, shade=False
    )
    surface.set_rasterized(True)
    surface.set_clip_on(False)  # the zoom below fills the figure's margins
    axes.set_xlabel(f"input channel (of {channels})", labelpad=8)
    axes.set_ylabel(f"token (of {tokens})", labelpad=6)
    axes.set_zlabel("|X|", labelpad=2)
    axes.set_xlim(0, channels - 1)
    axes.set_ylim(0, tokens - 1)
    axes.set_zlim(0, None)
    axes.view_init(elev=32, azim=-62)
    axes.set_box_aspect((2.0, 1.1, 0.8), zoom=1.3)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_pane_color((1, 1, 1, 0))
    return figure


def ranges(analysis: Analysis) -> Figure:
    """Of the Linears of the chosen block, by step: the channels' absmax from least to largest, and the median's."""
    chosen = [one for one in analysis.linears if one.block == analysis.linear.block]
    changing = [one for one in chosen if len(analysis.spreads[one.name].high) > 1]
    figure = new_figure(5.2)
    grid = figure.subplots(2, 3, sharex=True, sharey=True)
    for axes, linear in zip(grid.flat, changing):
        spread = analysis.spreads[linear.name]
        steps = np.arange(len(spread.high))
        floor = np.maximum(spread.low, spread.high.max() * 1e-3)  # a dead channel would take the axis to zero
        axes.fill_between(steps, floor, spread.high, color=BLUE, alpha=0.25, linewidth=0, label="all channels")
        axes.plot(steps, spread.high, color=BLUE, label="largest channel")
        axes.plot(steps, spread.median, color=ORANGE, linestyle="--", label="median channel")
        axes.set_title(f"{linear.kind}\nlast / first step: {spread.growth:.2g}")
    magnitudes(grid.flat[0])
    figure.supxlabel("sampling step (noise to sound)", fontsize=10)
    figure.supylabel("largest |X| of a channel", fontsize=10)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


def smoothing(analysis: Analysis) -> Figure:
    """Each channel's absmax of X and of W, before and after; channels in order of |X| before."""
    found = analysis.smoothing
    order = np.argsort(-found.x)
    ratios = found.ratios()
    figure = new_figure(3.9)
    sides = figure.subplots(1, 2)
    pairs = (("activations |X|", "x", found.x, found.x_after), ("weights |W|", "w", found.w, found.w_after))
    for axes, (title, key, before, after) in zip(sides, pairs):
        rank = np.arange(1, len(order) + 1)
        for values, colour, when in ((before, ORANGE, "before"), (after, BLUE, "after")):
            label = f"{when}: largest / median {ratios[f'{key}_{when}']:.2g}"
            axes.plot(rank, _floored(values[order]), color=colour, linewidth=1.2, label=label)
        magnitudes(axes)
        axes.set_title(title)
        axes.set_xlabel("input channel, loudest |X| first")
        axes.margins(x=0.01)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18))
    sides[0].set_ylabel("largest magnitude of a channel")
    return figure


def layer_errors(analysis: Analysis) -> Figure:
    """A heat map: a row for every quantized Linear, kind by kind and in a kind block by block; a column a step."""
    from matplotlib.colors import LogNorm

    order = {kind: number for number, kind in enumerate(analysis.kinds)}
    rows = sorted(
        (one for one in analysis.linears if one.name in analysis.errors), key=lambda one: (order[one.kind], one.block)
    )
    table = 100 * np.stack([analysis.errors[one.name] for one in rows])
    finite = table[np.isfinite(table) & (table > 0)]
    top = float(finite.max()) if finite.size else 1.0
    bottom = max(float(finite.min()) if finite.size else 0.1, top / MOST_SPREAD)
    figure = new_figure(1.8 + min(0.075 * len(rows), 7))
    axes = figure.subplots()
    axes.grid(False)
    norm = LogNorm(bottom * 0.999, top * 1.001, clip=True)
    half = (analysis.steps[-1] - analysis.steps[0]) / max(2 * len(analysis.steps) - 2, 1) or 0.5
    extent = (analysis.steps[0] - half, analysis.steps[-1] + half, len(rows) - 0.5, -0.5)
    image = axes.imshow(table.clip(bottom, top), aspect="auto", cmap=MAP, norm=norm, extent=extent)
    _kinds_as_ticks(axes, [one.kind for one in rows], [one.block for one in rows])
    axes.set_xlabel("sampling step (noise to sound)")
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("relative error of the Linear's output, %")
    bar.outline.set_visible(False)
    ticks = [tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if bottom <= tick <= top]
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.minorticks_off()
    return figure


def _kinds_as_ticks(axes: Axes, kinds: list[str], blocks: list[int]) -> None:
    starts = [row for row, kind in enumerate(kinds) if row == 0 or kinds[row - 1] != kind]
    ends = [*starts[1:], len(kinds)]
    labels = [f"{kinds[a]}\nblocks {blocks[a]}..{blocks[b - 1]}" for a, b in zip(starts, ends)]
    axes.set_yticks([(a + b - 1) / 2 for a, b in zip(starts, ends)], labels, fontsize=8)
    axes.tick_params(axis="y", length=0)
    for start in starts[1:]:
        axes.axhline(start - 0.5, color="white", linewidth=1.5)


def velocity(analysis: Analysis) -> Figure:
    """Cosine and relative error of the velocity by step, the worst step marked."""
    figure = new_figure(4.4)
    upper, lower = figure.subplots(2, 1, sharex=True)
    steps = np.arange(len(analysis.cosine))
    worst = int(analysis.cosine.argmin())
    upper.plot(steps, analysis.cosine, color=BLUE)
    upper.plot([worst], [analysis.cosine[worst]], "o", color=ORANGE)
    text = f"worst: step {worst}, {analysis.cosine[worst]:.4f}"
    side = worst > len(steps) / 2
    upper.annotate(
        text,
        (worst, analysis.cosine[worst]),
        textcoords="offset points",
        xytext=(-10 if side else 10, 0),
        ha="right" if side else "left",
        va="center",
    )
    upper.axhline(1, color=GREY, linewidth=0.8)
    upper.set_ylabel("cosine with FP32")
    lower.plot(steps, 100 * analysis.relative_error, color=BLUE)
    lower.set_ylabel("relative error, %")
    lower.set_ylim(0, None)
    lower.set_xlabel("sampling step (noise to sound)")
    return figure


def _floored(values: np.ndarray) -> np.ndarray:
    """For a logarithmic axis: a dead channel stands at the foot of it."""
    return np.maximum(values, float(values.max()) * 1e-5)
