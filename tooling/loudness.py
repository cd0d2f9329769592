"""Sound in, its integrated loudness out, as ITU-R BS.1770-4 defines it; and gains that make clips equally loud."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BLOCK, HOP = 0.4, 0.1  # seconds: gating blocks overlap by three quarters
ABSOLUTE_GATE = -70.0  # LUFS
RELATIVE_GATE = -10.0  # LU below the loudness of what passes the absolute gate
OFFSET = -0.691  # dB, so that the K-weighting cancels at 997 Hz
TARGET = -23.0  # LUFS, of EBU R 128
PEAK = 0.99  # no sample is raised above it


def k_weighting(sample_rate: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The two filters of BS.1770: numerators [2, 3] and denominators [2, 3], high shelf and high pass.

    The standard prints them for 48 kHz. For another rate the analogue filters behind those numbers are transformed anew
    (bilinear; their frequency, gain and Q as libebur128 has them).
    """
    shelf_gain = 10 ** (3.999843853973347 / 20)
    k, q = math.tan(math.pi * 1681.974450955533 / sample_rate), 0.7071752369554196
    band = shelf_gain**0.4996667741545416
    norm = 1 + k / q + k * k
    shelf_b = [shelf_gain + band * k / q + k * k, 2 * (k * k - shelf_gain), shelf_gain - band * k / q + k * k]
    shelf_a = [norm, 2 * (k * k - 1), 1 - k / q + k * k]
    j, p = math.tan(math.pi * 38.13547087602444 / sample_rate), 0.5003270373238773
    high = 1 + j / p + j * j
    high_a = [high, 2 * (j * j - 1), 1 - j / p + j * j]
    return (
        np.array([np.array(shelf_b) / norm, [1.0, -2.0, 1.0]]),
        np.array([np.array(shelf_a) / norm, np.array(high_a) / high]),
    )


def k_weighted(audio: NDArray, sample_rate: int) -> NDArray[np.float64]:
    """audio [channels, n] through both filters -> [channels, n].

    Their response is applied to the spectrum; a second of zeros behind the sound takes up what rings on.
    """
    samples = audio.shape[1]
    size = 1 << (samples + sample_rate - 1).bit_length()
    z = np.exp(-2j * np.pi * np.arange(size // 2 + 1) / size)
    response = np.ones(len(z), complex)
    for b, a in zip(*k_weighting(sample_rate)):
        response *= (b[0] + b[1] * z + b[2] * z * z) / (a[0] + a[1] * z + a[2] * z * z)
    spectrum = np.fft.rfft(np.asarray(audio, np.float64), size, axis=1)
    return np.fft.irfft(spectrum * response, size, axis=1)[:, :samples]


def integrated_loudness(audio: NDArray, sample_rate: int) -> float:
    """audio [1 or 2, n] in -1..1 -> LUFS, gated; -inf for what is quieter than the absolute gate.

    A sound shorter than a gating block (0.4 s) is one block. Raises ValueError for more channels, whose weights differ.
    """
    if audio.ndim != 2 or audio.shape[0] not in (1, 2):
        raise ValueError(f"loudness is that of [1 or 2, samples], not of {audio.shape}")
    power = np.square(k_weighted(audio, sample_rate)).sum(axis=0)
    total = np.concatenate([[0.0], np.cumsum(power)])
    block = min(round(BLOCK * sample_rate), len(power))
    if block == 0:
        return -math.inf
    starts = np.arange(0, len(power) - block + 1, round(HOP * sample_rate))
    means = (total[starts + block] - total[starts]) / block
    loud = means[means > _power(ABSOLUTE_GATE)]
    if not len(loud):
        return -math.inf
    gated = loud[loud > loud.mean() * 10 ** (RELATIVE_GATE / 10)]
    return OFFSET + 10 * math.log10(gated.mean())


def _power(loudness: float) -> float:
    return 10 ** ((loudness - OFFSET) / 10)


def matching_gains(clips: Sequence[NDArray], sample_rate: int) -> tuple[list[float], float]:
    """Gains (factors) that make all clips [channels, n] equally loud, and that loudness in LUFS.

    It is TARGET, or less where a clip would pass PEAK on the way there: all are lowered then, none is limited. A silent
    clip keeps its gain of 1.
    """
    heard = [(integrated_loudness(clip, sample_rate), float(np.abs(clip).max(initial=0.0))) for clip in clips]
    limits = [loudness + 20 * math.log10(PEAK / peak) for loudness, peak in heard if loudness > -math.inf]
    target = min([TARGET, *limits])
    return [1.0 if loudness == -math.inf else 10 ** ((target - loudness) / 20) for loudness, _ in heard], target
