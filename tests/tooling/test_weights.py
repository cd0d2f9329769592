"""Quantizer properties (hypothesis) and the numpy simulation against exact integer arithmetic."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from dit_trt.tooling.weights import dequantize, quantize, quantize_weight, quantized_linear

finite = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
matrices = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=12), elements=finite)
scales = st.floats(2.0**-10, 2.0**10, width=32).map(np.float32)


@given(matrices)
def test_weight_round_trip_is_within_half_a_step(weight: NDArray[np.float32]) -> None:
    integers, scale = quantize_weight(weight)
    assert integers.dtype == np.int8 and scale.dtype == np.float32 and scale.shape == weight.shape[:1]
    assert (scale > 0).all() and np.abs(integers.astype(int)).max() <= 127
    error = np.abs(dequantize(integers, scale[:, None]) - weight)
    assert (error <= scale[:, None] * (0.5 + 1e-4)).all()


@given(matrices)
def test_weight_uses_the_whole_range(weight: NDArray[np.float32]) -> None:
    integers, _ = quantize_weight(weight)
    alive = np.abs(weight).max(axis=1) > 1e-9
    assert (np.abs(integers.astype(int)).max(axis=1)[alive] == 127).all()
    assert not integers[np.abs(weight).max(axis=1) == 0].any()


@given(matrices, scales)
def test_quantize_is_idempotent_and_odd(x: NDArray[np.float32], scale: np.float32) -> None:
    q = quantize(x, scale)
    assert (quantize(dequantize(q, scale), scale) == q).all()
    inside = np.abs(x / scale) < 127
    assert (quantize(-x, scale)[inside] == -q[inside]).all()


@given(arrays(np.float32, 16, elements=finite), scales)
def test_quantize_is_monotonic_and_saturates(x: NDArray[np.float32], scale: np.float32) -> None:
    q = quantize(np.sort(x), scale)
    assert (np.diff(q.astype(int)) >= 0).all()
    assert quantize(np.float32([1e9, -1e9]), scale).tolist() == [127, -128]


def test_ties_go_to_even() -> None:
    halves = np.float32([0.5, 1.5, 2.5, -0.5, -1.5])
    assert quantize(halves, np.float32(1)).tolist() == [0, 2, 2, 0, -2]


def test_all_zero_rows_are_exact() -> None:
    integers, scale = quantize_weight(np.zeros((3, 4), np.float32))
    assert not integers.any() and (scale > 0).all() and np.isfinite(scale).all()


def test_integer_gemm_equals_the_dequantized_product() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 33)).astype(np.float32)
    integers, scale = quantize_weight(rng.standard_normal((7, 33)).astype(np.float32))
    x_scale = np.float32(np.abs(x).max() / 127)
    expected = dequantize(quantize(x, x_scale), x_scale).astype(np.float64) @ dequantize(integers, scale[:, None]).T
    np.testing.assert_allclose(quantized_linear(x, x_scale, integers, scale), expected, rtol=1e-5, atol=1e-6)
