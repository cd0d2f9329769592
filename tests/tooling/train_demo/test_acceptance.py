"""The acceptance test of the demo model: what it says of clips that are as the real ones, and of those that are not."""

from __future__ import annotations

import numpy as np
import pytest

from dit_trt.tooling.train_demo.acceptance import Clips, Heard, accept, table
from dit_trt.tooling.train_demo.corpus import CLASSES
from dit_trt.tooling.train_demo.decoded import mel_statistics
from dit_trt.tooling.train_demo.features import CLIP
from dit_trt.tooling.train_demo.likeness import likeness, spectra

LABELS = CLASSES[:4]


def heard(label: str, seed: int, like: str | None = None) -> Heard:
    """A clip that the judges hear as one of `like` (default: of its own class)."""
    own = np.random.default_rng(CLASSES.index(like or label)).standard_normal((50, 8)).astype(np.float32)
    clip = own + 0.3 * np.random.default_rng((seed, 7)).standard_normal(own.shape).astype(np.float32)
    shape = clip - clip.mean()
    dog = 0.8 if (like or label) == "dog" else 0.01
    return Heard(label, (clip.ravel()[:24], clip.ravel()[-24:]), dog, shape / np.linalg.norm(shape))


def clips(like: str | None = None) -> Clips:
    def some(first: int, count: int, other: str | None = None) -> list[Heard]:
        return [heard(label, first + i, other) for label in LABELS for i in range(count)]

    return Clips(some(0, 12), some(100, 4), some(200, 4), some(300, 4, like))


def test_clips_like_the_real_ones_pass():
    rows, by_class = accept(clips())
    barred = [row for row in rows if row[1]]
    assert len(barred) == 8 and all(row[3] == "met" for row in barred)
    assert by_class.keys() == set(LABELS) and by_class["dog"][:2] == ["4 of 4", "4 of 4"]


def test_clips_that_are_all_cats_fail():
    rows, by_class = accept(clips(like="cat"))
    failed = [row for row in rows if row[1] and row[3] == "**missed**"]
    assert len(failed) == 7  # all but that nothing else is a dog
    assert by_class["cat"][0] == "4 of 4" and by_class["dog"][0] == "0 of 4"


def test_other_classes_that_bark_are_named():
    rows, _ = accept(clips(like="dog"))
    [row] = [row for row in rows if "other 3 classes" in row[0]]
    assert row[3] == "**missed**" and "cat 0.80" in row[2]


def test_the_tables_are_whole():
    lines = table(clips()).splitlines()
    assert {line.count("|") for line in lines[: lines.index("")]} == {5}
    assert {line.count("|") for line in lines[lines.index("") + 1 :]} == {6}


def test_likeness_knows_a_clip_at_any_shift_and_no_other():
    one, other = heard("dog", 0).shape, heard("cat", 0).shape
    assert likeness(np.roll(one, 17, axis=0), spectra([other, one])) == pytest.approx(1, abs=1e-5)
    assert likeness(one, spectra([other])) < 0.3


def test_mel_statistics_do_not_hear_the_level():
    audio = np.random.default_rng(0).standard_normal(CLIP // 2).astype(np.float32)
    loud, quiet = (mel_statistics(audio * gain) for gain in (1.0, 0.01))
    np.testing.assert_allclose(loud, quiet, atol=1e-4)
