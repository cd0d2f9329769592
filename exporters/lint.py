"""The graph lint: an ONNX file in, nothing out, or every place where a backend would silently lose int8."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import external_data_helper, numpy_helper

from ..engines.base import INT8, Dialect
from .activations import ZERO_POINTS
from .lint_int4 import int4_weights

FORBIDDEN = ("MatMulInteger", "DynamicQuantizeLinear", "QLinearMatMul", "ConvInteger", "QLinearConv")
SPLITS = ("Split", "Slice", "Gather")
SHAPES = ("Reshape", "Transpose")
SMALLEST = 16  # a GEMM with fewer input or output channels is slower quantized


class GraphLintError(ValueError):
    """The graph breaks rules that keep integer GEMMs integer; the message lists all faults."""


def lint(path: Path, dialect: Dialect = INT8) -> None:
    """Raise GraphLintError with every fault of the ONNX file at `path`; small tensors are read, weights are not."""
    faults = lint_faults(onnx.load(path, load_external_data=False), path.parent, dialect)
    if faults:
        raise GraphLintError(f"{path.name}: " + "; ".join(faults))


def lint_faults(model: onnx.ModelProto, folder: Path, dialect: Dialect = INT8) -> list[str]:
    graph = model.graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    consumers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    faults = [f"{n.name}: {n.op_type} is not portable" for n in graph.node if n.op_type in FORBIDDEN]

    def read(name: str) -> NDArray | None:
        tensor = initializers.get(name)
        if tensor is None:
            return None
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor = onnx.TensorProto.FromString(tensor.SerializeToString())
            external_data_helper.load_external_data_for_tensor(tensor, str(folder))
        return numpy_helper.to_array(tensor)

    int4 = int4_weights(model, read, dialect)
    faults += int4.faults
    initializers |= int4.weights
    rescaled = _rescaled_weights(graph, initializers, consumers)
    weights = {*initializers, *rescaled.values()}
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or node.name in int4.checked:
            continue
        scale, zero = read(node.input[1]), read(node.input[2]) if len(node.input) > 2 else None
        if scale is None:
            faults.append(f"{node.name}: its scale is computed, not an initializer: the GEMM would be float")
        elif not (np.isfinite(scale).all() and (scale > 0).all()):
            faults.append(f"{node.name}: its scale is not positive and finite")
        elif scale.dtype != np.float32:
            faults.append(f"{node.name}: its scale is {scale.dtype}, accumulators need float32")
        is_weight = not weights.isdisjoint((node.input[0], node.output[0]))
        wanted = np.int8(0) if is_weight else ZERO_POINTS[dialect.activation]
        if node.op_type == "DequantizeLinear" and node.input[0] not in initializers:
            faults += _pair_faults(node, producers)
        if zero is None or zero.dtype != wanted.dtype or (zero != wanted).any():
            faults.append(f"{node.name}: its zero point is not {wanted.dtype} {wanted}")
        if node.op_type == "QuantizeLinear":
            if is_weight and scale is not None and (scale.size != 1 or scale != 1):
                faults.append(f"{node.name}: weights rounded at every step have the scale 1")
            elif scale is not None and scale.size != 1:
                faults.append(f"{node.name}: activations have one scale, this has {scale.size}")
            readers = consumers.get(node.output[0], [])
            if [reader.op_type for reader in readers] != ["DequantizeLinear"]:
                faults.append(f"{node.name}: is not followed by exactly one DequantizeLinear")
        else:
            readers = [] if node.name in rescaled else consumers.get(node.output[0], [])
            faults += _dequantize_faults(node, readers, 1 if is_weight else 0, producers, consumers, initializers)
    return list(dict.fromkeys(faults))  # both DQs of a MatMul tell of it


def _pair_faults(node: onnx.NodeProto, producers: dict[str, onnx.NodeProto]) -> list[str]:
    """A DQ undoes its Q: with other parameters the pair would scale what passes through it."""
    before = producers.get(node.input[0])
    if before is None or before.op_type != "QuantizeLinear":
        return [f"{node.name}: dequantizes what no QuantizeLinear made"]
    return [] if before.input[1:] == node.input[1:] else [f"{node.name}: its scale is not its QuantizeLinear's"]


def _rescaled_weights(
    graph: onnx.GraphProto, initializers: dict[str, onnx.TensorProto], consumers: dict[str, list[onnx.NodeProto]]
) -> dict[str, str]:
    """Weights that are made anew at every step, `DQ(stored) -> Mul -> ... -> Q`: name of the DQ -> output of the Q."""
    found = {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in initializers:
            last = node
            while len(readers := consumers.get(last.output[0], [])) == 1 and readers[0].op_type == "Mul":
                last = readers[0]
            if last is not node and [reader.op_type for reader in readers] == ["QuantizeLinear"]:
                found[node.name] = readers[0].output[0]
    return found


def _dequantize_faults(
    node: onnx.NodeProto,
    readers: list[onnx.NodeProto],
    side: int,
    producers: dict[str, onnx.NodeProto],
    consumers: dict[str, list[onnx.NodeProto]],
    initializers: dict[str, onnx.TensorProto],
) -> list[str]:
    """readers: those that must be GEMMs which read it as their input `side`."""
    faults = []
    weight = initializers.get(node.input[0])
    for reader in readers:
        if reader.op_type != "MatMul" or reader.input[side] != node.output[0]:
            faults.append(f"{node.name}: feeds {reader.op_type} {reader.name}, not a GEMM's input {side}")
            continue
        other = producers.get(reader.input[1 - side])
        if other is None or other.op_type != "DequantizeLinear":
            faults.append(f"{reader.name}: only one of its inputs is quantized")
        for cut in _cuts(reader.output[0], consumers, initializers):
            faults.append(f"{reader.name}: goes straight into {cut.op_type} and would fall to float")
    if weight is not None and (axis := next((a.i for a in node.attribute if a.name == "axis"), 1)) != 1:
        faults.append(f"{node.name}: its axis is {axis}, weights [in, out] have a scale per output, axis 1")
    if weight is not None and min(weight.dims) < SMALLEST:
        faults.append(f"{node.name}: {list(weight.dims)} is too small to be worth int8")
    return faults


def _cuts(
    product: str,
    consumers: dict[str, list[onnx.NodeProto]],
    initializers: dict[str, onnx.TensorProto],
    splits: tuple[str, ...] = SPLITS,
) -> list[onnx.NodeProto]:
    """What cuts a product into parts with nothing but a bias in between: a builder would cut its weight instead.

    Behind a Reshape only a Gather is meant, which takes queries, keys or values; RoPE slices within a head.
    """
    found = []
    for node in consumers.get(product, []):
        if node.op_type in splits:
            found.append(node)
        elif node.op_type == "Add" and any(name in initializers for name in node.input):
            found += _cuts(node.output[0], consumers, initializers, splits)
        elif node.op_type in SHAPES:
            found += _cuts(node.output[0], consumers, initializers, ("Gather",))
    return found
