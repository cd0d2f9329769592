"""The metrics' mathematics against independent implementations: scipy, torch, plain loops; and what must not pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dit_trt.engines.errors import UserError
from dit_trt.tooling.evaluation.divergence import clip_probabilities, cosine, kl_divergence
from dit_trt.tooling.evaluation.frechet import (
    Gaussian,
    enough,
    frechet_distance,
    kernel_distance,
    principal_axes,
    read_statistics,
    reference_gaussian,
    write_statistics,
)
from dit_trt.tooling.intervals import mean_interval, paired, set_interval


def rows(n: int, d: int, seed: int, shift: float = 0.0) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + shift


# -------------------- Frechet


def by_scipy(a: NDArray, b: NDArray) -> float:
    """The formula as it is written."""
    s_a, s_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(s_a @ s_b)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s_a + s_b - 2 * root.real))


@given(st.integers(0, 10**6), st.integers(2, 6))
@settings(max_examples=40, deadline=None)
def test_the_distance_is_that_of_the_formula(seed: int, d: int) -> None:
    a, b = rows(60, d, seed), rows(80, d, seed + 1, 0.5)
    found = frechet_distance(Gaussian.of(a), Gaussian.of(b))
    assert found == pytest.approx(by_scipy(a, b), rel=1e-6, abs=1e-6)
    assert frechet_distance(Gaussian.of(b), Gaussian.of(a)) == pytest.approx(found, rel=1e-6)
    turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0]
    assert frechet_distance(Gaussian.of(a @ turn), Gaussian.of(b @ turn)) == pytest.approx(found, rel=1e-6)


def test_closed_forms() -> None:
    """Of one dimension: (m1 - m2)^2 + (s1 - s2)^2."""
    a = np.array([[0.0], [2.0]])
    b = np.array([[10.0], [16.0]])
    expected = (1 - 13) ** 2 + (np.sqrt(2) - np.sqrt(18)) ** 2
    assert frechet_distance(Gaussian.of(a), Gaussian.of(b)) == pytest.approx(expected)
    x = rows(50, 5, 0)
    assert frechet_distance(Gaussian.of(x), Gaussian.of(x)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(Gaussian.of(x), Gaussian.of(x + 2)) == pytest.approx(4 * 5)


def test_singular_covariances_are_exact() -> None:
    """Fewer rows than dimensions: scipy's root turns complex or fails there, the trace of ours is real."""
    a, b = rows(4, 6, 1), rows(5, 6, 2)
    padded = [np.hstack([x, np.zeros((len(x), 2))]) for x in (a, b)]
    plain = frechet_distance(Gaussian.of(a), Gaussian.of(b))
    assert frechet_distance(*map(Gaussian.of, padded)) == pytest.approx(plain, rel=1e-9)
    eigenvalues = np.linalg.eigvals(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False))
    mixed = np.sqrt(np.clip(eigenvalues.real, 0, None)).sum()
    traces = np.trace(np.cov(a, rowvar=False) + np.cov(b, rowvar=False))
    assert plain == pytest.approx(((a.mean(0) - b.mean(0)) ** 2).sum() + traces - 2 * mixed, rel=1e-5)


def test_small_distances_of_singular_covariances_are_exact() -> None:
    """Few clips in many dimensions, hardly changed. With centred rows X, Y over the root of n - 1, the nonzero
    eigenvalues of S_a S_b are the squared singular values of X Y^T, [n, n]: no null space, another computation."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((40, 512)) * np.exp(rng.uniform(-6, 0, 512))
    y = x + 1e-3 * rng.standard_normal(x.shape) * x.std(axis=0)
    p, q = ((z - z.mean(axis=0)) / np.sqrt(len(z) - 1) for z in (x, y))
    mean = x.mean(axis=0) - y.mean(axis=0)
    mixed = np.linalg.svd(p @ q.T, compute_uv=False).sum()
    expected = mean @ mean + np.square(p).sum() + np.square(q).sum() - 2 * mixed
    assert 0 < expected < 1e-5 * np.square(p).sum()
    assert frechet_distance(Gaussian.of(x), Gaussian.of(y)) == pytest.approx(expected, rel=1e-6)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=6), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_statistics_do_not_depend_on_the_chunks(sizes: list[int], seed: int) -> None:
    data = rows(sum(sizes) + 2, 3, seed, 1e4)
    whole = Gaussian.of(data)
    parts = Gaussian.of(data[:2])
    at = 2
    for size in sizes:
        parts = parts.merge(Gaussian.of(data[at : at + size]))
        at += size
    assert parts.count == whole.count == len(data)
    np.testing.assert_allclose(parts.mean, data.mean(0), rtol=1e-12)
    np.testing.assert_allclose(parts.covariance, np.cov(data, rowvar=False), rtol=1e-7, atol=1e-7)


def test_too_few_for_a_frechet_distance() -> None:
    few, least, many = (Gaussian.of(rows(n, 8, 0)) for n in (15, 16, 40))
    assert enough(many, least) and not enough(many, few) and not enough(few, many)
    with pytest.raises(UserError, match="a covariance of 1 embeddings does not exist"):
        _ = Gaussian.of(rows(1, 3, 0)).covariance
    with pytest.raises(UserError, match="not finite"):
        Gaussian.of([[1.0, np.nan]])


def test_principal_components_are_those_of_the_reference() -> None:
    reference, other = rows(300, 6, 3), rows(300, 6, 4)
    axes = principal_axes(Gaussian.of(reference), 2)
    _, _, directions = np.linalg.svd(reference - reference.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(directions[:2] @ axes), np.eye(2), atol=1e-9)
    found = frechet_distance(Gaussian.of(reference).project(axes), Gaussian.of(other).project(axes))
    assert found == pytest.approx(by_scipy(reference @ axes, other @ axes))


def test_reference_statistics_are_stable_audio_metrics(tmp_path: Path) -> None:
    data = rows(100, 4, 5)
    np.savez(tmp_path / "ref.npz", mu_ref=data.mean(0), sigma_ref=np.cov(data, rowvar=False))
    mean, covariance = read_statistics(tmp_path / "ref.npz")
    np.testing.assert_array_equal(mean, data.mean(0))
    other = Gaussian.of(rows(100, 4, 6))
    expected = by_scipy(data, rows(100, 4, 6))
    assert frechet_distance(other, reference_gaussian(tmp_path / "ref.npz")) == pytest.approx(expected, rel=1e-6)
    write_statistics(tmp_path / "own.npz", Gaussian.of(data))
    np.testing.assert_allclose(read_statistics(tmp_path / "own.npz")[1], covariance)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"mu": np.zeros(2)}, "is not a file of reference statistics"),
        ({"mu_ref": np.zeros(2), "sigma_ref": np.eye(3)}, "do not fit together"),
        ({"mu_ref": np.full(2, np.nan), "sigma_ref": np.eye(2)}, "holds NaN or infinity"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, arrays: dict, said: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=said):
        read_statistics(tmp_path / "x.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(UserError, match="is not a file of reference statistics"):
        read_statistics(tmp_path / "text.npz")


# -------------------- the kernel distance


def test_the_kernel_distance_is_that_of_the_loops() -> None:
    a, b = rows(7, 3, 0), rows(9, 3, 1)

    def k(x: NDArray, y: NDArray) -> float:
        return float((x @ y / 3 + 1) ** 3)

    within_a = sum(k(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j) / (7 * 6)
    within_b = sum(k(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j) / (9 * 8)
    between = sum(k(x, y) for x in a for y in b) / 63
    assert kernel_distance(a, b) == pytest.approx(within_a + within_b - 2 * between)


def test_the_kernel_distance_of_pairs_leaves_the_pairs_out() -> None:
    """Equal sets: exactly zero. Nearly equal ones: not below it on average, as the plain one is."""
    a = rows(9, 3, 0)
    assert kernel_distance(a, a, paired=True) == pytest.approx(0, abs=1e-9)
    rng = np.random.default_rng(3)
    found = {True: [], False: []}  # type: ignore[var-annotated]
    for _ in range(400):
        x = rng.standard_normal((10, 3))
        y = (x + 0.1 * rng.standard_normal((10, 3))) / np.sqrt(1.01)  # of the same distribution
        for paired_rows, values in found.items():
            values.append(kernel_distance(x, y, paired_rows))
    assert abs(np.mean(found[True])) < 3 * np.std(found[True]) / 20 < abs(np.mean(found[False]))


def test_the_kernel_distance_is_zero_on_average_for_one_distribution() -> None:
    rng = np.random.default_rng(0)
    found = [kernel_distance(rng.standard_normal((12, 4)), rng.standard_normal((12, 4))) for _ in range(600)]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(600)
    apart = kernel_distance(rng.standard_normal((12, 4)), rng.standard_normal((12, 4)) + 2)
    assert apart > 3 * np.std(found)
    with pytest.raises(UserError, match="needs two embeddings a set, not 1"):
        kernel_distance(rows(1, 2, 0), rows(3, 2, 0))


# -------------------- Kullback-Leibler, cosine


@given(st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_the_divergence_is_stable_audio_metrics(seed: int) -> None:
    """Their lines: mean of the windows' logits, softmax, F.kl_div((ref + 1e-6).log(), eval, reduction='sum')."""
    rng = np.random.default_rng(seed)
    reference, evaluated = (2 * rng.standard_normal((rng.integers(1, 5), 50)) for _ in range(2))
    p, q = (torch.softmax(torch.from_numpy(x).mean(0), dim=-1) for x in (reference, evaluated))
    expected = float(torch.nn.functional.kl_div((p + 1e-6).log(), q, reduction="sum"))
    found = kl_divergence(clip_probabilities(reference), clip_probabilities(evaluated))
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert found == pytest.approx(scipy.stats.entropy(q.numpy(), p.numpy()), rel=0.01, abs=1e-3)
    assert abs(kl_divergence(clip_probabilities(reference), clip_probabilities(reference))) < 1e-4


def test_extreme_and_broken_logits() -> None:
    sure, other = clip_probabilities([[1000.0, 0.0]]), clip_probabilities([[0.0, 1000.0]])
    np.testing.assert_array_equal(sure, [1, 0])
    assert kl_divergence(sure, other) == pytest.approx(-np.log(1e-6))
    with pytest.raises(UserError, match="not finite"):
        clip_probabilities([[np.nan, 0.0]])


def test_cosines() -> None:
    assert cosine([1, 0], [1, 1]) == pytest.approx(np.sqrt(0.5))
    with pytest.raises(UserError, match="a cosine with a vector of zeros, or NaN, does not exist"):
        cosine([0, 0], [1, 1])


# -------------------- intervals


def test_a_mean_is_covered_by_its_interval_nineteen_times_in_twenty() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        found = mean_interval(rng.exponential(2.0, 60), trial)
        hits += found.low <= 2.0 <= found.high
    assert 175 <= hits <= 199


def test_an_interval_of_a_distance_covers_what_more_clips_would_give() -> None:
    """The spread of a kernel distance of 40 clips, over many samples, beside that of one sample's halves."""
    rng = np.random.default_rng(2)
    reference = rng.standard_normal((500, 3)) + 0.5

    def sample(seed: int) -> NDArray:
        return np.random.default_rng(seed).standard_normal((40, 3))

    found = np.array([kernel_distance(sample(seed), reference) for seed in range(200)])
    intervals = []
    for seed in range(12):
        clips = sample(seed)
        intervals.append(set_interval(lambda chosen, x=clips: kernel_distance(x[chosen], reference), 40))  # type: ignore[misc]
    widths = [each.high - each.low for each in intervals]
    expected = np.subtract(*np.percentile(found, (97.5, 2.5)))
    assert np.median(widths) == pytest.approx(expected, rel=0.35)
    assert sum(each.low <= found.mean() <= each.high for each in intervals) >= 9


def test_same_seed_same_interval() -> None:
    values = np.random.default_rng(0).standard_normal(30)
    assert mean_interval(values) == mean_interval(values) != mean_interval(values, 1)
    assert paired(list(values), list(values - 1)).value == pytest.approx(1)
    assert paired(list(values), list(values - 1)).high == pytest.approx(1)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: mean_interval([]), "no clips to take a mean of"),
        (lambda: mean_interval([1.0, float("nan")]), "1 of 2 clips have no finite value"),
        (lambda: set_interval(lambda chosen: 0.0, 3), "needs four clips, there are 3"),
        (lambda: paired([1.0], [1.0, 2.0]), "1 clips cannot be paired with 2"),
    ],
)
def test_what_has_no_interval_says_so(call, said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=said):
        call()
    one = mean_interval([2.0])
    assert (one.value, one.low, one.high) == (2.0, -np.inf, np.inf)
