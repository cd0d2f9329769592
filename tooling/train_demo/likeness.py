"""How alike two clips are in time and pitch: the correlation of their spectrograms, wherever in time each begins."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .decoded import BANDS, levelled
from .features import log_mel

Shape = NDArray[np.floating]


def shape_of(audio: NDArray[np.float32]) -> NDArray[np.float32]:
    """audio [samples], of any level -> the log-mel spectrogram of its first CLIP, [frames, BANDS], mean 0, norm 1."""
    mel = log_mel(levelled(audio))
    mel = mel.reshape(len(mel), BANDS, -1).mean(axis=2)
    shape = mel - mel.mean()
    return shape / np.linalg.norm(shape)


def spectra(shapes: Sequence[Shape]) -> NDArray[np.complex64]:
    """What `likeness` looks for the nearest one in, made once: the spectra in time of shapes [n, frames, bands]."""
    return np.fft.rfft(np.asarray(shapes, np.float32), axis=1).astype(np.complex64)


def likeness(shape: Shape, known: NDArray[np.complex64]) -> float:
    """The highest correlation with any of those that `spectra` are of, at any shift in time (circular)."""
    products = (np.fft.rfft(shape, axis=0) * known.conj()).sum(axis=2)
    return float(np.fft.irfft(products, len(shape), axis=1).max())
