"""4-bit weights as numbers: out of their bytes, dequantized, and as the int8 that `expanded` graphs compute of them."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]


def unpack(packed: NDArray, shape: tuple[int, ...]) -> NDArray[np.int8]:
    """Integers of two a byte, in C order, the first in the low four bits. packed: any 1-byte type."""
    low = packed.view(np.int8)
    integers = np.empty((packed.size, 2), np.int8)
    np.right_shift(low << 4, 4, out=integers[:, 0])
    np.right_shift(low, 4, out=integers[:, 1])
    return integers.reshape(-1)[: math.prod(shape)].reshape(shape)


def dequantize(integers: NDArray[np.int8], scale: Float) -> Float:
    """integers * scale, float32 [out, in]; scale [out] or [out, groups]."""
    scale = scale.reshape(len(integers), -1, 1)
    blocks = integers.reshape(len(integers), scale.shape[1], -1)
    return (blocks * scale).reshape(integers.shape)


def expand(integers: NDArray[np.int8], scale: Float, c: Float) -> NDArray[np.int8]:
    """round(integers * scale / c), [out, in]: every operation in float32, ties to even, as the standard says."""
    weight = dequantize(integers, scale)
    weight /= c[:, None]
    return np.rint(weight, out=weight).astype(np.int8)
