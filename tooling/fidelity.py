"""How true a quantized pipeline is to FP32: velocities on FP32's own trajectories, latents and sound of its own.

FP32 is recorded once, clip by clip, on disk; any number of pipelines are measured against it. What `diff` computes
with Polygraphy for one bundle is computed here with plain arrays for many, a clip in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from ..runtime.denoiser import guide
from ..runtime.griffin_lim import stft
from ..runtime.pipeline import Pipeline, Settings
from ..runtime.samplers import DETERMINISTIC, OBJECTIVE_OF
from ..runtime.step_engine import Conditioning

Float = NDArray[np.float32]
Done = Callable[[int], object]
IDENTICAL_DB = 200.0
MEL_BANDS = 80
MEL_RANGE_DB = 80.0


@dataclass(frozen=True)
class Trial:
    """What is sampled: every prompt with every seed, a clip each, under `settings` (whose own seed does not count)."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: Settings = field(default_factory=Settings)

    @property
    def clips(self) -> list[tuple[int, int]]:
        """(index of the prompt, seed) in order; the clips of one prompt are neighbours."""
        return [(index, seed) for index in range(len(self.prompts)) for seed in self.seeds]

    @property
    def calls(self) -> int:
        """Calls of the DiT that one measurement takes: teacher forced, and a rollout."""
        return 2 * len(self.clips) * self.settings.steps

    def digest(self, model: str) -> str:
        text = json.dumps([model, asdict(replace(self, settings=replace(self.settings, seed=0)))], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Fidelity:
    """cosine and relative_error: [clips, steps], of the velocity; snr_db (final latents) and log_mel_db: [clips].

    The velocity is the CFG-combined one, teacher forced on FP32's trajectory under the trial's sampler; latents and
    sound are those of own rollouts under a deterministic sampler. What gives NaN or infinity has a number like it.
    """

    cosine: NDArray[np.float64]
    relative_error: NDArray[np.float64]
    snr_db: NDArray[np.float64]
    log_mel_db: NDArray[np.float64]

    def summary(self) -> dict[str, float]:
        """worst_step_cosine: the lowest mean over clips of any step. SNR is the median over clips, the rest means."""
        steps = self.cosine.mean(axis=0)
        worst = int(steps.argmin())
        return {
            "worst_step_cosine": float(steps[worst]),
            "worst_step": worst,
            "mean_cosine": float(self.cosine.mean()),
            "mean_relative_error": float(self.relative_error.mean()),
            "snr_db": float(np.median(self.snr_db)),
            "log_mel_db": float(self.log_mel_db.mean()),
        }


class Forced:
    """velocity(x [channels, latents] as the model sees it, step) of one pipeline: CFG-combined, [channels, latents].

    It calls the step engine as the sampling loop does.
    """

    def __init__(self, pipeline: Pipeline, conditioning: Conditioning, cfg_scale: float):
        self._engine = pipeline.step_engine_for(conditioning)
        self._conditioning, self._cfg_scale = conditioning, cfg_scale

    def __call__(self, x: Float, step: int) -> Float:
        outputs = self._engine.run(self._conditioning, step, np.stack((x,) * self._conditioning.batch))
        return guide(outputs["velocity"], self._cfg_scale)


def trajectory(
    pipeline: Pipeline, conditioning: Conditioning, settings: Settings, on_step: Done = lambda step: None
) -> tuple[Float, Float]:
    """Sample once: x as the model sees it and the CFG-combined velocity of every step, [steps, channels, latents]."""
    xs: list[Float] = []
    velocities: list[Float] = []

    def observe(step: int, inputs: Mapping[str, Float], outputs: Mapping[str, Float]) -> None:
        xs.append(inputs["x"][0].copy())
        velocities.append(guide(outputs["velocity"], settings.cfg_scale))

    pipeline.sample(conditioning, settings, on_step, observe)
    return np.stack(xs), np.stack(velocities)


def deterministic_sampler(settings: Settings) -> str:
    """Of the same objective: what differs under it is the velocity, not the noise."""
    return DETERMINISTIC[OBJECTIVE_OF[settings.sampler]]


def rollout(
    pipeline: Pipeline, conditioning: Conditioning, settings: Settings, on_step: Done = lambda step: None
) -> Float:
    """Final latents [channels, latents] under the sampler in which nothing but the velocity differs."""
    return pipeline.sample(conditioning, replace(settings, sampler=deterministic_sampler(settings)), on_step)


def record(reference: Pipeline, trial: Trial, folder: Path, done: Done = lambda calls: None) -> Path:
    """Sample every clip of `trial` with FP32 into `folder`, which is returned; clips that are there are left alone.

    A clip: x and velocity [steps, channels, latents] of the trajectory; latents [channels, latents] and audio
    [channels, samples] of the rollout. done(calls) counts up to `trial.calls`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    conditionings = _Conditionings(reference, trial)
    steps = trial.settings.steps
    for number, (prompt, seed) in enumerate(trial.clips):
        done(2 * steps * number)
        path = folder / f"{number:04d}.safetensors"
        if path.is_file():
            continue
        conditioning = conditionings[prompt]
        one = replace(trial.settings, seed=seed)
        x, velocity = trajectory(reference, conditioning, one)
        clip = {"x": x, "velocity": velocity, "latents": rollout(reference, conditioning, one)}
        part = path.with_suffix(".part")
        save_file({**clip, "audio": np.ascontiguousarray(reference.decode(clip["latents"]))}, part)
        part.rename(path)
    done(trial.calls)
    return folder


def measure(pipeline: Pipeline, trial: Trial, folder: Path, done: Done = lambda calls: None) -> Fidelity:
    """Compare `pipeline` with what `record` left in `folder`; done(calls) counts up to `trial.calls`."""
    conditionings = _Conditionings(pipeline, trial)
    shape = (len(trial.clips), trial.settings.steps)
    cosine, error = np.zeros(shape), np.zeros(shape)
    snr, mel = np.zeros(shape[0]), np.zeros(shape[0])
    for number, (prompt, seed) in enumerate(trial.clips):
        clip = load_file(folder / f"{number:04d}.safetensors")
        velocity = Forced(pipeline, conditionings[prompt], trial.settings.cfg_scale)
        for step in range(shape[1]):
            found = velocity(clip["x"][step], step)
            cosine[number, step], error[number, step] = compare_velocities(clip["velocity"][step], found)
        done((2 * number + 1) * shape[1])
        latents = rollout(pipeline, conditionings[prompt], replace(trial.settings, seed=seed))
        snr[number] = snr_db(clip["latents"], latents)
        mel[number] = log_mel_distance(clip["audio"], pipeline.decode(latents), pipeline.sizes["sample_rate"])
        done((2 * number + 2) * shape[1])
    return Fidelity(cosine, error, snr, mel)


class _Conditionings:
    """Of each prompt, of which the last is kept: clips of one prompt are neighbours."""

    def __init__(self, pipeline: Pipeline, trial: Trial):
        self._pipeline, self._trial = pipeline, trial
        self._kept: tuple[int, Conditioning] | None = None

    def __getitem__(self, prompt: int) -> Conditioning:
        if self._kept is None or self._kept[0] != prompt:
            seconds = self._pipeline.check_seconds(None)
            text = self._trial.prompts[prompt]
            self._kept = prompt, self._pipeline.condition(text, self._trial.settings, seconds)
        return self._kept[1]


# -------------------- the numbers


def compare_velocities(expected: Float, found: Float) -> tuple[float, float]:
    """Cosine and relative error ||found - expected|| / ||expected|| over all elements, in float64."""
    a, b = expected.astype(np.float64).ravel(), found.astype(np.float64).ravel()
    norm = np.linalg.norm(a)
    return float(a @ b / (norm * np.linalg.norm(b))), float(np.linalg.norm(b - a) / norm)


def snr_db(expected: Float, found: Float) -> float:
    """10 log10(||expected||^2 / ||found - expected||^2), at most `IDENTICAL_DB`; NaN where `found` is not finite."""
    noise = float(np.square(found.astype(np.float64) - expected).sum())
    if not np.isfinite(noise):
        return float("nan")
    signal = float(np.square(expected, dtype=np.float64).sum())
    return IDENTICAL_DB if noise == 0 else min(IDENTICAL_DB, 10 * float(np.log10(signal / noise)))


def log_mel_distance(expected: Float, found: Float, sample_rate: int) -> float:
    """Mean absolute difference, in dB, of two sounds' log-mel spectrograms over all bands and frames.

    expected, found: float32 [channels, samples], as the decoder makes them, not normalised; channels are averaged.
    Spectrogram: |STFT|^2, periodic Hann window of the power of two samples next to 46 ms (2048 at 44.1 kHz), hop a
    quarter of it; `MEL_BANDS` triangles (see `mel_filters`); 10 log10 of each band, floored `MEL_RANGE_DB` below the
    loudest band and frame of `expected`: what lies under the floor in both counts as equal.
    """
    powers = [_mel_power(audio, sample_rate) for audio in (expected, found)]
    floor = max(float(powers[0].max()) * 10 ** (-MEL_RANGE_DB / 10), 1e-20)
    a, b = (10 * np.log10(np.maximum(power, floor)) for power in powers)
    return float(np.abs(a - b).mean())


def _mel_power(audio: Float, sample_rate: int) -> NDArray[np.float64]:
    """[frames, MEL_BANDS]"""
    n_fft = 2 ** round(np.log2(0.046 * sample_rate))
    power = np.abs(stft(audio.mean(axis=0), n_fft, n_fft // 4)).astype(np.float64) ** 2
    return power @ mel_filters(sample_rate, n_fft).T


def mel_filters(sample_rate: int, n_fft: int, bands: int = MEL_BANDS) -> NDArray[np.float64]:
    """[bands, n_fft / 2 + 1]: triangles of height 1, corners equidistant in mel from 0 to half the sample rate.

    mel = 2595 log10(1 + Hz / 700) (O'Shaughnessy; HTK's).
    """
    top = 2595 * np.log10(1 + sample_rate / 2 / 700)
    corners: NDArray[np.float64] = 700 * (10 ** (np.linspace(0, top, bands + 2) / 2595) - 1)
    bins = np.linspace(0, sample_rate / 2, n_fft // 2 + 1)
    low, middle, high = (corners[i : i + bands, None] for i in range(3))
    return np.clip(np.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)), 0, None)
