"""What every Linear costs in a recipe, as the exporter writes it: for the plan before and the manifest after."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..exporters.int4 import Form, packed_bytes
from ..exporters.linears import Linear
from .recipe import Recipe
from .weights import group_of


@dataclass(frozen=True)
class Layer:
    """One Linear and what its weight costs, in bytes: as fp32, and in this recipe (integers, scales, zero points).

    branch_bytes: of its low-rank branch. Where several step graphs share the noise levels, each has both, and so many
    times they are counted. Biases and activation scales (5 bytes a Linear) are not in it; padding in the file is not
    either.
    """

    name: str
    kind: str
    graph: str
    in_features: int
    out_features: int
    bits: str
    float_bytes: int
    bytes: int
    branch_bytes: int


def layers(linears: Iterable[Linear], recipe: Recipe, int4_block: int = 0) -> list[Layer]:
    """All Linears in order. int4_block: of the backend's dialect."""
    return [_layer(linear, recipe, int4_block) for linear in linears]


def _layer(linear: Linear, recipe: Recipe, int4_block: int) -> Layer:
    parts, branch = weight_tensors(linear, recipe, int4_block), branch_tensors(linear, recipe)
    copies = (recipe.groups or 1) if linear.graph == "step" else 1
    return Layer(
        linear.name,
        linear.kind,
        linear.graph,
        linear.in_features,
        linear.out_features,
        recipe.bits_of(linear),
        sum(4 * linear.in_features * rows for rows in linear.parts.values()),
        copies * sum(sum(part) for part in parts.values()),
        copies * sum(branch),
    )


def weight_tensors(linear: Linear, recipe: Recipe, int4_block: int = 0) -> dict[str, tuple[int, ...]]:
    """By part, the bytes of the tensors of its weight in one graph. int4_block: of the backend's dialect."""
    bits, width = recipe.bits_of(linear), linear.in_features
    if bits == "fp32":
        return {part: (4 * width * rows,) for part, rows in linear.parts.items()}
    if bits != "w4a8":
        return {part: packed_bytes(width, rows, 8) for part, rows in linear.parts.items()}
    group = group_of(width, recipe.group_size)
    form: Form = "memory" if recipe.w4 == "memory" else "expanded"
    return {
        part: packed_bytes(width, rows, 4, 0 if group == width else group, form, int4_block)
        for part, rows in linear.parts.items()
    }


def branch_tensors(linear: Linear, recipe: Recipe) -> tuple[int, ...]:
    """Bytes of the tensors of its low-rank branch in one graph: a [in, rank] once, b [rank, out] for every part."""
    rank = min(recipe.lora_rank, linear.in_features, linear.out_features)
    if not rank or recipe.bits_of(linear) == "fp32":
        return ()
    return 2 * linear.in_features * rank, *(2 * rank * rows for rows in linear.parts.values())
