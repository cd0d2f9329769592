"""The comparison itself: zero against itself, exact against numpy, and a spoilt engine fails."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from step_bundles import grouped_bundle

from dit_trt.engines.bundle import Bundle
from dit_trt.engines.errors import UserError
from dit_trt.engines.manifest import write_manifest
from dit_trt.runtime.denoiser import guide
from dit_trt.runtime.pipeline import Pipeline, Settings
from dit_trt.tooling.diff import compare

SETTINGS = Settings(steps=7)
PROMPTS = ["dog barking", "rain"]


def spoilt(bundle: Bundle, folder: Path, factor: float) -> Bundle:
    """A copy whose first ff.2 has its weight scales multiplied: what a wrong export would do."""
    shutil.copytree(bundle.folder, folder)
    path = folder / "step.onnx"
    model = onnx.load(path)
    name = "model.model.transformer.layers.0.ff.ff.2.scale"
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(factor), name))
    onnx.save_model(model, path, save_as_external_data=True, location="step.onnx.data")
    manifest = {k: v for k, v in bundle.manifest.items() if k not in ("files", "format")}
    write_manifest(folder, manifest)
    return Bundle(folder)


def test_a_bundle_equals_itself(tiny_float: Bundle) -> None:
    calls: list[int] = []
    result = compare(tiny_float, tiny_float, PROMPTS, SETTINGS, on_call=calls.append)
    assert result.cosine.shape == result.relative_error.shape == (2, 7)
    assert (result.cosine > 1 - 1e-6).all() and (result.relative_error < 1e-6).all()
    assert (result.snr_db == 200).all()
    assert calls == list(range(1, 5 * 7 * 2 + 1))


@pytest.mark.parametrize("negative", [None, "wind"])
def test_numbers_equal_a_plain_loop(tiny_float: Bundle, tiny_sqs: Bundle, negative: str | None) -> None:
    """Teacher forcing by hand: the reference's inputs through both engines, cosine and error by their formulas."""
    result = compare(tiny_sqs, tiny_float, PROMPTS, SETTINGS, negative_prompt=negative)
    theirs, ours = Pipeline(tiny_float), Pipeline(tiny_sqs)
    for index, prompt in enumerate(PROMPTS):
        settings = Settings(steps=7, seed=1000 + index)
        theirs_c, ours_c = (p.condition(prompt, settings, theirs.max_seconds, negative) for p in (theirs, ours))
        seen: list[tuple[NDArray, NDArray]] = []

        def observe(step: int, inputs, outputs, seen=seen) -> None:  # type: ignore[no-untyped-def]
            seen.append((inputs["x"].copy(), guide(outputs["velocity"], 7.0)))

        theirs.sample(theirs_c, settings, observe=observe)
        for step, (x, expected) in enumerate(seen):
            inputs = {**ours_c.constants, "x": x, **ours_c.at(step)}
            found = guide(ours.engine("step").run(inputs)["velocity"], 7.0)
            cosine = (found * expected).sum() / np.linalg.norm(found) / np.linalg.norm(expected)
            error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
            assert result.cosine[index, step] == pytest.approx(cosine, abs=1e-5)
            assert result.relative_error[index, step] == pytest.approx(error, abs=1e-4)
    assert result.worst_step_cosine == pytest.approx(result.cosine.mean(axis=0).min())
    assert result.worst_step == result.cosine.mean(axis=0).argmin()
    assert 0 < result.relative_error.mean() < 0.3, "int8 is neither exact nor broken"
    assert (result.snr_db < 60).all()


def test_a_spoilt_engine_is_seen(tiny_float: Bundle, tiny_sqs: Bundle, tmp_path: Path) -> None:
    good = compare(tiny_sqs, tiny_float, PROMPTS[:1], SETTINGS)
    bad = compare(spoilt(tiny_sqs, tmp_path / "bad", 4.0), tiny_float, PROMPTS[:1], SETTINGS)
    assert bad.relative_error.mean() > 3 * good.relative_error.mean()
    assert bad.worst_step_cosine < good.worst_step_cosine


def test_bundles_of_different_models_are_refused(tiny_float: Bundle, tmp_path: Path) -> None:
    shutil.copytree(tiny_float.folder, tmp_path / "other")
    manifest = {k: v for k, v in tiny_float.manifest.items() if k not in ("files", "format")}
    write_manifest(tmp_path / "other", {**manifest, "model": {**manifest["model"], "digest": "0" * 64}})
    with pytest.raises(UserError, match="different models"):
        compare(Bundle(tmp_path / "other"), tiny_float, PROMPTS)


def test_steps_are_compared_in_their_own_graph(tiny_float: Bundle, tmp_path: Path) -> None:
    """A second step graph that is off is off in its own steps, and the commands name it."""
    bound = float(SETTINGS.sigmas[4])
    result = compare(
        grouped_bundle(tiny_float, tmp_path / "two", [bound]), tiny_float, PROMPTS, SETTINGS, tmp_path / "in"
    )
    assert (result.relative_error[:, :5] < 1e-6).all()
    assert (result.relative_error[:, 5:] > 1e-2).all() and result.worst_step >= 5
    assert str(tmp_path / "two" / "step-1.onnx") in result.polygraphy_commands[1]
    assert str(tiny_float.path("step.onnx")) in result.polygraphy_commands[0]


def test_printed_commands_hold_the_scales_of_the_step(tiny_grouped: Bundle, tmp_path: Path) -> None:
    result = compare(tiny_grouped, tiny_grouped, PROMPTS, SETTINGS, tmp_path / "inputs", 0.99999)
    assert (result.relative_error < 1e-6).all() and (result.snr_db == 200).all()
    assert polygraphy(result.polygraphy_commands).returncode == 0


def polygraphy(commands: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Run both printed commands; the second one's result."""
    first, second = (shlex.split(command) for command in commands)
    assert first[:2] == second[:2] == ["polygraphy", "run"]
    program = str(Path(sys.executable).with_name("polygraphy"))
    subprocess.run([program, *first[1:]], check=True, capture_output=True)
    return subprocess.run([program, *second[1:]], check=False, capture_output=True, text=True)


@pytest.mark.parametrize("negative", [None, "wind"])
def test_printed_polygraphy_commands_repeat_the_verdict(
    tiny_float: Bundle, tiny_sqs: Bundle, tmp_path: Path, negative: str | None
) -> None:
    """ONNX Runtime agrees with the engine about the guided cosine, and passes or fails by the same bar."""
    result = compare(tiny_sqs, tiny_float, PROMPTS[:1], SETTINGS, tmp_path / "in puts", 0.0, negative_prompt=negative)
    good = polygraphy(result.polygraphy_commands)
    assert good.returncode == 0 and "PASSED" in good.stdout
    said = float(re.search(r"guided velocities: ([0-9.]+)", good.stdout)[1])  # type: ignore[index]
    assert said == pytest.approx(result.worst_step_cosine, abs=0.02)
    strict = compare(tiny_sqs, tiny_float, PROMPTS[:1], SETTINGS, tmp_path / "strict", 0.99999)
    bad = polygraphy(strict.polygraphy_commands)
    assert bad.returncode != 0 and "FAILED" in bad.stdout
