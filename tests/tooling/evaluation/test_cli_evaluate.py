"""`dit-trt evaluate` as a user runs it: the table, resuming, killing, and mistakes in one line."""

from __future__ import annotations

import csv
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import error_of, invoke, one_object
from killable import ForkServer
from numpy.typing import NDArray

from dit_trt.calib_data.reader import heldout_captions
from dit_trt.engines.bundle import Bundle
from dit_trt.engines.manifest import write_manifest
from dit_trt.runtime.pipeline import Pipeline

CAPTIONS = "id,caption\na,dog barking\nb,rain\nc,a cat meows\nd,a bell\n"
QUICK = ("--steps", 2, "--seconds", 0.45, "--velocity-clips", 1)
KILLS = 24


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    (tmp_path / "captions.csv").write_text(CAPTIONS)
    return tmp_path / "captions.csv"


def test_the_table(tiny_sqs: Bundle, captions: Path, tmp_path: Path) -> None:
    arguments = ("evaluate", tiny_sqs.folder, "--captions", captions, *QUICK, "--floor", "--output", tmp_path / "out")
    found = one_object(invoke(*arguments, "--json").stdout)
    assert found["clips"] == 4 and found["output"] == str(tmp_path / "out")
    fp32, own, floor = found["rows"]
    assert [row["name"] for row in found["rows"]] == ["fp32", tiny_sqs.folder.name, "fp32-other-seeds"]
    assert own["label"] == "SQS W8A8" and own["bundle_bytes"] == tiny_sqs.size_bytes and own["clips"] == 4
    assert fp32["worst_step_cosine"] is None and 0.5 < own["worst_step_cosine"] <= own["mean_cosine"] < 1
    assert fp32["log_mel_db"] is None and own["log_mel_db_low"] <= own["log_mel_db"] <= own["log_mel_db_high"]
    assert own["clip_seconds"] > 0 and own["faster"] > 0 and fp32["faster"] == 1 and floor["faster"] is None
    table = (tmp_path / "out" / "table.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0].strip("| ") for row in rows[1:]] == ["FP32", "SQS W8A8", "FP32, other seeds"]
    assert len({row.count("|") for row in rows}) == 1 and "4 clips a row (4 captions), 0.45 s, 2 steps, cfg 7" in table
    with (tmp_path / "out" / "table.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == [row["name"] for row in found["rows"]]
    assert json.loads((tmp_path / "out" / "table.json").read_text()) == found["rows"]
    files = sorted(path.name for path in (tmp_path / "out" / tiny_sqs.folder.name).iterdir())
    assert files == ["a.wav", "b.wav", "c.wav", "clips.jsonl", "d.wav"]

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.wav")}
    again = one_object(invoke(*arguments, "--json").stdout)
    assert again == found and before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.wav")}


def test_a_silent_clip_is_left_out_and_said(
    tiny_sqs: Bundle, captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every row, so that rows stay comparable; the others are scored."""
    calls = Counter[str]()
    decode = Pipeline.decode

    def once_silent(self: Pipeline, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        name = self.bundle.manifest["recipe"]["method"]
        calls[name] += 1
        return decode(self, latents) * (0 if name == "sqs" and calls[name] == 2 else 1)

    monkeypatch.setattr(Pipeline, "decode", once_silent)
    arguments = ("evaluate", tiny_sqs.folder, "--captions", captions, *QUICK, "--output", tmp_path / "out", "--json")
    result = invoke(*arguments)
    found = one_object(result.stdout)
    [(name, [gone])] = found["silent"].items()
    assert name == tiny_sqs.folder.name and gone in "abcd" and found["clips"] == 3
    assert f"note: 1 of {name}'s clips are silent ({gone}): no row is scored on them" in result.stderr
    assert [row["clips"] for row in found["rows"]] == [3, 3] and found["rows"][1]["log_mel_db"] > 0
    table = (tmp_path / "out" / "table.md").read_text()
    assert f"left out of every row: {name}'s {gone}." in table and "3 clips a row (3 captions)" in table


def test_silence_alone_is_no_evaluation(
    tiny_sqs: Bundle, captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pipeline, "decode", lambda self, latents: np.zeros((2, 20_000), np.float32))
    said = error_of("evaluate", tiny_sqs.folder, "--captions", captions, *QUICK, "--output", tmp_path / "out")
    assert "no clip sounds in all rows" in said


def test_our_own_captions_are_the_default() -> None:
    texts = heldout_captions()
    assert len(texts) == 24 and len({caption.id for caption in texts}) == 24
    assert texts[0].id == "ablation-0001" and texts[-1].id == "heldout-0008"


MISTAKES = {
    "two models": (
        ("{tiny_float}", "{other}"),
        1,
        "the bundles were built from different models; evaluate those of one",
    ),
    "no such metric": (("{sqs}", "--metrics", "fid"), 1, "there is no embedder 'fid'; there are: birdnet, "),
    "weights of nothing": (("{sqs}", "--weights", "clap=x"), 2, "--weights clap=x is not NAME=PATH of a network in"),
    "weights not there": (
        ("{sqs}", "--metrics", "clap", "--weights", "clap=no"),
        1,
        "--weights clap=no: there is no no",
    ),
    "no reference": (("{sqs}", "--reference", "no.npz"), 1, "is neither a folder of recordings nor an .npz file of"),
    "a reference for nothing": (("{sqs}", "--reference", "."), 2, "name some with --metrics, as birdnet,aisfx"),
    "too many": (("{sqs}", "--num-captions", "25"), 2, "--num-captions 25 is more than the 24 there are"),
    "too long": (("{sqs}", "--seconds", "100"), 1, "seconds 100 is outside 0.1.."),
    "no captions": (("{sqs}", "--captions", "no.csv"), 1, "no prompt file no.csv"),
    "steps": (("{sqs}", "--steps", "0"), 2, "steps"),
    "no such device": (("{sqs}", "--device", "TPU"), 1, "OpenVINO has no device 'TPU' here; available: CPU"),
}


@pytest.mark.parametrize(("arguments", "code", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(
    tiny_sqs: Bundle, tiny_float: Bundle, tmp_path: Path, arguments: tuple, code: int, said: str
) -> None:
    other = tmp_path / "other"
    if "{other}" in arguments:
        shutil.copytree(tiny_sqs.folder, other)
        manifest = plain(other)
        write_manifest(other, {**manifest, "model": {**manifest["model"], "digest": "0" * 64}})
    names = {"tiny_float": tiny_float.folder, "sqs": tiny_sqs.folder, "other": other}
    words = [word.format(**names) if word.startswith("{") else word for word in arguments]
    assert said in error_of("evaluate", *words, "--output", tmp_path / "out", code=code)
    assert not list(tmp_path.rglob("*.wav"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("id,caption\na,x\na,y\n", "the id a is there twice (captions 1 and 2); make ids unique"),
        ("id,caption\n../a,x\n", "the id '../a' cannot name a file; use letters, digits, -, _ and ."),
        ("id,caption\n,x\n", "the id '' cannot name a file"),
    ],
)
def test_ids_that_cannot_be(tiny_sqs: Bundle, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "c.csv").write_text(text)
    assert said in error_of("evaluate", tiny_sqs.folder, "--captions", tmp_path / "c.csv", "--output", tmp_path / "o")


def test_another_build_of_a_name_is_not_mixed_in(tiny_sqs: Bundle, captions: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_sqs.folder, tmp_path / "x"))
    arguments = ("evaluate", copy, "--captions", captions, *QUICK, "--velocity-clips", 0, "--output", tmp_path / "out")
    invoke(*arguments)
    with (copy / "tokenizer.json").open("a") as file:
        file.write("\n")
    write_manifest(copy, plain(copy))
    assert "x holds clips of another build of x; delete that folder and its line in" in error_of(*arguments)


def test_a_device_is_the_one_that_it_runs_on(tiny_sqs: Bundle, captions: Path, tmp_path: Path) -> None:
    arguments = ("evaluate", tiny_sqs.folder, "--captions", captions, *QUICK, "--output", tmp_path / "out")
    found = one_object(invoke(*arguments, "--device", "CPU", "--json").stdout)
    assert [row["clips"] for row in found["rows"]] == [4, 4]
    assert "holds clips of another build of fp32" in error_of(*arguments), "or of another device: they are not mixed"


def plain(folder: Path) -> dict:
    """The manifest without what writing it adds."""
    manifest = json.loads((folder / "manifest.json").read_text())
    return {key: value for key, value in manifest.items() if key not in ("files", "format")}


# -------------------- killed


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer() as running:
        yield running


def test_a_killed_evaluation_loses_and_doubles_nothing(
    server: ForkServer, home: Path, tiny_sqs: Bundle, tiny_float: Bundle, captions: Path, tmp_path: Path
) -> None:
    """kill -9 before a change of the file system, or after a time: what was finished stays as it is, byte for byte."""
    out = tmp_path / "out"
    words = [tiny_sqs.folder, tiny_float.folder, "--captions", captions, *QUICK, "--velocity-clips", 0]
    words += ["--batch", 3, "--output", out]
    _, changes, seconds = server.run("evaluate", words, home)
    expected = {path.relative_to(out): path.read_bytes() for path in out.rglob("*.wav")}
    assert len(expected) == 8
    shutil.rmtree(out)
    rng = random.Random(3)
    killed = resumed = 0
    while killed < KILLS:
        change, delay = rng.randrange(1, changes), 0.0
        if killed % 4 == 3:
            change, delay = 0, rng.uniform(0.05, seconds)
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*.wav") if not path.name.startswith(".")}
        was_killed = server.run("evaluate", words, home, change, delay)[0]
        killed += was_killed
        resumed += was_killed and 0 < len(before) < 8
        for path, written in before.items():
            assert path.stat().st_mtime_ns == written, "a finished clip was made again"
        for path in out.rglob("*.wav"):
            assert path.read_bytes() == expected[path.relative_to(out)], "a clip with its name is whole"
        if not was_killed:
            lines = [
                json.loads(line)["id"] for index in out.rglob("clips.jsonl") for line in index.read_text().splitlines()
            ]
            assert Counter(lines) == dict.fromkeys("abcd", 2), "each clip once, in each index"
            shutil.rmtree(out)
    assert not server.run("evaluate", words, home)[0]
    assert {path.relative_to(out): path.read_bytes() for path in out.rglob("*.wav")} == expected
    assert not [path for path in out.rglob(".*.tmp")]
    assert resumed >= 3
