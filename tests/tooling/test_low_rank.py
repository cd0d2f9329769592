"""The low-rank branch against exact SVDs, and what it brings back of a quantized Linear's output."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from dit_trt.exporters.quantized import Weight
from dit_trt.tooling.gptq import hessian
from dit_trt.tooling.low_rank import low_rank, product, randomised_svd, residual, svdquant
from dit_trt.tooling.weights import dequantize_weight, quantize_weight

Float = NDArray[np.float32]
RANK = 16
SPECTRA = {
    "flat": np.ones(192),
    "slow": 1 / np.sqrt(np.arange(1, 193)),
    "fast": 0.5 ** np.arange(192),
    "cliff behind the rank": np.r_[np.ones(RANK), np.full(192 - RANK, 0.999)],
    "cluster within the rank": np.r_[np.full(RANK // 2, 1.0), np.full(RANK // 2, 0.05), np.full(192 - RANK, 0.04)],
    "rank deficient": np.r_[np.ones(4), np.zeros(188)],
    "twelve decades": np.logspace(6, -6, 192),
}


def with_spectrum(s: NDArray) -> Float:
    rng = np.random.default_rng(3)
    u, v = (np.linalg.qr(rng.standard_normal((n, 192)))[0] for n in (320, 192))
    return ((u * s) @ v.T).astype(np.float32)


def near(weight: Float) -> Weight:
    return quantize_weight(weight, 4)


def a_layer() -> tuple[Float, Float, Float]:
    """A weight with a few strong directions, and correlated rows of its input, seen and not seen."""
    rng = np.random.default_rng(5)
    weight = rng.standard_normal((96, 128)) + rng.standard_normal((96, 6)) @ rng.standard_normal((6, 128))
    rows = rng.standard_normal((1024, 24)) @ rng.standard_normal((24, 128)) + 0.5 * rng.standard_normal((1024, 128))
    return weight.astype(np.float32), rows[:512].astype(np.float32), rows[512:].astype(np.float32)


def lost(x: Float, weight: Float, found: Float) -> float:
    return float(np.linalg.norm(x @ (found - weight).T) / np.linalg.norm(x @ weight.T))


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_randomised_svd_has_99_percent_of_the_energy(name: str, transposed: bool) -> None:
    matrix = with_spectrum(SPECTRA[name])
    matrix = matrix.T if transposed else matrix
    u, s, vt = randomised_svd(matrix, RANK)
    exact = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[:RANK]
    energy = (exact**2).sum()
    assert (s.astype(np.float64) ** 2).sum() >= 0.99 * energy
    assert np.square(matrix - (u * s) @ vt).sum() <= np.square(matrix).sum() - 0.99 * energy + 1e-5 * energy
    np.testing.assert_allclose(u.T @ u, np.eye(RANK), atol=1e-4)


def test_the_energy_of_a_quantization_error() -> None:
    """The realistic case: nearly flat."""
    weight, _, _ = a_layer()
    error = weight - dequantize_weight(near(weight))
    exact = np.linalg.svd(error, compute_uv=False)[:8]
    assert (randomised_svd(error, 8)[1] ** 2).sum() >= 0.99 * (exact**2).sum()


def test_a_seed_is_a_result() -> None:
    matrix = with_spectrum(SPECTRA["slow"])
    first, again, other = (low_rank(matrix, 8, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.a, again.a)
    np.testing.assert_array_equal(first.b, again.b)
    assert not np.array_equal(first.a, other.a)


def test_a_matrix_of_that_rank_comes_back_in_fp16() -> None:
    matrix = with_spectrum(np.r_[2.0, 1.0, 0.5, np.zeros(189)])
    branch = low_rank(matrix, 3)
    assert (branch.a.dtype, branch.a.shape, branch.b.shape) == (np.float16, (192, 3), (3, 320))
    assert np.abs(product(branch) - matrix).max() <= 2e-3 * np.abs(matrix).max()


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_fp16_holds_what_is_very_small_or_large(size: float) -> None:
    matrix = with_spectrum(np.r_[2.0, 1.0, np.zeros(190)]) * np.float32(size)
    assert np.linalg.norm(product(low_rank(matrix, 2)) - matrix) <= 1e-2 * np.linalg.norm(matrix)


@pytest.mark.parametrize(("rank", "kept"), [(0, 0), (5, 5), (500, 8)])
def test_rank_none_and_rank_too_large(rank: int, kept: int) -> None:
    weight = np.random.default_rng(0).standard_normal((12, 8)).astype(np.float32)
    for root in (None, np.ones(8, np.float32), np.eye(8, dtype=np.float32)):
        branch, quantized = svdquant(weight, rank, near, root, rounds=1)
        assert branch.a.shape == (8, kept) and branch.b.shape == (kept, 12)
        if rank == 0:
            assert not product(branch).any()
            np.testing.assert_array_equal(quantized.integers, near(weight).integers)
        if kept == 8:
            np.testing.assert_allclose(dequantize_weight(quantized) + product(branch), weight, atol=5e-3)


def test_a_zero_matrix_has_a_zero_branch() -> None:
    branch, quantized = svdquant(np.zeros((12, 8), np.float32), 4, near, np.zeros(8, np.float32), rounds=1)
    assert not product(branch).any() and not quantized.integers.any() and np.isfinite(branch.a).all()


def test_a_root_minimises_the_output_error() -> None:
    """Against the closed form: the SVD of E root, with the root inverted again."""
    weight, rows, _ = a_layer()
    error, root = weight - dequantize_weight(near(weight)), np.linalg.cholesky(hessian([rows]))
    u, s, vt = np.linalg.svd(error.astype(np.float64) @ root)
    best = np.linalg.norm(s[6:])
    branch = low_rank(error, 6, root.astype(np.float32))
    assert np.linalg.norm((error - product(branch)) @ root) == pytest.approx(best, rel=2e-3)
    np.testing.assert_allclose(product(branch), (u[:, :6] * s[:6]) @ vt[:6] @ np.linalg.inv(root), atol=2e-3)
    assert np.linalg.norm((error - product(low_rank(error, 6))) @ root) > 1.1 * best


def test_the_rms_of_channels_is_a_diagonal_root() -> None:
    matrix = with_spectrum(SPECTRA["slow"])
    rms = np.random.default_rng(0).exponential(size=192).astype(np.float32)
    np.testing.assert_allclose(product(low_rank(matrix, 6, rms)), product(low_rank(matrix, 6, np.diag(rms))), atol=1e-4)


def test_every_step_of_the_recipe_gains_on_rows_not_seen() -> None:
    weight, rows, unseen = a_layer()
    root = np.linalg.cholesky(hessian([rows])).astype(np.float32)
    quantized = near(weight)
    bare = dequantize_weight(quantized)
    errors = [lost(unseen, weight, bare)]
    for branch, integers in (
        (residual(weight, quantized, 8), quantized),
        (residual(weight, quantized, 8, root), quantized),
    ):
        errors.append(lost(unseen, weight, dequantize_weight(integers) + product(branch)))
    assert errors[1] < 0.97 * errors[0] and errors[2] < 0.9 * errors[1]
    errors = []
    for arguments in ((None, 0), (None, 4), (root, 4)):
        branch, integers = svdquant(weight, 8, near, *arguments)
        errors.append(lost(unseen, weight, dequantize_weight(integers) + product(branch)))
    assert errors[1] < 0.95 * errors[0] and errors[2] < 0.95 * errors[1]


def test_svdquant_rounds_what_its_fp16_branch_leaves() -> None:
    weight, _, _ = a_layer()
    branch, quantized = svdquant(weight, 8, near)
    np.testing.assert_array_equal(quantized.integers, near(weight - product(branch)).integers)
    drafts = []
    svdquant(weight, 8, near, rounds=2, draft=lambda w: drafts.append(w) or near(w))
    assert len(drafts) == 2
