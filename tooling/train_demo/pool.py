"""Recordings in, a pool of augmented clips out: what the demo trains on.

There are 19 recordings; variety comes from pitch and speed (+-0.2 octave), timing, repeats, gain and tilt.
"""

from __future__ import annotations

import numpy as np
import soxr

from .corpus import CLASSES, LOOPED, Recording
from .features import CLIP, SAMPLE_RATE, encode, fit_pca, log_mel, mel_filters

CUTS = {"cat": [(1.25, 2.82)], "owl": [(0, 1.6), (4.2, 6.4)], "cow": [(0.3, 2.3), (2.5, 5.0)]}
"""Seconds of a long recording that hold one call each; the rest is silence or an unfinished call."""

BASE_SPEED = {"siren": 0.6}
WHOLE_SECONDS = CLIP / SAMPLE_RATE
DOG_WEIGHT = 2


def events(recording: Recording) -> list[np.ndarray]:
    if not recording.origin.endswith(".mp3") or recording.label not in CUTS:
        return [recording.audio]
    return [recording.audio[int(a * SAMPLE_RATE) : int(b * SAMPLE_RATE)] for a, b in CUTS[recording.label]]


def fade(audio: np.ndarray, samples: int = 256) -> np.ndarray:
    ramp = np.linspace(0, 1, min(samples, len(audio) // 2), dtype=np.float32)
    audio = audio.copy()
    audio[: len(ramp)] *= ramp
    audio[len(audio) - len(ramp) :] *= ramp[::-1]
    return audio


def arrange(label: str, sounds: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Place `sounds` (resampled) on a clip: looped, cropped from a long take, or repeated with gaps."""
    clip = np.zeros(CLIP, np.float32)
    if label in LOOPED:
        sound = sounds[rng.integers(len(sounds))]
        cross = min(1024, len(sound) // 8)
        ramp = np.linspace(0, 1, cross, dtype=np.float32)
        head, tail = sound[:cross] * ramp, sound[len(sound) - cross :] * ramp[::-1]
        period = np.concatenate((head + tail, sound[cross : len(sound) - cross]))
        endless = np.tile(period, CLIP // len(period) + 2)
        start = rng.integers(len(period))
        clip = endless[start : start + CLIP].copy()
        if label == "telephone":  # rings and pauses
            ring, pause = rng.uniform(0.8, 1.4), rng.uniform(0.3, 0.9)
            phase = (np.arange(CLIP) / SAMPLE_RATE + rng.uniform(0, 0.3)) % (ring + pause)
            clip *= np.clip(np.minimum(phase, ring - phase) / 0.01, 0, 1).astype(np.float32)
        return clip
    sound = sounds[rng.integers(len(sounds))]
    if len(sound) > CLIP and label != "thunder":
        energy = np.concatenate(([0.0], np.cumsum(sound.astype(np.float64) ** 2)))
        starts = np.arange(0, len(sound) - CLIP, 256)
        windows = energy[starts + CLIP] - energy[starts]
        chosen = int(rng.choice(starts[windows >= 0.6 * windows.max()]))
        return fade(sound[chosen : chosen + CLIP])
    at = int(rng.uniform(0, 0.35) * SAMPLE_RATE)
    while at < CLIP:
        sound = fade(sounds[rng.integers(len(sounds))], 128)
        piece = sound[: CLIP - at]
        clip[at : at + len(piece)] += rng.uniform(0.6, 1) * piece
        if label == "thunder":
            break
        # A call that no longer fits would be cut off in the middle: leave silence instead.
        at += len(sound) + int(rng.uniform(0.08, 0.7) * SAMPLE_RATE)
        if at + 0.6 * len(sound) > CLIP:
            break
    return clip


def augment(label: str, recordings: list[Recording], rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """-> one clip float32 [CLIP] of peak 1, and its seconds_total (after which it is silent)."""
    recording = recordings[rng.integers(len(recordings))]
    speed = BASE_SPEED.get(label, 1.0) * 2 ** rng.uniform(-0.2, 0.2)
    sounds = [soxr.resample(s, SAMPLE_RATE * speed, SAMPLE_RATE, "MQ") for s in events(recording)]
    clip = arrange(label, sounds, rng)
    tilt = rng.uniform(-0.25, 0.25)
    clip = clip + tilt * np.concatenate(([0], clip[:-1])).astype(np.float32)
    seconds = WHOLE_SECONDS
    if rng.random() < 0.3:
        seconds = rng.uniform(1, WHOLE_SECONDS)
        left = seconds - np.arange(CLIP) / SAMPLE_RATE
        clip = clip * np.clip(left / 0.15, 0, 1).astype(np.float32)
    peak = np.abs(clip).max()
    return (clip / max(peak, 1e-4) * rng.uniform(0.6, 1)).astype(np.float32), seconds


def build(recordings: list[Recording], per_class: int, seed: int = 0) -> dict[str, np.ndarray]:
    """-> log-mels float16 [clips, frames, MELS], labels [clips] (into CLASSES), seconds [clips]."""
    rng = np.random.default_rng(seed)
    filters = mel_filters()
    mels, labels, seconds = [], [], []
    for index, label in enumerate(CLASSES):
        own = [r for r in recordings if r.label == label]
        for _ in range(per_class * (DOG_WEIGHT if label == "dog" else 1)):
            clip, duration = augment(label, own, rng)
            mels.append(log_mel(clip, filters).astype(np.float16))
            labels.append(index)
            seconds.append(duration)
    return {
        "mels": np.stack(mels),
        "labels": np.array(labels),
        "seconds": np.array(seconds, np.float32),
    }


def build_latents(
    recordings: list[Recording], per_class: int, keep: float, sizes: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """The training pool: latents float16 [clips, C, 64], labels, seconds and the PCA buffers (`pca.*`)."""
    pool = build(recordings, per_class)
    buffers, share = fit_pca(pool["mels"], keep, sizes)
    print(f"{len(pool['mels'])} clips; {len(buffers['components'])} components keep {share:.4f}", flush=True)
    latents = np.stack([encode(mel, buffers) for mel in pool["mels"]])
    print(f"latents: std {latents.std():.3f}, largest {np.abs(latents).max():.1f}", flush=True)
    return {
        "latents": latents.astype(np.float16),
        "labels": pool["labels"],
        "seconds": pool["seconds"],
        "share": np.array(share),
        **{f"pca.{name}": value for name, value in buffers.items()},
    }
