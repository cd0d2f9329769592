"""PNG pictures of sound and of the difference of two runs. Sizes are chosen to be read on a phone."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...runtime.griffin_lim import stft
from ..fidelity import mel_filters
from ..figures.channels import pooled
from ..figures.style import BLUE, GREY, MAP, ORANGE, styled
from ..plots import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Float = NDArray[np.float32]
BANDS, RANGE_DB = 80, 80.0
MOST_COLUMNS = 640
WIDTH, DPI = 5.0, 144  # inches; 720 pixels


def log_mel(audio: Float, sample_rate: int) -> NDArray:
    """audio [channels, samples] -> dB below the loudest, [BANDS, frames], at least -RANGE_DB; windows of 46 ms."""
    n_fft = 2 ** round(np.log2(0.046 * sample_rate))
    mono = audio.mean(axis=0)
    magnitude = np.abs(stft(np.pad(mono, (0, max(0, n_fft - len(mono)))), n_fft, n_fft // 4)).T
    return mel_decibels(magnitude, sample_rate)


def mel_decibels(magnitude: Float, sample_rate: int) -> NDArray:
    """|STFT| [n_fft / 2 + 1, frames] -> dB below the loudest, [BANDS, frames], at least -RANGE_DB."""
    bands = mel_filters(sample_rate, 2 * (len(magnitude) - 1), BANDS) @ (magnitude.astype(np.float64) ** 2)
    power = pooled(np.nan_to_num(bands).astype(np.float32), BANDS, MOST_COLUMNS)
    top = max(float(power.max()), 1e-20)
    return 10 * np.log10(np.maximum(power / top, 10 ** (-RANGE_DB / 10)))


def spectrogram_png(decibels: NDArray) -> bytes:
    """A picture of nothing but the spectrogram, low notes below: quick, for what changes while one looks."""
    from matplotlib.image import imsave

    file = io.BytesIO()
    imsave(file, np.repeat(decibels, 2, axis=0), vmin=-RANGE_DB, vmax=0, cmap=MAP, origin="lower", format="png")
    return file.getvalue()


def sound_png(audio: Float, sample_rate: int) -> bytes:
    """Waveform over spectrogram of audio [channels, samples] in -1..1."""
    seconds = audio.shape[1] / sample_rate
    with styled():
        figure = new_figure(3.4, WIDTH)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
        _waveform(upper, audio, seconds)
        lower.grid(False)
        lower.imshow(
            log_mel(audio, sample_rate),
            aspect="auto",
            origin="lower",
            cmap=MAP,
            vmin=-RANGE_DB,
            vmax=0,
            extent=(0, seconds, 0, BANDS),
        )
        top = _mel(sample_rate / 2)
        ticks = [hertz for hertz in (250, 1000, 4000, 16000) if hertz < sample_rate / 2]
        lower.set_yticks([BANDS * _mel(hertz) / top for hertz in ticks], [f"{hertz / 1000:g}" for hertz in ticks])
        lower.set_ylabel("kHz")
        lower.set_xlabel("seconds")
        return _png(figure)


def _waveform(axes: Axes, audio: Float, seconds: float) -> None:
    """The least and the largest sample of each column of pixels."""
    mono = audio.mean(axis=0)
    starts = np.arange(0, len(mono), -(-len(mono) // MOST_COLUMNS))
    low, high = np.minimum.reduceat(mono, starts), np.maximum.reduceat(mono, starts)
    axes.fill_between(np.linspace(0, seconds, len(starts)), low, high, color=BLUE, linewidth=0.4)
    axes.set_ylim(-1, 1)
    axes.set_yticks([])
    axes.set_xlim(0, seconds)


def difference_png(relative: NDArray, cosine: NDArray) -> bytes:
    """Relative difference and cosine of two runs' denoised estimates, [steps] each, over the steps."""
    with styled():
        figure = new_figure(3.2, WIDTH)
        upper, lower = figure.subplots(2, 1, sharex=True)
        steps = np.arange(1, len(relative) + 1)
        marker = "o" if len(steps) < 3 else None
        upper.plot(steps, 100 * relative, color=ORANGE, marker=marker)
        upper.set_ylabel("difference, %")
        upper.set_ylim(0, None)
        lower.plot(steps, cosine, color=BLUE, marker=marker)
        lower.axhline(1, color=GREY, linewidth=0.8)
        lower.set_ylabel("cosine")
        lower.set_xlabel("sampling step (noise to sound)")
        lower.xaxis.get_major_locator().set_params(integer=True)
        return _png(figure)


def _mel(hertz: float) -> float:
    return 2595 * float(np.log10(1 + hertz / 700))


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, dpi=DPI, format="png", metadata={"Software": None})
    return file.getvalue()
