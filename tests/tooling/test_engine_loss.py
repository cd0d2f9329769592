"""`diff --simulate`: the method's loss and the engine's, told apart."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from commands import error_of, invoke, one_object
from hardware import CPU_BACKENDS, exact_int8
from onnx import numpy_helper
from step_bundles import edited, manifest_of

from dit_trt.engines.bundle import Bundle
from dit_trt.engines.errors import UserError
from dit_trt.engines.manifest import write_manifest
from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.runtime.pipeline import Settings
from dit_trt.tooling.build import build_bundle
from dit_trt.tooling.engine_loss import calibration_of, engine_loss
from dit_trt.tooling.recipe import Recipe

SETTINGS = Settings(steps=4, cfg_scale=3.0)
SQS = Recipe("sqs", decoder_bits=32)  # the simulation's float weights are the checkpoint's own


@pytest.mark.parametrize("bits", ["w8a8", "w7a8"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_sound_engine_loses_next_to_nothing(
    tiny: Path, tiny_table_file: Path, tiny_float: Bundle, tmp_path: Path, backend: str, bits: str
) -> None:
    checkpoint = Checkpoint.open(str(tiny))
    bundle = build_bundle(checkpoint, replace(SQS, bits=bits), backend, tmp_path / "sqs", tiny_table_file).bundle
    loss = engine_loss(bundle, tiny_float, checkpoint, ["dog barking", "rain"], SETTINGS)
    assert loss.method_cosine.shape == loss.engine_error.shape == (2, 4)
    assert 0 < loss.method_error.mean() < 0.5
    if bits == "w8a8":
        exact_int8(backend)
    assert loss.engine_error.mean() < 0.2 * loss.method_error.mean()


def test_a_broken_engine_is_told_from_its_method(
    tiny: Path, tiny_sqs: Bundle, tiny_float: Bundle, tmp_path: Path
) -> None:
    """One Linear's scales doubled in the graph: the simulation knows nothing of it."""
    folder = tmp_path / "broken"
    shutil.copytree(tiny_sqs.folder, folder)

    def double(graph: onnx.GraphProto) -> None:
        [scale] = [tensor for tensor in graph.initializer if tensor.name.endswith("layers.1.ff.ff.2.scale")]
        scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(2), scale.name))

    edited(folder, "step", double)
    write_manifest(folder, manifest_of(tiny_sqs))
    loss = engine_loss(Bundle(folder), tiny_float, Checkpoint.open(str(tiny)), ["dog barking"], SETTINGS)
    assert loss.engine_error.mean() > loss.method_error.mean()


def test_on_the_command_line(tiny: Path, tiny_sqs: Bundle, tiny_table_file: Path, tmp_path: Path) -> None:
    built = build_bundle(Checkpoint.open(str(tiny)), SQS, "openvino", tmp_path / "sqs", tiny_table_file)
    arguments = ("diff", built, "--simulate", "--num-prompts", "1", "--steps", "3", "--min-cosine", "0")
    found = one_object(invoke(*arguments, "--json").stdout)
    assert found["simulated_worst_step_cosine"] == pytest.approx(found["worst_step_cosine"], abs=0.02)
    assert 0 <= found["engine_to_simulation_mean_relative_error"] < found["simulated_mean_relative_error"]
    wind = one_object(invoke(*arguments, "--negative-prompt", "wind", "--json").stdout)
    assert wind["negative_prompt"] == "wind"
    for name in ("worst_step_cosine", "simulated_worst_step_cosine"):
        assert wind[name] != found[name]
    assert wind["simulated_worst_step_cosine"] == pytest.approx(wind["worst_step_cosine"], abs=0.02)
    both = ("diff", tiny_sqs.folder, "--simulate", "--against", tiny_sqs.folder)
    assert "leave out --against" in error_of(*both, code=2)


def test_a_table_that_is_gone(tiny: Path, tiny_sqs: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIT_TRT_HOME", str(tmp_path))
    with pytest.raises(UserError, match="build it again"):
        calibration_of(tiny_sqs, Checkpoint.open(str(tiny)))
