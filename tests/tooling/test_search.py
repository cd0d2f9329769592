"""Searches by output error: the best of what is really computed, found from few rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from dit_trt.tooling.activations import static, token
from dit_trt.tooling.search import alpha_errors, best, clip_errors, output_error, problem
from dit_trt.tooling.smoothing import activation_scales, smoothing_factor
from dit_trt.tooling.weights import dequantize_weight, quantize_weight

Float = NDArray[np.float32]


def layer(outlier: float, seed: int = 0) -> tuple[Float, Float]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((256, 64)).astype(np.float32)
    x[:, :4] *= np.float32(outlier)
    return x, rng.standard_normal((48, 64)).astype(np.float32)


def rounded(weight: Float) -> Float:
    return dequantize_weight(quantize_weight(weight, 4))


def factor_of(x: Float, weight: Float) -> Callable[[float], Float]:
    return lambda alpha: smoothing_factor(np.abs(x).max(axis=0), np.abs(weight).max(axis=0), alpha)


def test_output_error_is_relative_and_squared() -> None:
    x, weight = layer(1)
    assert output_error(x, weight, x, weight) == 0
    assert output_error(x, weight, 0 * x, weight) == pytest.approx(1)
    assert output_error(x, weight, x, np.float32(1.1) * weight) == pytest.approx(0.01, rel=1e-4)
    assert output_error(0 * x, weight, 0 * x, weight) == 0


def test_alpha_is_the_best_of_the_integers_themselves() -> None:
    x, weight = layer(30)
    factor = factor_of(x, weight)
    alphas = (0.0, 0.25, 0.5, 0.75, 1.0)
    one = problem(x, weight, lambda smoothed, s, rows: token(smoothed, 1e-8))
    errors = alpha_errors([one], factor, rounded, alphas)
    for alpha in alphas:
        s = factor(alpha)
        wanted, found = x @ weight.T, token(x / s, 1e-8) @ rounded(weight * s).T
        assert errors[alpha] == pytest.approx(((found - wanted) ** 2).sum() / (wanted**2).sum(), rel=1e-3)
    assert best(errors) == min(alphas, key=errors.__getitem__)
    assert errors[0.5] < 0.5 * min(errors[0.0], errors[1.0])


def test_alpha_goes_to_the_side_that_is_rounded() -> None:
    """Outliers on both sides: with float weights all smoothing is for the activations, and the other way round."""
    x, weight = layer(100)
    weight[:, 8:12] *= 50
    factor, absmax = factor_of(x, weight), np.abs(x)
    inputs = problem(x, weight, lambda x, s, rows: static(x, float(activation_scales(absmax, s).max())))
    weights = problem(x, weight, lambda smoothed, s, rows: smoothed)
    assert best(alpha_errors([inputs], factor, lambda w: w)) >= 0.8
    assert best(alpha_errors([weights], factor, rounded)) <= 0.5


def test_several_linears_share_one_alpha() -> None:
    """The joint error is the mean of theirs, though one's output is a million times larger."""
    pairs = [layer(40), layer(1, seed=1)]
    pairs[1] = (pairs[1][0], pairs[1][1] * np.float32(1e3))
    factor = factor_of(*pairs[0])
    problems = [problem(x, w, lambda smoothed, s, rows: token(smoothed, 1e-8)) for x, w in pairs]
    each = [alpha_errors([one], factor, rounded, (0.2, 0.6)) for one in problems]
    both = alpha_errors(problems, factor, rounded, (0.2, 0.6))
    for alpha, error in both.items():
        assert error == pytest.approx((each[0][alpha] + each[1][alpha]) / 2)


def test_a_large_problem_is_cut_and_keeps_its_rows_steps() -> None:
    x = np.arange(3000, dtype=np.float32).repeat(4).reshape(3000, 4)
    seen = []
    weight = np.arange(5000, dtype=np.float32).repeat(4).reshape(5000, 4)
    one = problem(x, weight, lambda smoothed, s, rows: seen.append(rows) or smoothed)
    assert one.x.shape == (512, 4) and one.weight.shape == (1024, 4) and len(np.unique(one.weight)) == 1024
    one.activation(one.x, np.ones(4, np.float32))
    np.testing.assert_array_equal(one.x[:, 0], seen[0])  # row i of x holds i


def test_clipping_gives_up_a_rare_outlier() -> None:
    x, weight = layer(1)
    x[0, 0] = 40  # one value of 16384
    scale = np.abs(x).max() / 127
    errors = clip_errors([(x, weight, weight)], lambda rows, factor: static(rows, factor * scale))
    chosen = best(errors)
    assert errors[chosen] < 0.95 * errors[1.0] and chosen < 0.95
    wanted = x @ weight.T
    found = static(x, chosen * scale) @ weight.T
    assert errors[chosen] == pytest.approx(((found - wanted) ** 2).sum() / (wanted**2).sum(), rel=1e-3)


def test_nothing_is_clipped_for_nothing() -> None:
    """Two values, both on the grid of the whole range: any smaller range is worse; equals go to the first."""
    x = np.float32([[127, -127, 127, -127]])
    errors = clip_errors([(x, np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32))], static)
    assert best(errors) == 1.0 and errors[1.0] == 0 < min(list(errors.values())[1:])
    assert best({0.3: 1.0, 0.1: 1.0}) == 0.3
