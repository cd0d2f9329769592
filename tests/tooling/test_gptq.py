"""GPTQ against nearest rounding, the textbook algorithm, and the best integers there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from dit_trt.exporters.quantized import Weight
from dit_trt.tooling.gptq import gptq, hessian, second_moment
from dit_trt.tooling.weights import dequantize_weight, quantize_weight, round_weight, weight_scale

Float = NDArray[np.float32]
Double = NDArray[np.float64]


def correlated(n: int, k: int, noise: float = 0.3) -> Float:
    rng = np.random.default_rng(0)
    factors = rng.standard_normal((n, k // 4)) @ rng.standard_normal((k // 4, k))
    return (factors + noise * rng.standard_normal((n, k))).astype(np.float32)


def gaussian(*shape: int) -> Float:
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


def error(x: Float, weight: Float, quantized: Weight) -> float:
    wanted = x @ weight.T
    return float(np.linalg.norm(x @ dequantize_weight(quantized).T - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize("bits", [4, 8])
def test_correlated_inputs_gain_clearly_and_on_rows_not_seen(bits: int, group: int) -> None:
    rows, weight = correlated(1024, 160), gaussian(48, 160)
    seen, unseen = rows[:512], rows[512:]
    for order in (False, True):
        found = gptq(weight, hessian([seen]), bits, group, order=order)
        assert error(unseen, weight, found) < 0.7 * error(unseen, weight, quantize_weight(weight, bits, group))
        np.testing.assert_array_equal(found.scale, weight_scale(weight, bits, group))


@pytest.mark.parametrize("order", [False, True])
def test_a_diagonal_hessian_compensates_nothing(order: bool) -> None:
    weight = gaussian(12, 200)
    diagonal = np.diag(np.random.default_rng(1).exponential(size=200))
    found, nearest = gptq(weight, diagonal, 4, 8, order=order), quantize_weight(weight, 4, 8)
    np.testing.assert_array_equal(found.integers, nearest.integers)
    matrix = hessian([correlated(400, 200)])
    assert (gptq(weight, matrix, 4, 8, order=order).integers != nearest.integers).mean() > 0.1


def textbook(weight: Float, hessian: Double, scale: Float, qmax: int) -> NDArray[np.int8]:
    """Frantar et al. 2022, algorithm 1, a column at a time: Cholesky of the inverse, errors pushed to the right."""
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    w, integers = weight.astype(np.float64), np.empty(weight.shape, np.int8)
    for k in range(weight.shape[1]):
        integers[:, k] = np.clip(np.rint(w[:, k] / scale), -qmax, qmax)
        lost = (w[:, k] - integers[:, k] * scale) / upper[k, k]
        w[:, k:] -= np.outer(lost, upper[k, k:])
    return integers


def test_it_is_gptq_also_across_blocks() -> None:
    """300 columns, three blocks: the integers are those of the textbook, which inverts, but for ties."""
    weight, matrix = gaussian(10, 300), hessian([correlated(600, 300)])
    found = gptq(weight, matrix, 4, damping=0, order=False)
    same = found.integers == textbook(weight, matrix, found.scale.astype(np.float64), 7)
    assert same.mean() > 0.999


def test_near_the_best_integers_there_are() -> None:
    """All 15^4 choices of four integers: GPTQ ends close to the best, nearest rounding does not."""
    rng = np.random.default_rng(2)
    choices = np.array(list(itertools.product(range(-7, 8), repeat=4)))
    total = dict.fromkeys(("best", "gptq", "nearest"), 0.0)
    for _ in range(20):
        factor, weight = rng.standard_normal((4, 2)), rng.standard_normal((1, 4)).astype(np.float32)
        matrix = factor @ factor.T + 0.02 * np.eye(4)

        def loss(e: Double, matrix: Double = matrix) -> Double:
            return np.einsum("ni,ij,nj->n", e, matrix, e)

        quantized = {"gptq": gptq(weight, matrix, 4, damping=0), "nearest": quantize_weight(weight, 4)}
        best = loss(choices * quantized["nearest"].scale - weight).min()
        total["best"] += best
        for name, found in quantized.items():
            lost = float(loss(dequantize_weight(found).astype(np.float64) - weight)[0])
            assert lost >= best - 1e-6
            total[name] += lost
    assert total["gptq"] < 0.5 * total["nearest"] and total["gptq"] < 3 * total["best"]


def test_fewer_rows_than_channels_do_not_harm() -> None:
    """64 rows for 160 channels: the shrunk Hessian still gains on rows not seen; the bare one is worse than nearest."""
    rows, weight = correlated(2048, 160, noise=3), gaussian(48, 160)
    seen, unseen = rows[:64], rows[64:]
    nearest = error(unseen, weight, quantize_weight(weight, 4))
    assert error(unseen, weight, gptq(weight, hessian([seen]), 4)) < 0.97 * nearest
    bare, count = second_moment([seen])
    assert count == 64 and error(unseen, weight, gptq(weight, bare, 4)) > 1.1 * nearest


def test_dead_channels_and_a_silent_input() -> None:
    rows, weight = correlated(64, 32), gaussian(8, 32)
    rows[:, [3, 17]] = 0
    found, nearest = gptq(weight, second_moment([rows])[0], 4), quantize_weight(weight, 4)
    np.testing.assert_array_equal(found.integers[:, [3, 17]], nearest.integers[:, [3, 17]])
    for silent in (second_moment, lambda blocks: (hessian(blocks), 0)):
        matrix = silent([np.zeros((5, 32), np.float32)])[0]
        np.testing.assert_array_equal(gptq(weight, matrix, 4).integers, nearest.integers)
    with pytest.raises(ValueError, match="NaN"):
        gptq(weight, np.full((32, 32), np.nan))


def test_clipped_scales_are_kept() -> None:
    rows, weight = correlated(512, 256, noise=3), gaussian(32, 256)
    clipped = gptq(weight, hessian([rows]), 4, clip=True)
    assert (clipped.scale < weight_scale(weight, 4)).any()
    assert error(rows, weight, clipped) < error(rows, weight, gptq(weight, hessian([rows]), 4))
    assert not np.array_equal(clipped.integers, round_weight(weight, clipped.scale, 4).integers)


def test_the_hessian_is_the_same_in_blocks() -> None:
    rows = correlated(100, 24)
    matrix, count = second_moment([rows])
    np.testing.assert_allclose(matrix, rows.astype(np.float64).T @ rows / 100, rtol=1e-10)
    streamed, also = second_moment(iter([rows[:30], rows[30:31], rows[31:]]))
    assert count == also == 100
    np.testing.assert_allclose(streamed, matrix, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="row"):
        hessian([])


def test_shrinkage_fades_with_rows_and_keeps_the_trace() -> None:
    share = []
    for n in (16, 256, 4096):
        rows = correlated(n, 24)
        raw, shrunk = second_moment([rows])[0], hessian([rows])
        assert np.trace(shrunk) == pytest.approx(np.trace(raw))
        share.append(1 - shrunk[0, 1] / raw[0, 1])
    assert share[0] > 0.1 > share[1] > 10 * share[2] > 0
