"""Sounds in, class names out: a small classifier of real clips that never heard a generated one.

    python -m dit_trt.tooling.train_demo.judge --assets assets --wavs wavs --figure docs/demo-spectrograms.png

The folder holds `<class>-<seed>.wav`. The judge is a logistic regression on log-mel statistics, trained on
augmented real recordings, each passed through the demo's own decoder (PCA and Griffin-Lim), plus a class
"none" (coloured noise, decoded random latents), so that noise is not given the name of the nearest class.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import soundfile
import soxr
from safetensors.numpy import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from ...runtime.griffin_lim import griffin_lim
from .corpus import CLASSES, Recording, load
from .features import CLIP, HOP, N_FFT, SAMPLE_RATE, decode_magnitude, encode, log_mel, mel_filters
from .pool import augment

WEIGHTS = Path(__file__).parents[2] / "models" / "demo" / "model.safetensors"
NONE = "none"
TRAIN_CLIPS, HELD_OUT_CLIPS = 32, 8
ITERATIONS = 32
BANDS = 40
FIGURE_CLASSES = ("dog", "cat", "rooster", "frog", "rain", "siren")


def pretransform(weights: Path = WEIGHTS) -> dict[str, np.ndarray]:
    """The `pretransform.` buffers of a checkpoint, float32."""
    state = load_file(weights)
    return {
        name.removeprefix("pretransform."): value.astype(np.float32)
        for name, value in state.items()
        if name.startswith("pretransform.")
    }


def mel_statistics(audio: np.ndarray, filters: np.ndarray) -> np.ndarray:
    """audio [samples] at 44.1 kHz, any loudness -> statistics of its log-mel and of its rhythm."""
    audio = np.pad(audio[:CLIP], (0, max(0, CLIP - len(audio))))
    mel = log_mel(audio / max(np.abs(audio).max(), 1e-4), filters)
    mel = mel.reshape(len(mel), BANDS, -1).mean(2)
    loud = mel.mean(1)
    active = mel[loud >= np.quantile(loud, 0.5)]
    contour = active - active.mean(1, keepdims=True)
    rhythm = np.abs(np.fft.rfft((loud - loud.mean()) * np.hanning(len(loud))))[1:49]
    return np.concatenate(
        [
            active.mean(0),
            contour.std(0),
            *np.quantile(mel, (0.1, 0.9), axis=0),
            np.abs(np.diff(mel, axis=0)).mean(0),
            np.log1p(rhythm),
        ]
    ).astype(np.float32)


class Judge:
    """Trained in three minutes, most of it Griffin-Lim; `cache` keeps its feature table."""

    def __init__(self, assets: Path, cache: Path | None = None):
        self.filters = mel_filters()
        if cache is None or not cache.exists():
            table = self.table(load(assets), pretransform())
            if cache is not None:
                np.savez(cache, allow_pickle=False, **table)
        else:
            with np.load(cache) as archive:
                table = dict(archive)
        held_out = table["held_out"]
        self.model: Pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        self.model.fit(table["features"][~held_out], table["labels"][~held_out])
        named = self.model.predict(table["features"][held_out])
        self.held_out_accuracy = float(np.mean(named == table["labels"][held_out]))

    def table(self, recordings: list[Recording], buffers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Features of augmented real clips and noises behind the decoder; held-out ones are other draws."""
        rng = np.random.default_rng(20_000)
        features, labels = [], []
        for label in (*CLASSES, NONE):
            own = [r for r in recordings if r.label == label]
            for _ in range(TRAIN_CLIPS + HELD_OUT_CLIPS):
                if own:
                    audio = through_decoder(augment(label, own, rng)[0], buffers, self.filters)
                elif rng.random() < 0.5:
                    audio = through_decoder(noise(rng), buffers, self.filters)
                else:
                    audio = resynthesize(random_latents(rng, len(buffers["scale"])), buffers)
                features.append(mel_statistics(audio, self.filters))
                labels.append(label)
        held_out = np.tile(np.arange(TRAIN_CLIPS + HELD_OUT_CLIPS) >= TRAIN_CLIPS, len(CLASSES) + 1)
        return {"features": np.stack(features), "labels": np.array(labels), "held_out": held_out}

    def name(self, audio: np.ndarray) -> str:
        return str(self.model.predict(mel_statistics(audio, self.filters)[None])[0])


def noise(rng: np.random.Generator) -> np.ndarray:
    """Coloured noise or clicks under a random envelope: float32 [CLIP], peak 1."""
    spectrum = np.fft.rfft(rng.standard_normal(CLIP))
    spectrum /= np.maximum(np.fft.rfftfreq(CLIP, 1 / SAMPLE_RATE), 20) ** rng.uniform(-0.3, 1)
    knots = rng.uniform(0, 1, rng.integers(2, 40)) ** rng.uniform(0, 4)
    envelope = np.interp(np.linspace(0, 1, CLIP), np.linspace(0, 1, len(knots)), knots)
    clip = np.fft.irfft(spectrum) * envelope
    return (clip / np.abs(clip).max()).astype(np.float32)


def random_latents(rng: np.random.Generator, channels: int) -> np.ndarray:
    """What an untrained model might say: latents of noise, more or less smooth in time, std 1."""
    z = rng.standard_normal((channels, CLIP // (4 * HOP)))
    spectrum = np.fft.rfft(z, axis=1)
    spectrum /= np.arange(1, spectrum.shape[1] + 1) ** rng.uniform(0, 1)
    z = np.fft.irfft(spectrum, z.shape[1], axis=1)
    return (z / z.std()).astype(np.float32)


def resynthesize(latents: np.ndarray, buffers: dict[str, np.ndarray]) -> np.ndarray:
    return griffin_lim(decode_magnitude(latents, buffers), N_FFT, HOP, ITERATIONS)


def through_decoder(clip: np.ndarray, buffers: dict[str, np.ndarray], filters: np.ndarray) -> np.ndarray:
    return resynthesize(encode(log_mel(clip, filters), buffers), buffers)


def read(path: Path) -> np.ndarray:
    """-> float32 mono at 44.1 kHz."""
    audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return soxr.resample(audio.mean(1), rate, SAMPLE_RATE)


def evaluate(judge: Judge, wavs: Path) -> tuple[float, dict[str, list[str]]]:
    """-> the share of `<class>-<seed>.wav` files named right, and the names given to each class's files."""
    names: dict[str, list[str]] = defaultdict(list)
    for path in sorted(wavs.glob("*-*.wav")):
        label = path.stem.rsplit("-", 1)[0]
        if label in CLASSES:
            names[label].append(judge.name(read(path)))
    if not names:
        raise SystemExit(f"{wavs} has no <class>-<seed>.wav of the classes {', '.join(CLASSES)}")
    right = [name == label for label, given in names.items() for name in given]
    return float(np.mean(right)), dict(names)


def figure(assets: Path, wavs: Path, path: Path) -> None:
    """Log-mel pictures of six classes: a real clip behind the decoder beside two generated ones."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    recordings, buffers, filters = load(assets), pretransform(), mel_filters()
    rng = np.random.default_rng(3)
    plot, axes = pyplot.subplots(len(FIGURE_CLASSES), 3, figsize=(9, 10), sharex=True, sharey=True)
    for row, label in zip(axes, FIGURE_CLASSES):
        real = augment(label, [r for r in recordings if r.label == label], rng)[0]
        sounds = [("real, decoded", through_decoder(real, buffers, filters))]
        generated = sorted(wavs.glob(f"{label}-*.wav"))[:2]
        sounds += [(f"generated, seed {path.stem.rpartition('-')[2]}", read(path)) for path in generated]
        for axis, (title, sound) in zip(row, sounds):
            sound = np.pad(sound[:CLIP], (0, max(0, CLIP - len(sound))))
            mel = log_mel(sound / np.abs(sound).max(), filters)
            extent = (0, CLIP / SAMPLE_RATE, 0, mel.shape[1])
            axis.imshow(mel.T, origin="lower", aspect="auto", vmin=-2.3, vmax=5, extent=extent)
            axis.set_title(f"{label}: {title}", fontsize=8)
        row[0].set_ylabel("mel band", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("seconds", fontsize=8)
    plot.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    plot.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--wavs", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="keep the judge's training features in this .npz")
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    judge = Judge(args.assets, args.cache)
    print(f"held-out real clips named right: {judge.held_out_accuracy:.0%}")
    score, names = evaluate(judge, args.wavs)
    for label, given in names.items():
        print(f"  {label:12} {given.count(label)}/{len(given)}  {' '.join(given)}")
    print(f"{args.wavs}{os.sep}: {score:.1%} of {sum(map(len, names.values()))} named right")
    if args.figure:
        figure(args.assets, args.wavs, args.figure)


if __name__ == "__main__":
    main()
