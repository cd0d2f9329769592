"""Sound to begin from: a recording becomes the latents that sampling starts at, noised as far as is asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from ..engines.errors import UserError
from .settings import Settings

if TYPE_CHECKING:
    from .pipeline import Pipeline

Float = NDArray[np.float32]


@dataclass(frozen=True)
class InitAudio:
    """audio float32 [channels, n] at sample_rate Hz; noise_level: the sigma that sampling starts at, not its first.

    The higher it is the less of the recording is left: Stable Audio Open's noise is added to it (sigma_min..500),
    Small's takes its place (0.12..1). None: 1 and 0.5, see Objective.
    """

    audio: Float
    sample_rate: int
    noise_level: float | None = None

    @property
    def seconds(self) -> float:
        return self.audio.shape[1] / self.sample_rate

    @classmethod
    def read(cls, path: str | Path, noise_level: float | None = None) -> InitAudio:
        """Any sound file that libsndfile reads. Raises UserError when it is none, or holds no samples or NaN."""
        try:
            audio, sample_rate = soundfile.read(path, dtype="float32", always_2d=True)
        except (OSError, RuntimeError) as error:
            raise UserError(f"--init-audio {path} cannot be read as sound ({error}); give a WAV or FLAC file") from None
        if not len(audio) or not np.isfinite(audio).all():
            raise UserError(f"--init-audio {path} holds {'NaN or infinity' if len(audio) else 'no samples'}")
        return cls(np.ascontiguousarray(audio.T), sample_rate, noise_level)

    def settings(self, settings: Settings) -> Settings:
        """The schedule that starts at the noise level. Raises UserError for a level that is none of it."""
        objective = settings.objective
        level = objective.init_level if self.noise_level is None else self.noise_level
        lowest, highest = objective.levels(settings.sigma_min, settings.sigma_max)
        if not lowest <= level <= highest or objective.fault(settings.sigma_min, level) is not None:
            raise UserError(
                f"init_noise_level {level:g} is outside {lowest:g}..{highest:g}, the noise levels of this run"
            )
        return replace(settings, sigma_max=level)

    def encoded(self, pipeline: Pipeline, latents: int) -> tuple[Float, Float]:
        """Mean and standard deviation [channels, latents] of the recording, cut or followed by silence.

        As stable-audio-tools prepares it: resampled, cut from its start, mono to all channels, several to one by their
        mean, more than the model has cut. Raises UserError when the model has no encoder.
        """
        channels = pipeline.audio_channels
        samples = latents * pipeline.sizes["downsampling_ratio"]
        # Resampling takes time and memory; a second more than is kept leaves its edge out of sight.
        audio = self.audio[:, : -(-samples * self.sample_rate // pipeline.sample_rate) + self.sample_rate]
        if self.sample_rate != pipeline.sample_rate:
            audio = soxr.resample(audio.T, self.sample_rate, pipeline.sample_rate, quality="VHQ").T
        if channels == 1:
            audio = audio.mean(axis=0, keepdims=True)
        elif len(audio) == 1:
            audio = np.repeat(audio, channels, axis=0)
        audio = audio[:channels, :samples]
        padded = np.pad(audio, ((0, 0), (0, samples - audio.shape[1])))
        return pipeline.encode(np.ascontiguousarray(padded, np.float32))
