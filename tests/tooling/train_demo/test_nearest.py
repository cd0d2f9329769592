"""How `nearest` tells clips learned by heart from others of the same recordings; its pool is the training's."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from dit_trt.tooling.train_demo import nearest
from dit_trt.tooling.train_demo.corpus import CLASSES, Recording, pack, recordings_by_class, unpack
from dit_trt.tooling.train_demo.features import SAMPLE_RATE
from dit_trt.tooling.train_demo.likeness import likeness, shape_of, spectra
from dit_trt.tooling.train_demo.nearest import KINDS, Drawn, check_pool, table
from dit_trt.tooling.train_demo.pool import Clips, build_latents

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
def recordings(tmp_path: Path) -> list[Recording]:
    """A tone for each class, as `corpus --pack` keeps them."""
    time = np.arange(SAMPLE_RATE // 2) / SAMPLE_RATE
    envelope = np.hanning(len(time))
    tones = [envelope * np.sin(2 * np.pi * (150 + 90 * i) * time) for i in range(len(CLASSES))]
    made = [Recording(label, "a file", "a package", tone.astype(np.float32)) for label, tone in zip(CLASSES, tones)]
    pack(made, tmp_path / "recordings.npz")
    return unpack(tmp_path / "recordings.npz")


def test_the_pool_is_the_trainings(recordings: list[Recording]):
    """Clip by clip: the sounds that `pool` keeps have the class and the shape that `nearest` draws."""
    pool, clips = build_latents(recordings, 12, audio=12, processes=1, seed=5), Clips(recordings, 5)
    found = [nearest.of_pool(clips, index) for index in range(12)]
    assert [each is None for each in found] == (pool["second"] >= 0).tolist()
    for each, first, seconds, audio in zip(found, pool["first"], pool["seconds"], pool["audio"]):
        if each is not None:
            assert each.label == CLASSES[first] and each.whole == (seconds > 4.08)
            np.testing.assert_allclose(each.shape, shape_of(audio / np.float32(32767)), atol=5e-4)
    mean = np.mean([nearest.mean_mel(clips, index) for index in range(12)], axis=0)
    check_pool(mean, pool["pca.mean"])
    others = Clips(recordings, 6)
    with pytest.raises(SystemExit, match="not the pool"):
        check_pool(np.mean([nearest.mean_mel(others, index) for index in range(12)], axis=0), pool["pca.mean"])


def test_the_decoder_keeps_a_clip_near_to_itself(recordings: list[Recording]):
    clips = Clips(recordings, 5)
    found = {index: made for index in range(12) if (made := nearest.of_pool(clips, index)) is not None}
    index, own = next(iter(found.items()))
    others = [each.shape for i, each in found.items() if i != index]
    decoded = nearest.of_pool_decoded(clips, index)
    assert decoded.label == own.label
    assert likeness(decoded.shape, spectra([own.shape])) > 0.9 > likeness(decoded.shape, spectra(others))


def test_real_clips_sound_to_their_end(recordings: list[Recording]):
    for index in range(4):
        made = nearest.of_recordings(recordings_by_class(recordings), ("rain", index))
        assert made.label == "rain" and made.whole
        assert made.shape[-30:].max() > np.median(made.shape)


def test_the_tool(recordings: list[Recording], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Generated clips that are the pool's own come out so, as those of the pool itself do."""

    def here(function, tasks, make):
        own = make()
        if isinstance(own, Clips):
            own.weights = np.array([0.5, 0.5, *np.zeros(len(CLASSES) - 2)])
        return (function(own, task) for task in tasks)

    monkeypatch.setattr(nearest, "in_processes", here)
    monkeypatch.setattr(nearest, "CLASSES", HELD_OUT)
    monkeypatch.setattr(nearest, "COUNT", 2)
    monkeypatch.setattr(nearest, "PCA_CLIPS", 3)
    monkeypatch.setattr(nearest, "through_decoder", lambda clip: clip)
    monkeypatch.setattr(nearest, "check_pool", lambda mean, shipped: None)
    monkeypatch.setattr(nearest, "load_held_out", lambda assets: recordings[: len(HELD_OUT)])
    wavs = tmp_path / "wavs"
    wavs.mkdir()
    clips = Clips(recordings, 0)
    clips.weights = np.array([0.5, 0.5, *np.zeros(len(CLASSES) - 2)])
    for index in range(24):
        audio, first, second, seconds = clips.draw(index)
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
