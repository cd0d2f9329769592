"""Audio in, latents out: log-mel spectrogram, then PCA; the trained inverse of `exporters/mel_pca.py`.

The transform is fixed (no network): 160 mel bands of the magnitude STFT, `log(mel + floor)`, four frames
stacked to 640 values, projected on C principal components. Four frames of 512 samples make one latent of 2048
samples, the latent rate of Stable Audio Open.
"""

from __future__ import annotations

from functools import cache

import numpy as np

SAMPLE_RATE = 44100
N_FFT = 2048
HOP = 512
MELS = 160
FRAMES_PER_LATENT = 4
CLIP = 180224
"""Samples of one training clip: 352 frames, 88 latents, 4.09 s."""
FLOOR = 0.1
"""Added to mel magnitudes (a full-scale sine is 512, so this is -74 dB) to bound the logarithm."""
LOG_MIN, LOG_MAX = float(np.log(FLOOR)), float(np.log(N_FFT / 4))


def hz_to_mel(hz: np.ndarray) -> np.ndarray:
    """Slaney's scale: linear to 1 kHz, logarithmic above."""
    hz = np.asarray(hz, float)
    return np.where(hz < 1000, hz * 3 / 200, 15 + 27 * np.log(np.maximum(hz, 1000) / 1000) / np.log(6.4))


def mel_to_hz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))


@cache
def mel_filters() -> np.ndarray:
    """[MELS, bins] triangles over 30..16000 Hz, each row of sum 1 (a band is a mean magnitude)."""
    edges = mel_to_hz(np.linspace(hz_to_mel(np.array(30.0)), hz_to_mel(np.array(16000.0)), MELS + 2))
    bins = np.fft.rfftfreq(N_FFT, 1 / SAMPLE_RATE)
    low, mid, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rows = np.maximum(0, np.minimum((bins - low) / (mid - low), (high - bins) / (high - mid)))
    return (rows / rows.sum(1, keepdims=True)).astype(np.float32)


def mel_inverse() -> np.ndarray:
    """[bins, MELS]: interpolation between the mean magnitudes of the bands over a bin (rows of sum 1, or 0).

    Unlike the pseudo-inverse it has no negative lobes, so no energy appears where there was none.
    """
    filters = mel_filters()
    triangles = filters / filters.max(1, keepdims=True)
    return (triangles / np.maximum(triangles.sum(0, keepdims=True), 1e-3)).T.astype(np.float32)


def log_mel(audio: np.ndarray) -> np.ndarray:
    """audio [samples], a multiple of HOP -> [samples / HOP, MELS]; frame t is around (t + 1/2) * HOP."""
    padded = np.pad(audio.astype(np.float32), (N_FFT - HOP) // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, N_FFT)[::HOP]
    window = np.hanning(N_FFT + 1)[:-1].astype(np.float32)
    return np.log(np.abs(np.fft.rfft(frames * window, axis=1)) @ mel_filters().T + FLOOR).astype(np.float32)


def stack(mel: np.ndarray) -> np.ndarray:
    """[..., frames, MELS] -> [..., frames / 4, 4 * MELS]."""
    return mel.reshape(*mel.shape[:-2], -1, FRAMES_PER_LATENT * MELS)


def fit_pca(mels: np.ndarray, keep: float, sizes: tuple[int, ...]) -> tuple[dict[str, np.ndarray], float]:
    """mels [clips, frames, MELS] -> the pretransform's buffers and the variance share they keep.

    The smallest of `sizes` that keeps `keep` of the variance (else the largest). Component std is made
    proportional to eigenvalue ** 0.25 ("partial whitening": loud components stay louder), mean variance is 1.
    """
    rows = stack(mels).reshape(-1, FRAMES_PER_LATENT * MELS)
    mean = rows.mean(0, dtype=np.float64)
    covariance = np.zeros((rows.shape[1],) * 2)
    for chunk in np.array_split(rows, max(1, len(rows) // 8192)):
        centred = chunk.astype(np.float32) - mean.astype(np.float32)
        covariance += centred.T @ centred
    values, vectors = np.linalg.eigh(covariance / len(rows))
    values, vectors = values[::-1], vectors[:, ::-1].T
    share = np.cumsum(values) / values.sum()
    size = next((c for c in sizes if share[c - 1] >= keep), sizes[-1])
    std = values[:size] ** 0.25
    std = std / np.sqrt(np.mean(std**2))
    buffers = {
        "components": vectors[:size],
        "mean": mean,
        "scale": np.sqrt(values[:size]) / std,
        "mel_inverse": mel_inverse(),
        "log_range": np.array([LOG_MIN, LOG_MAX]),
    }
    return {k: np.ascontiguousarray(v, np.float32) for k, v in buffers.items()}, float(share[size - 1])


def encode(mel: np.ndarray, buffers: dict[str, np.ndarray]) -> np.ndarray:
    """mel [..., frames, MELS] -> latents [..., C, frames / 4]."""
    z = (stack(mel).astype(np.float32) - buffers["mean"]) @ buffers["components"].T / buffers["scale"]
    return np.ascontiguousarray(np.swapaxes(z, -1, -2))


def decode_log_mel(latents: np.ndarray, buffers: dict[str, np.ndarray]) -> np.ndarray:
    """latents [C, L] -> log-mel [4 L, MELS], clamped."""
    rows = (latents.T * buffers["scale"]) @ buffers["components"] + buffers["mean"]
    return np.clip(rows.reshape(-1, MELS), *buffers["log_range"])


def decode_magnitude(latents: np.ndarray, buffers: dict[str, np.ndarray]) -> np.ndarray:
    """latents [C, L] -> magnitude [bins, 4 L]; what `MelPcaDecoder` computes in ONNX."""
    mel = np.exp(decode_log_mel(latents, buffers)) - np.exp(buffers["log_range"][0])
    return (np.maximum(mel, 0) @ buffers["mel_inverse"].T).T
