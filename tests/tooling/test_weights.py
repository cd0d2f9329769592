"""Quantizer properties (hypothesis) and the numpy simulation against exact integer arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from dit_trt.exporters.quantized import Weight, WeightBits
from dit_trt.tooling.weights import (
    dequantize,
    dequantize_weight,
    group_of,
    quantize,
    quantize_weight,
    round_weight,
)

Float = NDArray[np.float32]
finite = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
matrices = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=12), elements=finite)


def quantized_linear(x: Float, x_scale: np.float32, weight: NDArray[np.int8], w_scale: Float) -> Float:
    """The integer GEMM a W8A8 engine computes: x [..., in] -> [..., out], accumulated in int32."""
    accumulator = quantize(x, x_scale).astype(np.int32) @ weight.T.astype(np.int32)
    return accumulator.astype(np.float32) * (x_scale * w_scale)


scales = st.floats(2.0**-10, 2.0**10, width=32).map(np.float32)
bits = st.sampled_from([8, 7, 4])
groups = st.sampled_from([0, 2, 3, 64])


def spread(weight: Weight, in_features: int) -> Float:
    """The scale of every single weight [out, in]."""
    columns = weight.scale.reshape(len(weight.scale), -1)
    return np.repeat(columns, in_features // columns.shape[1], axis=1)


@given(matrices, bits, groups)
def test_weight_round_trip_is_within_half_a_step(weight: Float, bits: WeightBits, group: int) -> None:
    quantized = quantize_weight(weight, bits, group)
    assert quantized.integers.dtype == np.int8 and quantized.scale.dtype == np.float32 and quantized.bits == bits
    assert (quantized.scale > 0).all() and np.abs(quantized.integers.astype(int)).max() <= {8: 127, 7: 63, 4: 7}[bits]
    step = spread(quantized, weight.shape[1])
    assert (np.abs(dequantize_weight(quantized) - weight) <= step * (0.5 + 1e-4)).all()


@given(matrices, bits, groups)
def test_every_group_uses_the_whole_range(weight: Float, bits: WeightBits, group: int) -> None:
    integers = quantize_weight(weight, bits, group).integers.astype(int)
    width = group_of(weight.shape[1], group)
    largest = np.abs(weight.reshape(-1, width)).max(axis=1)
    peak = np.abs(integers.reshape(-1, width)).max(axis=1)
    assert (peak[largest > 1e-9] == {8: 127, 7: 63, 4: 7}[bits]).all()
    assert not peak[largest == 0].any()


def test_groups_are_of_consecutive_inputs() -> None:
    weight = np.float32([[7, 3.5, 70, 35], [0.7, 0, 7, -7]])
    quantized = quantize_weight(weight, 4, 2)
    np.testing.assert_allclose(quantized.scale, [[1, 10], [0.1, 1]], rtol=1e-6)
    assert quantized.integers.tolist() == [[7, 4, 7, 4], [7, 0, 7, -7]]  # 3.5 is a tie: to even


@pytest.mark.parametrize(
    ("in_features", "group", "width", "shape"),
    [(12, 0, 12, (5,)), (12, 4, 4, (5, 3)), (12, 64, 4, (5, 3)), (12, 12, 12, (5,)), (12, 24, 12, (5,))],
)
def test_a_group_that_does_not_fit_is_cut(in_features: int, group: int, width: int, shape: tuple[int, ...]) -> None:
    assert group_of(in_features, group) == width
    assert quantize_weight(np.ones((5, in_features), np.float32), 4, group).scale.shape == shape


@pytest.mark.parametrize("group", [0, 16])
def test_a_clipped_scale_has_less_of_the_weighted_error(group: int) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_t(4, (16, 64)).astype(np.float32)
    moment = rng.exponential(size=64).astype(np.float32)

    def error(quantized: Weight) -> Float:
        each = moment * (dequantize_weight(quantized) - weight) ** 2
        return each.reshape(*quantized.scale.reshape(16, -1).shape, -1).sum(axis=2)

    plain, clipped = quantize_weight(weight, 4, group), quantize_weight(weight, 4, group, moment)
    assert (error(clipped) <= error(plain) * (1 + 1e-6)).all()
    assert error(clipped).sum() < 0.9 * error(plain).sum()
    best = np.min(
        [error(round_weight(weight, plain.scale * np.float32(f), 4)) for f in np.linspace(1, 0.5, 26)], axis=0
    )
    np.testing.assert_allclose(error(clipped), best, rtol=1e-5)


def test_clipping_follows_the_energy_of_the_input() -> None:
    """One large weight among small ones: it is clipped when its channel is silent, and kept when it is not."""
    weight = np.float32([[7, 3.3, 3.2, -3.3]])
    loud, silent = (quantize_weight(weight, 4, clip=np.float32([x, 1, 1, 1])) for x in (1e6, 1e-6))
    np.testing.assert_allclose(dequantize_weight(loud)[0, 0], 7, rtol=1e-6)
    assert dequantize_weight(silent)[0, 0] < 6


@given(matrices, scales)
def test_quantize_is_idempotent_and_odd(x: Float, scale: np.float32) -> None:
    q = quantize(x, scale)
    assert (quantize(dequantize(q, scale), scale) == q).all()
    inside = np.abs(x / scale) < 127
    assert (quantize(-x, scale)[inside] == -q[inside]).all()


@given(arrays(np.float32, 16, elements=finite), scales)
def test_quantize_is_monotonic_and_saturates(x: Float, scale: np.float32) -> None:
    q = quantize(np.sort(x), scale)
    assert (np.diff(q.astype(int)) >= 0).all()
    assert quantize(np.float32([1e9, -1e9]), scale).tolist() == [127, -128]


def test_ties_go_to_even() -> None:
    halves = np.float32([0.5, 1.5, 2.5, -0.5, -1.5])
    assert quantize(halves, np.float32(1)).tolist() == [0, 2, 2, 0, -2]


def test_all_zero_rows_are_exact() -> None:
    for clip in (None, np.ones(4, np.float32)):
        quantized = quantize_weight(np.zeros((3, 4), np.float32), clip=clip)
        assert not quantized.integers.any() and (quantized.scale > 0).all() and np.isfinite(quantized.scale).all()


def test_integer_gemm_equals_the_dequantized_product() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 33)).astype(np.float32)
    weight = quantize_weight(rng.standard_normal((7, 33)).astype(np.float32))
    x_scale = np.float32(np.abs(x).max() / 127)
    expected = dequantize(quantize(x, x_scale), x_scale).astype(np.float64) @ dequantize_weight(weight).T
    found = quantized_linear(x, x_scale, weight.integers, weight.scale)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
