"""Searches by the error of a Linear's output over rows of the reservoir: the smoothing's alpha, a range's clipping.

What is searched for is given as functions, so that any activation range and any weight quantizer will do. Several
Linears that share one choice (`to_kv` of all blocks) are several problems of one search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]
ALPHAS = tuple(np.round(np.linspace(0, 1, 21), 2).tolist())
SHRINK = tuple(np.round(np.linspace(1, 0.3, 29), 3).tolist())
_ROWS, _OUTPUTS = 512, 1024


@dataclass(frozen=True)
class Problem:
    """One Linear: X [n, in], the rows of its input, W [out, in], and what Q(X) is once X is divided by s.

    activation(x / s, s) -> the floats that the integers of x / s stand for (`activations`), [n, in]. It is given
    the very rows of `x`, in their order.
    """

    x: Float
    weight: Float
    activation: Callable[[Float, Float], Float]


def problem(
    x: Float, weight: Float, activation: Callable[[Float, Float, NDArray[np.int64]], Float], seed: int = 0
) -> Problem:
    """A Problem of at most 512 of the rows of x and 1024 of the outputs, drawn with a seed: as good, and soon done.

    activation(x / s, s, rows): rows [n] says which rows of the whole x they are (their steps, for a `step` range).
    """
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.permutation(len(x))[:_ROWS])
    outputs = np.sort(rng.permutation(len(weight))[:_OUTPUTS])
    return Problem(x[rows], weight[outputs], lambda smoothed, s: activation(smoothed, s, rows))


def output_error(x: Float, weight: Float, x_hat: Float, weight_hat: Float) -> float:
    """||X W^T - X^ W^^T||^2 / ||X W^T||^2 (0 when the output is all zero)."""
    wanted = x @ weight.T
    energy = float(np.square(wanted, dtype=np.float64).sum())
    wanted -= x_hat @ weight_hat.T
    return float(np.square(wanted, dtype=np.float64).sum()) / energy if energy else 0.0


def alpha_errors(
    problems: Sequence[Problem],
    factor: Callable[[float], Float],
    weight: Callable[[Float], Float],
    alphas: Iterable[float] = ALPHAS,
) -> dict[float, float]:
    """Every alpha's mean relative squared output error, ||X W^T - Q(X / s) Q(s W)^T||^2 / ||X W^T||^2.

    factor(alpha) -> s [in] (eq. 3), one for all problems. weight: s W -> the float weight its integers stand for. The
    search of DiTAS (Dong and Zhang 2025).
    """
    errors = {}
    for alpha in alphas:
        s = factor(alpha)
        each = [output_error(p.x, p.weight, p.activation(p.x / s, s), weight(p.weight * s)) for p in problems]
        errors[alpha] = float(np.mean(each))
    return errors


def best(errors: dict[float, float]) -> float:
    """The choice of the least error; the first of equals."""
    return min(errors, key=lambda choice: errors[choice])


def clip_errors(
    problems: Sequence[tuple[Float, Float, Float]],
    activation: Callable[[Float, float], Float],
    factors: Iterable[float] = SHRINK,
) -> dict[float, float]:
    """Every factor's mean relative squared output error when an activation range is that much smaller.

    problems: (X / s, s W, what the integers of s W stand for). activation(x, factor) -> the floats that its integers
    stand for when its scale, or every step's delta, is multiplied by the factor.
    """
    return {
        factor: float(np.mean([output_error(x, w, activation(x, factor), w_hat) for x, w, w_hat in problems]))
        for factor in factors
    }
