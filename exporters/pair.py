"""The guidance pair as a difference: the batch [c, u] is rounded as [(c - u) ratio, u] and put together again behind.

Guidance computes u + cfg (c - u), so an error that c and u do not share is multiplied by about cfg sqrt(2). A Linear
is linear: W c = W u + W (c - u). Rounded so, both halves share the error of u, and that of the difference is as small
as the difference. ratio stretches it to u's range; with a range for every token there is no need.
"""

from __future__ import annotations

import numpy as np

from .quantized import QuantizedLinear, Slot
from .rewriting import Rewriting
from .step_slots import StepSlots

# [batch, 1, 1]: the place of the difference, and of what is left as it is
_FIRST, _SECOND = (np.array(values, np.float32).reshape(2, 1, 1) for values in ([1, 0], [0, 1]))


class Pair:
    """Codes what one Linear reads, and decodes its products. The batch of the graph is the pair, c before u."""

    def __init__(self, rewriting: Rewriting, slots: StepSlots, item: QuantizedLinear):
        self._rewriting = rewriting
        base = self._base = item.linear.graph_name("").removesuffix(".weight")
        ratio = item.activation.difference
        self._first = rewriting.shared("pair.first", _FIRST)
        self._ratio, self._inverse = self._first, self._first  # [ratio, 0] and [1 / ratio, 0]
        self._stretch: str | None = None  # [ratio, 1]
        self._shrink: str | None = None  # [1 / ratio, 1]
        add = rewriting.add
        if item.activation.range == "step":
            second, name = rewriting.shared("pair.second", _SECOND), f"difference/{item.linear.name}"
            self._ratio = add("Mul", [slots.piece(Slot(1, {name: 1})), self._first], f"{base}.pair_ratio")
            inverse = add("Mul", [slots.piece(Slot(1, {name: -1})), self._first], f"{base}.pair_inverse")
            self._stretch = add("Add", [self._ratio, second], f"{base}.pair_stretch")
            self._shrink = add("Add", [inverse, second], f"{base}.pair_shrink")
        elif item.activation.range == "static":
            assert ratio is not None
            self._ratio = rewriting.constant(f"{base}.pair_ratio", np.float32(ratio) * _FIRST)
            self._stretch = rewriting.constant(f"{base}.pair_stretch", np.float32(ratio) * _FIRST + _SECOND)
            self._shrink = rewriting.constant(f"{base}.pair_shrink", _FIRST / np.float32(ratio) + _SECOND)

    def encode(self, x: str) -> str:
        """x [2, tokens, in], the pair -> its difference, stretched, and its second half."""
        return self._combine(x, f"{self._base}.pair", self._stretch, self._ratio, "Sub")

    def decode(self, y: str, base: str, output: str) -> str:
        """The product [2, tokens, out] of what `encode` made -> that of the pair, as the tensor `output`."""
        return self._combine(y, f"{base}.pair_back", self._shrink, self._first, "Add", output)

    def _combine(self, x: str, name: str, both: str | None, second: str, op: str, output: str | None = None) -> str:
        """x * both +- (x's second half) * second"""
        add = self._rewriting.add
        bounds = [self._rewriting.shared(f"pair.{what}", np.array([value], np.int64)) for what, value in _SLICE.items()]
        scaled = x if both is None else add("Mul", [x, both], f"{name}_scaled")
        half = add("Slice", [scaled, *bounds], f"{name}_half")  # not of the bare product: TensorRT would lose its int8
        return add(op, [scaled, add("Mul", [half, second], f"{name}_second")], output or f"{name}_coded")


_SLICE = {"from": 1, "to": 2, "axis": 0}
