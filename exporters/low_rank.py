"""The FP16 low-rank branch in a graph: x A once for all parts of a Linear, then every part's own columns of B."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from ..engines.base import Dialect
from .quantized import QuantizedLinear
from .rewriting import Rewriting
from .step_slots import Slot, StepSlots

TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


class Branch:
    """x A B of one Linear. x: the float tensor that is quantized, behind whatever scales it.

    With a weight that is rescaled at every step x is x' f[t] = x' / (s[t] delta[t]), so A is multiplied by s[t] and B
    by 1/sigma[t]; the product's factor sigma[t] delta[t] makes it x' A B again.
    """

    def __init__(self, rewriting: Rewriting, slots: StepSlots, item: QuantizedLinear, x: str, dialect: Dialect):
        assert item.low_rank is not None
        self._rewriting, self._linear, self._type = rewriting, item.linear, TYPES[dialect.branch]
        low_rank, name = item.low_rank(), item.linear.name
        self._b = low_rank.b
        base = item.linear.graph_name("").removesuffix(".weight")
        a = self._half(f"{base}.lora_a", low_rank.a)
        self._rows: dict[str, str] = {}
        if item.stored_smoothing is not None:
            s = slots.piece(Slot(item.linear.in_features, {f"smoothing/{name}": 1}))
            axis = rewriting.constant(f"{base}.lora_axis", np.array([1], np.int64))
            column = rewriting.add("Unsqueeze", [s, axis], f"{base}.lora_s")
            a = rewriting.add("Mul", [a, column], f"{base}.lora_a_scaled")
            inverse = Slot(item.linear.out_features, {f"weight_scale/{name}": -1})
            parts = item.linear.parts
            self._rows = dict(zip(parts, slots.pieces(inverse, list(parts.values()))))
        if self._type != TensorProto.FLOAT:
            x = rewriting.add("Cast", [x], f"{base}.lora_x", to=self._type)
            a = rewriting.add("Cast", [a], f"{base}.lora_a_cast", to=self._type)
        self._x_a = rewriting.add("MatMul", [x, a], f"{base}.lora_x_a")

    def part(self, part: str, base: str) -> str:
        """x A B of one part, [..., rows of the part]."""
        b = self._half(f"{base}.lora_b", np.ascontiguousarray(self._b[:, self._linear.rows(part)]))
        if part in self._rows:
            b = self._rewriting.add("Mul", [b, self._rows[part]], f"{base}.lora_b_scaled")
        if self._type == TensorProto.FLOAT:
            return self._rewriting.add("MatMul", [self._x_a, b], f"{base}.lora")
        b = self._rewriting.add("Cast", [b], f"{base}.lora_b_cast", to=self._type)
        y = self._rewriting.add("MatMul", [self._x_a, b], f"{base}.lora_y")
        return self._rewriting.add("Cast", [y], f"{base}.lora", to=TensorProto.FLOAT)

    def _half(self, name: str, value: NDArray[np.float16]) -> str:
        """Stored in 16 bits, float32 in the graph, which is exact."""
        stored = self._rewriting.constant(name, value)
        return self._rewriting.add("Cast", [stored], f"{name}.float32", to=TensorProto.FLOAT)
