"""What is drawn is what an analysis holds, and what is no number, or nothing, can be drawn too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dit_trt.engines.bundle import Bundle
from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.runtime.pipeline import Settings
from dit_trt.tooling.figures import draw
from dit_trt.tooling.figures.analysis import Analysis
from dit_trt.tooling.figures.channels import outliers, smoothed, spread
from dit_trt.tooling.figures.style import styled
from dit_trt.tooling.recipe import Recipe


@pytest.fixture(scope="module")
def analysis(checkpoint: Checkpoint, tiny_float: Bundle) -> Analysis:
    """Random numbers, each in its place."""
    rng = np.random.default_rng(0)
    linear = checkpoint.linears[-1]
    x, absmax = (rng.random((size, linear.in_features), np.float32) for size in (25, 8))
    spreads = {
        one.name: spread(rng.random((8 if one.graph == "step" else 1, one.in_features), np.float32))
        for one in checkpoint.linears
    }
    s = np.full(linear.in_features, 2, np.float32)
    return Analysis(
        *(tiny_float, tiny_float, Recipe(), checkpoint.linears, "dog", Settings(steps=6), linear, 5),
        *(np.stack((x, x)), outliers(x), spreads, smoothed(absmax, rng.random((16, s.size), np.float32), s), True),
        *((0, 2, 5), {one.name: rng.random(3) for one in checkpoint.linears}, rng.random(6), rng.random(6), []),
    )


@pytest.fixture(autouse=True)
def in_style():  # type: ignore[no-untyped-def]
    with styled():
        yield


def lines(axes):  # type: ignore[no-untyped-def]
    return [line.get_ydata() for line in axes.lines]


def test_the_heat_map_has_a_row_a_linear_kind_by_kind(analysis: Analysis) -> None:
    axes = draw.layer_errors(analysis).axes[0]
    names = [f"transformer.layers.{block}.{kind}" for kind in analysis.kinds for block in (0, 1)]
    expected = 100 * np.array([analysis.errors[name] for name in names])
    np.testing.assert_allclose(axes.images[0].get_array(), expected, rtol=1e-6)
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"{kind}\nblocks 0..1" for kind in analysis.kinds]


def test_ranges_are_those_of_the_block(analysis: Analysis) -> None:
    panels = draw.ranges(analysis).axes
    assert len(panels) == 6
    for axes in panels:
        found = analysis.spreads[f"transformer.layers.1.{axes.get_title(loc='left').splitlines()[0]}"]
        high, median = lines(axes)
        np.testing.assert_array_equal(high, found.high)
        np.testing.assert_array_equal(median, found.median)


def test_smoothing_is_in_the_order_of_the_activations(analysis: Analysis) -> None:
    found = analysis.smoothing
    left, right = (lines(axes) for axes in draw.smoothing(analysis).axes)
    order = np.argsort(-found.x)
    expected = ((left, found.x, found.x_after), (right, found.w, found.w_after))
    for drawn, before, after in expected:
        np.testing.assert_array_equal(drawn[0], before[order])
        np.testing.assert_array_equal(drawn[1], after[order])
    assert (np.diff(left[0]) <= 0).all()


def test_the_velocity_and_its_worst_step(analysis: Analysis) -> None:
    upper, lower = draw.velocity(analysis).axes
    np.testing.assert_array_equal(lines(upper)[0], analysis.cosine)
    np.testing.assert_array_equal(lines(lower)[0], 100 * analysis.relative_error)
    worst = analysis.cosine.argmin()
    assert upper.texts[0].get_text() == f"worst: step {worst}, {analysis.cosine[worst]:.4f}"


def test_the_surface_is_the_prompts_half(analysis: Analysis) -> None:
    axes = draw.activations(analysis).axes[0]
    assert axes.get_zlim()[1] == pytest.approx(analysis.input[0].max(), rel=0.1)
    assert f"of {analysis.input.shape[2]}" in axes.get_xlabel()


BROKEN: dict[str, Callable[[Analysis], Analysis]] = {
    "one step": lambda a: replace(
        a, steps=(0,), errors={name: one[:1] for name, one in a.errors.items()}, cosine=a.cosine[:1]
    ),
    "infinite and no errors": lambda a: replace(
        a, errors={name: np.array([0, np.inf, np.nan]) for name in a.errors}, cosine=np.full(6, np.nan)
    ),
    "exact": lambda a: replace(a, errors={name: np.zeros(3) for name in a.errors}, cosine=np.ones(6)),
    "a dead input": lambda a: replace(
        a,
        input=np.zeros_like(a.input),
        outliers=outliers(np.zeros_like(a.input[0])),
        spreads={name: spread(np.zeros((len(one.high), 4), np.float32)) for name, one in a.spreads.items()},
        smoothing=smoothed(np.zeros((8, 4), np.float32), np.zeros((2, 4), np.float32), np.ones(4, np.float32)),
    ),
    "one Linear": lambda a: replace(a, errors={a.linear.name: np.ones(3)}),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.filterwarnings("error")
def test_whatever_was_found_is_drawn(name: str, analysis: Analysis, tmp_path: Path) -> None:
    broken = BROKEN[name](analysis)
    broken = replace(broken, relative_error=broken.cosine)
    assert len(draw.draw_all(broken, tmp_path)) == 5
    assert len(list(tmp_path.iterdir())) == 10
