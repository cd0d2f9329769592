"""A weightless graph and ready weights become an ONNX file, with Q/DQ pairs at the inputs of the quantized Linears.

The graph is rewritten by weight name, never by node name. Weights are asked for, packed and written one at a time,
so that memory holds one layer whatever the model's size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ..engines.base import INT8, Dialect
from ..engines.errors import UserError
from .quantized import QuantizedLinear, Slot

ALIGNMENT = 64
ZERO_POINTS: dict[str, np.int8 | np.uint8] = {"int8": np.int8(0), "uint8": np.uint8(128)}  # of activations
INLINE = 1024  # bytes; smaller weights stay in the graph itself


@dataclass(frozen=True)
class Written:
    """What `write_graph` wrote: the bytes of both files, and what its input `step_scales` holds, in order."""

    bytes: int
    slots: tuple[Slot, ...] = ()


def write_graph(
    topology: onnx.ModelProto,
    path: Path,
    weights: Callable[[str], NDArray],
    quantized: Mapping[str, QuantizedLinear] | None = None,
    dialect: Dialect = INT8,
) -> Written:
    """Write `path` and `path + '.data'`, as the backend of `dialect` wants it.

    topology: a graph whose weights are inputs (see float_graphs). weights(name): the float array of an input.
    quantized: by Linear name; only those of this graph count, the others are ignored.
    """
    model = onnx.ModelProto()
    model.CopyFrom(topology)
    graph = model.graph
    runtime_inputs = [value for value in graph.input if not is_weight(value)]
    names = [value.name for value in graph.input if is_weight(value)]
    shapes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in graph.input}
    del graph.input[:]
    graph.input.extend(runtime_inputs)
    with DataFile(path.with_name(path.name + ".data")) as data:
        packed = _insert_qdq(graph, quantized or {}, data, dialect)
        for name in names:
            if name not in packed:
                graph.initializer.append(data.add(name, _checked(name, weights(name), shapes[name])))
    onnx.save_model(model, path)
    return Written(path.stat().st_size + data.path.stat().st_size)


def _checked(name: str, weight: NDArray, shape: list[int]) -> NDArray:
    if list(weight.shape) != shape:
        raise UserError(f"the checkpoint's {name} has shape {list(weight.shape)}, its configuration asks for {shape}")
    if not np.isfinite(weight).all():
        raise UserError(f"the checkpoint's {name} holds NaN or infinity")
    return weight


def is_weight(value: onnx.ValueInfoProto) -> bool:
    """Weights keep their dotted checkpoint names; run-time inputs are `x`, `context_k.0`, ..."""
    return value.name.startswith(("model.", "conditioner.", "pretransform.", "rope."))


def matmuls_by_weight(graph: onnx.GraphProto) -> dict[str, tuple[onnx.NodeProto, onnx.NodeProto]]:
    """Weight name -> (its Transpose, the MatMul that reads it), for every `x @ W^T` of a weightless graph."""
    transposes = {node.output[0]: node for node in graph.node if node.op_type == "Transpose" and "." in node.input[0]}
    return {
        transposes[node.input[1]].input[0]: (transposes[node.input[1]], node)
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in transposes
    }


def _insert_qdq(
    graph: onnx.GraphProto, quantized: Mapping[str, QuantizedLinear], data: DataFile, dialect: Dialect
) -> set[str]:
    """Rewrite `x -> MatMul(W^T)` to `x -> Q -> DQ -> MatMul(DQ(int8 W^T))`; returns the weights so replaced."""
    matmuls = matmuls_by_weight(graph)
    before: dict[str, list[onnx.NodeProto]] = {}
    dropped: set[str] = set()
    packed: set[str] = set()
    pairs: dict[tuple[str, float], str] = {}
    for item in quantized.values():
        for part in item.linear.parts:
            weight_name = item.linear.graph_name(part)
            if weight_name not in matmuls:
                continue
            transpose, matmul = matmuls[weight_name]
            weight = item.weight(part)
            integers, scale = weight.integers, weight.scale
            base = weight_name.removesuffix(".weight")
            zero = np.zeros(scale.shape, np.int8)
            graph.initializer.extend(
                [
                    data.add(f"{base}.int8", np.ascontiguousarray(integers.T)),
                    data.add(f"{base}.scale", scale.astype(np.float32)),
                    data.add(f"{base}.zero_point", zero),
                ]
            )
            nodes = before.setdefault(matmul.output[0], [])
            key = (matmul.input[0], item.activation.scale)
            if key not in pairs:
                pairs[key] = _activation_pair(graph, base, *key, nodes, ZERO_POINTS[dialect.activation])
            nodes.append(
                helper.make_node(
                    "DequantizeLinear",
                    [f"{base}.int8", f"{base}.scale", f"{base}.zero_point"],
                    [f"{base}.dq"],
                    name=f"{base}.dq",
                    axis=1,
                )
            )
            matmul.input[0], matmul.input[1] = pairs[key], f"{base}.dq"
            matmul.name = base
            dropped.add(transpose.output[0])
            packed.add(weight_name)
    kept = []
    for node in graph.node:
        if node.output[0] not in dropped:
            kept += [*before.get(node.output[0], []), onnx.NodeProto.FromString(node.SerializeToString())]
    del graph.node[:]
    graph.node.extend(kept)
    return packed


def _activation_pair(
    graph: onnx.GraphProto, base: str, x: str, scale: float, nodes: list[onnx.NodeProto], zero: np.int8 | np.uint8
) -> str:
    """Q and DQ of one tensor with a per-tensor scale; Linears that read the same tensor share the pair."""
    graph.initializer.append(numpy_helper.from_array(np.array(scale, np.float32), f"{base}.x_scale"))
    graph.initializer.append(numpy_helper.from_array(np.array(zero), f"{base}.x_zero_point"))
    parameters = [f"{base}.x_scale", f"{base}.x_zero_point"]
    nodes.append(helper.make_node("QuantizeLinear", [x, *parameters], [f"{base}.x_q"], name=f"{base}.x_q"))
    nodes.append(
        helper.make_node("DequantizeLinear", [f"{base}.x_q", *parameters], [f"{base}.x_dq"], name=f"{base}.x_dq")
    )
    return f"{base}.x_dq"


class DataFile:
    """One external-data file, appended to; every tensor starts on a multiple of 64 bytes."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> DataFile:
        self._file = self.path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, name: str, array: NDArray) -> TensorProto:
        """The initializer of `array`: inline when small, else a reference to bytes written here and now."""
        array = np.asarray(array, order="C")
        if array.nbytes < INLINE:
            return numpy_helper.from_array(array, name)
        offset = math.ceil(self._file.tell() / ALIGNMENT) * ALIGNMENT
        self._file.write(b"\0" * (offset - self._file.tell()))
        self._file.write(array.data)
        tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.path.name), ("offset", offset), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor
