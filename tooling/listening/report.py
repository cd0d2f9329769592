"""Scores become a Markdown table and a bar plot as the paper's Fig. 4, PNG and SVG."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from ..plots import new_figure
from .scores import METHOD, Score

TABLE, PLOTS = "results.md", ("results.png", "results.svg")
HEAD = ("model", "mean", "95 % interval", "ratings", "difference", "95 % interval")


def rows(scores: Sequence[Score]) -> list[tuple[str, ...]]:
    """The cells under HEAD."""
    return [
        (
            score.model,
            f"{score.mean:.2f}",
            f"{score.interval[0]:.2f} to {score.interval[1]:.2f}",
            str(score.ratings),
            "" if score.difference is None else f"{score.difference:+.2f}",
            ""
            if score.difference_interval is None
            else f"{score.difference_interval[0]:+.2f} to {score.difference_interval[1]:+.2f}",
        )
        for score in scores
    ]


def write_report(folder: Path, title: str, scores: Sequence[Score], counted: str) -> list[Path]:
    """TABLE and PLOTS in `folder`; `counted` says who was. Returns their paths."""
    cells = [HEAD, ("---",) * len(HEAD), *rows(scores)]
    lines = [
        f"# {title}",
        "",
        "How well does the sound fit the prompt? 1: not at all, 5: perfectly.",
        "",
        *(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells),
        "",
        f"{counted}. {METHOD}.",
        "",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TABLE).write_text("\n".join(lines), "utf-8")
    paths = [folder / name for name in PLOTS]
    _draw(paths, title, scores)
    return [folder / TABLE, *paths]


def _draw(paths: Sequence[Path], title: str, scores: Sequence[Score]) -> None:
    shown = [score for score in scores if score.ratings]
    figure = new_figure(4, max(4.0, 1.0 + 1.3 * len(shown)))
    axes = figure.subplots()
    places = range(len(shown))
    means = [score.mean for score in shown]
    errors = [
        [max(0.0, score.mean - score.interval[0]) for score in shown],
        [max(0.0, score.interval[1] - score.mean) for score in shown],
    ]
    colours = [f"C{place}" for place in places]
    axes.bar(places, [mean - 1 for mean in means], 0.6, bottom=1, color=colours, yerr=errors, capsize=5)
    for place, score in zip(places, shown):
        axes.annotate(
            f"{score.mean:.2f}", (place, 1), (0, 4), textcoords="offset points", ha="center", va="bottom", color="white"
        )
    axes.set_xticks(places, [textwrap.fill(score.model, 14) for score in shown], fontsize=8)
    axes.set_ylim(1, 5.1)
    axes.set_yticks(range(1, 6))
    axes.set_ylabel("how well the sound fits the prompt, 1 to 5")
    axes.set_title(textwrap.fill(title.replace("$", r"\$"), 60), fontsize=10)
    for path in paths:
        figure.savefig(path, dpi=150)
