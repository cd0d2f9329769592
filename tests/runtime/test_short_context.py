"""Without a negative prompt the unconditional half has no cross attention: not computed, and nothing else changes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from manifests import stamped

from dit_trt.engines.bundle import Bundle
from dit_trt.engines.manifest import MANIFEST
from dit_trt.engines.onnxruntime import ONNXRuntimeEngine
from dit_trt.engines.openvino import OpenVINOEngine
from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.runtime.graph_shapes import graph_shapes
from dit_trt.runtime.pipeline import Pipeline, Settings
from dit_trt.runtime.step_engine import Conditioning
from dit_trt.tooling.build import build_bundle
from dit_trt.tooling.recipe import Recipe

SETTINGS = Settings(steps=4, seed=3)
RECIPES = {
    "fp32": Recipe("none"),
    "sqs": Recipe("sqs"),
    "sqd": Recipe("sqd"),
    "sqd-requantize": Recipe("sqd", sqd_weights="requantize"),
    "sqt-rank": Recipe("sqt", lora_rank=8),
    "w4a8": Recipe("sqt", "w4a8", group_size=64),
}
Build = Callable[[str, str], Bundle]


@pytest.fixture(scope="module")
def built(tiny: Path, home: Path, tiny_table_file: Path) -> Build:
    """A bundle of the tiny model by recipe and backend, built once."""
    known: dict[tuple[str, str], Bundle] = {}

    def bundle(recipe: str, backend: str) -> Bundle:
        if (recipe, backend) not in known:
            target = home / "short-context" / f"{recipe}-{backend}"
            checkpoint = Checkpoint.open(str(tiny))
            known[recipe, backend] = build_bundle(checkpoint, RECIPES[recipe], backend, target, tiny_table_file).bundle
        return known[recipe, backend]

    return bundle


class Whole(Pipeline):
    """Computes both halves' cross attention, whatever they are."""

    def context_rows(self, conditioning: Conditioning) -> int:
        return conditioning.batch


def latents(pipeline: Pipeline, clips: int, negative: str | None) -> np.ndarray:
    prompts = ("dog barking", "rain", "a cat")[:clips]
    conditioning = Conditioning.together([pipeline.condition(p, SETTINGS, 0.7, negative) for p in prompts])
    expected = clips if negative is None and type(pipeline) is Pipeline else 2 * clips
    for engine in pipeline.step_engine_for(conditioning).engines:
        assert {shape[0] for name, shape in engine.inputs.items() if name.startswith("context_")} == {expected}
        assert engine.inputs["x"][0] == 2 * clips
    return pipeline.sample_batch(conditioning, SETTINGS, range(clips))


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_is_that_of_the_whole_context(built: Build, recipe: str, backend: str) -> None:
    bundle = built(recipe, backend)
    for clips, negative in ((1, None), (3, None), (1, "siren"), (3, "siren")):
        found, expected = (latents(kind(bundle), clips, negative) for kind in (Pipeline, Whole))
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
        assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize("rows", [1, 2])
def test_cross_attention_is_computed_for_so_many_rows(tiny_sqs: Bundle, tmp_path: Path, rows: int) -> None:
    """By the graph itself, and by OpenVINO's kernels."""
    shapes = graph_shapes(tiny_sqs.manifest["sizes"], context=rows)["step"]
    path = shutil.copy(tiny_sqs.path("step.onnx"), tmp_path)
    shutil.copy(tiny_sqs.path("step.onnx.data"), tmp_path)
    model = onnx.load(path, load_external_data=False)
    products = [n for n in model.graph.node if n.name.endswith(("cross_attn.to_q", "cross_attn.to_out"))]
    assert len(products) == 4
    model.graph.output.extend(onnx.ValueInfoProto(name=node.output[0]) for node in products)
    onnx.save_model(model, path)
    found = ONNXRuntimeEngine(Path(path), shapes).run({name: np.ones(s, np.float32) for name, s in shapes.items()})
    assert [found[node.output[0]].shape for node in products] == [(rows, 25, 128)] * 4

    compiled = OpenVINOEngine(tiny_sqs.path("step.onnx"), shapes).compiled
    of_kernels = []
    for op in compiled.get_runtime_model().get_ordered_ops():
        if op.get_rt_info()["layerType"].astype(str) == "FullyConnected":
            weight = op.input_value(1).get_node().get_friendly_name()
            of_kernels += [op.output(0).get_shape()[0]] * ("cross_attn." in weight)
    assert of_kernels == [rows] * 4


def test_a_bundle_of_before_runs_as_before(tiny_sqs: Bundle, tmp_path: Path) -> None:
    """Its step graph has one batch, and its manifest says nothing."""
    folder = Path(shutil.copytree(tiny_sqs.folder, tmp_path / "old"))
    manifest = {name: value for name, value in tiny_sqs.manifest.items() if name != "short_context"}
    (folder / MANIFEST).write_text(stamped(manifest))
    pipeline = Pipeline.open(folder)
    conditioning = pipeline.condition("dog", SETTINGS, 0.7)
    assert pipeline.step_engine_for(conditioning).engines[0].inputs["context_v.1"][0] == 2
    found, expected = (p.sample(conditioning, SETTINGS) for p in (pipeline, Whole(tiny_sqs)))
    assert np.array_equal(found, expected)


def test_a_coded_pair_needs_both_halves(tiny: Path, tmp_path: Path, tiny_table_file: Path) -> None:
    recipe = Recipe("sqt", cfg_pair="difference")
    bundle = build_bundle(Checkpoint.open(str(tiny)), recipe, "openvino", tmp_path / "pair", tiny_table_file).bundle
    assert bundle.manifest["short_context"] is False
    pipeline = Pipeline(bundle)
    conditioning = pipeline.condition("dog", SETTINGS, 0.7)
    assert pipeline.context_rows(conditioning) == 2
    assert pipeline.step_engine_for(conditioning) is pipeline.step_engine_of()


def test_which_rows_have_a_context(tiny_float: Bundle) -> None:
    pipeline = Pipeline(tiny_float)
    plain, against = (pipeline.condition("dog", SETTINGS, 0.7, negative) for negative in (None, ""))
    assert (plain.context_rows, against.context_rows) == (1, 2), "an empty negative prompt is one"
    for conditioning in (plain, against, *(Conditioning.together([c] * 3) for c in (plain, against))):
        rows = conditioning.context_rows
        for name, value in conditioning.constants.items():
            if name.startswith("context_v"):
                assert value[:rows].any(axis=(1, 2, 3)).all() and not value[rows:].any()
    assert Conditioning.together([plain, against]).context_rows == 4
    unguided = pipeline.condition("dog", replace(SETTINGS, cfg_scale=1.0), 0.7)
    assert (unguided.batch, unguided.context_rows) == (1, 1)


def test_a_context_is_never_cut_off(tiny_float: Bundle) -> None:
    """A step engine without room for the negative prompt's refuses it; one with room takes any."""
    pipeline = Pipeline(tiny_float)
    plain, against = (pipeline.condition("dog", SETTINGS, 0.7, negative) for negative in (None, "siren"))
    x = np.ones((2, *pipeline.step_engine_of().latent_shape), np.float32)
    short, whole = pipeline.step_engine_for(plain), pipeline.step_engine_for(against)
    with pytest.raises(ValueError, match=r"context_k.0 has shape \(2, .*the engine takes \(1, "):
        short.run(against, 0, x)
    found, expected = (engine.run(plain, 0, x)["velocity"] for engine in (short, whole))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
