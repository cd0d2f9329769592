"""Stable Audio Open's size, whole: what its builds take and weigh, and that their steps run. See docs/full-size.md.

    DIT_TRT_FULL_SIZE=/some/folder python -m pytest -m full_size [-k "export and w4a8"]

The folder (20 GB) keeps the checkpoint, the calibration table, the bundles and what was measured, and what is there is
not made again: delete `w4a8` to build that one anew. Without the variable all is made in a temporary folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import onnx
import pytest
from trt_graphs import builds

from dit_trt.engines.bundle import Bundle
from dit_trt.tooling.contents import bundle_parts
from dit_trt.tooling.process_memory import measure

pytestmark = pytest.mark.full_size

MB = 1_000_000
ROOM = 20_000 * MB
CALIBRATION = ("--num-prompts", "1", "--calib-steps", "2")  # random weights have nothing to calibrate for
BUILDS = {  # what is asked for; the most that the bundle may weigh without the text encoder
    "w8a8": (("--method", "sqs"), 1400 * MB),
    "w4a8": (("--method", "sqs", "--bits", "w4a8", "--group-size", "128"), 900 * MB),  # 64, the default: 928 MB
    "w4a8-rank-32": (("--method", "sqs", "--bits", "w4a8", "--group-size", "128", "--lora-rank", "32"), 1000 * MB),
}
every_build = pytest.mark.parametrize("name", BUILDS)
TENSORRT = {  # what is asked for; how many fused attentions that has
    "tensorrt-w8a8": (("--method", "sqs"), 48),
    "tensorrt-w4a8": (("--method", "sqs", "--bits", "w4a8", "--group-size", "128"), 48),
    "tensorrt-w8a8-fp32": (("--method", "sqs", "--trunk", "fp32"), 0),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    named = os.environ.get("DIT_TRT_FULL_SIZE")
    path = Path(named) if named else tmp_path_factory.mktemp("full-size")
    path.mkdir(parents=True, exist_ok=True)
    free, used = shutil.disk_usage(path).free, sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert free + used > ROOM, f"{path} has room for {(free + used) / 1e9:.0f} GB; set DIT_TRT_FULL_SIZE elsewhere"
    return path


def measured(folder: Path, name: str, command: list[str]) -> dict:
    """Run a command with the folder's own home; what it took is kept as `<name>.json` there."""
    numbers = asdict(measure(command, print, {"DIT_TRT_HOME": str(folder / "home")}))
    (folder / f"{name}.json").write_text(json.dumps(numbers, indent=1))
    return numbers


@pytest.fixture(scope="session")
def checkpoint(folder: Path) -> Path:
    path = folder / "sao"
    if not (path / "model_config.json").is_file():
        measured(folder, "checkpoint", [sys.executable, "-m", "dit_trt.tooling.synthetic_checkpoint", "sao", str(path)])
    return path


@pytest.fixture(scope="session")
def build(folder: Path, checkpoint: Path) -> Callable[[str], tuple[Bundle, dict]]:
    """A bundle by its name in `BUILDS` or `TENSORRT`, and what its build took with a calibration table at hand."""

    def command(name: str) -> list[str]:
        model = ["--model", str(checkpoint), "--text-encoder", str(checkpoint / "text_encoder")]
        asked = BUILDS[name][0] if name in BUILDS else ("--backend", "tensorrt", *TENSORRT[name][0])
        return ["dit-trt", "build", *model, *asked, *CALIBRATION, "--output", str(folder / name)]

    def made(name: str) -> tuple[Bundle, dict]:
        numbers = folder / f"{name}.json"
        if not (folder / name).is_dir() or not numbers.is_file():
            if not (folder / "calibrated.json").is_file():
                measured(folder, "calibrated", command("w8a8"))
            measured(folder, name, command(name))
        return Bundle(folder / name), json.loads(numbers.read_text())

    return made


def test_the_checkpoint_is_written_in_little_memory(folder: Path, checkpoint: Path) -> None:
    assert (checkpoint / "model.safetensors").stat().st_size == pytest.approx(4853.79 * MB, rel=1e-4)
    assert json.loads((folder / "checkpoint.json").read_text())["peak_rss"] < 1000 * MB


@every_build
def test_export_memory(build: Callable, name: str) -> None:
    """Everything up to the last graph's last byte: the backend's own compilation is another matter."""
    phases = build(name)[1]["phases"]
    compiling = next(i for i, phase in enumerate(phases) if phase["name"].startswith("compiling"))
    exporting = phases[:compiling]
    assert {"writing step.onnx", "writing conditioning.onnx"} <= {phase["name"] for phase in exporting}
    assert max(phase["rss"] for phase in exporting) < 3000 * MB


@every_build
def test_size(build: Callable, name: str) -> None:
    parts = bundle_parts(build(name)[0])
    assert parts.pop("text") > 100 * MB
    assert sum(parts.values()) <= BUILDS[name][1]


@every_build
def test_no_weight_is_stored_twice(build: Callable, name: str) -> None:
    bundle, seen = build(name)[0], {}
    for path in sorted(bundle.folder.glob("*.onnx")):
        data = path.with_name(f"{path.name}.data").read_bytes()
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            where = {entry.key: entry.value for entry in tensor.external_data}
            if where and int(where["length"]) > MB:
                begin = int(where["offset"])
                digest = hashlib.sha256(data[begin : begin + int(where["length"])]).hexdigest()
                assert digest not in seen, f"{tensor.name} of {path.name} is {seen[digest]}"
                seen[digest] = f"{tensor.name} of {path.name}"
    assert len(seen) > 24 * 7


@every_build
def test_all_linears_run_in_int8(build: Callable, name: str) -> None:
    manifest = build(name)[0].manifest
    assert (manifest["linears"], manifest["int8_linears"]) == (168, 168)


@builds
@pytest.mark.parametrize("name", TENSORRT)
def test_tensorrt_ahead_of_time(build: Callable, name: str) -> None:
    """No GPU is needed for the plans, nor much memory: 4.1 GB in W8A8, a little less than four times the step's."""
    bundle, numbers = build(name)
    manifest = bundle.manifest
    assert (manifest["linears"], manifest["int8_linears"]) == (168, 168)
    assert manifest.get("attentions", 0) == manifest.get("fused_attentions", 0) == TENSORRT[name][1]
    assert numbers["peak_rss"] < 5000 * MB


@pytest.mark.parametrize("latents", [216, 1024])
def test_steps(build: Callable, folder: Path, checkpoint: Path, latents: int) -> None:
    """10 s and the whole 47.55 s: every bundle computes the model's step, in less memory than PyTorch."""
    bundles = [option for name in BUILDS for option in ("--bundle", str(build(name)[0].folder))]
    report = folder / f"steps-{latents}.md"
    steps = [sys.executable, "-m", "dit_trt.tooling.full_size", "steps", "--model", str(checkpoint), *bundles]
    measured(folder, "contest", [*steps, "--latents", str(latents), "--rounds", "1", "--output", str(report)])
    baseline, *rows = json.loads(report.with_suffix(".json").read_text())["rows"]
    assert [row["name"] for row in rows] == list(BUILDS)
    for row in rows:
        assert 0 < row["relative_error"] < 1  # of something else it would be 1.4; W4A8 of random weights: 0.76
        assert row["after_step"]["rss_anon"] < baseline["after_step"]["rss_anon"]
