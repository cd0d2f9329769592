"""What needs no network: how a clip's sound differs from FP32's of the same caption and seed, and what is clipped."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...engines.errors import UserError
from ...runtime.griffin_lim import stft
from ..fidelity import log_mel_distance

Float = NDArray[np.float32]
FFT_SIZES = (512, 1024, 2048)
FULL_SCALE = 32766 / 32768
RMS_WINDOW = 0.05  # seconds


def check_sound(audio: Float, name: str) -> None:
    """audio float32 [channels, samples]. Raises UserError, naming the clip, for NaN, infinity, silence or nothing."""
    if not audio.size:
        raise UserError(f"{name} is empty")
    if not np.isfinite(audio).all():
        raise UserError(f"{name} holds NaN or infinity")
    if not audio.any():
        raise UserError(f"{name} is silent: nothing can be compared with it")


def log_mel_db(expected: Float, found: Float, sample_rate: int) -> float:
    """Mean absolute difference, in dB, of log-mel spectrograms (`fidelity.log_mel_distance`); [channels, n] each."""
    _check_pair(expected, found)
    return log_mel_distance(expected, found, sample_rate)


def multi_resolution_stft(expected: Float, found: Float) -> float:
    """Spectral convergence plus log-magnitude distance, the mean over three STFTs (Yamamoto et al. 2020, eq. 3 to 6).

    || |S| - |S'| ||_F / || |S| ||_F + mean |ln |S| - ln |S'||; Hann windows of 512, 1024 and 2048 samples, hops of a
    quarter; magnitudes are floored 100 dB below the expected clip's largest. Both [channels, samples]; the channels'
    mean is compared.
    """
    _check_pair(expected, found)
    total = 0.0
    for size in FFT_SIZES:
        a, b = (np.abs(stft(audio.mean(axis=0), size, size // 4)).astype(np.float64) for audio in (expected, found))
        floor = a.max() * 1e-5
        logs = np.log(np.maximum(a, floor)) - np.log(np.maximum(b, floor))
        total += float(np.linalg.norm(a - b) / np.linalg.norm(a) + np.abs(logs).mean())
    return total / len(FFT_SIZES)


def rms_correlation(expected: Float, found: Float, sample_rate: int) -> float:
    """Pearson's correlation of two sounds' loudness curves: is it loud and quiet at the same moments?

    The curve is the RMS of windows of 50 ms, half overlapping, over all channels, [channels, samples] each; 1 for the
    same sound at any level, 0 where one of the curves is flat. Raises UserError as the other comparisons do.
    """
    _check_pair(expected, found)
    length = max(2, round(RMS_WINDOW * sample_rate))
    a, b = (_rms_curve(audio, length) for audio in (expected, found))
    spread = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b / spread) if spread else 0.0


def _rms_curve(audio: Float, length: int) -> NDArray[np.float64]:
    """Less its mean; what is left of a constant's rounding is none."""
    power = np.square(audio, dtype=np.float64).mean(axis=0)
    windows = np.lib.stride_tricks.sliding_window_view(power, min(length, len(power)))[:: length // 2]
    curve = np.sqrt(windows.mean(axis=1))
    centred = curve - curve.mean()
    return centred if np.abs(centred).max() > 1e-9 * curve.max() else np.zeros_like(curve)


def _check_pair(expected: Float, found: Float) -> None:
    if expected.shape != found.shape:
        raise UserError(f"clips of {expected.shape} and {found.shape} (channels, samples) cannot be compared")
    for audio, name in ((expected, "the reference clip"), (found, "the clip")):
        if not np.isfinite(audio).all():
            raise UserError(f"{name} holds NaN or infinity")
    check_sound(expected, "the reference clip")
    if not expected.mean(axis=0).any():
        raise UserError("the reference clip's channels cancel: its mean, which is compared, is silent")
    if expected.shape[1] < max(FFT_SIZES):
        raise UserError(f"a clip of {expected.shape[1]} samples is too short to compare; at least {max(FFT_SIZES)}")


def clipped_share(audio: Float) -> float:
    """The share of samples in runs of two or more at full scale: a peak-normalised clip touches it once."""
    full = np.abs(audio) >= FULL_SCALE
    padded = np.pad(full, ((0, 0), (1, 1)))
    return float((full & (padded[:, :-2] | padded[:, 2:])).mean()) if audio.size else 0.0
