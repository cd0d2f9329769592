"""Which knots a calibrated table keeps: nothing lost where nothing need be, and what the demo's own table loses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.runtime.pipeline import Settings
from dit_trt.runtime.scale_tables import interpolate
from dit_trt.tooling.scale_tables import choose_knots, fit_knots, fit_table
from dit_trt.tooling.tables import load_calibration, shipped_table

SIGMAS = Settings().sigmas[:-1]


@given(st.integers(1, 16), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_no_more_steps_than_knots_lose_nothing(steps: int, width: int, seed: int) -> None:
    sigmas = Settings(steps=steps).sigmas[:-1]
    table = np.exp(np.random.default_rng(seed).uniform(-9, 9, (steps, width)))
    knots, logs = fit_knots(sigmas, {"t": table})
    assert knots.dtype == np.float32 and len(knots) == steps
    found = np.exp(interpolate(knots, logs["t"], sigmas).astype(np.float64))
    np.testing.assert_allclose(found, table, rtol=1e-4 if width == 1 else 5e-3)
    assert logs["t"].dtype == (np.float32 if width == 1 else np.float16)


@settings(max_examples=12)
@given(st.sets(st.integers(1, 98), max_size=14), st.integers(0, 2**32 - 1))
def test_a_table_with_few_bends_is_found_again(bends: set[int], seed: int) -> None:
    """Log-linear between at most 16 steps: those steps are the knots that leave no error."""
    rng = np.random.default_rng(seed)
    places = np.log(SIGMAS)
    at = [0, *sorted(bends), 99]
    log_table = np.stack([np.interp(places, places[at][::-1], rng.uniform(-2, 2, len(at))) for _ in range(20)], axis=1)
    knots, logs = fit_knots(SIGMAS, {"many": np.exp(log_table), "one": np.exp(log_table[:, :1])})
    assert len(knots) == 16 and (np.diff(knots) > 0).all()
    if len(bends) <= 3:  # greedy: with many bends each choice is only the best of its moment
        assert set(places[at].astype(np.float32)) <= set(knots)
        np.testing.assert_allclose(interpolate(knots, logs["one"], SIGMAS), log_table[:, :1], atol=1e-4)
        np.testing.assert_allclose(interpolate(knots, logs["many"], SIGMAS), log_table, atol=2e-3)


def test_every_table_counts_alike() -> None:
    """A step where a table of width 1 jumps is a knot, however wide another table is."""
    narrow = np.where(np.arange(100) < 30, 1.0, 9.0)[:, None]
    wide = np.exp(np.random.default_rng(0).normal(0, 0.5, (100, 500)))
    knots = choose_knots(SIGMAS, {"narrow": narrow, "wide": wide})
    assert {np.float32(np.log(SIGMAS[i])) for i in (29, 30)} <= set(knots)


@pytest.mark.parametrize("bad", [0.0, -1.0, np.inf, np.nan])
def test_a_table_that_has_no_logarithm_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        fit_knots([9.0, 1.0], {"t": np.array([[1.0], [bad]])})


def test_more_levels_than_float32_tells_apart_are_one_knot() -> None:
    knots, logs = fit_knots([2.0, 2.0 - 1e-12], {"t": np.array([[1.0], [4.0]])})
    assert len(knots) == 1
    assert np.exp(logs["t"][0, 0]) == pytest.approx(2.0)


# -------------------- what 16 knots cost on the demo's calibration table


class Ranges:
    """The demo's ranges of SQD `shared`, and what they do to random inputs whose absmax is the table's."""

    def __init__(self) -> None:
        checkpoint = Checkpoint.open("demo")
        table = shipped_table(checkpoint)
        assert table is not None
        absmax = load_calibration(Path(table), checkpoint).absmax
        self.smoothed: dict[str, NDArray] = {}  # absmax of x / s, [100, in]
        rng = np.random.default_rng(0)
        self.tokens: dict[str, NDArray] = {}  # [tokens, in], absmax 1
        for linear in checkpoint.linears:
            if linear.graph != "step" or not linear.name.startswith("transformer.layers.7."):
                continue
            x = np.maximum(absmax[linear.name], 1e-5 * absmax[linear.name].max())
            w = np.maximum(np.abs(checkpoint.tensor(linear.key())).max(axis=0), 1e-12)
            self.smoothed[linear.name] = x / np.sqrt(x.max(axis=0) / w)
            tokens = rng.standard_normal((32, x.shape[1]))
            self.tokens[linear.name] = tokens / np.abs(tokens).max(axis=0)
        self.exact = {name: a.max(axis=1, keepdims=True) / 127 for name, a in self.smoothed.items()}

    def error(self, delta: dict[str, NDArray]) -> float:
        """Relative quantization error, mean over Linears and steps, of rounding and clipping with delta[t] [100, 1]."""
        errors = []
        for name, absmax in self.smoothed.items():
            x, d = absmax[:, None] * self.tokens[name], delta[name][:, None]
            lost = x - np.clip(np.rint(x / d), -127, 127) * d
            errors.append(np.sqrt((lost**2).sum(axis=(1, 2)) / (x**2).sum(axis=(1, 2))))
        return float(np.mean(errors))


def test_sixteen_knots_cost_less_than_one_percent_on_the_demo() -> None:
    """Also: better than the steps' own values at the knots, than knots evenly apart, than ranges that never clip."""
    ranges = Ranges()
    assert len(ranges.exact) == 6

    def at_steps(knots: NDArray, logs: dict[str, NDArray]) -> dict[str, NDArray]:
        return {name: np.exp(interpolate(knots, log_table, SIGMAS)) for name, log_table in logs.items()}

    knots, logs = fit_knots(SIGMAS, ranges.exact)
    fitted = at_steps(knots, logs)
    deviations = np.concatenate([np.log(fitted[name] / ranges.exact[name]) for name in fitted])
    assert np.sqrt((deviations**2).mean()) < 0.04
    error, exact = ranges.error(fitted), ranges.error(ranges.exact)
    assert error < 1.01 * exact
    constant = {name: np.full_like(delta, delta.max()) for name, delta in ranges.exact.items()}
    assert ranges.error(constant) > 1.1 * exact, "the steps differ, or knots would have nothing to do"

    order = np.argsort(SIGMAS)
    sampled = {
        name: np.interp(knots, np.log(SIGMAS)[order], np.log(delta[order, 0]))[:, None]
        for name, delta in ranges.exact.items()
    }
    even = np.linspace(*np.log([SIGMAS[-1], SIGMAS[0]]), 16, dtype=np.float32)
    upper = {name: values + np.log(ranges.exact[name] / fitted[name]).max() for name, values in logs.items()}
    others = {
        "the steps' own values": at_steps(knots, sampled),
        "evenly apart": at_steps(even, {name: fit_table(even, SIGMAS, delta) for name, delta in ranges.exact.items()}),
        "never clips": at_steps(knots, upper),
    }
    assert error < min(ranges.error(other) for other in others.values())
