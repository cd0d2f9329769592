"""The input side of an integer product: how x becomes int8 and back, once per tensor however many Linears read it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..engines.base import Dialect
from .quantized import LARGEST, Activation
from .rewriting import Rewriting, scalar

ZERO_POINTS: dict[str, np.int8 | np.uint8] = {"int8": np.int8(0), "uint8": np.uint8(128)}  # of activations
LEVELS = LARGEST[8]


@dataclass(frozen=True)
class Quantized:
    """What a MatMul reads in the place of x, and what its product is then multiplied by (a tensor's name, or None)."""

    tensor: str
    factor: str | None = None


class Activations:
    """Quantizes the tensors of one graph; those that read the same tensor with the same range share the nodes."""

    def __init__(self, rewriting: Rewriting, dialect: Dialect):
        self._rewriting = rewriting
        self._zero = ZERO_POINTS[dialect.activation]
        self._known: dict[tuple[str, Activation], Quantized] = {}

    def quantize(self, x: str, activation: Activation, base: str) -> Quantized:
        """base: what new tensors are called after, where this is the first to read x so."""
        key = (x, activation)
        if key not in self._known:
            self._known[key] = self._quantize(x, activation, base)
        return self._known[key]

    def _quantize(self, x: str, activation: Activation, base: str) -> Quantized:
        match activation.range:
            case "engine":
                return Quantized(x)
            case "static" | "step":
                return Quantized(self._pair(x, activation.scale, base))
            case "token":
                return self._token(x, activation.scale, base)

    def _pair(self, x: str, scale: float, base: str) -> str:
        """Q and DQ with one scale for the whole tensor."""
        add, constant = self._rewriting.add, self._rewriting.constant
        parameters = [
            constant(f"{base}.x_scale", scalar(scale)),
            constant(f"{base}.x_zero_point", np.array(self._zero)),
        ]
        q = add("QuantizeLinear", [x, *parameters], f"{base}.x_q")
        return add("DequantizeLinear", [q, *parameters], f"{base}.x_dq")

    def _token(self, x: str, scale: float, base: str) -> Quantized:
        """x * 127 / amax by the scale 1; amax [..., tokens, 1] is the token's absmax, at least 127 * scale, never 0.

        As max(max, -min): ONNX Runtime takes 4 to 9 % of a step longer for the max of Abs, OpenVINO the same.
        """
        add, constant = self._rewriting.add, self._rewriting.constant
        axis = constant(f"{base}.x_axis", np.array([-1], np.int64))
        largest = add("ReduceMax", [x, axis], f"{base}.x_max", keepdims=1)
        smallest = add("ReduceMin", [x, axis], f"{base}.x_min", keepdims=1)
        floor = constant(f"{base}.x_floor", scalar(LEVELS * scale))
        amax = add("Max", [largest, add("Neg", [smallest], f"{base}.x_minus_min"), floor], f"{base}.x_amax")
        inverse = add("Div", [constant(f"{base}.x_levels", scalar(LEVELS)), amax], f"{base}.x_inverse")
        scaled = add("Mul", [x, inverse], f"{base}.x_scaled")
        factor = add("Mul", [amax, constant(f"{base}.x_step", scalar(1 / LEVELS))], f"{base}.x_factor")
        return Quantized(self._pair(scaled, 1.0, base), factor)
