"""A weightless graph and ready weights become an ONNX file, with integer products where the Linears are quantized.

The graph is rewritten by weight name, never by node name. Weights are asked for, packed and written one at a time,
so that memory holds one layer whatever the model's size.

A quantized Linear, part by part:

    x -> * f -> pair -> Q -> DQ -> MatMul(DQ(integers)) -> + (x f) A B -> * g -> pair -> + bias

f and g are there where the range changes with the step or the token; step_factors says what they are merged into. The
pair is coded and decoded where its difference is what is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from ..engines.base import INT8, Dialect
from ..engines.errors import UserError
from .activations import Activations
from .data_file import DataFile
from .half import add_half, fits, is_matrix
from .int4 import Form, allow_int4
from .low_rank import Branch
from .pair import Pair
from .quantized import QuantizedLinear, Slot
from .rewriting import Rewriting
from .step_factors import StepFactors
from .step_slots import StepSlots
from .trunk import Trunk
from .weight_nodes import StepWeights, dequantized


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
    half: bool = False,
    narrow: bool = False,
) -> Written:
    """Write `path` and `path + '.data'`, as the backend of `dialect` wants it.

    topology: a graph whose weights are inputs (see float_graphs). weights(name): the float array of an input.
    quantized: by Linear name; only those of this graph count, the others are ignored. half: store the other matrices
    in FP16 (see half). narrow: this graph is the trunk, which runs in the dialect's type (see trunk).
    """
    model = onnx.ModelProto()
    model.CopyFrom(topology)
    graph = model.graph
    runtime_inputs = [value for value in graph.input if not is_weight(value)]
    names = [value.name for value in graph.input if is_weight(value)]
    shapes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in graph.input}
    del graph.input[:]
    graph.input.extend(runtime_inputs)

    def checked(name: str) -> NDArray:
        return _checked(name, weights(name), shapes[name])

    slots = StepSlots()
    with DataFile(path.with_name(path.name + ".data")) as data:
        rewriting = Rewriting(graph, data)
        here = [
            item for item in (quantized or {}).values() if item.linear.graph_name(_first(item)) in rewriting.matmuls
        ]
        _quantize(rewriting, here, slots, checked, dialect)
        slots.finish(rewriting)
        left = [name for name in names if name not in rewriting.replaced]
        trunk = Trunk(rewriting, dialect.trunk, left) if narrow and dialect.trunk != "float32" else None
        for name in left:
            weight = checked(name)
            if trunk is not None:
                trunk.store(name, weight)
            elif half and is_matrix(name, weight.shape) and fits(weight):
                add_half(rewriting, name, weight)
            else:
                rewriting.constant(name, weight)
        rewriting.finish()
    if any(tensor.data_type == onnx.TensorProto.INT4 for tensor in graph.initializer):
        allow_int4(model)
    onnx.save_model(model, path)
    return Written(path.stat().st_size + data.path.stat().st_size, tuple(slots.slots))


def _first(item: QuantizedLinear) -> str:
    return next(iter(item.linear.parts))


def _quantize(
    rewriting: Rewriting,
    items: list[QuantizedLinear],
    slots: StepSlots,
    weights: Callable[[str], NDArray],
    dialect: Dialect,
) -> None:
    """Rewrite every `x -> MatMul(W^T)` of the Linears `items`."""
    activations = Activations(rewriting, dialect)
    factors = StepFactors(rewriting, slots, {item.linear.name: item for item in items}, weights)
    for item in items:
        factors.scale_input(item)
        x = rewriting.matmuls[item.linear.graph_name(_first(item))][1].input[0]
        pair = None if item.activation.difference is None else Pair(rewriting, slots, item)
        if pair is not None:
            x = pair.encode(x)
        form: Form = "memory" if item.activation.range == "engine" else "expanded"
        step_weights = None if item.stored_smoothing is None else StepWeights(rewriting, slots, item)
        branch = None if item.low_rank is None else Branch(rewriting, slots, item, x, dialect)
        for part in item.linear.parts:
            name = item.linear.graph_name(part)
            base = name.removesuffix(".weight")
            transpose, matmul = rewriting.matmuls[name]
            quantized = activations.quantize(x, item.activation, base)
            weight = dequantized(rewriting, base, item.weight(part), form, dialect.int4_block)
            if step_weights is not None:
                weight = step_weights.requantized(part, base, weight)
            matmul.name, matmul.input[0], matmul.input[1] = base, quantized.tensor, weight
            factor = quantized.factor or factors.output(item, part)
            joined = None if branch is None else branch.part(part, base)
            result = matmul.output[0]
            if pair is not None:
                matmul.output[0] = f"{base}.of_pair"
            _follow(rewriting, matmul, base, factor, joined, token=item.activation.range == "token")
            if pair is not None:
                pair.decode(f"{base}.of_pair", base, result)
            rewriting.remove(transpose)
            rewriting.replaced.add(name)


def _follow(
    rewriting: Rewriting, matmul: onnx.NodeProto, base: str, factor: str | None, branch: str | None, token: bool
) -> None:
    """Put the low-rank sum and the factor behind a product, whose readers read their result by the old name.

    The branch reads what the product reads, so it comes before the factor; but for `token` its x is not divided by
    the token's absmax, so it comes behind.
    """
    steps = [("Mul", factor), ("Add", branch)] if token else [("Add", branch), ("Mul", factor)]
    steps = [(op, operand) for op, operand in steps if operand is not None]
    if not steps:
        return
    result = matmul.output[0]
    current = matmul.output[0] = f"{base}.product"
    for i, (op, operand) in enumerate(steps):
        last = i == len(steps) - 1
        current = rewriting.add(op, [current, operand], result if last else f"{base}.with_low_rank")  # type: ignore[list-item]


def _checked(name: str, weight: NDArray, shape: list[int]) -> NDArray:
    if list(weight.shape) != shape:
        raise UserError(f"the checkpoint's {name} has shape {list(weight.shape)}, its configuration asks for {shape}")
    if not np.isfinite(weight).all():
        raise UserError(f"the checkpoint's {name} holds NaN or infinity")
    return weight


def is_weight(value: onnx.ValueInfoProto) -> bool:
    """Weights keep their dotted checkpoint names; run-time inputs are `x`, `context_k.0`, ..."""
    return value.name.startswith(("model.", "conditioner.", "pretransform.", "rope."))
