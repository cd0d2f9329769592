"""On a real NVIDIA GPU: python -m pytest -m gpu. Every method's plan runs, and says what ONNX Runtime says.

Deselected elsewhere; skipped, with the reason, where TensorRT finds no GPU.
"""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
from commands import invoke
from graphs import random_inputs, shapes_of

from dit_trt.engines import cuda, tensorrt
from dit_trt.engines.bundle import Bundle
from dit_trt.engines.tensorrt import TensorRTEngine
from dit_trt.engines.tensorrt_build import target_names
from dit_trt.runtime.pipeline import Pipeline
from dit_trt.tooling.gpu_report import ROWS, measured
from dit_trt.tooling.workflow import CalibrationOptions, build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(tensorrt.unusable() is not None, reason=f"TensorRT: {tensorrt.unusable()}"),
]
OPTIONS = {"seconds": 2.0, "seed": 3}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("gpu")
    return {name: build(recipe, "demo", "tensorrt", folder / name).bundle for name, recipe in ROWS.items()}


@pytest.mark.parametrize("name", ROWS)
def test_every_method_says_what_onnx_runtime_says(bundles: dict[str, Bundle], name: str, tmp_path: Path) -> None:
    """The whole prompt, twice with one seed: equal bytes; level with the same graphs in ONNX Runtime."""
    first, _ = Pipeline(bundles[name])("dog barking", **OPTIONS)  # type: ignore[arg-type]
    again, _ = Pipeline(bundles[name])("dog barking", **OPTIONS)  # type: ignore[arg-type]
    np.testing.assert_array_equal(first, again)
    found = measured("demo", [name], 100, 1, CalibrationOptions())["rows"][name]
    assert found["int8_linears"] == found["linears"] and found["fused_attentions"] == found["attentions"]
    assert found["cosine"] > 0.995, found
    assert found["device_bytes"] > 0


@pytest.mark.parametrize("name", ["FP16", "SQS W8A8", "sqt W8A8"])
def test_diff_passes_by_both_runners(bundles: dict[str, Bundle], name: str) -> None:
    shown = invoke("diff", bundles[name].folder, "--num-prompts", 1, "--min-cosine", 0.9).stdout
    assert "PASS" in shown
    assert "in Polygraphy's TrtRunner" in shown or "TrtRunner does not run here" in shown


def test_a_target_of_this_gpu_alone(tmp_path: Path) -> None:
    """TensorRT-RTX's CURRENT: what the portable plan is compared with."""
    own = ("--target", "current") if "current" in target_names() else ()
    invoke("build", "--backend", "tensorrt", "--method", "sqs", *own, "--output", tmp_path / "own")
    audio, _ = Pipeline(Bundle(tmp_path / "own"))("dog barking", **OPTIONS)  # type: ignore[arg-type]
    assert np.isfinite(audio).all() and np.abs(audio).max() > 0.1


def test_one_plan_runs_every_length_of_its_profile(tmp_path: Path) -> None:
    invoke("build", "--backend", "tensorrt", "--method", "sqs", "--profile", "8,64,64", "--output", tmp_path / "p")
    pipeline = Pipeline(Bundle(tmp_path / "p"))
    for seconds in (0.6, 2.0):
        audio, rate = pipeline("dog barking", seconds=seconds, steps=10, short_window=True)
        assert audio.shape == (2, round(seconds * rate)) and np.isfinite(audio).all()


@pytest.fixture
def step(bundles: dict[str, Bundle]) -> tuple[TensorRTEngine, dict]:
    bundle = bundles["FP16"]
    return TensorRTEngine(bundle.path("step.onnx"), shapes_of(bundle, "step")), random_inputs(bundle, "step")


def test_the_third_run_is_the_first(step: tuple[TensorRTEngine, dict]) -> None:
    """Set up, captured, launched: the same numbers."""
    engine, inputs = step
    first = engine.run(inputs)["velocity"]
    for _ in range(3):
        np.testing.assert_array_equal(engine.run({"x": inputs["x"]})["velocity"], first)


def test_an_engine_gives_its_memory_back(bundles: dict[str, Bundle]) -> None:
    pipeline = Pipeline(bundles["FP32"])
    pipeline("rain", steps=2)
    held = cuda.memory()[0]
    del pipeline
    gc.collect()
    assert cuda.memory()[0] > held
