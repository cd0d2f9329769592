"""What depends on the sampling step comes in as one input, `step_scales`, and is cut into pieces by one Split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from .quantized import QuantizedLinear, Slot
from .rewriting import Rewriting

INPUT = "step_scales"


def input_factor(item: QuantizedLinear) -> Slot:
    """f[t]: what the input of a Linear with the range `step` is multiplied by before it is rounded."""
    name = item.linear.name
    if item.stored_smoothing is None:
        return Slot(1, {f"range/{name}": 1})
    return Slot(item.linear.in_features, {f"smoothing/{name}": -1, f"delta/{name}": -1})


def output_factor(item: QuantizedLinear) -> Slot:
    """g[t]: what its product is multiplied by; over all parts of the Linear where it has a channel axis."""
    name = item.linear.name
    if item.stored_smoothing is None:
        return Slot(1, {f"range/{name}": -1})
    return Slot(item.linear.out_features, {f"weight_scale/{name}": 1, f"delta/{name}": 1})


def times(a: Slot, b: Slot) -> Slot:
    """The slot of the product."""
    powers = {name: a.powers.get(name, 0) + b.powers.get(name, 0) for name in {**a.powers, **b.powers}}
    return Slot(max(a.width, b.width), {k: v for k, v in powers.items() if v}, a.constant * b.constant)


def scaled(slot: Slot, constant: NDArray[np.float32]) -> Slot:
    """A slot with a constant of its own in front."""
    return replace(slot, width=max(slot.width, constant.size), constant=constant.reshape(-1).astype(np.float32))


class StepSlots:
    """Collects the slots of a graph and hands out the names of their pieces; `finish` makes the input and the Split."""

    def __init__(self) -> None:
        self.slots: list[Slot] = []
        self._cuts: list[tuple[str, int]] = []
        self._known: dict[tuple, list[str]] = {}

    def piece(self, slot: Slot, name: str | None = None) -> str:
        """The tensor float32 [slot.width] of a slot; equal slots are one, unless it asks for a `name` of its own."""
        return self.pieces(slot, [slot.width], name)[0]

    def pieces(self, slot: Slot, widths: Sequence[int], name: str | None = None) -> list[str]:
        """One slot cut into several tensors."""
        key = (name, slot.width, frozenset(slot.powers.items()), slot.constant.tobytes(), tuple(widths))
        if key not in self._known:
            first = len(self._cuts)
            names = [name or f"{INPUT}.{first + i}" for i in range(len(widths))]
            self.slots.append(slot)
            self._cuts += zip(names, widths)
            self._known[key] = names
        return self._known[key]

    def finish(self, rewriting: Rewriting) -> None:
        if not self.slots:
            return
        widths = np.array([width for _, width in self._cuts], np.int64)
        value = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [int(widths.sum())])
        rewriting.graph.input.append(value)
        sizes = rewriting.inline(f"{INPUT}.widths", widths)
        names = [name for name, _ in self._cuts]
        rewriting.add_node(helper.make_node("Split", [INPUT, sizes], names, name=INPUT, axis=0))
