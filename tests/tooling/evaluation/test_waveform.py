"""Weight-free metrics: exact cases, the formulas by scipy, and what cannot be compared."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.signal
from numpy.typing import NDArray

from dit_trt.engines.errors import UserError
from dit_trt.tooling.evaluation.waveform import (
    check_sound,
    clipped_share,
    log_mel_db,
    multi_resolution_stft,
    rms_correlation,
)

RATE = 44100


def sound(seed: int = 0, samples: int = RATE) -> NDArray[np.float32]:
    return (0.2 * np.random.default_rng(seed).standard_normal((2, samples))).astype(np.float32)


def test_a_sound_is_no_different_from_itself() -> None:
    assert log_mel_db(sound(), sound(), RATE) == 0
    assert multi_resolution_stft(sound(), sound()) == 0


def test_twice_as_loud() -> None:
    assert log_mel_db(sound(), 2 * sound(), RATE) == pytest.approx(20 * np.log10(2), rel=1e-4)
    assert multi_resolution_stft(sound(), 2 * sound()) == pytest.approx(1 + np.log(2), rel=1e-4)


def test_the_stft_distance_is_that_of_the_formulas() -> None:
    a, b = sound(1), sound(2)
    expected = 0.0
    for size in (512, 1024, 2048):
        window = scipy.signal.get_window("hann", size)
        x, y = (
            np.abs(np.fft.rfft(np.lib.stride_tricks.sliding_window_view(s.mean(0), size)[:: size // 4] * window))
            for s in (a, b)
        )
        expected += np.linalg.norm(x - y) / np.linalg.norm(x) + np.abs(np.log(x) - np.log(y)).mean()
    assert multi_resolution_stft(a, b) == pytest.approx(expected / 3, rel=0.02)  # but for the frames at the ends


def test_noise_is_farther_the_louder() -> None:
    distances = [multi_resolution_stft(sound(), sound() + level * sound(5)) for level in (0.01, 0.1, 1.0)]
    assert distances == sorted(distances) and distances[0] > 0
    mels = [log_mel_db(sound(), sound() + level * sound(5), RATE) for level in (0.01, 0.1, 1.0)]
    assert mels == sorted(mels)


def test_loudness_curves_are_those_of_the_windows() -> None:
    t = np.arange(RATE) / RATE
    early, late = (np.exp(-((t - middle) ** 2) / 0.02).astype(np.float32) for middle in (0.3, 0.7))
    a, b = sound() * early, sound(5) * late
    length = 2205

    def curve(audio: NDArray) -> list[float]:
        starts = range(0, RATE - length + 1, length // 2)
        return [np.sqrt(np.mean(audio[:, s : s + length].astype(np.float64) ** 2)) for s in starts]

    assert rms_correlation(a, b, RATE) == pytest.approx(np.corrcoef(curve(a), curve(b))[0, 1], abs=1e-9)
    assert rms_correlation(a, 3 * a, RATE) == pytest.approx(1)
    assert rms_correlation(a, sound(5) * early, RATE) > 0.95 > 0 > rms_correlation(a, b, RATE)
    assert rms_correlation(a, 0 * a, RATE) == 0 and rms_correlation(a, np.full_like(a, 0.1), RATE) == 0


def test_clipping_is_runs_at_full_scale() -> None:
    audio = np.zeros((1, 10), np.float32)
    audio[0, 3] = 1.0
    assert clipped_share(audio) == 0  # the peak of a normalised clip
    audio[0, 5:8] = [-1.0, 1.0, 1.0]
    assert clipped_share(audio) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("expected", "found", "said"),
    [
        (sound(), sound(0, RATE // 2), r"clips of \(2, 44100\) and \(2, 22050\)"),
        (sound(), sound() * np.float32("nan"), "the clip holds NaN or infinity"),
        (0 * sound(), sound(), "the reference clip is silent"),
        (sound()[:1] * np.array([[1.0], [-1.0]], np.float32), sound(), "the reference clip's channels cancel"),
        (sound(0, 100), sound(0, 100), "a clip of 100 samples is too short"),
    ],
)
def test_what_cannot_be_compared(expected: NDArray, found: NDArray, said: str) -> None:
    for call in (
        lambda: log_mel_db(expected, found, RATE),
        lambda: multi_resolution_stft(expected, found),
        lambda: rms_correlation(expected, found, RATE),
    ):
        with pytest.raises(UserError, match=said):
            call()


def test_broken_sounds_are_named() -> None:
    for audio, said in (
        (sound(0, 0), "x is empty"),
        (0 * sound(), "x is silent"),
        (sound() * np.float32("nan"), "x holds NaN"),
    ):
        with pytest.raises(UserError, match=said):
            check_sound(audio, "x")
