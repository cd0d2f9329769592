"""Numbers about channels, on arrays small enough to see the answer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_trt.tooling.figures.channels import outliers, pooled, smoothed, spread

ABSMAX = np.array([[1, 2, 3, 10], [4, 5, 6, 40]], np.float32)  # [steps, channels]


def test_the_spread_of_channels_and_its_growth() -> None:
    found = spread(ABSMAX)
    assert (found.low.tolist(), found.median.tolist(), found.high.tolist()) == ([1, 4], [2.5, 5.5], [10, 40])
    assert found.growth == 4
    assert found.standing_out == pytest.approx(40 / 5.5)


def test_a_range_that_grows_from_nothing_and_one_of_nothing() -> None:
    assert spread(np.array([[0.0, 0.0], [1.0, 2.0]], np.float32)).growth == np.inf
    assert spread(np.zeros((2, 3), np.float32)).growth == 1


def test_outliers() -> None:
    x = np.array([[1, -6, 0, 1], [-1, 2, 1, 1], [1, 5, 1, -1], [1, -3, 1, 1]], np.float32)  # [tokens, channels]
    found = outliers(x)
    assert (found.top, found.absmax, found.standing_out) == (1, 6, 6)
    assert found.lasting == 0.25 * 2  # 6 and 5 are above 3; 3 is not
    assert found.top_share == pytest.approx(74 / (74 + 4 + 3 + 4))
    assert found.for_half == 1
    assert outliers(np.eye(4, dtype=np.float32)).for_half == 2


def test_smoothing_moves_what_stands_out_into_the_weights() -> None:
    weight = np.array([[1, -1, 1, 2], [-1, 0.5, 1, 1]], np.float32)
    s = np.array([4, 5, 6, 20], np.float32)
    found = smoothed(ABSMAX, weight, s)
    assert found.x_after.tolist() == [1, 1, 1, 2]
    assert found.w_after.tolist() == [4, 5, 6, 40]
    assert found.ratios() == pytest.approx({"x_before": 40 / 5.5, "x_after": 2.0, "w_before": 2.0, "w_after": 40 / 5.5})


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
def test_pooling_loses_no_outlier(m: int, n: int, rows: int, columns: int, seed: int) -> None:
    x = np.random.default_rng(seed).random((m, n), np.float32)
    found = pooled(x, rows, columns)
    assert found.shape[0] <= rows
    assert found.shape[1] <= columns
    assert found.max() == x.max()
    if rows >= m and columns >= n:
        np.testing.assert_array_equal(found, x)
