"""What `mixtures` says of prompts of two sounds: where both are heard, and where one is."""

from __future__ import annotations

import numpy as np
import pytest

from dit_trt.tooling.train_demo.acceptance import Heard
from dit_trt.tooling.train_demo.captions import PAIR_PROMPTS
from dit_trt.tooling.train_demo.corpus import CLASSES
from dit_trt.tooling.train_demo.decoded import NONE
from dit_trt.tooling.train_demo.mixtures import pair_of, random_pairs, table

PAIRS = (("dog", "rain"), ("cat", "fire"), ("owl", "wind"))
WIDTH = 2 * len(CLASSES)


def heard(label: str, seed: int, sounds: tuple[str, ...] | None = None) -> Heard:
    """A clip in which the judges hear `sounds` (default: those of its label)."""
    features = 0.1 * np.random.default_rng(seed).standard_normal(WIDTH).astype(np.float32)
    for name in pair_of(label) if sounds is None else sounds:
        features[[CLASSES.index(name), len(CLASSES) + CLASSES.index(name)]] += 1
    return Heard(label, (features, features[::-1].copy()), 0.0, features)


def lines_of(made: list[Heard]) -> list[list[str]]:
    rng = np.random.default_rng(0)
    singles = [heard(label, 100 + index) for index in range(6) for label in (*CLASSES, NONE)]
    mixed = ["+".join(rng.choice(CLASSES, 2, replace=False)) for _ in range(200)]
    known = singles + [heard(label, 1000 + index) for index, label in enumerate(mixed)]
    others = [heard("+".join(pair), 2000 + index) for pair in PAIRS for index in range(3)]
    alone = {label: [heard(label, 3000 + index) for index in range(4)] for label in CLASSES}
    return [line.strip("| ").split(" | ") for line in table(known, made, others, alone).splitlines()]


def clips(sounds: dict[tuple[str, str], tuple[str, ...]]) -> list[Heard]:
    return [heard("+".join(pair), 4000 + i, sounds.get(pair)) for pair in PAIRS for i in range(5)]


def test_both_sounds_are_heard_where_they_are_and_not_in_one_alone():
    found = lines_of(clips({}))
    assert found[2] == ["generated mixtures (15)", "100%, 100%", "100%, 100%"]
    assert found[3] == ["real mixtures of the same pairs (9)", "100%, 100%", "100%, 100%"]
    assert [found[4][0], found[5][0]] == ["real clips of the first alone (12)", "real clips of the second alone (12)"]
    assert max(int(cell.partition("%")[0]) for row in found[4:6] for cell in row[1:]) < 30
    assert [row[0] for row in found[9:]] == [" and ".join(pair) for pair in PAIRS]
    assert all(cell.startswith("5 of 5, 3 of 3, ") and cell.endswith(" of 8") for row in found[9:] for cell in row[1:])


@pytest.mark.parametrize(("sounds", "least_one"), [(("dog",), True), (("piano", "bell"), False)])
def test_a_clip_that_lacks_a_sound_is_counted(sounds: tuple[str, ...], least_one: bool):
    found = lines_of(clips({("dog", "rain"): sounds}))
    both, one = (int(share.strip(" %")) for share in found[2][1].split(","))
    assert both <= 80 and (one == 100) is least_one
    assert int(found[9][1].partition(" ")[0]) <= 2 and found[10][1].startswith("5 of 5, 3 of 3, ")


def test_the_prompts_are_plain_and_of_known_classes():
    assert PAIR_PROMPTS["dog", "rain"] == "dog barking while rain falling"
    assert all(first in CLASSES and second in CLASSES and first != second for first, second in PAIR_PROMPTS)
    assert all(first != second for first, second in map(pair_of, random_pairs(50)))
