"""The ablation's numbers: equal to `diff`'s on the same clips, and each by a formula of its own."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dit_trt.engines.bundle import Bundle
from dit_trt.runtime.pipeline import Pipeline, Settings
from dit_trt.tooling.diff import compare
from dit_trt.tooling.fidelity import (
    MEL_BANDS,
    Fidelity,
    Trial,
    compare_velocities,
    log_mel_distance,
    measure,
    mel_filters,
    record,
    snr_db,
)
from dit_trt.tooling.intervals import median_interval

TRIAL = Trial(("dog barking", "rain"), (5000, 5001), Settings(steps=7))


@pytest.fixture(scope="module")
def clips(tiny_float: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(Pipeline(tiny_float), TRIAL, tmp_path_factory.mktemp("clips"))


def test_a_pipeline_equals_itself(tiny_float: Bundle, clips: Path) -> None:
    calls: list[int] = []
    result = measure(Pipeline(tiny_float), TRIAL, clips, calls.append)
    assert result.cosine.shape == result.relative_error.shape == (4, 7)
    assert (result.cosine > 1 - 1e-6).all() and (result.relative_error < 1e-6).all()
    assert (result.snr_db == 200).all() and (result.log_mel_db == 0).all()
    assert calls == list(range(7, TRIAL.calls + 1, 7))


def test_numbers_equal_diffs(tiny_float: Bundle, tiny_sqs: Bundle, clips: Path) -> None:
    """Polygraphy's comparison of the same clips; `diff` gives each prompt the next seed."""
    found = measure(Pipeline(tiny_sqs), TRIAL, clips)
    expected = compare(tiny_sqs, tiny_float, TRIAL.prompts, Settings(steps=7, seed=5000))
    rows = [TRIAL.clips.index((0, 5000)), TRIAL.clips.index((1, 5001))]
    part = Fidelity(found.cosine[rows], found.relative_error[rows], found.snr_db[rows], found.log_mel_db[rows])
    assert part.cosine == pytest.approx(expected.cosine, abs=1e-5)
    assert part.relative_error == pytest.approx(expected.relative_error, abs=1e-5)
    assert part.snr_db == pytest.approx(expected.snr_db, abs=1e-3)
    assert part.summary()["worst_step_cosine"] == pytest.approx(expected.worst_step_cosine, abs=1e-5)
    assert part.summary()["worst_step"] == expected.worst_step
    assert found.cosine.mean() < 0.9999, "nothing was quantized"
    assert 0 < found.log_mel_db.mean() < 20


def test_recording_goes_on_where_it_stopped(tiny_float: Bundle, clips: Path) -> None:
    before = {path: path.read_bytes() for path in sorted(clips.iterdir())}
    assert len(before) == 4
    lost, *others = before
    times = {path: path.stat().st_mtime_ns for path in others}
    lost.unlink()
    lost.with_suffix(".part").write_bytes(b"of a killed run")
    record(Pipeline(tiny_float), TRIAL, clips)
    assert {path: path.stat().st_mtime_ns for path in others} == times
    assert {path: path.read_bytes() for path in sorted(clips.iterdir())} == before


def test_the_digest_is_of_all_that_is_sampled() -> None:
    seeded = Trial(TRIAL.prompts, TRIAL.seeds, Settings(steps=7, seed=3))
    assert seeded.digest("m") == TRIAL.digest("m")
    others = [
        Trial(("rain",), TRIAL.seeds, TRIAL.settings),
        Trial(TRIAL.prompts, (5000,), TRIAL.settings),
        Trial(TRIAL.prompts, TRIAL.seeds, Settings(steps=8)),
    ]
    assert len({TRIAL.digest("m"), TRIAL.digest("n"), *(other.digest("m") for other in others)}) == 5


def test_summary() -> None:
    cosine = np.array([[1.0, 0.9, 0.8], [1.0, 0.5, 0.8]])
    summary = Fidelity(cosine, cosine / 10, np.array([10.0, 30.0]), np.array([1.0, 2.0])).summary()
    assert (summary["worst_step"], summary["worst_step_cosine"]) == (1, pytest.approx(0.7))
    assert summary["mean_cosine"] == pytest.approx(5 / 6)
    assert summary["mean_relative_error"] == pytest.approx(5 / 60)
    assert (summary["snr_db"], summary["log_mel_db"]) == (20, 1.5)


def test_velocities_and_snr() -> None:
    a, b = np.array([[3.0, 0.0]], np.float32), np.array([[3.0, 4.0]], np.float32)
    assert compare_velocities(a, b) == pytest.approx((0.6, 4 / 3))
    assert snr_db(a, b) == pytest.approx(10 * math.log10(9 / 16))
    assert snr_db(a, a) == 200
    assert math.isnan(snr_db(a, np.array([[3.0, np.nan]], np.float32)))
    assert math.isnan(snr_db(a, np.array([[3.0, np.inf]], np.float32)))


# -------------------- log-mel distance

RATE = 16000


def noise(channels: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((channels, RATE)).astype(np.float32) * np.float32(0.1)


def test_a_gain_is_its_decibels() -> None:
    assert log_mel_distance(noise(), noise(), RATE) == 0
    assert log_mel_distance(noise(), noise() * np.float32(10**0.3), RATE) == pytest.approx(6, abs=1e-3)
    both = noise(2)
    assert log_mel_distance(both, both.mean(axis=0, keepdims=True), RATE) == pytest.approx(0, abs=1e-3)


def test_what_lies_under_the_floor_is_equal() -> None:
    quiet = noise() * np.float32(1e-6)  # 120 dB below
    assert log_mel_distance(noise(), quiet, RATE) == pytest.approx(
        log_mel_distance(noise(), np.zeros_like(quiet), RATE)
    )
    assert log_mel_distance(np.zeros_like(quiet), np.zeros_like(quiet), RATE) == 0
    loudest = log_mel_distance(noise(), np.zeros_like(quiet), RATE)
    assert 50 < loudest < 80, "from noise, a little under its loudest band and frame, to the floor"


def test_mel_filters() -> None:
    filters = mel_filters(RATE, 1024)
    assert filters.shape == (MEL_BANDS, 513)
    assert (filters.sum(axis=1) > 0).all()
    hz = np.linspace(0, RATE / 2, 513)
    mel = 2595 * np.log10(1 + hz / 700)
    spacing = 2595 * np.log10(1 + RATE / 2 / 700) / (MEL_BANDS + 1)
    inside = (mel >= spacing) & (mel <= MEL_BANDS * spacing)
    assert filters[:, inside].sum(axis=0) == pytest.approx(1), "neighbours add up to one between their peaks"
    for band in (0, 17, 79):
        support = hz[filters[band] > 0]
        low, high = (700 * (10 ** ((band + side) * spacing / 2595) - 1) for side in (0, 2))
        assert low < support[0] <= low + hz[1] and high - hz[1] <= support[-1] < high


# -------------------- bootstrap


def test_bootstrap_of_few_values_is_the_exact_one() -> None:
    """The median of n resampled values is at most the k-th smallest when (n + 1) / 2 of n draws are."""
    n = 19
    values = np.random.default_rng(1).permutation(np.arange(1.0, n + 1))

    def at_most(k: int) -> float:
        return sum(math.comb(n, j) * (k / n) ** j * (1 - k / n) ** (n - j) for j in range((n + 1) // 2, n + 1))

    low = next(k for k in range(1, n + 1) if at_most(k) >= 0.025)
    high = next(k for k in range(1, n + 1) if at_most(k) >= 0.975)
    assert median_interval(values.tolist()) == (10, low, high)
    assert (low, high) == (6, 14)
    assert median_interval([1.1] * 30) == (1.1, 1.1, 1.1)
    assert median_interval([1.0, 2.0, 4.0], seed=1) == median_interval([1.0, 2.0, 4.0], seed=1)
