"""Clips of a caption list: one of each, whole, the single run's; nothing lost, nothing twice, nothing mixed."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from dit_trt.calib_data.reader import Caption
from dit_trt.engines.bundle import Bundle
from dit_trt.engines.errors import UserError
from dit_trt.engines.home import flocked, sha256
from dit_trt.runtime.pipeline import Pipeline, Settings
from dit_trt.tooling.batch.clips import ClipFolder, Plan, clip_seed, read_clips
from dit_trt.tooling.batch.store import LocalStore
from dit_trt.tooling.evaluation.clips import evaluation_folder, generate_all, names_of

PLAN = Plan((Caption("91", "dog barking"), Caption("b-2", "rain")), Settings(steps=2), 0.3)


@pytest.fixture
def pipelines(tiny_float: Bundle, tiny_sqs: Bundle) -> dict:
    return {"fp32": lambda: Pipeline(tiny_float), "sqs": lambda: Pipeline(tiny_sqs)}


def test_every_clip_is_there_once_and_equals_its_single_run(pipelines: dict, tmp_path: Path) -> None:
    counts: list[int] = []
    found = generate_all(pipelines, tmp_path, replace(PLAN, variations=2), counts.append)
    assert counts == list(range(9))
    for name, clips in found.items():
        assert [clip.id for clip in clips] == ["91-1", "91-2", "b-2-1", "b-2-2"]
        assert clips == sorted(read_clips(tmp_path / name), key=lambda clip: clip.id)
        for clip in clips:
            assert clip.seed == clip_seed(1000, clip.id)
            expected, rate = pipelines[name]()(clip.caption, seconds=0.3, steps=2, seed=clip.seed)
            audio, found_rate = soundfile.read(tmp_path / name / clip.file, dtype="float32", always_2d=True)
            assert rate == found_rate
            np.testing.assert_allclose(audio.T, expected, atol=1 / 16000)
            assert clip.sha256 == sha256(tmp_path / name / clip.file)
            assert clip.seconds and clip.step_ms
    assert len({clip.seed for clip in found["sqs"]}) == 4
    assert replace(PLAN, variations=2).caption_ids == {"91-1": "91", "91-2": "91", "b-2-1": "b-2", "b-2-2": "b-2"}
    assert PLAN.caption_ids == {"91": "91", "b-2": "b-2"}


def test_a_clip_depends_on_its_id_alone(pipelines: dict, tmp_path: Path) -> None:
    """Not on order, number or the other bundles: what another folder holds is the same bytes."""
    both = generate_all(pipelines, tmp_path / "a", PLAN)
    turned = replace(PLAN, captions=PLAN.captions[::-1])
    alone = generate_all({"sqs": pipelines["sqs"]}, tmp_path / "b", turned, one_by_one=True)
    assert {c.id: c.sha256 for c in both["sqs"]} == {c.id: c.sha256 for c in alone["sqs"]}


@pytest.mark.parametrize("one_by_one", [False, True])
def test_clips_made_at_once_are_the_same_bytes(pipelines: dict, tmp_path: Path, one_by_one: bool) -> None:
    plan, counts = replace(PLAN, variations=3), list[int]()
    alone = generate_all(pipelines, tmp_path / "a", plan)
    (tmp_path / "b" / "sqs").mkdir(parents=True)
    shutil.copy(tmp_path / "a" / "sqs" / "91-2.wav", tmp_path / "b" / "sqs")  # one is there already
    batches = generate_all(pipelines, tmp_path / "b", plan, counts.append, one_by_one, batch=4)
    assert counts == list(range(1, 13))
    assert [clip.batch for clip in batches["fp32"]] == [3] * 6  # two threes, not four and two
    for name in pipelines:
        assert [(c.id, c.seed, c.sha256) for c in batches[name]] == [(c.id, c.seed, c.sha256) for c in alone[name]]


@pytest.fixture
def finished(pipelines: dict, tmp_path: Path) -> Path:
    generate_all({"sqs": pipelines["sqs"]}, tmp_path / "out", PLAN)
    return tmp_path / "out"


def refuse() -> Pipeline:
    raise AssertionError("nothing is left to generate")


def test_what_is_finished_is_not_made_again(finished: Path) -> None:
    before = (finished / "sqs" / "clips.jsonl").read_text()
    generate_all({"sqs": refuse}, finished, PLAN)
    assert (finished / "sqs" / "clips.jsonl").read_text() == before


@pytest.mark.parametrize("cut", [0, 1, 40], ids=["no last line", "no newline", "half a line"])
def test_a_clip_without_its_line_gets_it(finished: Path, cut: int) -> None:
    index = finished / "sqs" / "clips.jsonl"
    first, second = index.read_text().splitlines(keepends=True)
    index.write_text(first + (second[:-cut] if cut else ""))
    clips = generate_all({"sqs": refuse}, finished, PLAN)["sqs"]
    assert [clip.id for clip in clips] == ["91", "b-2"] and clips == read_clips(finished / "sqs")
    lost = dict.fromkeys(("seconds", "step_ms", "batch", "backend"))
    assert {**asdict(clips[1]), "error": None} == {**json.loads(second), **lost}
    assert sorted(file.name for file in (finished / "sqs").iterdir()) == ["91.wav", "b-2.wav", "clips.jsonl"]


def test_a_line_without_its_clip_is_made_again(finished: Path, pipelines: dict) -> None:
    before = (finished / "sqs" / "b-2.wav").read_bytes()
    (finished / "sqs" / "b-2.wav").unlink()
    generate_all({"sqs": pipelines["sqs"]}, finished, PLAN)
    assert (finished / "sqs" / "b-2.wav").read_bytes() == before
    assert [clip.id for clip in read_clips(finished / "sqs")] == ["91", "b-2"]


def test_a_clip_that_was_changed_is_not_taken(finished: Path) -> None:
    path = finished / "sqs" / "91.wav"
    path.write_bytes(path.read_bytes()[:-2] + b"ab")
    with pytest.raises(UserError, match=r"91\.wav is not what was generated; delete it, and it is made again$"):
        ClipFolder(LocalStore(finished / "sqs"), PLAN)


# -------------------- one folder, one plan


def test_a_folder_is_for_one_plan_and_one_build_of_each_bundle(tmp_path: Path) -> None:
    first = evaluation_folder(tmp_path, PLAN, {"sqs": "d1"})
    with (
        first,
        pytest.raises(UserError, match="another process is generating into"),
        evaluation_folder(tmp_path, PLAN, {}),
    ):
        pass
    with evaluation_folder(tmp_path, PLAN, {"fp32": "d2"}):  # more bundles may join
        pass
    assert json.loads((tmp_path / "evaluation.json").read_text())["bundles"] == {"sqs": "d1", "fp32": "d2"}
    for other, what in (
        (replace(PLAN, seconds=0.4), "seconds"),
        (replace(PLAN, settings=Settings(steps=3)), "settings"),
        (replace(PLAN, captions=PLAN.captions[:1]), "captions"),
    ):
        with pytest.raises(UserError, match=f"was begun with other {what}; "), evaluation_folder(tmp_path, other, {}):
            pass
    with (
        pytest.raises(UserError, match=r"sqs holds clips of another build of sqs; delete that folder"),
        evaluation_folder(tmp_path, PLAN, {"sqs": "d3"}),
    ):
        pass


def test_what_a_killed_process_left_of_its_results_is_removed(tmp_path: Path) -> None:
    with evaluation_folder(tmp_path, PLAN, {}):
        pass
    heard = tmp_path / ".heard" / "birdnet"
    heard.mkdir(parents=True)
    for left in (tmp_path / ".table.md.17.tmp", tmp_path / ".table.json.18.tmp", heard / ".a1.npy.19.tmp"):
        left.write_text("| ")
    mine = [tmp_path / ".notes.tmp", heard / "a1.npy"]
    for file in mine:
        file.write_text("whole")
    with evaluation_folder(tmp_path, PLAN, {}):
        pass
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(
        [*mine, tmp_path / "evaluation.json"]
    )


def test_what_a_killed_process_left_of_its_plan_is_no_stranger(tmp_path: Path) -> None:
    (tmp_path / ".evaluation.json.17.tmp").write_text('{"cap')
    with evaluation_folder(tmp_path, PLAN, {}):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    mine = {"thesis.txt", ".thesis.txt.17.tmp", ".table.md.17.tmp", ".evaluation.json.old.tmp"}
    for name in mine:
        (tmp_path / name).write_text("mine")
    with (
        pytest.raises(UserError, match="holds something else than an evaluation"),
        evaluation_folder(tmp_path, PLAN, {}),
    ):
        pass
    assert {path.name for path in tmp_path.iterdir()} == mine


def test_the_lock_ends_with_the_block(tmp_path: Path) -> None:
    with evaluation_folder(tmp_path, PLAN, {}):
        pass
    with flocked(tmp_path, wait=False):
        pass


def test_two_bundles_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match="two of the bundles are called sqs; copy one to another name"):
        names_of([Path("a/sqs"), Path("b/sqs")])


def test_without_an_index(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no clips\.jsonl: give the folder of one bundle"):
        read_clips(tmp_path)
    (tmp_path / "clips.jsonl").write_text('{"id": 3}\n')
    for read in (read_clips, lambda folder: ClipFolder(LocalStore(folder), PLAN)):
        with pytest.raises(UserError, match=r"clips\.jsonl is damaged .*; delete it: clips that are there are entered"):
            read(tmp_path)


def test_a_full_disk_loses_nothing(finished: Path, pipelines: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(finished / "sqs")

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device", str(self))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match=r"cannot write .*91\.wav: No space left on device"):
            generate_all({"sqs": pipelines["sqs"]}, finished, PLAN)
    assert not [path for path in (finished / "sqs").iterdir() if path.suffix == ".wav"]
    assert len(generate_all({"sqs": pipelines["sqs"]}, finished, PLAN)["sqs"]) == 2
