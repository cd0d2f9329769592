"""Compiled blobs: used again, thrown away when a byte changed or another graph's, removed when old."""

import os

import numpy as np
import pytest
from graphs import random_inputs, shapes_of

from dit_trt.engines import base, blobs
from dit_trt.engines.base import open_engine
from dit_trt.engines.blobs import blob_folder
from dit_trt.runtime.pipeline import Pipeline


def fill(key, text="blob"):
    with blob_folder(key) as folder:
        if not (folder / "a.blob").exists():
            (folder / "a.blob").write_text(text)
    return folder


def test_what_was_left_is_found_again(own_home):
    folder = fill("key")
    with blob_folder("key") as again:
        assert again == folder
        assert (again / "a.blob").read_text() == "blob"
    assert fill("another key") != folder
    assert folder.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("damage", ["changed", "added", "removed", "no sums", "sums are no JSON"])
def test_what_changed_since_is_thrown_away(own_home, damage):
    folder = fill("key")
    match damage:
        case "changed":
            (folder / "a.blob").write_text("bl0b")
        case "added":
            (folder / "b.blob").write_text("planted")
        case "removed":
            (folder / "a.blob").unlink()
        case "no sums":  # as a process leaves it that was killed while compiling
            (folder / "sha256.json").unlink()
        case _:
            (folder / "sha256.json").write_text("{")
    with blob_folder("key") as again:
        assert list(again.iterdir()) == []
        (again / "a.blob").write_text("new")
    with blob_folder("key") as again:
        assert (again / "a.blob").read_text() == "new"


def test_a_folder_that_others_can_write_into_is_not_trusted(own_home):
    folder = fill("key")
    folder.chmod(0o777)
    with blob_folder("key") as again:
        assert list(again.iterdir()) == []
        assert again.stat().st_mode & 0o077 == 0


def test_a_graph_too_large_to_be_kept_pushes_no_other_out(own_home, tiny_sqs, monkeypatch):
    monkeypatch.setattr(base, "LIMIT", 2 * tiny_sqs.path("step.onnx.data").stat().st_size - 1)
    for graph in ("text", "step"):
        open_engine("openvino", tiny_sqs.path(f"{graph}.onnx"), shapes_of(tiny_sqs, graph), digest=graph)
    assert len(list(own_home.glob("compiled/*"))) == 1


def test_a_failed_compilation_leaves_nothing_trusted(own_home):
    with pytest.raises(RuntimeError), blob_folder("key") as folder:
        (folder / "a.blob").write_text("half")
        raise RuntimeError
    with blob_folder("key") as folder:
        assert list(folder.iterdir()) == []


def test_those_used_longest_ago_go_first(own_home, monkeypatch):
    monkeypatch.setattr(blobs, "LIMIT", 300)
    folders = [fill(key, "x" * 60) for key in range(2)]
    for age, folder in enumerate(folders):
        os.utime(folder, (age, age))
    fill(0)  # used again: the other one is now the oldest
    newest = fill(2, "x" * 60)
    assert [folder.exists() for folder in (*folders, newest)] == [True, False, True]


def test_one_larger_than_the_limit_stays_for_its_user(own_home, monkeypatch):
    monkeypatch.setattr(blobs, "LIMIT", 10)
    assert (fill("key") / "a.blob").exists()


def test_a_home_that_cannot_be_written_costs_only_the_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIT_TRT_HOME", str(tmp_path / "file" / "home"))
    with blob_folder("key") as folder:
        assert folder is None


def test_a_flipped_bit_in_a_compiled_graph_is_compiled_anew(own_home, tiny_sqs):
    inputs = random_inputs(tiny_sqs, "step")

    def run():
        engine = open_engine("openvino", tiny_sqs.path("step.onnx"), shapes_of(tiny_sqs, "step"), digest="1")
        return engine.run(inputs)["velocity"]

    expected = run()
    [blob] = own_home.glob("compiled/*/*.blob")
    content = bytearray(blob.read_bytes())
    for position in range(len(content) // 2, len(content), 4097):  # in the weights: no header tells of it
        content[position] ^= 0x40
    blob.write_bytes(content)
    np.testing.assert_array_equal(run(), expected)
    assert blob.read_bytes() != content


def test_the_pipeline_keeps_one_blob_a_graph_whatever_the_steps(own_home, tiny_sqs):
    pipeline = Pipeline(tiny_sqs)
    for steps in (2, 3, 100):
        pipeline("dog", seconds=0.2, steps=steps)
    assert len(list(own_home.glob("compiled/*/sha256.json"))) == 4
