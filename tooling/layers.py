"""What every Linear costs in a recipe, as the exporter writes it: for the plan before and the manifest after."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..exporters.linears import Linear


@dataclass(frozen=True)
class Layer:
    """One Linear and what its weight costs, in bytes: as fp32, and in this recipe (integers, scales, zero points).

    Biases and activation scales (5 bytes a Linear) are not in it; padding in the file is not either.
    """

    name: str
    kind: str
    graph: str
    in_features: int
    out_features: int
    bits: str
    float_bytes: int
    bytes: int


def layers(linears: Iterable[Linear], chosen: Iterable[Linear], bits: str) -> list[Layer]:
    """All Linears in order; those of `chosen` are in `bits`, the others in fp32."""
    names = {linear.name for linear in chosen}
    return [_layer(linear, bits if linear.name in names else "fp32") for linear in linears]


def _layer(linear: Linear, bits: str) -> Layer:
    float_bytes = sum(4 * linear.in_features * rows for rows in linear.parts.values())
    stored = float_bytes if bits == "fp32" else sum(sum(packed(linear.in_features, r)) for r in linear.parts.values())
    return Layer(
        linear.name, linear.kind, linear.graph, linear.in_features, linear.out_features, bits, float_bytes, stored
    )


def packed(in_features: int, out_features: int) -> tuple[int, int, int]:
    """Bytes of one W8A8 MatMul: int8 weight [in, out], fp32 scale [out], int8 zero point [out] (see exporters/qdq)."""
    return in_features * out_features, 4 * out_features, out_features
