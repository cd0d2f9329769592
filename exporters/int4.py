"""A quantized weight as ONNX: int8, or 4 bits, of which an engine makes int8 (`expanded`) or which it keeps (`memory`).

expanded: `DQ(int4 [out, in]) -> Transpose -> Q(c) -> DQ(c) -> [in, out]`. All but the last DQ is constant: what runs is
a product of int8 by int8 as of an 8-bit weight, whatever the range of the activation. With a scale a group, c[m] =
max over groups scale[m, g] * 7 / 127, so that the loudest group fills -127..127; with a scale an output channel c is
that scale and the integers stay as they are. (The Transpose lets ONNX Runtime fold it: it keeps a bare DQ -> Q.)

memory: `DQ(int4 [in, out]) -> MatMul` by a float activation: 4 bits in RAM too, and the engine quantizes the activation
by itself. Without a zero point: with one, OpenVINO would multiply in float.

Where the integers stay as they are, TensorRT takes the Q for the DQ's undoing and fails over what is left. There every
output channel has several equal scales, one for a block of inputs, and nothing is undone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from ..engines import int4
from ..engines.errors import UserError
from .data_file import DataFile
from .quantized import LARGEST, Float, Weight

Form = Literal["expanded", "memory"]
OPSET, IR_VERSION = 21, 10  # the first with 4-bit tensors and with a scale a block


@dataclass(frozen=True)
class WeightNodes:
    """What one MatMul's weight adds to a graph; `output` is its dequantized float32 [in, out]."""

    initializers: list[TensorProto]
    nodes: list[NodeProto]
    output: str


def weight_nodes(base: str, weight: Weight, data: DataFile, form: Form = "expanded", block: int = 0) -> WeightNodes:
    """The nodes of `weight`, all named `<base>.<something>`; its bytes go to `data`. form: of 4-bit weights only.

    block: `expanded` with a scale an output channel repeats it for every so many inputs; 0: it is there once.
    Raises ValueError for integers that do not fit its bits, and for 8 or 7 bits with a scale a group.
    """
    if np.abs(weight.integers.astype(np.int16)).max(initial=0) > LARGEST[weight.bits]:
        raise ValueError(f"{base}: integers beyond +-{LARGEST[weight.bits]}, the most of {weight.bits} bits")
    if weight.bits != 4:
        if weight.scale.ndim != 1:
            raise ValueError(f"{base}: {weight.bits}-bit weights have one scale an output channel")
        return _int8(base, weight, data)
    return _expanded(base, weight, data, block) if form == "expanded" else _memory(base, weight, data)


def expand(weight: Weight) -> tuple[NDArray[np.int8], Float]:
    """The int8 weight [out, in] and its scale c [out] that `expanded` computes: in float32, ties to even."""
    if weight.scale.ndim == 1:
        return weight.integers, weight.scale
    c = weight.scale.max(axis=1) * np.float32(LARGEST[4]) / np.float32(LARGEST[8])
    return int4.expand(weight.integers, weight.scale, c), c


def packed_bytes(
    in_features: int, out_features: int, bits: int, group: int = 0, form: Form = "expanded", block: int = 0
) -> tuple[int, ...]:
    """Bytes of the tensors of one MatMul's weight, in the order of `weight_nodes`: integers, scale, ...

    group: input channels a scale, 0: one scale an output channel. block: as there. Padding in the file is not in it.
    """
    values, zero_points = in_features * out_features, out_features
    if bits != 4:
        return values, 4 * out_features, zero_points
    if block and not group and form == "expanded":
        group = block_of(in_features, block)
    scales = 4 * out_features * (in_features // (group or in_features))
    if form == "memory":
        return math.ceil(values / 2), scales
    return math.ceil(values / 2), scales, *([4 * out_features] if group else []), zero_points


def block_of(in_features: int, most: int) -> int:
    """The largest power of two in 16..most of which a width has two or more. Raises UserError when there is none."""
    fitting = [size for size in (256, 128, 64, 32, 16) if size <= most and in_features % size == 0]
    if (found := next((size for size in fitting if in_features // size > 1), None)) is None:
        raise UserError(
            f"{in_features} inputs have no two blocks of 16 to {most} for 4-bit weights: exclude the Linear"
        )
    return found


def allow_int4(model: onnx.ModelProto) -> None:
    """Raise the model's opset and IR version to the first with int4 tensors, where they are lower."""
    model.ir_version = max(model.ir_version, IR_VERSION)
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx"):
            opset.version = max(opset.version, OPSET)


def pack(integers: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Two a byte in C order, the first in the low four bits, as ONNX says; an odd one's upper half is zero."""
    nibbles = np.zeros(integers.size + integers.size % 2, np.uint8)
    nibbles[: integers.size] = integers.ravel().view(np.uint8) & 15
    return np.bitwise_or(nibbles[0::2], nibbles[1::2] << np.uint8(4), dtype=np.uint8)


def _int8(base: str, weight: Weight, data: DataFile) -> WeightNodes:
    initializers = [
        data.add(f"{base}.int8", np.ascontiguousarray(weight.integers.T)),
        data.add(f"{base}.scale", weight.scale),
        data.add(f"{base}.zero_point", np.zeros(weight.scale.shape, np.int8)),
    ]
    return WeightNodes(initializers, [_dequantize(base, "scale")], f"{base}.dq")


def _expanded(base: str, weight: Weight, data: DataFile, block: int) -> WeightNodes:
    out_features, in_features = weight.integers.shape
    scale = weight.scale
    if block and scale.ndim == 1:
        scale = np.repeat(scale[:, None], in_features // block_of(in_features, block), axis=1)
    initializers = [_int4(f"{base}.int4", weight.integers, data), data.add(f"{base}.scale", scale)]
    axis, c = {"axis": 0}, "scale"
    if scale.ndim == 2:
        axis, c = {"axis": 1, "block_size": in_features // scale.shape[1]}, "int8_scale"
        initializers.append(data.add(f"{base}.{c}", expand(weight)[1]))
    initializers.append(data.add(f"{base}.zero_point", np.zeros(out_features, np.int8)))
    nodes = [
        _node("DequantizeLinear", [f"{base}.int4", f"{base}.scale"], f"{base}.int4_dq", **axis),
        _node("Transpose", [f"{base}.int4_dq"], f"{base}.transposed", perm=[1, 0]),
        _node("QuantizeLinear", [f"{base}.transposed", f"{base}.{c}", f"{base}.zero_point"], f"{base}.int8", axis=1),
        _dequantize(base, c),
    ]
    return WeightNodes(initializers, nodes, f"{base}.dq")


def _memory(base: str, weight: Weight, data: DataFile) -> WeightNodes:
    initializers = [_int4(f"{base}.int4", weight.integers.T, data)]
    initializers.append(data.add(f"{base}.scale", np.ascontiguousarray(weight.scale.T)))
    axis = {"axis": 1} if weight.scale.ndim == 1 else {"axis": 0, "block_size": _group(weight)}
    nodes = [_node("DequantizeLinear", [f"{base}.int4", f"{base}.scale"], f"{base}.dq", **axis)]
    return WeightNodes(initializers, nodes, f"{base}.dq")


def _group(weight: Weight) -> int:
    return weight.integers.shape[1] // weight.scale.shape[1]


def _int4(name: str, integers: NDArray[np.int8], data: DataFile) -> TensorProto:
    tensor = data.add(name, pack(integers))
    tensor.data_type = TensorProto.INT4
    tensor.dims[:] = integers.shape
    return tensor


def _dequantize(base: str, scale: str) -> NodeProto:
    inputs = [f"{base}.int8", f"{base}.{scale}", f"{base}.zero_point"]
    return _node("DequantizeLinear", inputs, f"{base}.dq", axis=1)


def _node(op: str, inputs: list[str], output: str, **attributes: int | list[int]) -> NodeProto:
    return helper.make_node(op, inputs, [output], output, None, None, None, **attributes)
