"""How `nearest` tells clips learned by heart from others of the same recordings; its pool is the training's."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from dit_trt.tooling.train_demo import acceptance, nearest
from dit_trt.tooling.train_demo.acceptance import likeness, shape_of
from dit_trt.tooling.train_demo.corpus import CLASSES, Recording, pack, unpack
from dit_trt.tooling.train_demo.features import SAMPLE_RATE
from dit_trt.tooling.train_demo.nearest import KINDS, Drawn, check_pool, table
from dit_trt.tooling.train_demo.pool import build_latents

HELD_OUT = CLASSES[:2]


def drawn(label: str, seed: int, like: str | None = None, blur: float = 0.0) -> Drawn:
    """A clip of `label` that sounds as one of `like` (default: of its own class), with some noise of its own."""
    sound = np.random.default_rng((CLASSES.index(like or label), seed)).standard_normal((50, 8))
    values = np.roll(sound, 9 if blur else 0, axis=0)
    values += blur * np.random.default_rng((seed, 77)).standard_normal(sound.shape)
    values -= values.mean()
    return Drawn(label, (values / np.linalg.norm(values)).astype(np.float16))


def rows_of(made: list[Drawn]) -> list[list[str]]:
    trained, other = ([drawn(label, seed) for label in CLASSES for seed in seeds] for seeds in ((0, 1), (10, 11)))
    copies = [drawn(label, 0, blur=0.1) for label in CLASSES]
    others = [drawn(label, 20) for label in CLASSES]
    foreign = [drawn(label, 30) for label in HELD_OUT]
    found = dict(zip(KINDS, (made, copies, others, foreign)))
    return [line.strip("| ").split(" | ") for line in table(trained, other, found).splitlines()]


def more_of(row: list[str]) -> float:
    return float(row[3].split()[0])


def test_clips_learned_by_heart_are_nearer_to_the_trainings_pool():
    rows = rows_of([drawn(label, 1, blur=0.1) for label in CLASSES])
    assert [row[0].partition(" (")[0] for row in rows[2:6]] == list(KINDS)
    assert rows[2][0].endswith(f"({len(CLASSES)} of {len(CLASSES)} classes)") and rows[5][0].endswith(
        "(2 of 2 classes)"
    )
    assert float(rows[2][1]) > 0.98 and more_of(rows[2]) > 0.6 and more_of(rows[3]) > 0.6
    assert abs(more_of(rows[4])) < 0.05
    assert [row[0] for row in rows[9:]] == list(CLASSES)
    assert [row[4] for row in rows[9:11]] != ["", ""] and all(len(row) == 4 for row in rows[11:])


def test_new_clips_are_not():
    assert abs(more_of(rows_of([drawn(label, 40) for label in CLASSES])[2])) < 0.05


def test_a_clip_is_compared_with_its_own_class_alone():
    """A copy of another class's clip is no copy of its own."""
    rows = rows_of([drawn(label, 1, like=CLASSES[i - 1], blur=0.1) for i, label in enumerate(CLASSES)])
    assert abs(more_of(rows[2])) < 0.05


def test_classes_count_alike():
    """Ten copies of one class's clips weigh no more than one of each other's."""
    rows = rows_of([drawn("dog", 1, blur=0.1)] * 10 + [drawn(label, 40) for label in CLASSES[1:]])
    assert more_of(rows[2]) < 0.1


# -------------------- from recordings


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> acceptance.Worker:
    """Of this process, with a tone for each class, kept as `corpus --pack` does."""
    time = np.arange(SAMPLE_RATE // 2) / SAMPLE_RATE
    envelope = np.hanning(len(time))
    tones = [envelope * np.sin(2 * np.pi * (150 + 90 * i) * time) for i in range(len(CLASSES))]
    made = [Recording(label, "a file", "a package", tone.astype(np.float32)) for label, tone in zip(CLASSES, tones)]
    pack(made, tmp_path / "recordings.npz")
    worker = acceptance.Worker(unpack(tmp_path / "recordings.npz"))
    monkeypatch.setattr(acceptance, "_work", worker, raising=False)
    nearest._clips.cache_clear()
    return worker


def test_the_pool_is_the_trainings(worker: acceptance.Worker):
    """Clip by clip: the sounds that `pool` keeps have the class and the shape that `nearest` draws."""
    pool = build_latents(worker.recordings, 12, audio=12, processes=1, seed=5)
    found = [nearest.of_pool((5, index)) for index in range(12)]
    assert [each is None for each in found] == (pool["second"] >= 0).tolist()
    for each, first, seconds, audio in zip(found, pool["first"], pool["seconds"], pool["audio"]):
        if each is not None:
            assert each.label == CLASSES[first] and each.whole == (seconds > 4.08)
            np.testing.assert_allclose(each.shape, shape_of(audio / np.float32(32767), worker.filters), atol=5e-4)
    mean = np.mean([nearest.mean_mel((5, index)) for index in range(12)], axis=0)
    check_pool(mean, pool["pca.mean"])
    with pytest.raises(SystemExit, match="not the pool"):
        check_pool(np.mean([nearest.mean_mel((6, index)) for index in range(12)], axis=0), pool["pca.mean"])


def test_the_decoder_keeps_a_clip_near_to_itself(worker: acceptance.Worker):
    found = {index: made for index in range(12) if (made := nearest.of_pool((5, index))) is not None}
    index, own = next(iter(found.items()))
    others = [each.shape for i, each in found.items() if i != index]
    decoded = nearest.of_pool_decoded((5, index))
    assert decoded.label == own.label
    assert likeness(decoded.shape, [own.shape]) > 0.9 > likeness(decoded.shape, others)


def test_real_clips_sound_to_their_end(worker: acceptance.Worker):
    for index in range(4):
        made = nearest.of_recordings(("rain", index))
        assert made.label == "rain" and made.whole
        assert made.shape[-30:].max() > np.median(made.shape)


def test_the_tool(worker: acceptance.Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Generated clips that are the pool's own come out so; dogs and cats of other recordings do not."""
    monkeypatch.setattr(nearest, "CLASSES", HELD_OUT)
    monkeypatch.setattr(nearest, "COUNT", 2)
    monkeypatch.setattr(nearest, "PCA_CLIPS", 3)
    monkeypatch.setattr(acceptance.Worker, "decoded", lambda self, clip: clip)
    monkeypatch.setattr(nearest, "check_pool", lambda mean, shipped: None)
    monkeypatch.setattr(nearest, "load_held_out", lambda assets: worker.recordings)
    monkeypatch.setattr(nearest, "draws_of", lambda held_out: [(label, 9) for label in HELD_OUT])
    monkeypatch.setattr(nearest, "in_processes", lambda task, tasks, recordings: [task(each) for each in tasks])
    wavs = tmp_path / "wavs"
    wavs.mkdir()
    for seed in (0, nearest.OTHER_SEED):
        nearest._clips(seed).weights = np.array([0.5, 0.5, *np.zeros(len(CLASSES) - 2)])
    for index in range(24):
        audio, first, second, seconds = nearest._clips(0).draw(index)
        if second < 0 and seconds > 4.08:
            soundfile.write(wavs / f"{CLASSES[first]}-{index}.wav", audio, SAMPLE_RATE)
    arguments = ["--recordings", tmp_path / "recordings.npz", "--wavs", wavs, "--assets", tmp_path, "--clips", 24]
    monkeypatch.setattr(sys, "argv", ["nearest", *map(str, arguments), "--output", str(tmp_path / "nearest.md")])
    nearest.main()
    text = capsys.readouterr().out
    assert (tmp_path / "nearest.md").read_text("utf-8") == text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines()]
    assert float(rows[2][1]) > 0.99 and more_of(rows[2]) > 0 and more_of(rows[3]) > 0
    assert float(rows[2][1]) > float(rows[4][1])
