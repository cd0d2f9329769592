"""SQD's tables between their knots: numpy's own interpolation agrees, and a file that cannot be is one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from dit_trt.engines.errors import UserError
from dit_trt.exporters.quantized import Slot
from dit_trt.runtime import scale_tables
from dit_trt.runtime.pipeline import Settings
from dit_trt.runtime.scale_tables import ScaleTables, interpolate, load_scales
from dit_trt.tooling.scale_tables import save_scales

levels = st.floats(1e-3, 1e6)
schedules = st.builds(
    lambda steps, low, ratio: Settings(steps=steps, sigma_min=low, sigma_max=low * ratio).sigmas[:-1],
    st.integers(1, 40),
    st.floats(1e-3, 100),
    st.floats(1.001, 1e4),
)


@st.composite
def tables(draw: st.DrawFn) -> tuple[NDArray, NDArray]:
    """knots [k] and a log table [k, width]"""
    k, width = draw(st.integers(1, 16)), draw(st.integers(1, 5))
    gaps = draw(arrays(np.float32, k, elements=st.floats(0.0625, 2, width=32)))
    log_table = draw(arrays(np.float32, (k, width), elements=st.floats(-20, 20, width=32)))
    return np.cumsum(gaps) - np.float32(5), log_table


@given(tables(), st.lists(levels, min_size=1, max_size=20))
def test_interpolation_is_numpys(table: tuple[NDArray, NDArray], sigmas: list[float]) -> None:
    knots, log_table = table
    found = interpolate(knots, log_table, sigmas)
    expected = [np.interp(np.log(sigmas), knots.astype(np.float64), column) for column in log_table.T]
    np.testing.assert_allclose(found, np.stack(expected, axis=1), atol=1e-4)
    assert found.dtype == np.float32


@given(tables())
def test_the_knots_have_their_values(table: tuple[NDArray, NDArray]) -> None:
    knots, log_table = table
    np.testing.assert_allclose(interpolate(knots, log_table, np.exp(knots.astype(np.float64))), log_table, atol=1e-4)


@given(tables(), st.floats(0, 5))
def test_outside_the_end_value_holds_exactly(table: tuple[NDArray, NDArray], beyond: float) -> None:
    knots, log_table = table
    ends = np.exp([knots[0] - beyond - 1e-3, knots[-1] + beyond + 1e-3])
    np.testing.assert_array_equal(interpolate(knots, log_table, ends), log_table[[0, -1]])


@given(tables(), schedules)
def test_no_value_leaves_its_neighbours(table: tuple[NDArray, NDArray], sigmas: NDArray) -> None:
    """Rising tables rise all the way."""
    knots, log_table = table
    rising = np.sort(log_table, axis=0)
    found = interpolate(knots, rising, np.sort(sigmas))
    assert (np.diff(found, axis=0) >= -1e-4).all()
    assert (found >= rising[0] - 1e-4).all() and (found <= rising[-1] + 1e-4).all()


def written(path: Path) -> tuple[ScaleTables, NDArray]:
    """A file of two tables and three slots, and the sizes of the pieces."""
    knots = np.log(np.float32([0.3, 10, 500]))
    logs = {
        "r": np.float32([[0.1], [-1.5], [2.0]]),
        "s": np.linspace(-3, 3, 12, dtype=np.float16).reshape(3, 4),
        "unused": np.zeros((3, 7), np.float16),
    }
    slots = [
        Slot(4, {"r": 1, "s": -2}, np.float32([1, -2, 3, 0])),
        Slot(1, {"r": -1}),
        Slot(3, {"r": 2}, np.float32([5])),
        Slot(2, {}, np.float32([7, 8])),
    ]
    assert save_scales(path, knots, logs, slots) == 10
    return load_scales(path, 10), knots


def by_hand(sigma: float) -> NDArray:
    """What step_scales of `written` is at a noise level, in float64."""
    knots, at = np.log([0.3, 10, 500]), np.log(sigma)
    r = np.exp(np.interp(at, knots, [0.1, -1.5, 2.0]))
    s = np.exp([np.interp(at, knots, column) for column in np.linspace(-3, 3, 12, dtype=np.float16).reshape(3, 4).T])
    return np.concatenate([np.array([1, -2, 3, 0]) * r / s**2, [1 / r], [5 * r * r] * 3, [7, 8]])


@pytest.mark.parametrize("block", [1, 25, 30, 2**22])
def test_every_step_of_any_schedule_is_the_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """However many steps are computed at once, and in whatever order they are asked for."""
    monkeypatch.setattr(scale_tables, "BLOCK", block)
    tables, _ = written(tmp_path / "step.scales.safetensors")
    assert "unused" not in tables.logs
    for settings in (Settings(steps=7), Settings(steps=1), Settings(steps=30, sigma_min=0.01, sigma_max=9000)):
        sigmas = settings.sigmas[:-1]
        scales = tables.at(sigmas)
        for step in (*range(len(sigmas)), *reversed(range(len(sigmas))), 0):
            np.testing.assert_allclose(scales[step], by_hand(sigmas[step]), rtol=2e-5)
            assert scales[step].dtype == np.float32 and scales[step].shape == (10,)
        for outside in (-1, len(sigmas)):
            with pytest.raises(IndexError):
                scales[outside]


def test_a_wide_table_is_computed_a_few_steps_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_tables, "BLOCK", 25)
    tables, _ = written(tmp_path / "step.scales.safetensors")
    counts: list[int] = []
    rows = ScaleTables.rows
    monkeypatch.setattr(ScaleTables, "rows", lambda self, sigmas: counts.append(len(sigmas)) or rows(self, sigmas))
    scales = tables.at(Settings(steps=5).sigmas[:-1])
    for step in (0, 1, 1, 0, 2, 3, 4):
        scales[step]
    assert counts == [2, 2, 1]


TOO_LARGE = [{"width": 4, "powers": {"r": 50}}, {"width": 1, "powers": {}}, {"width": 5, "powers": {}}]
DAMAGE = {
    "lacks 'knots'": lambda t, m: t.pop("knots"),
    "lacks 'slots'": lambda t, m: m.pop("slots"),
    "lacks 'constant/2'": lambda t, m: t.pop("constant/2"),
    "lacks 's'": lambda t, m: t.pop("log/s"),
    "the knots are not ascending": lambda t, m: t.update(knots=t["knots"][::-1].copy()),
    "the table s has shape [2, 4], there are 3 knots": lambda t, m: t.update({"log/s": t["log/s"][:2]}),
    "the table r has shape [3], there are 3 knots": lambda t, m: t.update({"log/r": t["log/r"][:, 0].copy()}),
    "a tensor has NaN, infinity or another type than float": lambda t, m: t["log/s"].__setitem__((1, 1), np.nan),
    "a tensor has NaN, ": lambda t, m: t.update({"constant/0": np.ones(4, np.int8)}),
    "slot 0 has 4 floats, what it is made of has not": lambda t, m: t.update({"constant/0": np.ones(3, np.float32)}),
    "slot 0 has 4 floats, what": lambda t, m: t.update({"log/r": np.ones((3, 2), np.float32)}),
    "slots is no list": lambda t, m: m.update(slots="{}"),
    "Expecting value": lambda t, m: m.update(slots="["),
    "maximum recursion depth": lambda t, m: m.update(slots="[" * 200_000),
    "slot 0 is malformed": lambda t, m: m.update(slots='[{"width": 0, "powers": {}}]'),
    "slot 0 has an exponent that is no integer": lambda t, m: m.update(slots='[{"width": 4, "powers": {"r": 0.5}}]'),
    "slot 0 is too large for float32": lambda t, m: m.update(slots=json.dumps(TOO_LARGE)),
    "its pieces are 4 floats, the step graph takes 10": lambda t, m: m.update(slots='[{"width": 4, "powers": {}}]'),
}


@pytest.mark.parametrize("why", DAMAGE)
def test_a_file_that_cannot_be_is_named(tmp_path: Path, why: str) -> None:
    path = tmp_path / "step.scales.safetensors"
    tables, _ = written(path)
    tensors = load_file(path)
    slots = [{"width": piece.width, "powers": dict(piece.powers)} for piece in tables.pieces]
    metadata = {"slots": json.dumps(slots)}
    save_file(tensors, path, metadata)
    assert load_scales(path, 10).width == 10
    DAMAGE[why](tensors, metadata)
    save_file(tensors, path, metadata)
    assert refusal(path).startswith(f"{path} does not hold the scales of every step ({why}")


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        load_scales(path, 10)
    assert "\n" not in str(error.value) and str(error.value).endswith("build the bundle again")
    return str(error.value)


def test_no_file_and_half_a_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "step.scales.safetensors"
    assert str(path) in refusal(path)
    written(path)
    good = path.read_bytes()
    for bad in (b"", good[:9], good[:-1], b"\xff" * 99, b"[" * 10_000):
        path.write_bytes(bad)
        refusal(path)
    path.unlink()
    path.mkdir()
    refusal(path)
