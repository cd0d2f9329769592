"""Distances of two sets of embeddings: Frechet's, with streamed statistics, and the kernel distance for small sets.

Rows are embeddings, float [n, d]; all arithmetic is float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...engines.errors import UserError

Double = NDArray[np.float64]
SAMPLES_A_DIMENSION = 2  # fewer, and a covariance says more of the sample than of the sounds


@dataclass(frozen=True)
class Gaussian:
    """Mean [d] and scatter (sum of squared deviations, [d, d]) of `count` rows, merged exactly (Chan et al. 1979)."""

    count: int
    mean: Double
    scatter: Double

    @classmethod
    def of(cls, rows: ArrayLike) -> Gaussian:
        """Raises UserError for rows with NaN or infinity."""
        data = np.asarray(rows, np.float64)
        if not np.isfinite(data).all():
            raise UserError("an embedding is not finite: a clip with NaN, or an embedder that does not suit it")
        mean = data.mean(axis=0) if len(data) else np.zeros(data.shape[1])
        centred = data - mean
        return cls(len(data), mean, centred.T @ centred)

    def merge(self, other: Gaussian) -> Gaussian:
        """The statistics of both sets of rows together."""
        count = self.count + other.count
        if not count:
            return self
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        between = np.outer(apart, apart) * (self.count * other.count / count)
        return Gaussian(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Double:
        """Unbiased, [d, d], as numpy.cov has it. Raises UserError for fewer than two rows."""
        if self.count < 2:
            raise UserError(f"a covariance of {self.count} embeddings does not exist; give more clips")
        return self.scatter / (self.count - 1)

    def project(self, axes: Double) -> Gaussian:
        """The same of rows @ axes; axes [d, p]."""
        return Gaussian(self.count, self.mean @ axes, axes.T @ self.scatter @ axes)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mean_a - mean_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)), of covariances S (Dowson & Landau 1982; FID, FAD).

    The trace of the root is the sum of the singular values of S_a^(1/2) S_b^(1/2): real, and exact to rounding for
    singular covariances too. (The roots of the eigenvalues of S_a^(1/2) S_b S_a^(1/2) are the same numbers, but the
    rounding of each zero among those would enter by its root.)
    """
    mean = a.mean - b.mean
    s_a, s_b = a.covariance, b.covariance
    mixed = np.linalg.svd(_root(s_a) @ _root(s_b), compute_uv=False).sum()
    return max(0.0, float(mean @ mean + np.trace(s_a) + np.trace(s_b) - 2 * mixed))


def _root(covariance: Double) -> Double:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def enough(*sets: Gaussian) -> bool:
    """Whether all have two rows a dimension: below, their distance says little but the number of clips."""
    return all(each.count >= SAMPLES_A_DIMENSION * len(each.mean) for each in sets)


def principal_axes(reference: Gaussian, count: int) -> Double:
    """[d, count]: the directions in which the reference varies most, most first."""
    _, vectors = np.linalg.eigh(reference.scatter)
    return vectors[:, ::-1][:, :count]


def kernel_distance(a: ArrayLike, b: ArrayLike, paired: bool = False) -> float:
    """KID (Binkowski et al. 2018): the unbiased squared maximum mean discrepancy under k(x, y) = (x.y / d + 1)^3.

    It may be negative: its expectation is zero for two samples of one distribution. paired: row i of one belongs to row
    i of the other (one caption and seed), so the kernel of the two is left out, as in Gretton et al. 2012, eq. 4; with
    it, sets of nearly equal rows would come out below zero. Raises UserError for fewer than two rows a set.
    """
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if min(len(x), len(y)) < 2:
        raise UserError(f"a kernel distance needs two embeddings a set, not {min(len(x), len(y))}")

    def kernel(p: Double, q: Double) -> Double:
        return (p @ q.T / p.shape[1] + 1) ** 3

    def within(p: Double) -> float:
        values = kernel(p, p)
        return float((values.sum() - np.trace(values)) / (len(p) * (len(p) - 1)))

    between = kernel(x, y)
    if not paired:
        return within(x) + within(y) - 2 * float(between.mean())
    return within(x) + within(y) - 2 * float((between.sum() - np.trace(between)) / (len(x) * (len(x) - 1)))


def read_statistics(path: Path) -> tuple[Double, Double]:
    """mean [d] and covariance [d, d] of stable-audio-metrics' reference statistics, an npz of mu_ref and sigma_ref."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            mean, covariance = (np.asarray(archive[name], np.float64) for name in ("mu_ref", "sigma_ref"))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a file of reference statistics (mu_ref, sigma_ref): {error}") from None
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(f"{path}: mu_ref {mean.shape} and sigma_ref {covariance.shape} do not fit together")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{path} holds NaN or infinity")
    return mean, covariance


def reference_gaussian(path: Path) -> Gaussian:
    """The same as a Gaussian; how many rows it is of is not in the file, and taken to be enough."""
    mean, covariance = read_statistics(path)
    count = 1 + 1_000_000
    return Gaussian(count, mean, covariance * (count - 1))


def write_statistics(path: Path, gaussian: Gaussian) -> None:
    """The npz that `read_statistics` and stable-audio-metrics read."""
    np.savez(path, mu_ref=gaussian.mean, sigma_ref=gaussian.covariance)
