"""Taps for calibration: a weightless float graph in, the same graph with the statistics of its Linears' inputs out."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .linears import Linear
from .rewriting import matmuls_by_weight

ROWS = "rows"


def add_taps(topology: onnx.ModelProto, linears: Iterable[Linear]) -> onnx.ModelProto:
    """Add, for every Linear of this graph, the outputs `max/<name>`, `min/<name>` [in] and `rows/<name>` [n, in].

    The first two are over batch and tokens. In the step graph, whose batch is the guidance pair, `difference/<name>`
    [in] is the absmax over tokens of the first half less the second. `rows` is a new int64 input [n]: which tokens of
    the flattened [batch * tokens, in] to hand out. Linears that read the same tensor get outputs of their own all the
    same.
    """
    model = onnx.ModelProto()
    model.CopyFrom(topology)
    graph = model.graph
    matmuls = matmuls_by_weight(graph)
    graph.input.append(helper.make_tensor_value_info(ROWS, TensorProto.INT64, ["n"]))
    graph.initializer.append(numpy_helper.from_array(np.array([0, 1], np.int64), "taps.axes"))
    for linear in linears:
        weight = linear.graph_name(next(iter(linear.parts)))
        if weight not in matmuls:
            continue
        x = matmuls[weight][1].input[0]
        width = f"{linear.name}/shape"
        graph.initializer.append(numpy_helper.from_array(np.array([-1, linear.in_features], np.int64), width))
        flat = f"{linear.name}/flat"
        graph.node.extend(
            [
                helper.make_node("ReduceMax", [x, "taps.axes"], [f"max/{linear.name}"], keepdims=0),
                helper.make_node("ReduceMin", [x, "taps.axes"], [f"min/{linear.name}"], keepdims=0),
                helper.make_node("Reshape", [x, width], [flat]),
                helper.make_node("Gather", [flat, ROWS], [f"rows/{linear.name}"], axis=0),
            ]
        )
        kinds = [("max", [linear.in_features]), ("min", [linear.in_features])]
        if linear.graph == "step":
            graph.node.extend(_difference(x, linear))
            kinds.append(("difference", [linear.in_features]))
        for kind, shape in kinds:
            graph.output.append(helper.make_tensor_value_info(f"{kind}/{linear.name}", TensorProto.FLOAT, shape))
        graph.output.append(
            helper.make_tensor_value_info(f"rows/{linear.name}", TensorProto.FLOAT, ["n", linear.in_features])
        )
    return model


def _difference(x: str, linear: Linear) -> list[onnx.NodeProto]:
    halves = [f"{linear.name}/conditional", f"{linear.name}/unconditional"]
    difference, magnitude = f"{linear.name}/difference", f"{linear.name}/magnitude"
    return [
        helper.make_node("Split", [x], halves, axis=0, num_outputs=2),
        helper.make_node("Sub", halves, [difference]),
        helper.make_node("Abs", [difference], [magnitude]),
        helper.make_node("ReduceMax", [magnitude, "taps.axes"], [f"difference/{linear.name}"], keepdims=0),
    ]
