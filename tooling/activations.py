"""Activations as int8 sees them: X [..., in] -> the floats that its integers stand for, ties to even, float32.

One function for each activation range; the range of a Linear, `static` | `step` | `token`, says which one is used.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .weights import QMAX, dequantize, quantize

Float = NDArray[np.float32]


def static(x: Float, scale: float) -> Float:
    """One scale for all: Q then DQ."""
    return dequantize(quantize(x, np.float32(scale)), np.float32(scale))


def step(x: Float, scale: float, delta: Float) -> Float:
    """Every row by its own step's delta [...] (the step of each row), done as the graph does it: x * r by `scale`, / r.

    r = scale / delta, the table `range/<linear>`; `scale` is the largest delta of any step.
    """
    r = (np.float32(scale) / np.asarray(delta, np.float32))[..., None]
    return static(x * r, scale) / r


def token(x: Float, scale: float) -> Float:
    """Every token by its own absmax / 127, never less than `scale`."""
    absmax = np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(QMAX) * np.float32(scale))
    rounded = quantize(x * (np.float32(QMAX) / absmax), np.float32(1))
    return rounded * (absmax / np.float32(QMAX))
