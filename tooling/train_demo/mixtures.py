"""Whether a prompt of two sounds gives both: generated mixtures beside real ones, as machines hear them.

    python -m dit_trt.tooling.train_demo.clips --output wavs --pairs --seeds 4
    python -m dit_trt.tooling.train_demo.mixtures --assets assets --wavs wavs --output mixtures.md

A judge has a logistic regression a class, trained on real clips of one sound and real mixtures of two (made as the
training's were, behind the demo's decoder): is it heard? It hears both when its two likeliest classes are the pair: a
forced choice, so beside generated clips it hears other real mixtures of the same pairs (other draws of the recordings
that trained it), and, where it should not hear both, real clips of either sound alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from .acceptance import JUDGES, Heard, Listener, arguments, generated, real_clips, regression, show
from .captions import PAIR_PROMPTS
from .corpus import CLASSES, load
from .decoded import NONE, through_decoder
from .pool import augment_pair, other_than
from .processes import in_processes

MIXTURES, OF_A_PAIR = 1024, 4  # real ones: that train the judges; of each pair that test them


def pair_of(label: str) -> tuple[str, ...]:
    """`dog+rain` -> both; a class alone -> itself; no sound -> none."""
    return () if label == NONE else tuple(label.split("+"))


def mixture(listener: Listener, task: tuple[str, int]) -> Heard:
    """`dog+rain` and a number -> a real mixture, made as the training's were and decoded."""
    label, index = task
    rng = np.random.default_rng((30_000, index))
    first, second = pair_of(label)
    clip = augment_pair((first, second), (listener.own[first], listener.own[second]), rng)[0]
    return listener.ears.hear(label, through_decoder(clip))


def random_pairs(count: int) -> list[str]:
    """Of any first sound, and of a second as the training drew it."""
    rng = np.random.default_rng(40_000)
    firsts = [str(first) for first in rng.choice(CLASSES, count)]
    return [f"{first}+{other_than(first, rng)}" for first in firsts]


class Judge:
    """What is heard in a clip, by one kind of features: trained on clips whose label is a class, a pair or NONE."""

    def __init__(self, index: int, clips: Sequence[Heard]):
        self._index, self._classes = index, np.array(CLASSES)
        self._model = make_pipeline(StandardScaler(), OneVsRestClassifier(regression()))
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

    controls = [[(clip, pair) for pair in pairs for clip in alone[pair[side]]] for side in (0, 1)]
    lines = [f"| both heard, at least one | {' | '.join(JUDGES)} |", "|---" * (1 + len(JUDGES)) + "|"]
    for what, heard in (
        ("generated mixtures", [(clip, pair_of(clip.label)) for clip in made]),
        ("real mixtures of the same pairs", [(clip, pair_of(clip.label)) for clip in others]),
        ("real clips of the first alone", controls[0]),
        ("real clips of the second alone", controls[1]),
    ):
        lines.append(f"| {what} ({len(heard)}) | {share(counts(*zip(*heard)))} |")
    heads = ["both heard", *(f"{name}: generated, real, either alone" for name in JUDGES)]
    lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for pair in pairs:
        here = [[clip for clip in clips if pair_of(clip.label) == pair] for clips in (made, others)]
        here.append([clip for name in pair for clip in alone[name]])
        cells = [
            ", ".join(f"{(judge.heard(clips, [pair] * len(clips)) == 2).sum()} of {len(clips)}" for clips in here)
            for judge in judges
        ]
        lines.append(f"| {' and '.join(pair)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    args = arguments(__doc__, "<class>+<class>-<seed>.wav").parse_args()
    wavs = [
        path for path in sorted(args.wavs.glob("*+*-*.wav")) if pair_of(path.stem.rpartition("-")[0]) in PAIR_PROMPTS
    ]
    if not wavs:
        raise SystemExit(f"{args.wavs} has no mixtures; make them with clips --pairs --output {args.wavs}")
    recordings = load(args.assets)
    made = list(in_processes(generated, wavs, partial(Listener, [])))
    known, unseen = real_clips(recordings)
    trained = [(label, index) for index, label in enumerate(random_pairs(MIXTURES))]
    labels = dict.fromkeys(clip.label for clip in made)
    tested = [(label, index) for label in labels for index in range(OF_A_PAIR)]
    tasks = [*trained, *((label, MIXTURES + index) for index, (label, _) in enumerate(tested))]
    mixtures = list(in_processes(mixture, tasks, partial(Listener, recordings)))
    alone = {label: [clip for clip in unseen if clip.label == label] for label in CLASSES}
    show(table([*known, *mixtures[:MIXTURES]], made, mixtures[MIXTURES:], alone), args.output)


if __name__ == "__main__":
    main()
