"""GPTQ (Frantar et al. 2022): weights rounded one input channel after another, each making up for the errors before it.

Written as LDLQ, which gives the same integers (Chee et al. 2023, "QuIP", theorem 6) without inverting the Hessian:
with H = M D M^T, M unit upper triangular, the output error of a row e = Q(W) - W is sum_k D_k (e M[:, k])^2, and
rounding W_k - sum_{j<k} e_j M[j, k] keeps every term within half a step.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ..exporters.quantized import LARGEST, Weight, WeightBits
from .weights import clipped_scale, group_of, weight_scale

Float = NDArray[np.float32]
Double = NDArray[np.float64]
DAMPING = 1e-3
_BLOCK = 128  # columns whose feedback waits for one matrix product


def second_moment(blocks: Iterable[Float]) -> tuple[Double, int]:
    """X^T X / n [in, in] and n, over blocks of rows [rows, in] that are read one after another."""
    total, count = None, 0
    for rows in blocks:
        x = rows.astype(np.float64)
        if total is None:
            total = x.T @ x
        else:
            total += x.T @ x
        count += len(x)
    if total is None or not count:
        raise ValueError("a Hessian needs at least one row")
    total /= count
    return total, count


def hessian(blocks: Iterable[Float]) -> Double:
    """The Hessian of a Linear's output error, up to a factor: the second moment of its input, shrunk for few rows.

    512 rows know little of 768 channels' correlations and nothing of 6144's: GPTQ would then make up for errors with
    correlations that other rows do not have, and end up worse than rounding to nearest. So the matrix is mixed with a
    multiple of the identity, in the proportion that is best for its own spectrum and number of rows: "oracle
    approximating shrinkage" (Chen et al. 2010, eq. 23).
    """
    matrix, rows = second_moment(blocks)
    size, trace, square = len(matrix), float(np.trace(matrix)), float((matrix * matrix).sum())
    spread = square - trace**2 / size
    share = 1.0
    if spread > 0:
        share = min(1.0, ((1 - 2 / size) * square + trace**2) / ((rows + 1 - 2 / size) * spread))
    matrix *= 1 - share
    matrix.flat[:: size + 1] += share * trace / size
    return matrix


def gptq(
    weight: Float,
    hessian: Double,
    bits: WeightBits = 4,
    group: int = 0,
    clip: bool = False,
    damping: float = DAMPING,
    order: bool = True,
) -> Weight:
    """W [out, in] -> the integers whose output error, tr((Q(W) - W) H (Q(W) - W)^T), is small, one column at a time.

    hessian [in, in]: of the input as this W sees it (smoothed); see `hessian`. group as `quantize_weight`; scales are
    those of the original W, shrunk with `clip`. damping: added to H's diagonal, relative to its mean. order: channels
    of much energy first ("act order"), whose errors the others then make up for; the groups stay as they were.
    Raises ValueError for a Hessian that is not finite.
    """
    diagonal = np.diag(hessian)
    if not np.isfinite(hessian).all():
        raise ValueError("the Hessian holds NaN or infinity")
    scale = (
        clipped_scale(weight, diagonal.astype(np.float32), bits, group) if clip else weight_scale(weight, bits, group)
    )
    columns = np.argsort(-diagonal, kind="stable") if order else np.arange(len(diagonal))
    feedback = _feedback(hessian[np.ix_(columns, columns)], damping)
    width = group_of(weight.shape[1], group)
    spread = scale.reshape(len(scale), -1).T[columns // width]  # [in, out]
    integers = np.empty((weight.shape[1], weight.shape[0]), np.int8)
    integers[columns] = _round(weight.T[columns].astype(np.float64), spread, feedback, LARGEST[bits])
    return Weight(np.ascontiguousarray(integers.T), scale, bits)


def _feedback(hessian: Double, damping: float) -> Double:
    """M of H + damping = M D M^T, unit upper triangular: the Cholesky factor of H read from its far corner."""
    mean = float(np.diag(hessian).mean())
    if mean <= 0:  # nothing was ever seen: no input to make up for
        return np.eye(len(hessian))
    damped = hessian[::-1, ::-1].copy()
    while True:
        damped.flat[:: len(damped) + 1] += damping * mean
        try:
            factor = np.linalg.cholesky(damped)
            break
        except np.linalg.LinAlgError:  # singular to rounding, or not damped at all
            damping = max(10 * damping, 1e-8)
    upper = factor[::-1, ::-1]
    return upper / np.diag(upper)


def _round(weight: Double, scale: Float, feedback: Double, qmax: int) -> NDArray[np.int8]:
    """weight, scale [in, out]: channels in the order they are rounded. Feedback over blocks is one product a block."""
    integers = np.empty(weight.shape, np.int8)
    error = np.empty_like(weight)
    for start in range(0, len(weight), _BLOCK):
        stop = min(start + _BLOCK, len(weight))
        target = weight[start:stop] - feedback[:start, start:stop].T @ error[:start]
        for k in range(start, stop):
            wanted = target[k - start] - feedback[start:k, k] @ error[start:k]
            integers[k] = np.clip(np.rint(wanted.astype(np.float32) / scale[k]), -qmax, qmax)
            error[k] = integers[k] * scale[k] - weight[k]
    return integers
