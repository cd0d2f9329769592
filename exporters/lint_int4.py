"""The lint of 4-bit weights: each is in one of the two forms that engines multiply in int8, see int4."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from ..engines.base import Dialect
from .int4 import OPSET


@dataclass
class Int4:
    """What `int4_weights` found. weights: output of the Q of an `expanded` weight -> a tensor of its shape, [in, out].

    checked: names of the nodes that only this lint understands.
    """

    faults: list[str] = field(default_factory=list)
    weights: dict[str, TensorProto] = field(default_factory=dict)
    checked: set[str] = field(default_factory=set)


def int4_weights(model: onnx.ModelProto, read: Callable[[str], NDArray | None], dialect: Dialect) -> Int4:
    """Follow every 4-bit initializer to its product. read: the array of an initializer, None for any other name."""
    found = Int4()
    tensors = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT4}
    consumers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    producers = {name: node for node in model.graph.node for name in node.output}
    opset = max((x.version for x in model.opset_import if x.domain in ("", "ai.onnx")), default=0)
    if tensors and opset < OPSET:
        found.faults.append(f"opset {opset} knows no 4-bit weights, {OPSET} does")
    for name, tensor in tensors.items():
        for node in consumers.get(name, []):
            found.checked.add(node.name)
            if node.op_type != "DequantizeLinear":
                found.faults.append(f"{node.name}: {node.op_type} reads the 4-bit {name}, only DequantizeLinear may")
                continue
            found.faults += _dequantize_faults(node, tensor, read)
            readers = consumers.get(node.output[0], [])
            if [reader.op_type for reader in readers] == ["MatMul"]:
                found.faults += _memory_faults(node, readers[0], producers)
            else:
                _follow(node, readers, consumers, tensor, read, found, bool(dialect.int4_block))
    return found


def _dequantize_faults(node: NodeProto, tensor: TensorProto, read: Callable[[str], NDArray | None]) -> list[str]:
    faults = []
    if len(node.input) > 2:
        faults.append(f"{node.name}: has a zero point: OpenVINO would multiply in float")
    scale, axis, block = read(node.input[1]), _integer(node, "axis", 1), _integer(node, "block_size", 0)
    if scale is None or scale.dtype != np.float32:
        return [*faults, f"{node.name}: its scale is no float32 initializer"]
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        faults.append(f"{node.name}: its scale is not positive and finite")
    shape = (
        [size // block if i == axis else size for i, size in enumerate(tensor.dims)] if block else [tensor.dims[axis]]
    )
    if list(scale.shape) != shape or (block and tensor.dims[axis] % block):
        faults.append(
            f"{node.name}: its scale is {list(scale.shape)}, block size {block} and axis {axis} ask for {shape}"
        )
    return faults


def _memory_faults(node: NodeProto, product: NodeProto, producers: dict[str, NodeProto]) -> list[str]:
    faults = []
    if product.input[1] != node.output[0]:
        faults.append(f"{node.name}: feeds {product.name}, not a GEMM's input 1")
    if _integer(node, "axis", 1) != (0 if _integer(node, "block_size", 0) else 1):
        faults.append(f"{node.name}: weights [in, out] have blocks along axis 0 and output channels along axis 1")
    before = producers.get(product.input[0])
    if before is not None and before.op_type == "DequantizeLinear":
        faults.append(f"{product.name}: an int8 activation by a 4-bit weight would be a float product, or a wrong one")
    return faults


def _follow(
    node: NodeProto,
    readers: list[NodeProto],
    consumers: dict[str, list[NodeProto]],
    tensor: TensorProto,
    read: Callable[[str], NDArray | None],
    found: Int4,
    in_blocks: bool,
) -> None:
    """`Transpose -> QuantizeLinear` of an `expanded` weight; the DQ after it is the other lint's, as of any weight.

    in_blocks: the Q must not be the inverse of the DQ (see Dialect.int4_block).
    """
    chain = [node]
    for op in ("Transpose", "QuantizeLinear"):
        if [reader.op_type for reader in readers] != [op]:
            kinds = ", ".join(reader.op_type for reader in readers) or "nothing"
            found.faults.append(f"{chain[-1].name}: goes into {kinds}, no engine makes int8 of a 4-bit weight so")
            return
        chain.append(readers[0])
        readers = consumers.get(readers[0].output[0], [])
    quantize = chain[-1]
    found.checked |= {step.name for step in chain}
    found.weights[quantize.output[0]] = TensorProto(dims=reversed(tensor.dims))
    if _integer(node, "axis", 1) != (1 if _integer(node, "block_size", 0) else 0):
        found.faults.append(f"{node.name}: weights [out, in] have blocks along axis 1 and output channels along axis 0")
    scale, axis = read(quantize.input[1]), _integer(quantize, "axis", 1)
    if scale is None or list(scale.shape) != [tensor.dims[0]] or axis != 1:
        found.faults.append(f"{quantize.name}: weights [in, out] have a scale per output, axis 1")
    elif in_blocks and (first := read(node.input[1])) is not None and np.array_equal(first.ravel(), scale):
        found.faults.append(
            f"{quantize.name}: undoes {node.name}, whose scales it has: TensorRT builds nothing of that"
        )
    if [reader.op_type for reader in readers] != ["DequantizeLinear"]:
        found.faults.append(f"{quantize.name}: is not followed by exactly one DequantizeLinear")


def _integer(node: NodeProto, name: str, default: int) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)
