"""Whether a prompt of two sounds gives both: generated mixtures beside real ones, as machines hear them.

    python -m dit_trt.tooling.train_demo.clips --output wavs --pairs --seeds 4
    python -m dit_trt.tooling.train_demo.mixtures --assets assets --wavs wavs --output mixtures.md

A judge has a logistic regression a class, trained on real clips of one sound and real mixtures of two (as the training
made them, behind the demo's decoder): is it heard? It hears both when its two likeliest classes are the pair. Beside
generated clips it hears other real mixtures of the same pairs, and, where it should not hear both, real clips of their
first sound alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from .acceptance import JUDGED, JUDGES, UNSEEN, Heard, generated, in_processes, real, worker
from .captions import PAIR_PROMPTS
from .corpus import CLASSES, load
from .decoded import NONE, through_decoder
from .pool import BACKGROUNDS, augment_pair

MIXTURES, OF_A_PAIR = 1024, 4  # real ones: that train the judges; of each pair that test them


def pair_of(label: str) -> tuple[str, ...]:
    """`dog+rain` -> both; a class alone -> itself; no sound -> none."""
    return () if label == NONE else tuple(label.split("+"))


def mixture(task: tuple[str, int]) -> Heard:
    """`dog+rain`, or `` for a random pair, and a number -> a real mixture, made as the training's were and decoded."""
    label, index = task
    ears, own, buffers, filters = worker()
    rng = np.random.default_rng((30_000 + bool(label), index))
    if not label:
        first = str(rng.choice(CLASSES))
        others = BACKGROUNDS if rng.random() < 0.7 else CLASSES
        label = f"{first}+{rng.choice([other for other in others if other != first])}"
    first, second = pair_of(label)
    clip = augment_pair((first, second), (own[first], own[second]), rng)[0]
    return ears.hear(label, through_decoder(clip, buffers, filters))


class Judge:
    """What is heard in a clip, by one kind of features: trained on clips whose label is a class, a pair or NONE."""

    def __init__(self, index: int, clips: Sequence[Heard]):
        self._index, self._classes = index, np.array(CLASSES)
        regression = OneVsRestClassifier(LogisticRegression(C=0.1, max_iter=2000))
        self._model = make_pipeline(StandardScaler(), regression)
        there = [[name in pair_of(clip.label) for name in CLASSES] for clip in clips]
        self._model.fit([clip.features[index] for clip in clips], np.array(there, int))

    def heard(self, clips: Sequence[Heard], pairs: Sequence[tuple[str, ...]]) -> NDArray[np.int64]:
        """How many of each clip's pair are among its two likeliest classes: 0, 1 or 2."""
        likely = np.argsort(-self._model.predict_proba([clip.features[self._index] for clip in clips]), axis=1)[:, :2]
        return np.array([len({*self._classes[row]} & {*pair}) for row, pair in zip(likely, pairs, strict=True)])


def table(
    known: Sequence[Heard], made: Sequence[Heard], others: Sequence[Heard], alone: Mapping[str, Sequence[Heard]]
) -> str:
    """Both in Markdown. known: what trains the judges; made, others: mixtures, generated and real; alone: by class."""
    judges = [Judge(index, known) for index in range(len(JUDGES))]
    pairs = list(dict.fromkeys(pair_of(clip.label) for clip in made))

    def counts(clips: Sequence[Heard], of: Sequence[tuple[str, ...]]) -> list[NDArray[np.int64]]:
        return [judge.heard(clips, of) for judge in judges]

    def share(found: Sequence[NDArray[np.int64]]) -> str:
        return " | ".join(f"{(each == 2).mean():.0%}, {(each >= 1).mean():.0%}" for each in found)

    first = [(clip, pair) for pair in pairs for clip in alone[pair[0]]]
    lines = [f"| both heard, at least one | {' | '.join(JUDGES)} |", "|---" * (1 + len(JUDGES)) + "|"]
    for what, clips, of in (
        (f"generated mixtures ({len(made)})", made, [pair_of(clip.label) for clip in made]),
        (f"real mixtures of the same pairs ({len(others)})", others, [pair_of(clip.label) for clip in others]),
        (f"real clips of the first alone ({len(first)})", [clip for clip, _ in first], [pair for _, pair in first]),
    ):
        lines.append(f"| {what} | {share(counts(clips, of))} |")
    lines += [
        "",
        f"| both heard | {' | '.join(f'{name}, real' for name in JUDGES)} |",
        "|---" * (1 + len(JUDGES)) + "|",
    ]
    for pair in pairs:
        cells = []
        for judge in judges:
            here, there = ([clip for clip in clips if pair_of(clip.label) == pair] for clips in (made, others))
            both, of_real = (int((judge.heard(clips, [pair] * len(clips)) == 2).sum()) for clips in (here, there))
            cells.append(f"{both} of {len(here)}, {of_real} of {len(there)}")
        lines.append(f"| {' and '.join(pair)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True, help="what corpus downloaded")
    parser.add_argument("--wavs", type=Path, required=True, help="<class>+<class>-<seed>.wav")
    parser.add_argument("--output", type=Path, help="write the tables to this file, too")
    args = parser.parse_args()
    wavs = [path for path in sorted(args.wavs.glob("*+*-*.wav")) if path.stem.count("+") == 1]
    if not wavs:
        raise SystemExit(f"{args.wavs} has no mixtures; make them with clips --pairs --output {args.wavs}")
    recordings = load(args.assets)
    made = in_processes(generated, wavs, [])
    drawn = [(label, index) for label in (*CLASSES, NONE) for index in range(JUDGED + UNSEEN)]
    singles = in_processes(real, drawn, recordings)
    random_pairs = in_processes(mixture, [("", index) for index in range(MIXTURES)], recordings)
    labels = ["+".join(pair) for pair in PAIR_PROMPTS]
    tasks = [(label, OF_A_PAIR * number + index) for number, label in enumerate(labels) for index in range(OF_A_PAIR)]
    others = in_processes(mixture, tasks, recordings)
    known = [clip for clip, (_, index) in zip(singles, drawn) if index < JUDGED] + random_pairs
    alone = {
        label: [clip for clip, (_, index) in zip(singles, drawn) if clip.label == label and index >= JUDGED]
        for label in CLASSES
    }
    found = table(known, made, others, alone)
    print(found, end="")
    if args.output:
        args.output.write_text(found, "utf-8")


if __name__ == "__main__":
    main()
