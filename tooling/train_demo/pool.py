"""Recordings in, a pool of augmented clips out: what the demo trains on.

    python -m dit_trt.tooling.train_demo.pool --recordings recordings.npz --output pool.npz --clips 40000

There are 162 recordings; variety comes from pitch and speed (+-0.2 octave), timing, repeats, melodies and
rhythms, gain and tilt. A fifth of the clips are two sounds at once. A clip depends on its index and the seed only.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import soxr
from numpy.typing import NDArray

from .corpus import CLASSES, OVOS, Recording, recordings_by_class, unpack
from .features import CLIP, FRAMES_PER_LATENT, HOP, SAMPLE_RATE, encode, fit_pca, log_mel
from .processes import in_processes

Audio = NDArray[np.float32]
Stretch = Callable[[Audio], Audio]

LASTING = ("rain", "siren", "applause", "helicopter", "wind", "waves", "fire", "train")
"""Sounds that last: repeated without a gap over the whole clip."""
BACKGROUNDS = ("rain", "wind", "waves", "fire", "applause", "train", "thunder", "bird")
"""What the second sound of a pair most often is."""
ONCE = ("thunder", "car")
"""Sounds of which a clip holds one."""
INSTRUMENTS = {"piano": 1.5, "guitar": 1.5, "violin": 0.12, "trumpet": 0.08}
"""Seconds that a note rings on after the next has begun."""
PHRASE_SECONDS = 3.9
"""An instrument's recording at least this long (and not one note of a soundfont) is a phrase, played as it is."""

CUTS = {"cat": [(1.25, 2.82)], "owl": [(0, 1.6), (4.2, 6.4)], "cow": [(0.3, 2.3), (2.5, 5.0)]}
"""Seconds of a long recording that hold one call each; the rest is silence or an unfinished call."""
BASE_SPEED = {"siren": 0.6}
OCTAVES = 0.2
WHOLE_SECONDS = CLIP / SAMPLE_RATE
DOG_WEIGHT = 2
SHORT_SHARE, PAIR_SHARE = 0.3, 0.2
PCA_CLIPS, PCA_KEEP, PCA_SIZES = 2000, 1.0, (128,)


def fade(audio: Audio, samples: int = 256, out: int | None = None) -> Audio:
    """Ramps at both ends, of `samples` and of `out` samples (default: the same)."""
    audio = audio.copy()
    for count, side in ((samples, slice(None)), (samples if out is None else out, slice(None, None, -1))):
        ramp = np.linspace(0, 1, min(count, len(audio) // 2), dtype=np.float32)
        audio[side][: len(ramp)] *= ramp
    return audio


def events(recording: Recording) -> list[Audio]:
    if recording.source != OVOS or recording.label not in CUTS:
        return [recording.audio]
    return [recording.audio[int(a * SAMPLE_RATE) : int(b * SAMPLE_RATE)] for a, b in CUTS[recording.label]]


def crop(sound: Audio, length: int, rng: np.random.Generator) -> Audio:
    """A loud part of at most `length` samples that begins and ends where the sound is quiet."""
    block = 512
    power = np.add.reduceat(sound.astype(np.float64) ** 2, np.arange(0, len(sound), block))
    energy = np.concatenate(([0.0], np.cumsum(power)))
    blocks = length // block
    windows = energy[blocks:] - energy[:-blocks]
    start = int(rng.choice(np.flatnonzero(windows >= 0.6 * windows.max())))
    near = min(24, blocks // 4)
    start += int(np.argmin(power[start : start + near]))
    end = min(start + blocks - near, len(power) - near)
    end += int(np.argmin(power[end : end + near]))
    return fade(sound[start * block : end * block], 512)


def looped(sound: Audio, length: int, rng: np.random.Generator) -> Audio:
    """Repeated without a gap, from anywhere in it."""
    cross = min(4096, len(sound) // 8)
    ramp = np.sqrt(np.linspace(0, 1, cross, dtype=np.float32))
    head, tail = sound[:cross] * ramp, sound[len(sound) - cross :] * ramp[::-1]
    period = np.concatenate((head + tail, sound[cross : len(sound) - cross]))
    start = int(rng.integers(len(period)))
    return np.resize(np.roll(period, -start), length)


def lasting(label: str, sound: Audio, length: int, rng: np.random.Generator) -> Audio:
    clip = looped(sound, length, rng)
    if label == "waves":  # the sea comes and goes
        period, phase = rng.uniform(2.2, 4), rng.uniform(0, 1)
        swell = np.sin(np.pi * (np.arange(length) / SAMPLE_RATE / period + phase)) ** 2
        clip = clip * (0.15 + 0.85 * swell).astype(np.float32)
    return clip


def ringing(sound: Audio, length: int, rng: np.random.Generator) -> Audio:
    """A telephone: rings and pauses."""
    ring, pause = rng.uniform(0.8, 1.4), rng.uniform(0.3, 0.9)
    phase = (np.arange(length) / SAMPLE_RATE + rng.uniform(0, 0.3)) % (ring + pause)
    return looped(sound, length, rng) * np.clip(np.minimum(phase, ring - phase) / 0.01, 0, 1).astype(np.float32)


def place(clip: Audio, sound: Audio, at: int, gain: float) -> None:
    piece = sound[: max(0, len(clip) - at)]
    clip[at : at + len(piece)] += np.float32(gain) * piece


def calls(label: str, sounds: list[Audio], length: int, rng: np.random.Generator) -> Audio:
    """Repeated with gaps, as often as whole ones fit."""
    sounds = [crop(sound, length, rng) if len(sound) > length else fade(sound, 128) for sound in sounds]
    clip = np.zeros(length, np.float32)
    sound = sounds[rng.integers(len(sounds))]
    at = int(rng.uniform(0, min(0.35 * SAMPLE_RATE, length - len(sound))))
    while at + len(sound) <= length:
        place(clip, sound, at, rng.uniform(0.6, 1))
        if label in ONCE:
            break
        at += len(sound) + int(rng.uniform(0.08, 0.7) * SAMPLE_RATE)
        sound = sounds[rng.integers(len(sounds))]
    return clip


def steps(recordings: list[Recording], length: int, rng: np.random.Generator, stretch: Stretch) -> Audio:
    """Footsteps: an even pace on one floor."""
    chosen = recordings[rng.integers(len(recordings))].origin.rstrip("0123456789.og")
    floor = [fade(stretch(r.audio), 64) for r in recordings if r.origin.startswith(chosen)]
    clip = np.zeros(length, np.float32)
    pace, at = rng.uniform(0.32, 0.75), rng.uniform(0, 0.2)
    while at * SAMPLE_RATE < length - 8000:
        place(clip, floor[rng.integers(len(floor))], int(at * SAMPLE_RATE), rng.uniform(0.6, 1))
        at += pace * rng.uniform(0.94, 1.06)
    return clip


def semitones(sound: Audio, shift: int) -> Audio:
    return soxr.resample(sound, SAMPLE_RATE * 2 ** (shift / 12), SAMPLE_RATE, "MQ") if shift else sound


def melody(label: str, recordings: list[Recording], length: int, rng: np.random.Generator, stretch: Stretch) -> Audio:
    """Single notes as a short phrase: a random walk over the notes, with a chord now and then."""
    kind = recordings[rng.integers(len(recordings))]
    prefix = kind.origin.split(" ")[:2]  # "FluidR3_GM.sf2:" and "Nylon"
    notes = [
        r.audio for r in recordings if ".sf2" in r.origin and (label == "trumpet" or r.origin.split(" ")[:2] == prefix)
    ]
    if not notes or (len(kind.audio) > PHRASE_SECONDS * SAMPLE_RATE and ".sf2" not in kind.origin):
        return calls(label, [stretch(kind.audio)], length, rng)
    clip = np.zeros(length, np.float32)
    rings = INSTRUMENTS[label]
    plucked = rings > 1
    beat, at, note = rng.uniform(0.18, 0.5), rng.uniform(0, 0.2), int(rng.integers(len(notes)))
    while at < length / SAMPLE_RATE - 0.15:
        lasts = beat * float(rng.choice((1, 1, 1, 2, 3)))
        chord = rng.choice((2, 4), 2) if plucked and rng.random() < 0.3 else ()
        for step in (0, *chord):
            sound = notes[min(note + step, len(notes) - 1)][: int((lasts + rings) * 1.4 * SAMPLE_RATE)]
            sound = stretch(semitones(sound, int(rng.integers(-2, 3))))[: int((lasts + rings) * SAMPLE_RATE)]
            sound = fade(sound, 64, int(min(rings, 0.4) * SAMPLE_RATE))
            place(clip, sound, int(at * SAMPLE_RATE), rng.uniform(0.5, 1))
        at += lasts
        note = int(np.clip(note + rng.integers(-2, 3), 0, len(notes) - 1))
    return clip


def beat(recordings: list[Recording], length: int, rng: np.random.Generator, stretch: Stretch) -> Audio:
    """Drums: a recorded loop, a pattern of kick, snare and cymbal, or toms."""
    chosen = recordings[rng.integers(len(recordings))]
    if "loop_" in chosen.origin or rng.random() < 0.25:
        loops = [r for r in recordings if "loop_" in r.origin] or recordings
        return looped(stretch(loops[rng.integers(len(loops))].audio), length, rng)
    kit = [r for r in recordings if r.source == chosen.source]

    def of(*words: str) -> Audio:
        fitting = [r for r in kit if any(word in r.origin for word in words)] or kit
        return fade(stretch(fitting[rng.integers(len(fitting))].audio), 32)

    kick, snare, cymbal = of("Kick", "bass", "kick"), of("Snr", "snare"), of("Hat", "Ride", "cymbal")
    toms = [of("Tom", "tom") for _ in range(3)]
    clip = np.zeros(length, np.float32)
    sixteenth = rng.uniform(0.095, 0.18) * SAMPLE_RATE
    rolling = rng.random() < 0.25
    every = int(rng.choice((1, 2, 2, 4)))
    extra = rng.random(16) < 0.15
    for count in range(int(length / sixteenth)):
        at, place_in_bar = int(count * sixteenth), count % 16
        if rolling:
            if rng.random() < 0.7:
                place(clip, toms[rng.integers(3)], at, rng.uniform(0.4, 1))
            continue
        if place_in_bar in (0, 8) or extra[place_in_bar]:
            place(clip, kick, at, rng.uniform(0.8, 1))
        if place_in_bar in (4, 12):
            place(clip, snare, at, rng.uniform(0.7, 1))
        if count % every == 0:
            place(clip, cymbal, at, rng.uniform(0.15, 0.4))
    return clip


def render(label: str, recordings: list[Recording], length: int, rng: np.random.Generator) -> Audio:
    """One sound over `length` samples, of any peak."""
    speed = BASE_SPEED.get(label, 1.0) * 2 ** rng.uniform(-OCTAVES, OCTAVES)

    def stretch(sound: Audio) -> Audio:
        return soxr.resample(sound, SAMPLE_RATE * speed, SAMPLE_RATE, "MQ")

    if label == "footsteps":
        return steps(recordings, length, rng, stretch)
    if label == "drum":
        return beat(recordings, length, rng, stretch)
    if label in INSTRUMENTS:
        return melody(label, recordings, length, rng, stretch)
    weights = np.sqrt([len(each.audio) for each in recordings])  # longer ones hold more calls
    recording = recordings[rng.choice(len(recordings), p=weights / weights.sum())]
    sounds = [stretch(sound) for sound in events(recording)]
    if label == "telephone" and len(recording.audio) < SAMPLE_RATE:
        return ringing(sounds[0], length, rng)
    return lasting(label, sounds[0], length, rng) if label in LASTING else calls(label, sounds, length, rng)


def loudness(clip: Audio) -> float:
    """RMS of the loudest quarter."""
    power = np.sort((clip[: len(clip) // 1024 * 1024].reshape(-1, 1024).astype(np.float64) ** 2).mean(1))
    return float(np.sqrt(power[-max(1, len(power) // 4) :].mean())) + 1e-6


def draw_length(rng: np.random.Generator) -> tuple[int, float]:
    """-> samples that sound, and seconds_total."""
    seconds = rng.uniform(1, WHOLE_SECONDS) if rng.random() < SHORT_SHARE else WHOLE_SECONDS
    return min(CLIP, int(seconds * SAMPLE_RATE)), seconds


def finish(clip: Audio, rng: np.random.Generator) -> Audio:
    """Tilt, fade and gain: float32 [CLIP] of peak 0.6 to 1, silent after the samples of `clip`."""
    clip = clip + np.float32(rng.uniform(-0.25, 0.25)) * np.concatenate((np.zeros(1, np.float32), clip[:-1]))
    if len(clip) < CLIP:
        clip = np.pad(fade(clip, 32, int(0.1 * SAMPLE_RATE)), (0, CLIP - len(clip)))
    return (clip / max(float(np.abs(clip).max()), 1e-4) * rng.uniform(0.6, 1)).astype(np.float32)


def augment(label: str, recordings: list[Recording], rng: np.random.Generator) -> tuple[Audio, float]:
    """`recordings` of one class -> one clip float32 [CLIP], and its seconds_total (after which it is silent)."""
    length, seconds = draw_length(rng)
    return finish(render(label, recordings, length, rng), rng), seconds


def augment_pair(
    labels: tuple[str, str], recordings: tuple[list[Recording], list[Recording]], rng: np.random.Generator
) -> tuple[Audio, float]:
    """Two sounds at once, within 6 dB of each other; a lasting second one is never the louder."""
    length, seconds = draw_length(rng)
    first, second = (render(label, own, length, rng) for label, own in zip(labels, recordings, strict=True))
    level = 10 ** (rng.uniform(-6, 0 if labels[1] in LASTING else 6) / 20)
    return finish(first / loudness(first) + np.float32(level / loudness(second)) * second, rng), seconds


def other_than(label: str, rng: np.random.Generator) -> str:
    """The second sound of a pair: a background more often than not."""
    others = BACKGROUNDS if rng.random() < 0.7 else CLASSES
    return str(rng.choice([each for each in others if each != label]))


class Clips:
    """The clip of an index: the same in whatever process it is made."""

    def __init__(self, recordings: list[Recording], seed: int):
        self.own = recordings_by_class(recordings)
        if missing := [label for label, own in self.own.items() if not own]:
            raise SystemExit(f"no recordings of {', '.join(missing)}")
        self.seed = seed
        weights = np.array([DOG_WEIGHT if label == "dog" else 1 for label in CLASSES], float)
        self.weights = weights / weights.sum()

    def draw(self, index: int) -> tuple[Audio, int, int, float]:
        """-> clip float32 [CLIP], its class, its second class or -1, seconds_total."""
        rng = np.random.default_rng((self.seed, index))
        first, second = int(rng.choice(len(CLASSES), p=self.weights)), -1
        label = CLASSES[first]
        if rng.random() >= PAIR_SHARE:
            clip, seconds = augment(label, self.own[label], rng)
        else:
            other = other_than(label, rng)
            second = CLASSES.index(other)
            clip, seconds = augment_pair((label, other), (self.own[label], self.own[other]), rng)
        return clip, first, second, seconds


def _mel(clips: Clips, index: int) -> np.ndarray:
    return log_mel(clips.draw(index)[0]).astype(np.float16)


def _with(recordings: list[Recording], seed: int, buffers: dict[str, np.ndarray]) -> tuple[Clips, dict]:
    return Clips(recordings, seed), buffers


def _latents(own: tuple[Clips, dict], task: tuple[int, bool]) -> tuple[np.ndarray, int, int, float, np.ndarray | None]:
    (clips, buffers), (index, keep) = own, task
    clip, first, second, seconds = clips.draw(index)
    latents = encode(log_mel(clip), buffers).astype(np.float16)
    return latents, first, second, seconds, np.round(clip * 32767).astype(np.int16) if keep else None


def build_latents(
    recordings: list[Recording], clips: int, audio: int = 0, processes: int | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
    """The training pool.

    `latents` float16 [clips, 128, CLIP / 2048]; `first` and `second` int16 [clips] into CLASSES (second: -1 where
    there is one sound); `seconds` float32 [clips]; `audio` int16 [audio, CLIP], the sound of the first ones; the
    PCA's buffers (`pca.*`), fitted to the first 2000, and the `share` of the variance that they keep. The same for
    any number of processes, up to rounding.
    """
    Clips(recordings, seed)  # which raises where a class is missing: a process that does is waited for in vain
    mels = list(in_processes(_mel, range(min(clips, PCA_CLIPS)), partial(Clips, recordings, seed), processes))
    buffers, share = fit_pca(np.stack(mels), PCA_KEEP, PCA_SIZES)
    del mels
    print(f"{len(buffers['components'])} components keep {share:.4f}", flush=True)
    frames = CLIP // (HOP * FRAMES_PER_LATENT)
    pool: dict[str, np.ndarray] = {
        "latents": np.empty((clips, len(buffers["components"]), frames), np.float16),
        "first": np.empty(clips, np.int16),
        "second": np.empty(clips, np.int16),
        "seconds": np.empty(clips, np.float32),
    }
    if audio:
        pool["audio"] = np.empty((min(audio, clips), CLIP), np.int16)
    tasks = [(index, index < audio) for index in range(clips)]
    for index, made in enumerate(in_processes(_latents, tasks, partial(_with, recordings, seed, buffers), processes)):
        pool["latents"][index], pool["first"][index], pool["second"][index], pool["seconds"][index] = made[:4]
        if made[4] is not None:
            pool["audio"][index] = made[4]
    print(f"latents: std {pool['latents'].std(dtype=np.float32):.3f}, largest {np.abs(pool['latents']).max():.1f}")
    return {**pool, "share": np.array(share), **{f"pca.{name}": value for name, value in buffers.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=Path, required=True, help="what corpus --pack wrote")
    parser.add_argument("--output", type=Path, required=True, help="a .npz")
    parser.add_argument("--clips", type=int, default=40_000)
    parser.add_argument("--audio", type=int, default=0, help="keep the sound of so many clips")
    parser.add_argument("--processes", type=int, help="default: one for each core")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.monotonic()
    pool = build_latents(unpack(args.recordings), args.clips, args.audio, args.processes, args.seed)
    made = time.monotonic() - start
    np.savez(args.output, allow_pickle=False, **pool)
    print(f"{args.clips} clips in {made:.0f} s, {1000 * made / args.clips:.1f} ms each; {args.output}")


if __name__ == "__main__":
    main()
