"""Real clips through the demo's decoders, Griffin-Lim and trained ones: what is lost, as a Markdown table.

    python -m dit_trt.tooling.train_demo.compare_decoders --pool other.npz --decoder-run run [--clips 6] [--noise 0.1]

The pool (`audio` int16 [clips, samples], `first` [clips] into CLASSES) is best one of another seed than that trained
on. Latents are those of the first run's PCA. Three numbers a decoder: multi-resolution STFT distance and log-spectral
distance to the original, both smaller is better, and BirdNET's probability of the true class where it knows one.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...runtime.griffin_lim import stft
from ..evaluation.birdnet import BirdNET, open_embedder
from ..evaluation.waveform import multi_resolution_stft
from .corpus import CLASSES
from .decoders import Audio, Buffers, Decode, buffers_of, by_griffin_lim, by_network, open_run
from .features import HOP, N_FFT, SAMPLE_RATE, encode, log_mel, mel_filters

ITERATIONS = 64
FLOOR_DB = 80.0
"""Below the original's loudest bin, differences are not counted."""
KNOWN_AS = {
    "dog": ("Dog",),
    "siren": ("Siren",),
    "rooster": ("Red Junglefowl",),
    "owl": (" Owl", "Owlet"),
    "duck": ("Mallard", " Duck"),
    "crow": (" Crow", " Raven"),
    "frog": ("Frog", "frog", " Toad"),
    "gunshot": ("Gun",),
    "helicopter": ("Engine",),
    "car": ("Engine",),
    "laughter": ("Human vocal",),
}
"""Endings of BirdNET's labels that are right for a class."""


def log_spectral_distance(expected: Audio, found: Audio) -> float:
    """dB: the RMS over bins of the difference of log magnitudes, mean over the frames; [n * HOP] each."""
    a, b = (
        np.abs(stft(audio[: len(audio) // HOP * HOP], N_FFT, HOP)).astype(np.float64) for audio in (expected, found)
    )
    floor = a.max() * 10 ** (-FLOOR_DB / 20)
    difference = 20 * np.log10(np.maximum(a, floor) / np.maximum(b, floor))
    return float(np.sqrt(np.square(difference).mean(axis=1)).mean())


def right_score(birdnet: BirdNET, audio: Audio, label: str) -> float | None:
    """Probability of the likeliest of BirdNET's labels for this class, of the window where it is; None: it has none."""
    if label not in KNOWN_AS:
        return None
    logits = birdnet.embed(audio[None], SAMPLE_RATE).max(axis=0)
    right = [name.endswith(KNOWN_AS[label]) for name in birdnet.labels]
    return float(1 / (1 + np.exp(-logits[right].max())))


def compare(
    audio: NDArray[np.int16],
    labels: NDArray[np.integer],
    buffers: Buffers,
    decoders: Mapping[str, Decode],
    birdnet: BirdNET | None,
    noise: float = 0.0,
) -> dict[str, dict[str, list[float | None]]]:
    """-> class -> column -> its clips' numbers. noise: of the latents, in standard deviations of each channel."""
    filters, rng = mel_filters(), np.random.default_rng(0)
    spread = (buffers["scale"] / np.sqrt(np.mean(buffers["scale"] ** 2)))[:, None]
    table: dict[str, dict[str, list[float | None]]] = {}
    for clip, index in zip(audio, labels):
        label, original = CLASSES[index], clip.astype(np.float32) / 32767
        latents = encode(log_mel(original, filters), buffers)
        latents += np.float32(noise) * spread * rng.standard_normal(latents.shape, np.float32)
        row = table.setdefault(label, {})
        if birdnet is not None:
            row.setdefault("original BirdNET", []).append(right_score(birdnet, original, label))
        for name, decode in decoders.items():
            sound = decode(latents)
            row.setdefault(f"{name} STFT", []).append(multi_resolution_stft(original[None], sound[None]))
            row.setdefault(f"{name} LSD, dB", []).append(log_spectral_distance(original, sound))
            if birdnet is not None:
                row.setdefault(f"{name} BirdNET", []).append(right_score(birdnet, sound, label))
    return table


def markdown(table: Mapping[str, Mapping[str, list[float | None]]]) -> str:
    columns = list(next(iter(table.values())))
    columns.sort(key=lambda column: ("STFT", "LSD, dB", "BirdNET").index(column.split(" ", 1)[1]))
    lines = ["| class | clips | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 2)]
    means = {label: [_mean(row[column]) for column in columns] for label, row in table.items()}
    for label, row in table.items():
        cells = ["" if mean is None else f"{mean:.2f}" for mean in means[label]]
        lines.append(f"| {label} | {len(row[columns[0]])} | " + " | ".join(cells) + " |")
    overall = [_mean([mean[column] for mean in means.values()]) for column in range(len(columns))]
    lines.append(
        "| mean of classes | | " + " | ".join("" if mean is None else f"{mean:.3f}" for mean in overall) + " |"
    )
    return "\n".join(lines)


def _cells(means: list[float | None]) -> str:
    return " | ".join("" if mean is None else f"{mean:.3f}" for mean in means) + " |"


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, required=True, help=".npz of audio and first")
    parser.add_argument("--decoder-run", type=Path, action="append", required=True, help="may be given again")
    parser.add_argument("--clips", type=int, default=6, help="of each class, at most")
    parser.add_argument("--classes", help="comma-separated; default: all that the pool holds")
    parser.add_argument("--noise", type=float, default=0.0, help="of the latents, in standard deviations")
    parser.add_argument("--no-birdnet", action="store_true")
    args = parser.parse_args()
    with np.load(args.pool) as archive:
        audio = archive["audio"]
        labels = archive["first"][: len(audio)]
        alone = archive["second"][: len(audio)] < 0 if "second" in archive else np.ones(len(audio), bool)
    wanted = args.classes.split(",") if args.classes else CLASSES
    chosen = [np.flatnonzero((labels == CLASSES.index(label)) & alone)[: args.clips] for label in wanted]
    clips = np.concatenate(chosen)
    if not len(clips):
        raise SystemExit(f"{args.pool} has no clips of {', '.join(wanted)}")
    runs = {run.name: open_run(run) for run in args.decoder_run}
    buffers = buffers_of(next(iter(runs.values())))
    decoders = {"Griffin-Lim": by_griffin_lim(buffers, ITERATIONS)}
    decoders |= {name: by_network(decoder) for name, decoder in runs.items()}
    birdnet = None if args.no_birdnet else open_embedder()
    print(markdown(compare(audio[clips], labels[clips], buffers, decoders, birdnet, args.noise)))


if __name__ == "__main__":
    main()
