"""The weight side of a product: stored integers become the dequantized weight [in, out] that a MatMul reads."""

from __future__ import annotations

import numpy as np

from .int4 import Form, weight_nodes
from .quantized import QuantizedLinear, Slot, Weight
from .rewriting import Rewriting, scalar
from .step_slots import StepSlots


def dequantized(rewriting: Rewriting, base: str, weight: Weight, form: Form = "expanded", block: int = 0) -> str:
    """The nodes of one part's weight and the name of the dequantized weight [in, out].

    base: the part's graph name without `.weight`; new tensors are `<base>.<what>`. form, block: of 4-bit
    weights, see int4.
    """
    made = weight_nodes(base, weight, rewriting.data, form, block)
    rewriting.graph.initializer.extend(made.initializers)
    for node in made.nodes:
        rewriting.add_node(node)
    return made.output


class StepWeights:
    """The weight of a Linear whose integers are made anew at every step.

    DQ(stored) -> * s[t]/stored_smoothing -> * 1/sigma[t] -> Q(1) -> DQ(1) is W * s[t] / sigma[t] in integers; the
    factor sigma[t] * delta[t] follows the product.
    """

    def __init__(self, rewriting: Rewriting, slots: StepSlots, item: QuantizedLinear):
        self._rewriting = rewriting
        linear, name = item.linear, item.linear.name
        assert item.stored_smoothing is not None
        base = linear.graph_name("").removesuffix(".weight")
        inverse_stored = (1 / item.stored_smoothing).astype(np.float32)
        columns = slots.piece(Slot(linear.in_features, {f"smoothing/{name}": 1}, inverse_stored))
        axis = rewriting.constant(f"{base}.s_axis", np.array([1], np.int64))
        self._columns = rewriting.add("Unsqueeze", [columns, axis], f"{base}.s")
        inverse = slots.pieces(Slot(linear.out_features, {f"weight_scale/{name}": -1}), list(linear.parts.values()))
        self._rows = dict(zip(linear.parts, inverse))

    def requantized(self, part: str, base: str, weight: str) -> str:
        """weight: the stored one, dequantized; the same rounded to the step's integers."""
        add, constant = self._rewriting.add, self._rewriting.constant
        smoothed = add("Mul", [weight, self._columns], f"{base}.smoothed")
        steps = add("Mul", [smoothed, self._rows[part]], f"{base}.in_steps")
        parameters = [constant(f"{base}.w_scale", scalar(1)), constant(f"{base}.w_zero_point", np.array(np.int8(0)))]
        q = add("QuantizeLinear", [steps, *parameters], f"{base}.w_q")
        return add("DequantizeLinear", [q, *parameters], f"{base}.w_dq")
