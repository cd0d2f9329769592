"""How far a number of these clips may be from that of all clips: 95 % intervals by resampling, seeded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..engines.errors import UserError

RESAMPLES, SET_RESAMPLES = 2000, 200
LEVELS = (2.5, 97.5)


@dataclass(frozen=True)
class Estimate:
    """A number, its 95 % interval and the count of clips behind it."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


def _bootstrap(data: NDArray[np.float64], statistic: Callable, seed: int) -> tuple[float, float]:
    """The percentile interval (Efron) of statistic(resamples, axis=1)."""
    drawn = np.random.Generator(np.random.PCG64(seed)).integers(0, len(data), (RESAMPLES, len(data)))
    low, high = np.percentile(statistic(data[drawn], axis=1), LEVELS)
    return float(low), float(high)


def median_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """The median of a few timings or ratios, and its bootstrap interval."""
    data = np.asarray(values, np.float64)
    return float(np.median(data)), *_bootstrap(data, np.median, seed)


def mean_interval(values: ArrayLike, seed: int = 0) -> Estimate:
    """The mean of a value a clip, with its percentile bootstrap interval (Efron); one clip's is infinite.

    Raises UserError for no values, or one that is not finite.
    """
    data = np.asarray(values, np.float64)
    if not data.size:
        raise UserError("there are no clips to take a mean of")
    if not np.isfinite(data).all():
        raise UserError(f"{int((~np.isfinite(data)).sum())} of {data.size} clips have no finite value")
    low, high = _bootstrap(data, np.mean, seed) if len(data) > 1 else (-np.inf, np.inf)
    return Estimate(float(data.mean()), float(low), float(high), len(data))


def set_interval(
    statistic: Callable[[NDArray[np.intp]], float], clips: int, seed: int = 0, resamples: int = SET_RESAMPLES
) -> Estimate:
    """A statistic of a whole set (a distance of distributions), with an interval from halves of the clips.

    statistic(indices of clips) -> number. Drawing with replacement repeats clips, which a distance takes for a smaller
    variety; so halves are drawn without (half-sampling, McCarthy 1969): the spread of the halves' statistic about its
    own mean is that of the whole's about its expectation. Raises UserError for fewer than four clips.
    """
    if clips < 4:
        raise UserError(f"an interval of a distance needs four clips, there are {clips}")
    whole = statistic(np.arange(clips))
    rng = np.random.Generator(np.random.PCG64(seed))
    halves = np.array([statistic(np.sort(rng.permutation(clips)[: clips // 2])) for _ in range(resamples)])
    low, high = whole + np.percentile(halves, LEVELS) - halves.mean()
    return Estimate(float(whole), float(low), float(high), clips)


def paired(a: Sequence[float], b: Sequence[float], seed: int = 0) -> Estimate:
    """The mean of a - b over clips of the same captions: what differs is the bundle, not the caption."""
    if len(a) != len(b):
        raise UserError(f"{len(a)} clips cannot be paired with {len(b)}")
    return mean_interval(np.asarray(a, np.float64) - np.asarray(b, np.float64), seed)
