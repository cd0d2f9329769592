"""Half-precision trunks: what is neither an integer product nor an fp32 island runs in FP16 or BF16.

A strongly typed network runs every operation in the type that the graph says, so the graph says it:

    products in float, softmax, residual sums                 half
    from an integer product to what it is next rounded by,
    norms, RoPE, ranges, scales, inputs, convolutions         float32
    transposes, slices, reshapes                              whatever comes in

A Cast stands where the two meet. Accumulators of integer products leave in float32 (in FP16 they would overflow at a
thousand input channels), so what follows them costs nothing there; attention is half from its first product to its
second, as fused kernels want it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray
from onnx import NodeProto, TensorProto, numpy_helper

from ..engines.errors import UserError
from .rewriting import Rewriting

HALVES: dict[str, tuple[int, DTypeLike]] = {
    "float16": (TensorProto.FLOAT16, np.float16),
    "bfloat16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
}
# Of a float tensor. half: in the trunk's type. float32: because all it is made of is. rope: stays so whatever it meets.
Level = Literal["half", "float32", "rope"]
_LEVELS = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "half", TensorProto.BFLOAT16: "half"}
# Operations by what decides their type.
_PRODUCTS = {"MatMul", "Gemm", "Softmax"}
_ISLANDS = {
    *("QuantizeLinear", "DequantizeLinear", "ReduceMax", "ReduceMin", "ReduceMean", "LayerNormalization"),
    "Conv",  # of the latents, before the first block and behind the last; ONNX knows none in BF16 before opset 22
}
_SHAPES = {"Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Expand", "Gather", "Identity", "Split", "Tile"}


class Trunk:
    """Puts the Casts into a rewritten graph. `half` and `full`: the weights that it needs in that type.

    weights: names that the graph reads and whose arrays are written later, float32 as they stand.
    """

    def __init__(self, rewriting: Rewriting, kind: str, weights: Iterable[str]):
        self._rewriting = rewriting
        self.kind, (self._to, self._dtype) = kind, HALVES[kind]
        self.half: set[str] = set()
        self.full: set[str] = set()
        graph = rewriting.graph
        self._arrays = {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT}
        self._weights = {*weights}
        self._levels: dict[str, Level] = {
            value.name: "float32"
            for value in graph.input
            if value.type.tensor_type.elem_type == TensorProto.FLOAT and value.name not in self._weights
        }
        self._casts: dict[str, str] = {}
        for node in rewriting.in_order():
            self._type(node)
        for value in graph.output:
            if self._levels.get(value.name) == "half":
                inner = f"{value.name}.{kind}"
                rewriting.rename(value.name, inner)
                rewriting.add("Cast", [inner], value.name, to=TensorProto.FLOAT)

    def store(self, name: str, weight: NDArray[np.float32]) -> None:
        """Write a weight in the types in which it is read. Raises UserError when it is beyond FP16's largest."""
        if name in self.full:
            self._rewriting.constant(name, weight)
        if name in self.half:
            self._rewriting.constant(f"{name}.{self.kind}", self._narrow(name, weight))

    def _narrow(self, name: str, value: NDArray[np.float32]) -> NDArray:
        with np.errstate(over="ignore"):
            narrow = value.astype(self._dtype)
        if not np.isfinite(narrow.astype(np.float32)).all():
            raise UserError(f"{name} holds values beyond FP16's largest, 65504: take --trunk bf16 or fp32")
        return narrow

    def _is_constant(self, name: str) -> bool:
        return name in self._arrays or name in self._weights

    def _type(self, node: NodeProto) -> None:
        """Give the node's outputs their level, and its inputs the Casts that they need."""
        if node.op_type == "Cast":
            level = _LEVELS.get(next(attribute.i for attribute in node.attribute if attribute.name == "to"))
            self._read(node, self._levels.get(node.input[0]) or "float32")
        else:
            level = self._level(node)
            if level is not None:
                self._read(node, level)
        if level is not None:
            self._levels.update(dict.fromkeys(node.output, level))

    def _level(self, node: NodeProto) -> Level | None:  # None: it computes integers
        if node.op_type == "Shape":
            return None
        if node.op_type in _ISLANDS:
            return "float32"
        if node.op_type in _PRODUCTS:
            makers = [self._rewriting.maker(name) for name in node.input]
            integer = any(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers)
            return "float32" if integer else "half"
        data = list(node.input[:1] if node.op_type in _SHAPES else node.input)
        found = {self._levels[name] for name in data if name in self._levels}
        if any(name.startswith("rope.") and name in self._weights for name in data) or "rope" in found:
            return "rope"
        if "half" in found and node.output[0] in self._rewriting.added:
            return "float32"  # a factor of x before it is rounded: of a token of zeros it is beyond FP16
        if "half" in found:
            return "half"
        if found:
            return "float32"
        return "half" if any(self._is_constant(name) for name in data) else None

    def _read(self, node: NodeProto, level: Level) -> None:
        """Let `node` read every float input in the type of `level`."""
        for i, name in enumerate(node.input):
            if self._is_constant(name):
                node.input[i] = self._constant(name, level)
            elif name in self._levels and (self._levels[name] == "half") != (level == "half"):
                node.input[i] = self._cast(name, level)

    def _constant(self, name: str, level: Level) -> str:
        if name in self._weights:
            (self.half if level == "half" else self.full).add(name)
            return f"{name}.{self.kind}" if level == "half" else name
        if level != "half":
            return name
        narrow = f"{name}.{self.kind}"
        if name not in self._casts:
            value = numpy_helper.to_array(self._arrays[name])  # small: weights come later
            self._casts[name] = self._rewriting.inline(narrow, self._narrow(name, value))
        return narrow

    def _cast(self, name: str, level: Level) -> str:
        key = f"{name}.{self.kind if level == 'half' else 'float32'}"
        if key not in self._casts:
            to = self._to if level == "half" else TensorProto.FLOAT
            self._casts[key] = self._rewriting.add("Cast", [name], key, to=to)
        return key
