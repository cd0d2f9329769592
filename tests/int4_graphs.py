"""One quantized Linear as a graph of its own, and its oracles: plain numpy, nothing of the product's code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from dit_trt.exporters.data_file import DataFile
from dit_trt.exporters.int4 import Form, allow_int4, weight_nodes
from dit_trt.exporters.quantized import Weight

NAME = "model.layer"
DELTA = np.float32(0.05)  # of the static activation range


def random_weight(out_features: int, in_features: int, group: int = 0, seed: int = 0) -> Weight:
    """group: input channels a scale, 0: one scale an output channel."""
    random = np.random.default_rng(seed)
    integers = random.integers(-7, 8, (out_features, in_features)).astype(np.int8)
    scale = np.exp(random.normal(-4, 0.4, (out_features, in_features // (group or in_features)))).astype(np.float32)
    return Weight(integers, scale if group else scale[:, 0], 4)


def real(weight: Weight) -> NDArray[np.float32]:
    """W [out, in], every integer by its own scale."""
    out_features, in_features = weight.integers.shape
    scale = weight.scale.reshape(out_features, -1)
    return weight.integers.astype(np.float32) * np.repeat(scale, in_features // scale.shape[1], axis=1)


def int8(weight: Weight) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The integers [out, in] and scale [out] of `expanded`."""
    if weight.scale.ndim == 1:
        return weight.integers.astype(np.float32), weight.scale
    c = np.max(weight.scale, axis=1) * np.float32(7) / np.float32(127)
    return np.clip(np.round(real(weight) / c[:, None]), -127, 127), c


def write_linear(
    folder: Path, weight: Weight, form: Form, rows: int, kind: str = "int8", bias: NDArray | None = None
) -> Path:
    """y = (x W^T + bias)^T for x [rows, in]; `expanded` quantizes x by DELTA. kind: the integer type of activations.

    The Transpose at the end keeps the product from being the graph's output, whose name OpenVINO would give it.
    """
    out_features, in_features = weight.integers.shape
    with DataFile(folder / "g.onnx.data") as data:
        made = weight_nodes(NAME, weight, data, form)
    initializers, nodes, x = made.initializers, [], "x"
    if form == "expanded":
        zero = np.array(0, np.int8) if kind == "int8" else np.array(128, np.uint8)
        initializers += [numpy_helper.from_array(np.array(DELTA), "d"), numpy_helper.from_array(zero, "z")]
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "d", "z"], ["x_q"], name="x_q"),
            helper.make_node("DequantizeLinear", ["x_q", "d", "z"], ["x_dq"], name="x_dq"),
        ]
        x = "x_dq"
    nodes += [*made.nodes, helper.make_node("MatMul", [x, made.output], ["product"], name=NAME)]
    y = "product"
    if bias is not None:
        initializers.append(numpy_helper.from_array(bias, "bias"))
        nodes.append(helper.make_node("Add", ["product", "bias"], ["sum"], name="node_add"))
        y = "sum"
    nodes.append(helper.make_node("Transpose", [y], ["y"], name="end", perm=[1, 0]))
    inputs = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [rows, in_features])]
    outputs = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [out_features, rows])]
    graph = helper.make_graph(nodes, "linear", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    allow_int4(model)
    onnx.save_model(model, folder / "g.onnx")
    return folder / "g.onnx"


def run_standard(path: Path, x: NDArray, *names: str) -> list[NDArray]:
    """Any tensors of a graph as the standard says, node by node: ONNX Runtime without its optimizations."""
    model = onnx.load(path)
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(list(names), {"x": x})
