"""The FP16 low-rank branch (paper eq. 6-9, SVDQuant): what int8 or int4 lost of a weight, as two thin matrices.

Everything is in the smoothed domain: W here is the paper's W^ = W * s.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..exporters.quantized import LowRank, Weight
from .weights import dequantize_weight

Float = NDArray[np.float32]
OVERSAMPLING = 16
ITERATIONS = 4
Quantize = Callable[[Float], Weight]
_HALF_MAX = 65504


def residual(smoothed_weight: Float, quantized: Weight, rank: int, root: Float | None = None) -> LowRank:
    """The best branch for E = W - Q(W) (eq. 6-9). root: see `low_rank`."""
    return low_rank(smoothed_weight - dequantize_weight(quantized), rank, root)


def svdquant(
    smoothed_weight: Float,
    rank: int,
    quantize: Quantize,
    root: Float | None = None,
    rounds: int = 0,
    draft: Quantize | None = None,
) -> tuple[LowRank, Weight]:
    """The branch first, then the integers of what it leaves (SVDQuant, Li et al. 2024): W ~ Q(W - L) + L.

    L is the SVD of W, as rounded to FP16. quantize: a weight [out, in] -> its integers. rounds: how often L is first
    made anew from W - Q(W - L) (LoftQ, Li et al. 2023), with the quick quantizer `draft` (default: `quantize`). root,
    see `low_rank`: given, a last L makes up for what the integers lost of the output.
    """
    branch = low_rank(smoothed_weight, rank)
    for _ in range(rounds):
        branch = residual(smoothed_weight, (draft or quantize)(smoothed_weight - product(branch)), rank)
    quantized = quantize(smoothed_weight - product(branch))
    return branch if root is None else residual(smoothed_weight, quantized, rank, root), quantized


def low_rank(matrix: Float, rank: int, root: Float | None = None, seed: int = 0) -> LowRank:
    """E [out, in] -> a [in, rank], b [rank, out] in FP16 with (a b)^T the matrix of that rank nearest to E.

    root: nearest by the error of the Linear's output, ||(E - (a b)^T) root||, for a root [in, k] of its input's second
    moment, root root^T = E[x x^T]; or the rms of every channel [in], as if they were uncorrelated (LQER, Zhang et al.
    2024). With U the leading left singular vectors of E root, that is U U^T E: no root is ever inverted.
    A rank beyond min(out, in) is cut to it.
    """
    weighted = matrix if root is None else matrix * root if root.ndim == 1 else matrix @ root
    u = randomised_svd(weighted, min(rank, *matrix.shape), seed)[0]
    a, b = matrix.T @ u, u.T
    # Both sides of a component reach the same magnitude: FP16 has little room at either end.
    peak_a, peak_b = (np.maximum(np.abs(side).max(axis=axis), 1e-30) for side, axis in ((a, 0), (b, 1)))
    balance = np.sqrt(peak_b / peak_a)
    a, b = a * balance, b / balance[:, None]
    return LowRank(*(np.clip(side, -_HALF_MAX, _HALF_MAX).astype(np.float16) for side in (a, b)))


def product(branch: LowRank) -> Float:
    """What the branch adds to the weight: (a b)^T [out, in], float32."""
    return (branch.a.astype(np.float32) @ branch.b.astype(np.float32)).T


def randomised_svd(matrix: Float, rank: int, seed: int = 0) -> tuple[Float, Float, Float]:
    """The leading `rank` singular triplets u [m, rank], s [rank], vt [rank, n] (Halko et al. 2011, alg. 4.4, 5.1).

    Seeded; oversampled by 16, four power iterations with QR after every product, so that flat spectra do, too.
    """
    width = min(rank + OVERSAMPLING, *matrix.shape)
    sample = np.random.default_rng(seed).standard_normal((matrix.shape[1], width)).astype(matrix.dtype)
    q = np.linalg.qr(matrix @ sample)[0]
    for _ in range(ITERATIONS):
        q = np.linalg.qr(matrix.T @ q)[0]
        q = np.linalg.qr(matrix @ q)[0]
    u, s, vt = np.linalg.svd(q.T @ matrix, full_matrices=False)
    return (q @ u)[:, :rank], s[:rank], vt[:rank]
