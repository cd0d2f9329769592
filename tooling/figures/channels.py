"""Numbers about channels: a Linear's input, its ranges over the steps or its smoothing in; what stands out, out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import SupportsFloat

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]


@dataclass(frozen=True)
class Spread:
    """Of the channels' absmax, at every step [steps]: the smallest, the median and the largest channel's."""

    low: Float
    median: Float
    high: Float

    @property
    def growth(self) -> float:
        """The largest channel's at the last step over that at the first; infinite from zero."""
        return _ratio(self.high[-1], self.high[0])

    @property
    def standing_out(self) -> float:
        """The largest channel's over the median channel's, at the step where the largest is largest."""
        step = int(self.high.argmax())
        return _ratio(self.high[step], self.median[step])


def spread(absmax: Float) -> Spread:
    """absmax [steps, in] of a calibration table: over tokens, prompts and CFG halves."""
    return Spread(absmax.min(axis=1), np.median(absmax, axis=1), absmax.max(axis=1))


@dataclass(frozen=True)
class Outliers:
    """How |X| [tokens, in] is spread over channels.

    top: the channel with the largest |X|; standing_out: its absmax over the median channel's; lasting: of the tokens,
    the share in which its |X| is above half its largest (1: an outlier channel in every token). top_share: of the sum
    of X^2, what the loudest channel holds; for_half: how many channels, the loudest first, hold half of it.
    """

    top: int
    absmax: float
    standing_out: float
    top_share: float
    for_half: int
    lasting: float


def outliers(x: Float) -> Outliers:
    absmax = np.abs(x).max(axis=0)
    energy = np.sort(np.square(x, dtype=np.float64).sum(axis=0))[::-1]
    total = float(energy.sum()) or 1.0
    for_half = int(np.searchsorted(np.cumsum(energy), total / 2)) + 1
    top, largest = int(absmax.argmax()), float(absmax.max())
    lasting = float((np.abs(x[:, top]) > largest / 2).mean())
    return Outliers(top, largest, _ratio(largest, np.median(absmax)), float(energy[0]) / total, for_half, lasting)


@dataclass(frozen=True)
class Smoothed:
    """absmax by input channel [in], before and after smoothing: |X| over all steps, |X| / s, |W|, s |W| (eq. 3-5)."""

    x: Float
    x_after: Float
    w: Float
    w_after: Float

    def ratios(self) -> dict[str, float]:
        """The largest channel over the median channel, of each of the four."""
        sides = {"x_before": self.x, "x_after": self.x_after, "w_before": self.w, "w_after": self.w_after}
        return {name: _ratio(value.max(), np.median(value)) for name, value in sides.items()}


def smoothed(absmax_x: Float, weight: Float, s: Float) -> Smoothed:
    """absmax_x [steps, in], weight [out, in], s [in]."""
    x, w = absmax_x.max(axis=0), np.abs(weight).max(axis=0)
    return Smoothed(x, x / s, w, w * s)


def pooled(magnitude: Float, rows: int, columns: int) -> Float:
    """[m, n] -> at most [rows, columns], each the largest of its neighbours: no outlier is lost by it."""
    for axis, most in ((0, rows), (1, columns)):
        size = -(-magnitude.shape[axis] // most)
        magnitude = np.maximum.reduceat(magnitude, np.arange(0, magnitude.shape[axis], size), axis=axis)
    return magnitude


def _ratio(a: SupportsFloat, b: SupportsFloat) -> float:
    a, b = float(a), float(b)
    return a / b if b else float(np.inf if a else 1.0)
