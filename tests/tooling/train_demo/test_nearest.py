"""How `nearest` tells clips learned by heart from those that are not, and that its pool is the training's."""

from __future__ import annotations

import numpy as np
import pytest

from dit_trt.tooling.train_demo import acceptance, nearest
from dit_trt.tooling.train_demo.acceptance import likeness, shape_of
from dit_trt.tooling.train_demo.corpus import CLASSES, Recording
from dit_trt.tooling.train_demo.features import SAMPLE_RATE
from dit_trt.tooling.train_demo.nearest import KINDS, Drawn, table
from dit_trt.tooling.train_demo.pool import build_latents

HELD_OUT = ("dog", "cat")


def shape(label: str, seed: int) -> np.ndarray:
    return np.random.default_rng((CLASSES.index(label), seed)).standard_normal((50, 8)).astype(np.float16)


def near(label: str, seed: int) -> Drawn:
    """A clip of the pool, later in time and blurred a little."""
    blur = 0.1 * np.random.default_rng(seed).standard_normal((50, 8))
    return normal(label, np.roll(shape(label, seed), 9, axis=0) + blur)


def normal(label: str, values: np.ndarray) -> Drawn:
    values = np.float32(values) - np.float32(values).mean()
    return label, (values / np.linalg.norm(values)).astype(np.float16)


def rows_of(made: list[Drawn]) -> list[list[str]]:
    pool = [normal(label, shape(label, seed)) for label in CLASSES for seed in range(4)]
    others = [normal(label, shape(label, 10)) for label in CLASSES]
    foreign = [normal(label, shape(label, 20)) for label in HELD_OUT]
    copies = [near(label, 0) for label in CLASSES]
    found = dict(zip(KINDS, (made, copies, others, foreign)))
    return [line.strip("| ").split(" | ") for line in table(pool, found).splitlines()]


def test_clips_learned_by_heart_are_as_near_as_copies():
    rows = rows_of([near(label, seed) for label in CLASSES for seed in (1, 2)])
    assert rows[2][0] == "generated (4)" and float(rows[2][1].split()[0]) > 0.98
    assert int(rows[2][2].strip("%")) >= 50 and rows[4][2] == rows[5][2] == "0%"
    assert [row[:2] for row in rows[9:]] == [[label, "4"] for label in CLASSES]


def test_new_clips_are_not():
    rows = rows_of([normal(label, shape(label, 30)) for label in CLASSES])
    assert float(rows[2][1].split()[0]) < 0.4 and rows[2][2] == "0%"


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> acceptance.Worker:
    rng = np.random.default_rng(0)
    seconds = SAMPLE_RATE // 2
    recordings = [
        Recording(label, "made", label, (0.1 * rng.standard_normal(seconds) * np.hanning(seconds)).astype(np.float32))
        for label in CLASSES
    ]
    made = acceptance.Worker(recordings)
    monkeypatch.setattr(acceptance, "_work", made, raising=False)
    nearest._clips.cache_clear()
    return made


def test_the_pool_is_the_trainings(worker: acceptance.Worker):
    """Clip by clip: the sounds that `pool` keeps have the class and the shape that `nearest` draws."""
    pool = build_latents(worker.recordings, 12, audio=12, processes=1, seed=5)
    drawn = [nearest.of_pool((5, index)) for index in range(12)]
    assert [each is None for each in drawn] == (pool["second"] >= 0).tolist()
    for each, first, audio in zip(drawn, pool["first"], pool["audio"]):
        if each is not None:
            assert each[0] == CLASSES[first]
            np.testing.assert_allclose(each[1], shape_of(audio / np.float32(32767), worker.filters), atol=1e-4)


def test_the_decoder_keeps_a_clip_near_to_itself(worker: acceptance.Worker):
    drawn = {index: made for index in range(12) if (made := nearest.of_pool((5, index))) is not None}
    index, (label, own) = next(iter(drawn.items()))
    others = [shape for i, (_, shape) in drawn.items() if i != index]
    decoded = nearest.of_pool_decoded((5, index))
    assert decoded[0] == label
    assert likeness(decoded[1], [own]) > 0.9 > likeness(decoded[1], others)
