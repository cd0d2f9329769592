"""Symmetric weight and activation quantizers in numpy: floats in, integers and scales out, ties to even."""

from __future__ import annotations

from collections.abc import Iterable
from math import gcd

import numpy as np
from numpy.typing import NDArray

from ..engines import int4
from ..exporters.quantized import LARGEST, Weight, WeightBits

Float = NDArray[np.float32]

QMAX = LARGEST[8]
# An all-zero row still needs a positive scale: any does, its integers are zero.
TINY = np.float32(1e-12)
_CACHED = 1 << 16  # weights whose scales are searched at a time: they stay in the processor's cache
# What a scale is multiplied by when it is clipped: 4-bit weights gain from much smaller scales, 8-bit ones hardly.
SHRINK, SHRINK_4 = np.linspace(1, 0.8, 21), np.linspace(1, 0.5, 26)


def group_of(in_features: int, group: int) -> int:
    """How many consecutive inputs share a scale: the greatest common divisor of both; 0 means all of them."""
    return gcd(in_features, group)


def quantize_weight(weight: Float, bits: WeightBits = 8, group: int = 0, clip: Float | None = None) -> Weight:
    """W [out, in] -> integers and their scales, max|W| / `LARGEST` of every output channel (paper's choice).

    group: a scale for every so many consecutive inputs of an output channel (see `group_of`); 0: one a channel.
    clip: the second moment of every input channel, mean x^2 [in], or ones; given, each scale is shrunk to the one that
    makes sum_j clip_j (W_j - Q(W)_j)^2 of its weights least (`clipped_scale`).
    """
    scale = weight_scale(weight, bits, group) if clip is None else clipped_scale(weight, clip, bits, group)
    return round_weight(weight, scale, bits)


def weight_scale(weight: Float, bits: WeightBits = 8, group: int = 0) -> Float:
    """max|W| / qmax: [out], or [out, in // group] when the group is not the whole row; never zero."""
    qmax = np.float32(LARGEST[bits])
    scale = np.maximum(np.abs(_grouped(weight, group)).max(axis=2), TINY * qmax).astype(np.float32) / qmax
    return scale[:, 0] if scale.shape[1] == 1 else scale


def clipped_scale(
    weight: Float,
    second_moment: Float,
    bits: WeightBits = 8,
    group: int = 0,
    factors: Iterable[float] | None = None,
) -> Float:
    """`weight_scale` times the factor of the least error, sum_j second_moment_j (W_j - Q(W)_j)^2, each scale by itself.

    The error of a Linear's output is that sum when its inputs are uncorrelated. Searched over a grid, as OmniQuant and
    AWQ do for groups.
    """
    full = weight_scale(weight, bits, group)
    moment = _grouped(np.asarray(second_moment, np.float32)[None], group)
    tried = (SHRINK_4 if bits == 4 else SHRINK) if factors is None else tuple(factors)
    best = np.empty_like(full)
    step = max(1, _CACHED // weight.shape[1])
    for rows in (slice(start, start + step) for start in range(0, len(weight), step)):
        w = _grouped(weight[rows], group)
        largest = full[rows].reshape(w.shape[:2])
        chosen, least = largest, np.full(largest.shape, np.inf)
        for factor in tried:
            scale = largest * np.float32(factor)
            error = np.rint(w / scale[..., None])
            np.clip(error, -LARGEST[bits], LARGEST[bits], out=error)
            error *= scale[..., None]
            error -= w
            error *= error
            total = (error * moment).sum(axis=2, dtype=np.float64)
            chosen, least = np.where(total < least, scale, chosen), np.minimum(total, least)
        best[rows] = chosen.reshape(full[rows].shape)
    return best


def round_weight(weight: Float, scale: Float, bits: WeightBits = 8) -> Weight:
    """W [out, in] to the nearest multiple of its scale ([out] or [out, groups]), within +-`LARGEST`."""
    qmax = LARGEST[bits]
    spread = scale.reshape(len(scale), -1, 1)
    integers = np.rint(weight.reshape(len(weight), spread.shape[1], -1) / spread)
    return Weight(np.clip(integers, -qmax, qmax).astype(np.int8).reshape(weight.shape), scale, bits)


def dequantize_weight(weight: Weight) -> Float:
    """The float weight [out, in] that the integers stand for."""
    return int4.dequantize(weight.integers, weight.scale)


def _grouped(weight: Float, group: int) -> Float:
    """[out, in] -> [out, groups, in of a group]."""
    out_features, in_features = weight.shape
    return weight.reshape(out_features, -1, group_of(in_features, group))


def quantize(x: Float, scale: Float | np.float32) -> NDArray[np.int8]:
    """round(x / scale) to nearest, ties to even, clipped to [-128, 127]: what ONNX's QuantizeLinear computes."""
    return np.clip(np.rint(x / scale), -128, QMAX).astype(np.int8)


def dequantize(q: NDArray[np.int8], scale: Float | np.float32) -> Float:
    return q.astype(np.float32) * scale
