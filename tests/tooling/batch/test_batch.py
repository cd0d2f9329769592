"""`dit-trt batch` in one process: a clip a caption, resumed after any death; what fails fails alone."""

from __future__ import annotations

import contextlib
import json
import random
import resource
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from commands import error_of, files_in, invoke, one_object
from killable import ForkServer
from processes import dit_trt

from dit_trt.calib_data.reader import Caption, read_captions
from dit_trt.engines.bundle import Bundle
from dit_trt.engines.home import flocked, sha256
from dit_trt.runtime.pipeline import Pipeline
from dit_trt.runtime.wav import encode
from dit_trt.tooling.batch.batch import generate_batch
from dit_trt.tooling.batch.clips import Plan, clip_seed
from dit_trt.tooling.batch.store import UriStore, open_store
from dit_trt.tooling.evaluation.clips import generate_all

CAPTIONS = {"91": "dog barking", "b-2": "rain", "c.3": "a cat", "d": "the siren", "e": "a puppy woofs"}
KILLS = 7


def write_captions(path: Path, captions: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps({"id": i, "caption": text}) + "\n" for i, text in captions.items()))
    return path


@pytest.fixture
def batch(tiny_sqs: Bundle, tmp_path: Path) -> list[object]:
    file = write_captions(tmp_path / "captions.jsonl", CAPTIONS)
    return ["batch", file, "--bundle", tiny_sqs.folder, "--steps", 2, "--seconds", 0.3, "--output"]


def index(folder: Path) -> dict[str, dict]:
    lines = [json.loads(line) for line in (folder / "clips.jsonl").read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line for line in lines}


def hashes(folder: Path) -> dict[str, str]:
    """Of all clips there, each of them checked against its line."""
    found = index(folder)
    for line in found.values():
        assert line["error"] is None and line["sha256"] == sha256(folder / line["file"])
    assert {path.name for path in folder.glob("*.wav")} == {line["file"] for line in found.values()}
    return {i: line["sha256"] for i, line in found.items()}


def test_every_caption_has_its_clip(batch: list, tiny_sqs: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = invoke(*batch, out, "--json")
    value = one_object(result.stdout)
    rate = value.pop("clips_per_second")
    assert rate > 0
    assert value == {
        "passed": True,
        "bundle": str(tiny_sqs.folder),
        "output": str(out),
        "clips": 5,
        "made": 5,
        "failed": {},
        "workers": [],
    }
    assert "clips/s" in result.stderr
    lines = index(out)
    assert [*lines] == [*CAPTIONS]
    pipeline = Pipeline(tiny_sqs)
    for i, text in CAPTIONS.items():
        line = lines[i]
        assert (line["caption"], line["seed"], line["file"]) == (text, clip_seed(1000, i), f"{i}.wav")
        assert line["seconds"] > 0 and line["step_ms"] > 0 and (line["batch"], line["backend"]) == (1, "openvino")
        expected = encode(*pipeline(text, seconds=0.3, steps=2, seed=line["seed"]))
        assert (out / line["file"]).read_bytes() == expected
    assert files_in(out) == sorted(["batch.json", "clips.jsonl", *(f"{i}.wav" for i in CAPTIONS)])


@pytest.mark.parametrize("how", ["csv", "batches", "order", "file", "threads"])
def test_the_same_bytes_however_they_are_made(
    batch: list, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    invoke(*batch, tmp_path / "a")
    out, more = tmp_path / "b", []
    if how == "csv":
        batch[1] = tmp_path / "captions.csv"
        batch[1].write_text("audiocap_id,caption\n" + "".join(f"{i},{text}\n" for i, text in CAPTIONS.items()))
    if how == "batches":
        more = ["--batch", 3]
    if how == "order":
        write_captions(tmp_path / "captions.jsonl", dict(reversed(CAPTIONS.items())))
    if how == "threads":
        make = Pipeline.__init__
        monkeypatch.setattr(Pipeline, "__init__", lambda self, bundle, threads=None: make(self, bundle, threads=1))
    invoke(*batch, f"file://{out}" if how == "file" else out, *more)
    assert hashes(out) == hashes(tmp_path / "a")
    assert how != "batches" or {line["batch"] for line in index(out).values()} == {3, 2}


def test_evaluate_makes_the_same_clips(batch: list, tiny_sqs: Bundle, tmp_path: Path) -> None:
    invoke(*batch, tmp_path / "a")
    pipeline = Pipeline(tiny_sqs)
    plan = Plan(tuple(read_captions(batch[1])), pipeline.settings(steps=2), 0.3)
    generate_all({"x": lambda: pipeline}, tmp_path / "evaluated", plan)
    assert hashes(tmp_path / "evaluated" / "x") == hashes(tmp_path / "a")
    assert (tmp_path / "evaluated" / "x" / "91.wav").read_bytes() == (tmp_path / "a" / "91.wav").read_bytes()


def test_it_goes_on_where_it_was(batch: list, tmp_path: Path) -> None:
    out = tmp_path / "out"
    invoke(*batch, out)
    before = hashes(out)
    (out / "d.wav").unlink()
    text = (out / "clips.jsonl").read_text()
    (out / "clips.jsonl").write_text(text[:-30])
    kept = (out / "91.wav").stat().st_mtime_ns
    assert one_object(invoke(*batch, out, "--json").stdout)["made"] == 1
    assert hashes(out) == before
    assert (out / "91.wav").stat().st_mtime_ns == kept
    assert index(out)["e"]["step_ms"] is None, "its line was cut off"
    assert one_object(invoke(*batch, out, "--json").stdout)["made"] == 0


@pytest.mark.parametrize("more", [["--steps", 3], ["--seconds", 0.4], ["--seed", 7], ["--cfg", 1.5]])
def test_another_plan_needs_another_folder(batch: list, tmp_path: Path, more: list) -> None:
    invoke(*batch, tmp_path / "out")
    assert "was begun with other s" in error_of(*batch, tmp_path / "out", *more)


def test_other_captions_bundles_and_things_need_another_folder(batch: list, tiny_float: Bundle, tmp_path: Path) -> None:
    invoke(*batch, tmp_path / "out")
    other = [*batch]
    other[3] = tiny_float.folder
    assert "was begun with other bundle; give the same" in error_of(*other, tmp_path / "out")
    write_captions(batch[1], {**CAPTIONS, "91": "rain"})
    assert "was begun with other captions; give the same" in error_of(*batch, tmp_path / "out")
    assert "holds something else than a batch" in error_of(*batch, tmp_path)


def test_a_damaged_list_of_bundles_is_one_line(batch: list, tmp_path: Path) -> None:
    invoke(*batch, tmp_path / "out")
    file = tmp_path / "out" / "batch.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "bundles": []}))
    assert f"{file} does not hold its bundles as a JSON object" in error_of(*batch, tmp_path / "out")


def test_the_longest_id_is_a_file(batch: list, tmp_path: Path) -> None:
    name = "\u58f0" * 60
    write_captions(batch[1], {name: "rain"})
    invoke(*batch, tmp_path / "out")
    assert [*hashes(tmp_path / "out")] == [name]


# -------------------- what fails alone


def poison(monkeypatch: pytest.MonkeyPatch, text: str, error: Exception) -> None:
    condition = Pipeline.condition

    def fail(self: Pipeline, prompt: str, *rest: object) -> object:
        if prompt == text:
            raise error
        return condition(self, prompt, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Pipeline, "condition", fail)


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("oneDNN\ngave up"), "openvino stopped (gave up); free memory, or build again"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
    ],
)
def test_a_caption_that_fails_fails_alone(
    batch: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, error: Exception, told: str
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        poison(patch, "a cat", error)
        result = invoke(*batch, out, "--batch", size, "--json", code=1)
    value = one_object(result.stdout)
    assert (value["passed"], value["clips"], value["failed"]) == (False, 4, {"c.3": told})
    assert result.stderr.splitlines()[-1] == f"failed: c.3 ('a cat'): {told}"
    line = index(out)["c.3"]
    assert line == {
        **{"id": "c.3", "caption": "a cat", "seed": clip_seed(1000, "c.3")},
        **{"file": None, "sha256": None, "error": told},
    }
    assert len(list(out.glob("*.wav"))) == 4
    value = one_object(invoke(*batch, out, "--json").stdout)
    assert (value["made"], value["passed"]) == (1, True)
    invoke(*batch, tmp_path / "other")
    assert hashes(out) == hashes(tmp_path / "other")


def test_many_failures_are_not_all_named(batch: list, tmp_path: Path) -> None:
    write_captions(batch[1], {f"{i:02}": "\ud800" for i in range(23)})
    result = invoke(*batch, tmp_path / "out", code=1)
    failed = [line for line in result.stderr.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 21
    assert failed[0].startswith("failed: 00 ('\\ud800'): the prompt '\\ud800' is not UTF-8 text")
    assert failed[-1] == "failed: 3 more, see clips.jsonl; the same command tries them again"
    assert len(index(tmp_path / "out")) == 23


# -------------------- what stops all, and loses nothing


@pytest.mark.parametrize("at", ["91.wav", "c.3.wav", "clips.jsonl"])
def test_a_full_disk_is_one_line_and_loses_nothing(
    batch: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    out, write = tmp_path / "out", Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if at in self.name:
            write(self, data[: len(data) // 2])
            raise OSError(28, "No space left on device", str(self))
        return write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        if at == "clips.jsonl":
            opened = Path.open

            def no_append(self: Path, mode: str = "r", *rest: object, **more: object) -> object:
                if self.name == at and mode == "a":
                    raise OSError(28, "No space left on device", str(self))
                return opened(self, mode, *rest, **more)  # type: ignore[call-overload]

            patch.setattr(Path, "open", no_append)
        error = error_of(*batch, out)
    assert f"{out / at}: No space left on device; make room or choose another place with --output" in error
    assert not list(out.glob(".*")) and not [p for p in out.glob("*.wav") if p.stat().st_size < 9000]
    invoke(*batch, out)
    invoke(*batch, tmp_path / "other")
    assert hashes(out) == hashes(tmp_path / "other")


def test_kill_9_at_any_change(tmp_path: Path, tiny_sqs: Bundle, home: Path) -> None:
    """Two kills in a row, then to the end: the clips and the index of a run that nothing happened to."""
    file = write_captions(tmp_path / "captions.jsonl", dict([*CAPTIONS.items()][:3]))
    arguments = [file, "--bundle", tiny_sqs.folder, "--steps", "2", "--seconds", "0.3", "--output"]
    rng = random.Random(0)
    with ForkServer() as server:
        server.run("batch", [*arguments, tmp_path / "first"], home)  # fills caches, which is a change
        _, changes, _ = server.run("batch", [*arguments, tmp_path / "whole"], home)
        expected, finished = hashes(tmp_path / "whole"), set()
        for trial in range(KILLS):
            out = tmp_path / "out"
            shutil.rmtree(out, ignore_errors=True)
            change = 1 + (trial * changes + rng.randrange(changes)) // KILLS
            killed, *_ = server.run("batch", [*arguments, out], home, change)
            assert killed
            before = {path.name: path.read_bytes() for path in out.glob("*.wav")}
            finished.add(len(before))
            assert all((tmp_path / "whole" / name).read_bytes() == content for name, content in before.items())
            server.run("batch", [*arguments, out], home, rng.randrange(1, changes))
            assert all((out / name).read_bytes() == content for name, content in before.items())
            assert not server.run("batch", [*arguments, out], home)[0]
            assert hashes(out) == expected, f"trial {trial}: change {change}"
            assert files_in(out) == files_in(tmp_path / "whole")
    assert finished >= {0, 1, 2}, f"{finished}: the kills fell before, among and after the clips"


# -------------------- other places


def test_a_uri(batch: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index that cannot be appended to is written at the end, and when it ends badly; the rest is made again."""
    name, memory = uuid.uuid4().hex, fsspec.filesystem("memory")
    uri = f"memory://{name}/clips"
    invoke(*batch, tmp_path / "local")
    expected = hashes(tmp_path / "local")
    with monkeypatch.context() as patch:
        poison(patch, "the siren", KeyboardInterrupt())  # type: ignore[arg-type]
        invoke(*batch, uri, code=130)
    assert {path.rpartition("/")[2] for path in memory.ls(f"/{name}/clips", detail=False)} == {
        *("batch.json", "clips.jsonl", "91.wav", "b-2.wav", "c.3.wav")
    }
    lines = memory.cat_file(f"/{name}/clips/clips.jsonl").decode().splitlines(keepends=True)
    memory.pipe_file(f"/{name}/clips/clips.jsonl", "".join(lines[:2]).encode())  # as a kill leaves it
    value = one_object(invoke(*batch, uri, "--json").stdout)
    assert (value["clips"], value["made"], value["output"]) == (5, 3, uri)
    found = [json.loads(line) for line in memory.cat_file(f"/{name}/clips/clips.jsonl").decode().splitlines()]
    assert {line["id"]: line["sha256"] for line in found} == expected
    for line in found:
        content = memory.cat_file(f"/{name}/clips/{line['file']}")
        assert content == (tmp_path / "local" / line["file"]).read_bytes()
    assert one_object(invoke(*batch, uri, "--json").stdout)["made"] == 0


def test_the_index_of_a_uri_is_written_on_the_way(batch: list, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[int] = []
    write = UriStore.write

    def counted(self: UriStore, name: str, content: bytes) -> None:
        if name == "clips.jsonl":
            writes.append(content.count(b"\n"))
        write(self, name, content)

    monkeypatch.setattr(UriStore, "write", counted)
    monkeypatch.setattr("dit_trt.tooling.batch.clips.FLUSH_SECONDS", 0)
    invoke(*batch, f"memory://{uuid.uuid4().hex}")
    assert writes == [1, 2, 3, 4, 5]


# -------------------- mistakes


def _caption_faults() -> list[tuple[str, str, str]]:
    return [
        ("a.jsonl", "not json\n", r'line 1: write an object a line, as {"id": "91", "caption": "a dog barks"}'),
        ("a.jsonl", '{"caption": "rain"}\n["rain"]\n', "line 2: write an object a line"),
        ("a.jsonl", '{"text": "rain"}\n', "line 1: write an object a line"),
        ("a.jsonl", '{"caption": 3}\n', "line 1: write an object a line"),
        ("a.jsonl", '\n{"caption": " "}\n', "line 2: the caption is empty; complete or delete the line"),
        ("a.jsonl", "", "holds no prompts"),
        ("a.jsonl", '{"id": "x", "caption": "a"}\n{"id": "x", "caption": "b"}\n', "the id x is there twice"),
        ("a.jsonl", '{"id": "x", "caption": "a"}\n{"caption": "b"}\n', "the id '' cannot name a file"),
        ("a.jsonl", '{"id": "../x", "caption": "a"}\n', "the id '../x' cannot name a file"),
        (
            "a.jsonl",
            json.dumps({"id": "\u58f0" * 61, "caption": "a"}),
            "is too long for a file's name; use at most 180",
        ),
        *[
            ("a.jsonl", f'\n{{"id": {wrong}, "caption": "a"}}\n', "line 2: the id is neither text nor a number")
            for wrong in ("null", "true", "[1]")
        ],
        ("a.jsonl", "[" * 100_000, "line 1: write an object a line"),
        ("a.csv", "id,text\n1,rain\n", "has no column 'caption' (it has id, text)"),
        ("a.csv", "id,caption\n1,\n", "line 2: the caption is empty"),
        ("a.csv", "", "holds no prompts"),
        ("a.csv", '"id,caption\n', "not valid CSV"),
    ]


@pytest.mark.parametrize(("name", "text", "told"), _caption_faults())
def test_bad_captions(batch: list, tmp_path: Path, name: str, text: str, told: str) -> None:
    (tmp_path / name).write_text(text)
    batch[1] = tmp_path / name
    error = error_of(*batch, tmp_path / "out")
    assert told in error and name in error
    assert not (tmp_path / "out").exists()


def test_captions_that_are_not_there_or_not_text(batch: list, tmp_path: Path) -> None:
    batch[1] = tmp_path / "none.csv"
    assert "no prompt file" in error_of(*batch, tmp_path / "out")
    batch[1].write_bytes(b"id,caption\n1,\xff\n")
    assert "is not UTF-8 text (byte 13)" in error_of(*batch, tmp_path / "out")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--steps", 0], "steps 0 is outside 1..1000"),
        (["--cfg", -1], "cfg -1.0 is outside 0..100"),
        (["--sampler", "euler-a"], "unknown sampler 'euler-a'"),
        (["--workers", 2], "--workers belongs to --ray; give both"),
        (["--ray", "nowhere"], "--ray nowhere is no address; give --ray auto on a machine of the cluster"),
        (["--ray", "a:99999"], "--ray a:99999 is no address"),
    ],
)
def test_bad_options(batch: list, tmp_path: Path, more: list, told: str) -> None:
    assert told in error_of(*batch, tmp_path / "out", *more, code=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--seconds", 99], "seconds 99 is outside 0.1.."),
        (["--sampler", "pingpong"], "the sampler pingpong is not for this model (v)"),
    ],
)
def test_what_the_bundle_does_not_take(batch: list, tmp_path: Path, more: list, told: str) -> None:
    assert told in error_of(*batch, tmp_path / "out", *more)


@pytest.mark.parametrize(
    ("output", "told"),
    [("nonsense://x", "cannot be opened"), ("file://host/x", "no folder of this machine"), ("/dev/null", "is a file")],
)
def test_bad_places(batch: list, output: str, told: str) -> None:
    assert told in error_of(*batch, output)


def test_two_at_one_folder(batch: list, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with flocked(tmp_path / "out"):
        assert "another process is generating into" in error_of(*batch, tmp_path / "out")


@pytest.mark.parametrize(
    ("without", "more", "extra"), [("ray", ["--ray", "auto"], "ray"), ("fsspec", [], "ray")], ids=["ray", "fsspec"]
)
def test_what_is_not_installed_is_named(batch: list, without: str, more: list[str], extra: str) -> None:
    result = dit_trt(*map(str, [*batch, "memory://x", *more]), without=[without])
    assert (result.returncode, result.stdout) == (1, "")
    error = result.stderr.splitlines()[-1]
    assert error.startswith(f"Error: this command needs the package {without}, which comes with the {extra} extra: pip")


def test_no_build_extra_is_needed(batch: list, tmp_path: Path) -> None:
    without = ["torch", "onnx", "onnxscript", "ml_dtypes", "polygraphy", "fsspec", "ray"]
    result = dit_trt(*map(str, [*batch, tmp_path / "out"]), without=without)
    assert result.returncode == 0, result.stderr
    assert len(hashes(tmp_path / "out")) == 5


# -------------------- memory


@pytest.mark.parametrize("clips", [300, pytest.param(2250, marks=pytest.mark.full_size)])
def test_memory_stays_flat(tmp_path: Path, tiny_float: Bundle, clips: int) -> None:
    """What the first fifth of the clips have come to is what all need."""
    sizes: dict[int, int] = {}

    @contextlib.contextmanager
    def watch(what: str, total: int) -> Iterator[Callable[[int], object]]:
        yield lambda count: sizes.__setitem__(count, private_bytes())

    captions = [Caption(f"{i:05}", ["rain", "dog barking", "a cat"][i % 3]) for i in range(clips)]
    chosen = {"steps": 1, "cfg_scale": 1.0}
    result = generate_batch(tiny_float, captions, open_store(str(tmp_path)), 0.1, chosen, 2, watch=watch)
    assert (result.clips, result.failed) == (clips, ())
    assert sizes[clips] - sizes[clips // 5] < 4_000_000, sizes


def private_bytes() -> int:
    """Of this process, of its own."""
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * resource.getpagesize()
