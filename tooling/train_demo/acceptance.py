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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ..evaluation import birdnet
from .corpus import CLASSES, Recording, load, load_held_out, recordings_by_class
from .decoded import (
    NONE,
    levelled,
    mel_statistics,
    noise,
    pretransform,
    random_latents,
    read,
    resynthesize,
    through_decoder,
)
from .features import SAMPLE_RATE
from .likeness import likeness, shape_of, spectra
from .pool import augment
from .processes import in_processes

Audio = NDArray[np.float32]
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
    """The networks of one process."""

    def __init__(self) -> None:
        self._events, self._embedding = birdnet.open_embedder(), birdnet.open_embedding()

    def hear(self, label: str, audio: Audio) -> Heard:
        """audio [samples] at 44.1 kHz, of any level."""
        audio = levelled(audio)
        embedding = self._embedding.embed(audio[None], SAMPLE_RATE).mean(axis=0)
        dog = self._events.event_scores(audio[None], SAMPLE_RATE)["Dog"]
        return Heard(label, (mel_statistics(audio), embedding), dog, shape_of(audio))


# -------------------- clips and those who hear them


class Listener:
    """What one process works with: recordings by class, and ears."""

    def __init__(self, recordings: Sequence[Recording]) -> None:
        self.own, self.ears = recordings_by_class(recordings), Ears()


def real(listener: Listener, task: tuple[str, int]) -> Heard:
    """A class (or NONE) and a number -> a real clip of it, augmented as the training's were and decoded."""
    label, index = task
    rng = np.random.default_rng((20_000, index, (*CLASSES, NONE).index(label)))
    if label != NONE:
        audio = through_decoder(augment(label, listener.own[label], rng)[0])
    elif index % 2:
        audio = through_decoder(noise(rng))
    else:
        audio = resynthesize(random_latents(rng, len(pretransform()["scale"])))
    return listener.ears.hear(label, audio)


def generated(listener: Listener, path: Path) -> Heard:
    """`<label>-<seed>.wav` as it is."""
    return listener.ears.hear(path.stem.rpartition("-")[0], read(path))


def real_clips(recordings: list[Recording]) -> tuple[list[Heard], list[Heard]]:
    """Of every class and of none: JUDGED that judges are trained on, UNSEEN other draws of the same recordings."""
    drawn = [(label, index) for label in (*CLASSES, NONE) for index in range(JUDGED + UNSEEN)]
    heard = list(zip(in_processes(real, drawn, partial(Listener, recordings)), drawn))
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
    drawn = {label: [clip.shape for clip in clips.real if clip.label == label] for label in labels}
    shapes = {label: spectra(those) for label, those in drawn.items()}

    def near(heard: Sequence[Heard]) -> str:
        values = [likeness(clip.shape, shapes[clip.label]) for clip in heard if clip.label in known]
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
    return [(label, i) for label, own in recordings_by_class(held_out).items() for i in range(PER_SOURCE * len(own))]


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
    made = list(in_processes(generated, wavs, partial(Listener, [])))
    other = list(in_processes(real, draws_of(held_out), partial(Listener, held_out)))
    known, unseen = real_clips(recordings)
    show(table(Clips(real=known, unseen=unseen, foreign=other, generated=made)), args.output)


if __name__ == "__main__":
    main()
