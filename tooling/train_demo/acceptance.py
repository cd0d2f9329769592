"""The demo's acceptance test: generated clips beside real ones behind the same decoder, as machines hear both.

    python -m dit_trt.tooling.train_demo.clips --output wavs --seeds 8 --dogs 32
    python -m dit_trt.tooling.train_demo.acceptance --assets assets --wavs wavs --output acceptance.md

Its bars were set before the training: BirdNET's probability of a dog in generated barks is at least half of that in
real ones, and at most 0.05 in everything else; judges that know real clips alone name 70 % of all and 6 of 8 dogs. How
near a clip comes to its class's training recordings (to 32 clips drawn from them as the training's were) is told beside
how near other real clips come. Shares are means over classes.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ..evaluation import birdnet
from .corpus import CLASSES, Recording, load, load_held_out
from .decoded import (
    BANDS,
    NONE,
    mel_statistics,
    noise,
    pretransform,
    random_latents,
    read,
    resynthesize,
    through_decoder,
)
from .features import CLIP, SAMPLE_RATE, log_mel, mel_filters
from .pool import augment, one_thread_each

Audio = NDArray[np.float32]
Made = TypeVar("Made")
JUDGED, UNSEEN, PER_SOURCE = 32, 8, 4  # real clips of a class: that train the judges, that test them; of a source
DOG_BAR, OTHERS_BAR, NAMED_BAR, DOGS_BAR = 0.5, 0.05, 0.7, 0.75
JUDGES = ("log-mel statistics", "BirdNET's embedding")


@dataclass(frozen=True)
class Heard:
    """What is known of one clip: two judges' features, BirdNET's probability of a dog, and its shape in time."""

    label: str
    features: tuple[Audio, Audio]
    dog: float
    shape: Audio


class Ears:
    """The networks and filters of one process."""

    def __init__(self) -> None:
        self._filters = mel_filters()
        self._events, self._embedding = birdnet.open_embedder(), birdnet.open_embedding()

    def hear(self, label: str, audio: Audio) -> Heard:
        """audio [samples] at 44.1 kHz, of any level."""
        audio = np.pad(audio[:CLIP], (0, max(0, CLIP - len(audio))))
        audio = audio / max(float(np.abs(audio).max()), 1e-4)
        embedding = self._embedding.embed(audio[None], SAMPLE_RATE).mean(axis=0)
        dog = self._events.event_scores(audio[None], SAMPLE_RATE)["Dog"]
        features = mel_statistics(audio, self._filters), embedding
        return Heard(label, features, dog, shape_of(audio, self._filters))


def shape_of(audio: Audio, filters: Audio) -> Audio:
    """audio [samples], of any level -> the log-mel spectrogram of its first CLIP, [frames, BANDS], mean 0, norm 1."""
    audio = np.pad(audio[:CLIP], (0, max(0, CLIP - len(audio))))
    mel = log_mel(audio / max(float(np.abs(audio).max()), 1e-4), filters)
    mel = mel.reshape(len(mel), BANDS, -1).mean(axis=2)
    shape = mel - mel.mean()
    return shape / np.linalg.norm(shape)


def likeness(shape: Audio, others: Sequence[Audio]) -> float:
    """The highest correlation of two log-mel spectrograms [frames, bands] at any shift in time (circular)."""
    return nearest(shape, spectra(others))


def spectra(shapes: Sequence[NDArray[np.floating]]) -> NDArray[np.complex64]:
    """What `nearest` looks for the nearest one in."""
    return np.fft.rfft(np.asarray(shapes, np.float32), axis=1).astype(np.complex64)


def nearest(shape: NDArray[np.floating], known: NDArray[np.complex64]) -> float:
    """`likeness` to what `spectra` are of."""
    products = (np.fft.rfft(shape, axis=0) * known.conj()).sum(axis=2)
    return float(np.fft.irfft(products, len(shape), axis=1).max())


# -------------------- real clips, behind the demo's decoder, in as many processes as there are cores


class Worker:
    """What a task of `in_processes` works with: recordings, the decoder, ears (opened by the first that listens)."""

    def __init__(self, recordings: list[Recording]) -> None:
        self.recordings = recordings
        self.own = {label: [r for r in recordings if r.label == label] for label in CLASSES}
        self.buffers, self.filters = pretransform(), mel_filters()

    @cached_property
    def ears(self) -> Ears:
        return Ears()

    def decoded(self, clip: Audio) -> Audio:
        return through_decoder(clip, self.buffers, self.filters)


_work: Worker


def worker() -> Worker:
    """That of this process."""
    return _work


def _start(recordings: list[Recording]) -> None:
    global _work
    _work = Worker(recordings)


def real(task: tuple[str, int]) -> Heard:
    """A class (or NONE) and a number -> a real clip of it, augmented as the training's were and decoded."""
    label, index = task
    work = worker()
    rng = np.random.default_rng((20_000, index, (*CLASSES, NONE).index(label)))
    if label != NONE:
        return work.ears.hear(label, work.decoded(augment(label, work.own[label], rng)[0]))
    if index % 2:
        return work.ears.hear(label, work.decoded(noise(rng)))
    return work.ears.hear(label, resynthesize(random_latents(rng, len(work.buffers["scale"])), work.buffers))


def generated(path: Path) -> Heard:
    """`<label>-<seed>.wav` as it is."""
    return worker().ears.hear(path.stem.rpartition("-")[0], read(path))


def in_processes(task: Callable[[Any], Made], tasks: Sequence, recordings: list[Recording]) -> list[Made]:
    """task of each of `tasks`, in their order; real ones are drawn from `recordings`."""
    spawn = multiprocessing.get_context("spawn")
    with one_thread_each(), spawn.Pool(initializer=_start, initargs=(recordings,)) as pool:
        return pool.map(task, tasks, chunksize=4)


def real_clips(recordings: list[Recording]) -> tuple[list[Heard], list[Heard]]:
    """Of every class and of none: JUDGED that judges are trained on, UNSEEN other draws of the same recordings."""
    drawn = [(label, index) for label in (*CLASSES, NONE) for index in range(JUDGED + UNSEEN)]
    heard = list(zip(in_processes(real, drawn, recordings), drawn))
    judged = [clip for clip, (_, index) in heard if index < JUDGED]
    return judged, [clip for clip, (_, index) in heard if index >= JUDGED]


# -------------------- the table


def regression() -> LogisticRegression:
    """Every judge's, behind standardised features."""
    return LogisticRegression(C=0.1, max_iter=2000)


@dataclass(frozen=True)
class Clips:
    """real: what trains the judges; unseen: other draws of the same recordings; foreign: of held-out sources."""

    real: Sequence[Heard]
    unseen: Sequence[Heard]
    foreign: Sequence[Heard]
    generated: Sequence[Heard]


def accept(clips: Clips) -> tuple[list[tuple[str, str, str, str]], Mapping[str, list[str]]]:
    """-> rows (what, bar, result, met or missed; the last is empty where there is no bar); by class, a row of text."""
    rows: list[tuple[str, str, str, str]] = []

    def row(what: str, bar: str, result: str, met: bool | None = None) -> None:
        rows.append((what, bar, result, "" if met is None else "met" if met else "**missed**"))

    def dogs(heard: Sequence[Heard]) -> NDArray[np.float64]:
        return np.array([each.dog for each in heard if each.label == "dog"])

    made, real, foreign = (dogs(heard) for heard in (clips.generated, (*clips.real, *clips.unseen), clips.foreign))
    row(
        f"BirdNET's Dog, generated barks ({len(made)}), beside real ones behind the decoder ({len(real)})",
        f">= {DOG_BAR:.0%} of theirs",
        f"{made.mean():.3f} against {real.mean():.3f}: {made.mean() / real.mean():.0%}",
        made.mean() >= DOG_BAR * real.mean(),
    )
    row(f"the same, real barks of held-out sources ({len(foreign)})", "", f"{foreign.mean():.3f}")
    labels = list(dict.fromkeys(each.label for each in clips.generated))
    by_class = {label: [each for each in clips.generated if each.label == label] for label in labels}
    dog = {label: float(np.mean([each.dog for each in heard])) for label, heard in by_class.items() if label != "dog"}
    over = {label: score for label, score in dog.items() if score > OTHERS_BAR}
    said = ", ".join(f"{label} {score:.2f}" for label, score in sorted(over.items(), key=lambda item: -item[1]))
    worst = max(dog, key=lambda label: dog[label])
    found = f"at most {dog[worst]:.3f} ({worst})" if not over else f"{len(dog) - len(over)} of {len(dog)}; {said}"
    row(f"BirdNET's Dog in the other {len(dog)} classes, each one's mean", f"<= {OTHERS_BAR}", found, not over)
    real_dog = {label: np.mean([each.dog for each in clips.real if each.label == label]) for label in over or [worst]}
    row("- the same, real ones of these", "", ", ".join(f"{label} {score:.2f}" for label, score in real_dog.items()))
    known = {each.label for each in clips.foreign}
    text: dict[str, list[str]] = {label: [] for label in labels}
    for index, name in enumerate(JUDGES):
        judge = make_pipeline(StandardScaler(), regression())
        judge.fit([each.features[index] for each in clips.real], [each.label for each in clips.real])

        def right(heard: Sequence[Heard], judge: object = judge, index: int = index) -> NDArray[np.bool_]:
            named = judge.predict([each.features[index] for each in heard])  # type: ignore[attr-defined]
            return named == np.array([each.label for each in heard])

        def share_of(heard: Sequence[Heard]) -> float:
            some = {label: [each for each in heard if each.label == label] for label in (*CLASSES, NONE)}
            return float(np.mean([right(each).mean() for each in some.values() if each]))

        share, own = share_of(clips.generated), right(by_class["dog"])
        row(f"named right by the judge on {name}, generated", f">= {NAMED_BAR:.0%}", f"{share:.1%}", share >= NAMED_BAR)
        row("- of them dogs", "6 of 8", f"{own.sum()} of {len(own)}", own.mean() >= DOGS_BAR)
        of_known = share_of([each for each in clips.generated if each.label in known])
        row(
            f"- the {len(known)} classes with a held-out source",
            f">= {NAMED_BAR:.0%}",
            f"{of_known:.1%}",
            of_known >= NAMED_BAR,
        )
        row("- real clips: other draws of the same recordings", "", f"{share_of(clips.unseen):.1%}")
        row("- real clips of held-out sources", "", f"{share_of(clips.foreign):.1%}")
        for label in labels:
            own = right(by_class[label])
            text[label].append(f"{own.sum()} of {len(own)}")
    shapes = {label: [each.shape for each in clips.real if each.label == label] for label in CLASSES}

    def near(heard: Sequence[Heard]) -> str:
        values = [likeness(each.shape, shapes[each.label]) for each in heard if each.label in known]
        return f"{np.median(values):.2f} ({np.quantile(values, 0.1):.2f} to {np.quantile(values, 0.9):.2f})"

    what = f"likeness to the nearest of {JUDGED} draws of the class's training recordings, median (p10 to p90)"
    row(f"{what}, the {len(known)} classes: generated", "", near(clips.generated))
    row("- other draws of the same recordings", "", near(clips.unseen))
    row("- real clips of held-out sources", "", near(clips.foreign))
    for label in labels:
        text[label].append(f"{np.mean([each.dog for each in by_class[label]]):.3f}")
        text[label].append(f"{np.median([likeness(each.shape, shapes[label]) for each in by_class[label]]):.2f}")
    return rows, text


def table(clips: Clips) -> str:
    """Both tables in Markdown."""
    rows, by_class = accept(clips)
    lines = ["| | bar | result | |", "|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows), ""]
    heads = ["class", *(f"named right: {name}" for name in JUDGES), "BirdNET's Dog", "likeness"]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines += [f"| {' | '.join((label, *texts))} |" for label, texts in by_class.items()]
    return "\n".join(lines) + "\n"


def arguments(description: str | None, names: str) -> argparse.ArgumentParser:
    """assets, wavs and output; names: of the files in wavs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True, help="what corpus downloaded")
    parser.add_argument("--wavs", type=Path, required=True, help=names)
    parser.add_argument("--output", type=Path, help="write the tables to this file, too")
    return parser


def draws_of(held_out: Sequence[Recording]) -> list[tuple[str, int]]:
    """Tasks of `real`: PER_SOURCE clips for each recording of a held-out source."""
    sources = {label: sum(r.label == label for r in held_out) for label in CLASSES}
    return [(label, index) for label, count in sources.items() for index in range(PER_SOURCE * count)]


def show(text: str, output: Path | None) -> None:
    print(text, end="")
    if output:
        output.write_text(text, "utf-8")


def wavs_of_classes(folder: Path) -> list[Path]:
    """Its `<class>-<seed>.wav`, sorted."""
    return [path for path in sorted(folder.glob("*-*.wav")) if path.stem.rpartition("-")[0] in CLASSES]


def main() -> None:
    args = arguments(__doc__, "<class>-<seed>.wav").parse_args()
    wavs = wavs_of_classes(args.wavs)
    if not any(path.stem.startswith("dog-") for path in wavs):
        raise SystemExit(f"{args.wavs} has no dog-<seed>.wav; make its clips with clips --output {args.wavs}")
    recordings, held_out = load(args.assets), load_held_out(args.assets)
    made = in_processes(generated, wavs, [])
    other = in_processes(real, draws_of(held_out), held_out)
    known, unseen = real_clips(recordings)
    show(table(Clips(real=known, unseen=unseen, foreign=other, generated=made)), args.output)


if __name__ == "__main__":
    main()
