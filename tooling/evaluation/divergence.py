"""From a tagger's logits, how differently it hears two clips; from embeddings, how well a clip fits its caption."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...engines.errors import UserError

Double = NDArray[np.float64]
FLOOR = 1e-6  # of the reference's probabilities, as in stable-audio-metrics' passt_kld


def clip_probabilities(logits: ArrayLike) -> Double:
    """logits [windows, classes] of one clip -> [classes]: the softmax of their mean over the windows."""
    mean = np.asarray(logits, np.float64).mean(axis=0)
    if not np.isfinite(mean).all():
        raise UserError("a tagger's logits are not finite: a clip with NaN, or a tagger that does not suit it")
    exponents = np.exp(mean - mean.max())
    return exponents / exponents.sum()


def kl_divergence(reference: ArrayLike, evaluated: ArrayLike) -> float:
    """KL(evaluated || reference) of two clips' probabilities [classes], in nats, as stable-audio-metrics computes it.

    sum of e (log e - log(r + 1e-6)), where e log e is 0 at e = 0: torch's kl_div(log(r + 1e-6), e, reduction='sum').
    """
    r, e = np.asarray(reference, np.float64), np.asarray(evaluated, np.float64)
    logs = np.log(e, out=np.zeros_like(e), where=e > 0)
    return float((e * (logs - np.log(r + FLOOR))).sum())


def cosine(a: ArrayLike, b: ArrayLike) -> float:
    """Of two vectors: of a caption's embedding and its clip's, LAION-CLAP's score. Raises UserError for a zero one."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norms = np.linalg.norm(x) * np.linalg.norm(y)
    if not norms or not np.isfinite(norms):
        raise UserError("a cosine with a vector of zeros, or NaN, does not exist")
    return float(x @ y / norms)
