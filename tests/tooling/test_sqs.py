"""SQS in the engine's own graph: every Linear's integers equal a plain numpy simulation, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from dit_trt.engines.bundle import Bundle
from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.exporters.linears import Linear
from dit_trt.runtime.pipeline import Pipeline, Settings
from dit_trt.tooling.quantize import quantize_model
from dit_trt.tooling.recipe import Recipe
from dit_trt.tooling.tables import Calibration


def exposed_run(bundle: Bundle, graph: str, feeds: Mapping[str, NDArray], folder: Path) -> dict[str, NDArray]:
    """Run one graph in ONNX Runtime without optimizations, every float input of a Q, its integers and every product."""
    model = onnx.load(bundle.path(f"{graph}.onnx"))
    nodes = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "MatMul")]
    names = {}
    for node in nodes:
        if node.op_type == "QuantizeLinear":
            names[node.input[0]] = TensorProto.FLOAT
            names[node.output[0]] = TensorProto.INT8
        elif node.name.startswith("model."):
            names[node.output[0]] = TensorProto.FLOAT
    present = {output.name for output in model.graph.output}
    for name, kind in names.items():
        if name not in present:
            model.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    path = folder / f"{graph}.onnx"
    onnx.save(model, path)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]
    return dict(zip(outputs, session.run(None, dict(feeds)), strict=True))


def feeds_of(bundle: Bundle) -> dict[str, dict[str, NDArray]]:
    """Real inputs: the conditioning of a prompt, and the step inputs somewhere on its trajectory."""
    pipeline, settings = Pipeline(bundle), Settings(steps=8)
    conditioning = pipeline.condition("dog barking", settings, 0.7)
    seen: list[NDArray] = []
    pipeline.sample(conditioning, settings, observe=lambda step, inputs, outputs: seen.append(inputs["x"].copy()))
    step = {**conditioning.constants, "x": seen[5], **conditioning.at(5)}
    embeds = np.concatenate([pipeline._embed("dog barking")] * 2)
    numbers = {"seconds_start": np.zeros(2, np.float32), "seconds_total": np.full(2, 0.7, np.float32)}
    keep, t = np.float32([1, 0]), np.float32([0.5])
    return {"step": step, "conditioning": {"prompt_embeds": embeds, **numbers, "keep": keep, "t": t}}


def simulate(
    checkpoint: Checkpoint, linear: Linear, part: str, s: NDArray, next_s: NDArray | None, delta: np.float32, x: NDArray
) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """SQS of one Linear by its formulas, nothing of the product's code: x_q, w_q, scale [out], y."""
    rows = linear.rows(part)
    original = checkpoint.tensor(linear.key())[rows]
    smoothed = original * s
    scale = np.maximum(np.abs(smoothed).max(axis=1) / np.float32(127), np.float32(1e-12))
    w_q = np.rint(smoothed / scale[:, None])
    x_q = np.clip(np.rint(x / delta), -128, 127)
    scale = scale if next_s is None else scale * next_s[rows]
    y = (x_q.astype(np.int64) @ w_q.T.astype(np.int64)).astype(np.float64) * (np.float64(delta) * scale)
    return x_q, w_q, scale, y


@pytest.mark.parametrize("graph", ["step", "conditioning"])
def test_every_linears_integers_equal_the_simulation(
    tiny: Path, tiny_sqs: Bundle, tiny_table: Calibration, graph: str, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(str(tiny))
    smoothing = quantize_model(checkpoint, Recipe("sqs"), tiny_table)[0].smoothing
    values = exposed_run(tiny_sqs, graph, feeds_of(tiny_sqs)[graph], tmp_path)
    model = onnx.load(tiny_sqs.path(f"{graph}.onnx"))
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    nodes = {node.output[0]: node for node in model.graph.node}
    products = {node.name: node for node in model.graph.node if node.op_type == "MatMul"}
    checked = 0
    for linear in checkpoint.linears:
        if linear.graph != graph:
            continue
        for part in linear.parts:
            base = linear.graph_name(part).removesuffix(".weight")
            product = products[base]
            quantize_node = nodes[nodes[product.input[0]].input[0]]
            x, x_q = values[quantize_node.input[0]], values[quantize_node.output[0]]
            delta = tensors[quantize_node.input[1]][()]
            s, next_s = smoothing.factor[linear.name], smoothing.rows.get(linear.name)
            want_x, want_w, want_scale, want_y = simulate(checkpoint, linear, part, s, next_s, delta, x)
            np.testing.assert_array_equal(x_q, want_x)
            np.testing.assert_array_equal(tensors[f"{base}.int8"].T, want_w)
            np.testing.assert_allclose(tensors[f"{base}.scale"], want_scale, rtol=1e-6)
            found = values[product.output[0]]
            assert np.abs(found - want_y).max() <= 1e-5 * np.abs(want_y).max()
            assert x_q.any() and len(np.unique(x_q)) > 20, "a product of zeros proves nothing"
            checked += 1
    assert checked == {"step": 2 * 9, "conditioning": 2 * 2}[graph]


def test_activation_scale_covers_what_calibration_saw(tiny: Path, tiny_table: Calibration) -> None:
    """delta * 127 is the largest smoothed activation over all steps and channels (static range)."""
    checkpoint = Checkpoint.open(str(tiny))
    [model] = quantize_model(checkpoint, Recipe("sqs"), tiny_table)
    smoothing = model.smoothing
    for name, item in model.linears.items():
        largest = (tiny_table.absmax[name] / smoothing.factor[name]).max()
        assert item.activation.scale * 127 == pytest.approx(largest, rel=1e-6)


def test_linears_that_share_an_input_share_one_quantizer(tiny_sqs: Bundle) -> None:
    graph = onnx.load(tiny_sqs.path("conditioning.onnx"), load_external_data=False).graph
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) == 1
    step = onnx.load(tiny_sqs.path("step.onnx"), load_external_data=False).graph
    assert sum(node.op_type == "QuantizeLinear" for node in step.node) == 2 * 6


def test_missing_linear_in_the_table_is_named(tiny: Path, tiny_table: Calibration) -> None:
    from dit_trt.engines.errors import UserError

    absmax = dict(tiny_table.absmax)
    del absmax["transformer.layers.1.ff.ff.2"]
    with pytest.raises(UserError, match=r"transformer\.layers\.1\.ff\.ff\.2"):
        quantize_model(Checkpoint.open(str(tiny)), Recipe("sqs"), replace(tiny_table, absmax=absmax))


def test_the_engine_misses_by_as_much_as_the_exact_integers_do(
    tiny_float: Bundle, tiny_sqs: Bundle, tmp_path: Path
) -> None:
    """OpenVINO's own rounding may flip single integers; the error against FP32 is SQS's, not the engine's."""
    feeds, floats = feeds_of(tiny_sqs)["step"], Pipeline(tiny_float)
    conditioning = floats.condition("dog barking", Settings(steps=8), 0.7)
    reference_feeds = {**feeds, **conditioning.constants, **conditioning.at(5)}
    expected = floats.engine("step").run(reference_feeds)["velocity"]
    exact = exposed_run(tiny_sqs, "step", feeds, tmp_path)["velocity"]
    found = Pipeline(tiny_sqs).engine("step").run(feeds)["velocity"]
    of_exact, of_engine = (np.linalg.norm(v - expected) / np.linalg.norm(expected) for v in (exact, found))
    assert 0 < of_exact < 0.5
    assert of_engine == pytest.approx(of_exact, rel=0.1)
