"""Activation ranges against integers worked out by hand, and against each other."""

from __future__ import annotations

import numpy as np
import pytest

from dit_trt.tooling.activations import static, step, token


def test_static_rounds_to_even_and_saturates_as_int8() -> None:
    x = np.float32([[0.25, 0.75, -0.25, 1000, -1000]])
    np.testing.assert_array_equal(static(x, 0.5), [[0, 1, 0, 63.5, -64]])


def test_step_is_static_by_the_delta_of_each_row() -> None:
    x = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
    delta = np.float32([0.5, 0.25, 0.125, 0.03125])  # powers of two: the detour over r is exact
    found = step(x, 0.5, delta)
    for row, d in enumerate(delta):
        np.testing.assert_array_equal(found[row], static(x[row], d))
    assert not np.array_equal(found, static(x, 0.5))


def test_token_takes_every_rows_own_range() -> None:
    x = np.float32([[127, 1.4, -0.6], [12.7, 0.14, -0.06]])
    np.testing.assert_allclose(token(x, 1e-8), [[127, 1, -1], [12.7, 0.1, -0.1]], rtol=1e-6)


def test_token_range_has_a_floor() -> None:
    """A row far under the floor is rounded by it, to zero; a silent row is zero and no NaN."""
    x = np.float32([[0.4, -0.4], [0, 0], [254, 1]])
    np.testing.assert_allclose(token(x, 1.0), [[0, 0], [0, 0], [254, 0]], rtol=1e-6)


@pytest.mark.parametrize("rows", [(3,), (2, 3)])
def test_leading_dimensions_are_kept(rows: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal((*rows, 8)).astype(np.float32)
    for found in (static(x, 0.1), token(x, 1e-8), step(x, 0.1, np.full(rows, 0.05, np.float32))):
        assert found.shape == x.shape and found.dtype == np.float32
        assert np.abs(found - x).max() <= 0.06
