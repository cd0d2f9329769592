"""Integrated loudness against the numbers that ITU-R BS.1770 and EBU Tech 3341 print, and the gains made of it."""

import math

import numpy as np
import pytest

from dit_trt.tooling.loudness import (
    PEAK,
    TARGET,
    integrated_loudness,
    k_weighted,
    k_weighting,
    matching_gains,
)


def sine(dbfs, seconds, rate=48000, frequency=997.0, channels=1):
    time = np.arange(round(seconds * rate)) / rate
    return np.repeat(10 ** (dbfs / 20) * np.sin(2 * np.pi * frequency * time)[None], channels, axis=0)


def test_the_filters_at_48_khz_are_those_the_standard_prints():
    b, a = k_weighting(48000)
    np.testing.assert_allclose(b[0], [1.53512485958697, -2.69169618940638, 1.19839281085285], atol=1e-8)
    np.testing.assert_allclose(a[0], [1, -1.69065929318241, 0.73248077421585], atol=1e-8)
    np.testing.assert_array_equal(b[1], [1, -2, 1])
    np.testing.assert_allclose(a[1], [1, -1.99004745483398, 0.99007225036621], atol=1e-8)


def test_the_filtered_sound_is_that_of_the_difference_equations():
    audio = np.random.default_rng(0).standard_normal((2, 3000))
    expected = audio.copy()
    for b, a in zip(*k_weighting(44100)):
        x, y = np.pad(expected, ((0, 0), (2, 0))), np.zeros((2, 3002))
        for n in range(2, 3002):
            y[:, n] = b[0] * x[:, n] + b[1] * x[:, n - 1] + b[2] * x[:, n - 2] - a[1] * y[:, n - 1] - a[2] * y[:, n - 2]
        expected = y[:, 2:]
    np.testing.assert_allclose(k_weighted(audio, 44100), expected, atol=1e-9)


@pytest.mark.parametrize("rate", [8000, 44100, 48000, 96000])
@pytest.mark.parametrize(("dbfs", "channels", "lufs"), [(0, 1, -3.01), (-20, 1, -23.01), (-20, 2, -20.0)])
def test_a_sine(rate, dbfs, channels, lufs):
    assert integrated_loudness(sine(dbfs, 5, rate, channels=channels), rate) == pytest.approx(lufs, abs=0.03)


@pytest.mark.parametrize(
    ("parts", "lufs"),
    [  # EBU Tech 3341, cases 1 to 5: (dBFS, seconds) of a stereo sine of 1 kHz
        ([(-23, 20)], -23),
        ([(-33, 20)], -33),
        ([(-36, 10), (-23, 60), (-36, 10)], -23),
        ([(-72, 10), (-36, 10), (-23, 60), (-36, 10), (-72, 10)], -23),
        ([(-26, 20), (-20, 20.1), (-26, 20)], -23),
    ],
)
def test_the_cases_of_ebu_tech_3341(parts, lufs):
    audio = np.concatenate([sine(dbfs, seconds, frequency=1000, channels=2) for dbfs, seconds in parts], axis=1)
    assert integrated_loudness(audio, 48000) == pytest.approx(lufs, abs=0.1)


def test_a_short_sound_is_one_block_and_silence_has_none():
    assert integrated_loudness(sine(-20, 0.3), 48000) == pytest.approx(-23.01, abs=0.1)
    assert integrated_loudness(np.zeros((2, 48000)), 48000) == -math.inf
    assert integrated_loudness(np.zeros((2, 0)), 48000) == -math.inf
    with pytest.raises(ValueError, match=r"\(3, 10\)"):
        integrated_loudness(np.zeros((3, 10)), 48000)


def test_gains_make_clips_equally_loud():
    clips = [sine(-6, 2, channels=2), 0.05 * np.random.default_rng(1).standard_normal((2, 96000)), sine(-50, 2)]
    gains, target = matching_gains(clips, 48000)
    assert target == TARGET
    for clip, gain in zip(clips, gains):
        assert integrated_loudness(clip * gain, 48000) == pytest.approx(TARGET, abs=0.02)


def test_a_clip_that_would_be_clipped_lowers_all():
    click = sine(-60, 2)
    click[0, 1000] = 1
    clips = [sine(-6, 2), click, np.zeros((1, 96000))]
    gains, target = matching_gains(clips, 48000)
    assert target < TARGET - 10
    assert np.abs(click * gains[1]).max() == pytest.approx(PEAK)
    assert integrated_loudness(clips[0] * gains[0], 48000) == pytest.approx(target, abs=0.02)
    assert gains[2] == 1
