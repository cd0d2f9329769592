"""kill -9 at random points of build and calibrate: a bundle is whole or absent, and no finished step is lost."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from killable import ForkServer
from safetensors import safe_open

from dit_trt.engines.bundle import Bundle

PROMPTS, STEPS = 2, 6
BUILDS_BY_CHANGE, BUILDS_BY_TIME, CALIBRATIONS_BY_CHANGE, CALIBRATIONS_BY_TIME = 18, 4, 20, 10


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer() as running:
        yield running


@pytest.fixture(scope="module")
def warm_home(home: Path, tiny_table_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with what takes long and is not under test: exported graphs, the FP32 reference."""
    folder = tmp_path_factory.mktemp("killed")
    for name in ("graphs", "reference"):
        shutil.copytree(home / name, folder / name)
    return folder


def test_a_killed_build_leaves_the_old_bundle_or_the_new_one(
    server: ForkServer, warm_home: Path, tiny: Path, tmp_path: Path
) -> None:
    target, kept = tmp_path / "out" / "bundle", tmp_path / "kept"
    arguments = ["--model", tiny, "--num-prompts", PROMPTS, "--calib-steps", STEPS, "--output", target]
    new, old = [*arguments, "--alpha", "0.9"], [*arguments, "--alpha", "0.5"]
    server.run("build", old, warm_home)
    shutil.copytree(target, kept)
    _, changes, seconds = server.run("build", new, warm_home)
    rng = random.Random(0)
    found: list[tuple[bool, object]] = []
    killed = 0
    for trial in range(BUILDS_BY_CHANGE + BUILDS_BY_TIME):
        shutil.rmtree(target.parent)
        target.parent.mkdir()
        existing = trial % 3 != 0
        if existing:
            shutil.copytree(kept, target)
        change, delay = 0, rng.uniform(0.02, seconds)
        if trial < BUILDS_BY_CHANGE:  # spread over all changes, so that some fall around the swap whatever the seed
            change, delay = 1 + (trial * changes + rng.randrange(changes)) // BUILDS_BY_CHANGE, 0.0
        killed += server.run("build", new, warm_home, change, delay)[0]
        alpha = Bundle(target).verify().manifest["recipe"]["alpha"] if target.exists() else None
        assert alpha in ((0.5, 0.9) if existing else (None, 0.9)), f"trial {trial}: change {change}, {delay:.3f} s"
        found.append((existing, alpha))
        assert not server.run("build", new, warm_home)[0]
        assert Bundle(target).verify().manifest["recipe"]["alpha"] == 0.9
        assert [path.name for path in target.parent.iterdir()] == [target.name], "the next build removes what was left"
    assert killed >= BUILDS_BY_CHANGE
    assert set(found) >= {(True, 0.5), (True, 0.9), (False, None)}, "the kills fell before and after the swap"


def finished_calls(home: Path) -> int:
    """What is on disk of an unfinished calibration, counted here and not by the journal: calls of the DiT."""
    [folder] = (home / "calibration").iterdir()
    if (folder / "table.safetensors").exists():
        return PROMPTS * STEPS
    prompts = 0
    if (merged := folder / "journal" / "merged.npz").exists():
        with np.load(merged) as file:
            prompts = int(file["prompts"])
    return prompts * STEPS + len(list((folder / "journal").glob(f"prompt-{prompts:04d}-step-*.npz")))


def table_of(home: Path) -> dict[str, object]:
    [folder] = (home / "calibration").iterdir()
    with safe_open(folder / "table.safetensors", framework="np") as file:
        return {"metadata": file.metadata()} | {name: file.get_tensor(name).tobytes() for name in list(file.keys())}


def test_a_killed_calibration_loses_no_finished_step(server: ForkServer, warm_home: Path, tiny: Path) -> None:
    arguments = [tiny, PROMPTS, STEPS]
    calibration = warm_home / "calibration"
    shutil.rmtree(calibration, ignore_errors=True)
    _, changes, seconds = server.run("calibrate", arguments, warm_home)
    expected = table_of(warm_home)
    shutil.rmtree(calibration)
    rng = random.Random(1)
    killed, resumed, done = 0, 0, 0
    while killed < CALIBRATIONS_BY_CHANGE + CALIBRATIONS_BY_TIME:
        change, delay = rng.randrange(1, changes), 0.0
        if killed % 14 >= 9:
            change, delay = 0, rng.uniform(0.05, seconds)
        was_killed = server.run("calibrate", arguments, warm_home, change, delay)[0]
        killed += was_killed
        if calibration.exists():
            before, done = done, finished_calls(warm_home)
            assert done >= before, f"change {change}, {delay:.3f} s"
            resumed += was_killed and 0 < before < PROMPTS * STEPS
        if list(calibration.glob("*/table.safetensors")):
            assert table_of(warm_home) == expected
            shutil.rmtree(calibration)
            done = 0
    server.run("calibrate", arguments, warm_home)
    assert table_of(warm_home) == expected
    [folder] = calibration.iterdir()
    assert not list(folder.rglob("*.part"))
    assert resumed >= 5, "many a killed calibration was itself a resumed one"


def test_half_exported_graphs_are_exported_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill (or a power cut) during the export leaves some graphs, a part of one, or a damaged one."""
    from dit_trt.exporters import float_graphs

    def fake(name: str):  # type: ignore[no-untyped-def]
        graph = onnx.helper.make_graph([], name, [], [])
        return lambda config: onnx.helper.make_model(graph)

    monkeypatch.setattr(float_graphs, "_EXPORTS", {name: fake(name) for name in float_graphs.GRAPHS})
    float_graphs.export_topologies({}, tmp_path)
    [folder] = tmp_path.iterdir()
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(whole) == sorted(f"{name}.onnx" for name in float_graphs.GRAPHS)
    for damage in (
        lambda: (folder / "step.onnx").rename(folder / "step.onnx.part"),
        lambda: (folder / "step.onnx").write_bytes(b"garbage"),
        lambda: (folder / "step.onnx").write_bytes(b""),
        lambda: (folder / "step.onnx").write_bytes(whole["step.onnx"][:-1]),
    ):
        damage()
        found = float_graphs.export_topologies({}, tmp_path)
        assert {name: model.graph.name for name, model in found.items()} == {n: n for n in float_graphs.GRAPHS}
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
