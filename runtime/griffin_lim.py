"""Magnitude spectrogram in, sound out: Griffin-Lim phase reconstruction in numpy."""

from __future__ import annotations

import numpy as np

MOMENTUM = 0.99


def hann(n_fft: int) -> np.ndarray:
    """The periodic Hann window, float32 [n_fft]."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)).astype(np.float32)


def stft(audio: np.ndarray, n_fft: int, hop_length: int) -> np.ndarray:
    """float32 [frames * hop] -> complex64 [frames, n_fft / 2 + 1]; frame t is around (t + 1/2) * hop."""
    padded = np.pad(audio, (n_fft - hop_length) // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop_length]
    return np.fft.rfft(frames * hann(n_fft), axis=1)


def istft(spectrum: np.ndarray, n_fft: int, hop_length: int) -> np.ndarray:
    """complex64 [frames, n_fft / 2 + 1] -> float32 [frames * hop]: the least-squares inverse of `stft`.

    Raises ValueError for a spectrum of another size, or unless n_fft is a multiple of hop_length, which is even.
    """
    if n_fft % hop_length or hop_length % 2:
        raise ValueError(f"n_fft {n_fft} must be a multiple of hop_length {hop_length}, which must be even")
    if spectrum.shape[1] != n_fft // 2 + 1:
        raise ValueError(f"a spectrum of {spectrum.shape[1]} bins is not one of n_fft {n_fft}")
    window = hann(n_fft)
    count, overlap = len(spectrum), n_fft // hop_length
    frames = (np.fft.irfft(spectrum, n_fft, axis=1) * window).reshape(count, overlap, hop_length)
    squares = (window**2).reshape(overlap, hop_length)
    audio = np.zeros((count + overlap - 1, hop_length), np.float32)
    weight = np.zeros_like(audio)
    for part in range(overlap):
        audio[part : part + count] += frames[:, part]
        weight[part : part + count] += squares[part]
    margin = (n_fft - hop_length) // 2
    whole = slice(margin, margin + count * hop_length)
    return audio.ravel()[whole] / weight.ravel()[whole]


def griffin_lim(magnitude: np.ndarray, n_fft: int, hop_length: int, iterations: int, seed: int = 0) -> np.ndarray:
    """Find a sound whose STFT has (nearly) this magnitude.

    The fast variant with momentum (Perraudin, Balazs, Sondergaard 2013, "A fast Griffin-Lim algorithm"), from
    random phases drawn from `seed`: the same arguments give the same samples.

    magnitude: float32 [n_fft / 2 + 1, frames] -> float32 [frames * hop_length].
    Raises ValueError as `istft` does.
    """
    target = np.ascontiguousarray(magnitude.T, np.float32)
    angles = np.random.default_rng(seed).random(target.shape, np.float32) * np.float32(2 * np.pi)
    phases = np.exp(1j * angles).astype(np.complex64)
    previous = np.zeros_like(phases)
    momentum = np.float32(MOMENTUM / (1 + MOMENTUM))
    tiny = np.float32(1e-12)
    for _ in range(iterations):
        rebuilt = stft(istft(target * phases, n_fft, hop_length), n_fft, hop_length)
        phases = rebuilt - momentum * previous
        phases /= np.abs(phases) + tiny
        previous = rebuilt
    return istft(target * phases, n_fft, hop_length)
