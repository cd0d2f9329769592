"""`dit-trt list`: every bundle of the home folder, the broken ones too."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from commands import files_in, invoke, one_object

from dit_trt.engines.bundle import Bundle
from dit_trt.engines.manifest import FORMAT, MANIFEST, write_manifest


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bundles folder of an empty home."""
    monkeypatch.setenv("DIT_TRT_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "bundles"


def put(bundle: Bundle, folder: Path, **changes: object) -> None:
    shutil.copytree(bundle.folder, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    write_manifest(folder, {**manifest, **changes})


def test_an_empty_home_names_the_command(place: Path) -> None:
    result = invoke("list")
    assert result.stdout.startswith("no bundle in ")
    assert "dit-trt build --method sqs --bits w8a8" in result.stdout
    assert one_object(invoke("list", "--json").stdout) == {"home": str(place.parent), "bundles": []}
    assert files_in(place.parent.parent) == []


def test_newest_first_broken_last(
    place: Path, tiny_sqs: Bundle, tiny_float: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "UTC-2")  # POSIX: two hours east of Greenwich
    time.tzset()
    put(tiny_float, place / "old", created="2026-01-02T23:04:05+00:00")
    put(tiny_sqs, place / "new", created="2026-01-03T01:30:00+02:00")
    put(tiny_sqs, place / "cut")
    (place / "cut" / "step.onnx").unlink()
    put(tiny_sqs, place / "short")
    (place / "short" / "step.onnx").write_bytes(b"")
    put(tiny_sqs, place / "foreign")
    (place / "foreign" / MANIFEST).write_text('{"format": 99}')
    put(tiny_sqs, place / "when", created="yesterday")
    put(tiny_sqs, place / "what", recipe=[])
    (place / "folder").mkdir()
    (place / ".new.123-work").mkdir()
    (place / "notes.txt").write_text("not a bundle")
    value = one_object(invoke("list", "--json").stdout)
    try:
        lines = invoke("list").stdout.splitlines()
    finally:
        monkeypatch.undo()
        time.tzset()
    assert value["home"] == str(place.parent)
    assert value["bundles"][0] == {
        "name": "new",
        "bundle": str(place / "new"),
        "method": "sqs",
        "bits": "w8a8",
        "backend": "openvino",
        "linears": 14,
        "size_bytes": tiny_sqs.size_bytes,
        "created": "2026-01-03T01:30:00+02:00",
        "error": None,
    }
    assert [entry["name"] for entry in value["bundles"]] == [
        *("new", "old"),
        *("cut", "folder", "foreign", "short", "what", "when"),
    ]
    errors = [entry["error"] for entry in value["bundles"]]
    assert errors[:2] == [None, None]
    assert errors[2:6] == [
        "lacks step.onnx",
        "is not a bundle (no manifest.json)",
        f"has bundle format 99, this version reads {FORMAT}",
        "is damaged: step.onnx has the wrong size",
    ]
    assert all(error.startswith("manifest.json ") for error in errors[6:])
    size = f"{tiny_sqs.size_bytes / 1e6:.1f}"
    assert lines[0].split() == ["name", "method", "bits", "backend", "size", "created"]
    assert lines[1].split() == ["new", "sqs", "w8a8", "openvino", size, "MB", "2026-01-03", "01:30"]
    assert lines[2].split()[0] == "old"
    assert lines[2].split()[-2:] == ["2026-01-03", "01:04"]
    assert lines[3] == "cut  broken: lacks step.onnx"
    assert len(lines) == 9
    assert os.environ["DIT_TRT_HOME"] != str(place.parent)
