"""What the acceptance test compares with: real clips and noise behind the demo's decoder, their statistics, a picture.

    python -m dit_trt.tooling.train_demo.decoded --assets assets --wavs wavs --figure docs/demo-spectrograms.png

The folder holds `<class>-<seed>.wav`. Noise is a class of its own to a judge, so that it is not given the name of the
nearest one.
"""

from __future__ import annotations

import argparse
import json
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
import soxr
from safetensors.numpy import load_file

from ...runtime.griffin_lim import griffin_lim
from .corpus import load, recordings_by_class
from .features import CLIP, HOP, N_FFT, SAMPLE_RATE, decode_magnitude, encode, log_mel
from .pool import augment

DEMO = Path(__file__).parents[2] / "models" / "demo"
WEIGHTS = DEMO / "model.safetensors"
NONE = "none"
BANDS = 40
FIGURE_CLASSES = ("dog", "cat", "rooster", "frog", "rain", "siren")


@cache
def pretransform() -> dict[str, np.ndarray]:
    """The demo's `pretransform.` buffers, float32."""
    state = load_file(WEIGHTS)
    return {
        name.removeprefix("pretransform."): value.astype(np.float32)
        for name, value in state.items()
        if name.startswith("pretransform.")
    }


def levelled(audio: np.ndarray) -> np.ndarray:
    """audio [samples] of any level -> [CLIP], its first samples, with silence behind a shorter one; its peak is 1."""
    audio = np.pad(audio[:CLIP], (0, max(0, CLIP - len(audio))))
    return audio / max(float(np.abs(audio).max()), 1e-4)


def mel_statistics(audio: np.ndarray) -> np.ndarray:
    """audio [samples] at 44.1 kHz, any loudness -> statistics of its log-mel and of its rhythm."""
    mel = log_mel(levelled(audio))
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


def resynthesize(latents: np.ndarray) -> np.ndarray:
    """The product's own way to sound."""
    return griffin_lim(decode_magnitude(latents, pretransform()), N_FFT, HOP, iterations())


@cache
def iterations() -> int:
    config = json.loads((DEMO / "model_config.json").read_text("utf-8"))
    return int(config["model"]["pretransform"]["config"]["griffin_lim_iterations"])


def through_decoder(clip: np.ndarray) -> np.ndarray:
    return resynthesize(encode(log_mel(clip), pretransform()))


def read(path: Path) -> np.ndarray:
    """-> float32 mono at 44.1 kHz."""
    audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return soxr.resample(audio.mean(1), rate, SAMPLE_RATE)


def figure(assets: Path, wavs: Path, path: Path) -> None:
    """Log-mel pictures of six classes: a real clip behind the decoder beside two generated ones."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    recordings = recordings_by_class(load(assets))
    rng = np.random.default_rng(3)
    plot, axes = pyplot.subplots(len(FIGURE_CLASSES), 3, figsize=(9, 10), sharex=True, sharey=True)
    for row, label in zip(axes, FIGURE_CLASSES):
        sounds = [("real, decoded", through_decoder(augment(label, recordings[label], rng)[0]))]
        generated = sorted(wavs.glob(f"{label}-*.wav"))[:2]
        sounds += [(f"generated, seed {path.stem.rpartition('-')[2]}", read(path)) for path in generated]
        for axis, (title, sound) in zip(row, sounds):
            mel = log_mel(levelled(sound))
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
    parser.add_argument("--figure", type=Path, required=True)
    args = parser.parse_args()
    figure(args.assets, args.wavs, args.figure)


if __name__ == "__main__":
    main()
