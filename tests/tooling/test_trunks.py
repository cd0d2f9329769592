"""`--trunk`: what a backend's float work is computed in, chosen, proven, shown, and kept for the run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import QUICK_CALIBRATION, error_of, invoke, one_object
from graphs import random_inputs

from dit_trt.engines import openvino
from dit_trt.engines.base import BACKENDS, TRUNKS, choose_trunk
from dit_trt.engines.bundle import Bundle
from dit_trt.engines.errors import UserError
from dit_trt.runtime.pipeline import Pipeline
from dit_trt.tooling.build import trunk_of
from dit_trt.tooling.recipe import Recipe


@pytest.fixture(scope="module")
def bf16(tiny: Path, tiny_table_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """Where the CPU has no BF16, OpenVINO computes it by float32's instructions, slowly: `build` refuses that for the
    time it takes, and is told here that the CPU has it."""
    folder = tmp_path_factory.mktemp("bf16") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openvino, "has_bf16", lambda: True)
        built = one_object(
            invoke("build", "--model", tiny, *QUICK_CALIBRATION, "--trunk", "bf16", "--output", folder, "--json").stdout
        )
        assert built["int8_linears"] == built["linears"] == 14
        yield Bundle(folder)


def test_the_step_runs_in_bf16_and_the_rest_does_not(bf16: Bundle, tiny_sqs: Bundle) -> None:
    inputs = {graph: random_inputs(tiny_sqs, graph) for graph in ("step", "conditioning")}
    outputs = {}
    for bundle in (bf16, tiny_sqs):
        pipeline = Pipeline(bundle)
        engines = {"step": pipeline.engine("step"), "conditioning": pipeline.engine("conditioning", 5)}
        outputs[bundle] = {graph: engine.run(inputs[graph]) for graph, engine in engines.items()}
    for name, value in outputs[bf16]["conditioning"].items():
        np.testing.assert_array_equal(value, outputs[tiny_sqs]["conditioning"][name])
    found, full = (outputs[bundle]["step"]["velocity"] for bundle in (bf16, tiny_sqs))
    assert 1e-4 < np.linalg.norm(found - full) / np.linalg.norm(full) < 0.2


def test_the_bundle_says_so(bf16: Bundle, tiny_sqs: Bundle) -> None:
    assert (bf16.manifest["trunk"], tiny_sqs.manifest["trunk"]) == ("bf16", "fp32")
    output = invoke("inspect", bf16.folder).stdout
    assert "backend      openvino, bf16 trunk" in output
    assert "backend      openvino\n" in invoke("inspect", tiny_sqs.folder).stdout
    assert 'trunk = "bf16"' in invoke("inspect", bf16.folder, "--recipe").stdout
    for name in ("step.onnx", "step.onnx.data"):  # the engine's doing, not the graph's
        assert bf16.path(name).read_bytes() == tiny_sqs.path(name).read_bytes()


def test_another_trunk_is_another_bundle(tiny: Path, tiny_table_file: Path) -> None:
    arguments = ("build", "--model", tiny, *QUICK_CALIBRATION, "--backend", "tensorrt", "--dry-run", "--json")
    names = {one_object(invoke(*arguments, "--trunk", trunk).stdout)["bundle"] for trunk in ("fp16", "bf16", "fp32")}
    assert len(names) == 3


def test_what_auto_is() -> None:
    sqs, none = Recipe("sqs"), Recipe("none")
    assert [trunk_of(sqs, backend) for backend in BACKENDS] == ["fp32", "fp32", "fp16"]
    assert {trunk_of(none, backend) for backend in BACKENDS} == {"fp32"}
    assert trunk_of(Recipe("none", trunk="fp16"), "tensorrt") == "fp16"
    assert set(TRUNKS) == {"auto", "fp32", "bf16", "fp16"}


def test_a_cpu_without_bf16_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "has_bf16", lambda: False)
    with pytest.raises(UserError, match=r"^this CPU does not multiply bf16: openvino would compute in fp32; "):
        choose_trunk("openvino", "bf16")
    assert choose_trunk("openvino", "auto") == "fp32"
    assert choose_trunk("tensorrt", "bf16") == "bf16"


def test_a_backend_without_it_refuses_before_anything_is_done(tiny: Path, tmp_path: Path) -> None:
    line = error_of("build", "--model", tiny, "--backend", "openvino", "--trunk", "fp16", "--output", tmp_path / "out")
    assert line == "Error: the backend openvino has no trunk 'fp16' (one of: fp32, bf16)"
    assert not (tmp_path / "out").exists()
    assert "unknown trunk 'int8'" in error_of("build", "--model", tiny, "--trunk", "int8", code=2)


def test_json_of_a_plan(tiny: Path, tiny_table_file: Path, tmp_path: Path) -> None:
    """What a TensorRT bundle was built with is in its manifest, for the run to build the same."""
    arguments = ("--profile", "8,16,24", "--workspace-mb", 100, "--target", "sm80", "--target", "sm89")
    folder = tmp_path / "bundle"
    invoke("build", "--model", tiny, *QUICK_CALIBRATION, "--backend", "tensorrt", *arguments, "--output", folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["plan"] == {"profile": [8, 16, 24], "workspace": 100_000_000, "targets": ["sm80", "sm89"]}
    assert (manifest["attentions"], manifest["fused_attentions"]) == (4, 4)
    assert manifest["trunk"] == "fp16"
    shown = invoke("inspect", folder).stdout
    assert "tensorrt, fp16 trunk, 4 of 4 attentions fused, targets ['sm80', 'sm89'], profile [8, 16, 24]" in shown
