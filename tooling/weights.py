"""Symmetric int8 quantizers and their numpy simulation: floats in, integers and scales out, ties to even."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]

QMAX = 127
# An all-zero row still needs a positive scale: any does, its integers are zero.
TINY = np.float32(1e-12)


def quantize_weight(weight: Float) -> tuple[NDArray[np.int8], Float]:
    """W [out, in] -> int8 [out, in] and one scale per output channel [out], scale = max|W| / 127 (paper's choice)."""
    scale = np.maximum(np.abs(weight).max(axis=1), TINY * QMAX).astype(np.float32) / np.float32(QMAX)
    return quantize(weight, scale[:, None]), scale


def quantize(x: Float, scale: Float | np.float32) -> NDArray[np.int8]:
    """round(x / scale) to nearest, ties to even, clipped to [-128, 127]: what ONNX's QuantizeLinear computes."""
    return np.clip(np.rint(x / scale), -128, QMAX).astype(np.int8)


def dequantize(q: NDArray[np.int8], scale: Float | np.float32) -> Float:
    return q.astype(np.float32) * scale


def quantized_linear(x: Float, x_scale: np.float32, weight: NDArray[np.int8], w_scale: Float) -> Float:
    """The integer GEMM a W8A8 engine computes: x [..., in] -> [..., out], accumulated in int32."""
    accumulator = quantize(x, x_scale).astype(np.int32) @ weight.T.astype(np.int32)
    return accumulator.astype(np.float32) * (x_scale * w_scale)
