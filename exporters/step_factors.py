"""Where the factors of a step range go: into norm gains and into factors that are there anyway, else into Muls.

f[t] scales a Linear's input before it is rounded, g[t] undoes it behind the product (see step_slots). What is linear
in between takes f along for nothing: a norm in its gain, attention in its values, SwiGLU in its value half. (The g of
queries and keys in the scale of their attention, and the f of cross attention's output in the context's few values,
made no difference that could be measured.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from numpy.typing import NDArray
from onnx import NodeProto

from .linears import SOURCES, Linear
from .quantized import QuantizedLinear, Slot
from .rewriting import Rewriting
from .step_slots import StepSlots, input_factor, output_factor, scaled, times


class StepFactors:
    """Places f and g of the Linears `items` whose range is `step`. weights(name): of the folded graph."""

    def __init__(
        self,
        rewriting: Rewriting,
        slots: StepSlots,
        items: Mapping[str, QuantizedLinear],
        weights: Callable[[str], NDArray],
    ):
        self._rewriting, self._slots, self._weights = rewriting, slots, weights
        self._items = {name: item for name, item in items.items() if item.activation.range == "step"}
        self._readers: dict[tuple[str, str], QuantizedLinear] = {}  # Linear and part -> whose f its g takes along
        for item in self._items.values():
            if (source := self._source(item.linear)) is not None:
                self._readers[source] = item

    def _source(self, linear: Linear) -> tuple[str, str] | None:
        """Name and part of the Linear that has a g and makes, but for what is linear, the input of this one."""
        if linear.kind not in SOURCES:
            return None
        kind, part = SOURCES[linear.kind]
        name = linear.name.removesuffix(linear.kind) + kind
        return (name, part) if name in self._items else None

    # -------------------- f

    def scale_input(self, item: QuantizedLinear) -> None:
        """Multiply what the Linear reads by f, at the cheapest place there is."""
        if item.linear.name not in self._items:
            return
        f = input_factor(item)
        if (source := self._source(item.linear)) is not None:
            maker = self._items[source[0]].linear
            if maker.bias:
                self._take_along(f, maker.graph_name(source[1], "bias"))
            return
        matmuls = [self._rewriting.matmuls[item.linear.graph_name(part)][1] for part in item.linear.parts]
        x = matmuls[0].input[0]
        norm = self._rewriting.maker(x)
        if norm is not None and norm.op_type == "LayerNormalization" and _same(self._rewriting.readers(x), matmuls):
            for name in norm.input[1:]:
                self._take_along(f, name)
            return
        base = item.linear.graph_name("").removesuffix(".weight")
        scaled_x = self._rewriting.add("Mul", [x, self._slots.piece(f)], f"{base}.x_f")
        for matmul in matmuls:
            matmul.input[0] = scaled_x

    def _take_along(self, f: Slot, name: str) -> None:
        """The vector `name` becomes a slot: itself * f. One of zeros stays."""
        vector = self._weights(name)
        if vector.any():
            self._rewriting.replaced.add(name)
            self._slots.piece(scaled(f, vector), name)

    # -------------------- g

    def output(self, item: QuantizedLinear, part: str) -> str | None:
        """The tensor by which the product of a part is multiplied, with the f that it takes along."""
        linear = item.linear
        if linear.name not in self._items:
            return None
        g, reader = output_factor(item), self._readers.get((linear.name, part))
        if g.width == 1:
            return self._slots.piece(g if reader is None else times(g, input_factor(reader)))
        pieces = dict(zip(linear.parts, self._slots.pieces(g, list(linear.parts.values()))))
        if reader is None:
            return pieces[part]
        base = linear.graph_name(part).removesuffix(".weight")
        return self._rewriting.add("Mul", [pieces[part], self._slots.piece(input_factor(reader))], f"{base}.g")


def _same(some: list[NodeProto], others: list[NodeProto]) -> bool:
    """The same nodes, in whatever order."""
    return {node.output[0] for node in some} == {node.output[0] for node in others}
