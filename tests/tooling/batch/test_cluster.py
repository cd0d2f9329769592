"""A real Ray cluster of two nodes: whatever dies, a caption has one clip, the local one's bytes, or one error."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ray_cluster import CLIPS, KILLS, SECONDS, STEPS, WORDS, isolated, on_a_cluster

from dit_trt.calib_data.reader import Caption
from dit_trt.engines.bundle import Bundle
from dit_trt.engines.home import sha256
from dit_trt.tooling.batch.batch import generate_batch
from dit_trt.tooling.batch.store import open_store

Happened = tuple[dict[str, Any], Path]


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), (None, pytest.skip.Exception)])
@pytest.mark.parametrize("lack", ["ray", "namespaces"])
def test_without_ray_or_namespaces_ci_fails_and_others_skip(
    monkeypatch: pytest.MonkeyPatch, ci: str | None, outcome: type[BaseException], lack: str
) -> None:
    if ci is None:
        monkeypatch.delenv("CI", raising=False)
    else:
        monkeypatch.setenv("CI", ci)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if lack == "ray" else True)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: subprocess.CompletedProcess([], 1))
    with pytest.raises(outcome, match="ray is not here" if lack == "ray" else "not permitted here"):
        isolated()


@pytest.fixture(scope="module")
def happened(tiny_sqs: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Happened:
    folder = tmp_path_factory.mktemp("cluster")
    return on_a_cluster(folder, tiny_sqs.folder), folder


@pytest.fixture(scope="module")
def local(happened: Happened, tiny_sqs: Bundle) -> dict[str, str]:
    """The bytes of a run without Ray."""
    folder = happened[1] / "local"
    captions = [Caption(f"{i:03}", WORDS[i % len(WORDS)]) for i in range(CLIPS)]
    generate_batch(tiny_sqs, captions, open_store(str(folder)), SECONDS, {"steps": STEPS})
    return checked(folder)[0]


def checked(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """One line a caption: of a clip that is there and whole (-> its hash), or of an error."""
    lines = [json.loads(line) for line in (folder / "clips.jsonl").read_text().splitlines()]
    clips = {line["id"]: line["sha256"] for line in lines if line["error"] is None}
    errors = {line["id"]: line["error"] for line in lines if line["error"] is not None}
    assert len(lines) == len(clips) + len(errors) == len({*clips, *errors})
    assert clips == {path.stem: sha256(path) for path in folder.glob("*.wav")}
    assert {path.name for path in folder.iterdir()} == {"batch.json", "clips.jsonl", *(f"{i}.wav" for i in clips)}
    return clips, errors


@pytest.mark.parametrize("name", ["plain", "one", "worker killed", "node removed", "node joins", "driver killed"])
def test_the_clips_are_the_local_ones(happened: Happened, local: dict[str, str], name: str) -> None:
    assert checked(happened[1] / name.replace(" ", "-")) == (local, {})


def test_every_worker_works(happened: Happened) -> None:
    workers = happened[0]["plain"]["workers"]
    assert sorted((w["backend"], w["threads"], w["error"]) for w in workers) == [("openvino", 1, None)] * 2
    assert sum(w["clips"] for w in workers) == CLIPS and min(w["clips"] for w in workers) > 0
    [one] = happened[0]["one"]["workers"]
    assert (one["clips"], one["threads"]) == (CLIPS, 1), "no node has two processors"
    assert (happened[0]["nothing left"]["made"], happened[0]["nothing left"]["workers"]) == (0, [])


def test_a_caption_that_fails_or_kills_its_worker_is_the_only_one_lost(happened: Happened, local: dict) -> None:
    clips, errors = checked(happened[1] / "faulty")
    assert {*clips} == {"a", "c", "e", "f"}
    assert errors["b"] == "openvino stopped (poison); free memory, or build again"
    assert errors["d"].startswith(
        "3 workers were lost while making it (out of memory?): ActorDiedError: The actor died"
    )
    lost = [line for line in happened[0]["faulty"]["said"] if "was lost (ActorDiedError); its clips go on" in line]
    assert len(lost) >= 3


def test_where_no_worker_can_work_every_caption_says_why(happened: Happened) -> None:
    found = happened[0]["nowhere"]
    why = "no worker could make it: the backend cannot run here: mend it"
    assert {each["error"] for each in found["failed"]} == {why}
    assert (found["clips"], len(found["failed"])) == (0, 6)
    assert [worker["error"] for worker in found["workers"]] == ["the backend cannot run here: mend it"] * 2
    assert all(
        "its worker was lost 3 times: ActorDiedError" in each["error"] for each in happened[0]["deadly"]["failed"]
    )
    assert (happened[0]["mended"]["clips"], happened[0]["mended"]["failed"]) == (6, [])
    assert checked(happened[1] / "nowhere")[1] == {}


def test_lost_workers_are_told_of_and_replaced(happened: Happened) -> None:
    killed = happened[0]["worker killed"]
    assert len([worker for worker in killed["workers"] if worker["error"]]) == 2
    assert len(killed["workers"]) >= 3
    gone = happened[0]["node removed"]
    assert {worker["error"] is None for worker in gone["workers"]} == {True, False}
    # Ray takes seconds to notice that a node is gone: a worker that is seated there meanwhile never opens.
    joins = [worker["clips"] for worker in happened[0]["node joins"]["workers"] if worker["host"]]
    assert len(joins) == 2 and min(joins) > 0


def test_a_killed_driver_goes_on(happened: Happened) -> None:
    found = happened[0]["driver killed"]
    assert found["code"] == 0, found["stderr"]
    assert len(found["counts"]) == KILLS and sorted(found["counts"]) == found["counts"]
    assert (found["passed"], found["clips"]) == (True, CLIPS)
    assert 0 < found["made"] <= CLIPS - found["counts"][-1]
