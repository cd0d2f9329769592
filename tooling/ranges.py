"""Alpha and clipping of every Linear by search: the reservoir's rows through each Linear, as the recipe quantizes it.

The error that is made least is that of one Linear's output, X W^T, by itself (see search).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..exporters.checkpoint import Checkpoint
from ..exporters.linears import Linear
from . import activations
from .recipe import WEIGHT_BITS, Recipe
from .search import Problem, alpha_errors, best, clip_errors, problem
from .smoothing import activation_scales, over_readers, smoothing_factor
from .tables import Calibration
from .weights import dequantize_weight, quantize_weight

Float = NDArray[np.float32]


def choose_alphas(
    checkpoint: Checkpoint, recipe: Recipe, chosen: Sequence[Linear], calibration: Calibration
) -> dict[str, float]:
    """alpha of every chosen Linear by name: the recipe's, or, for `auto`, the best; all `to_kv` share one."""
    if recipe.alpha != "auto":
        return {linear.name: float(recipe.alpha) for linear in chosen}
    alphas: dict[str, float] = {}
    together = [linear for linear in chosen if linear.kind == "cross_attn.to_kv"]
    for linears in ([linear] for linear in chosen if linear not in together):
        alphas[linears[0].name] = _best_alpha(checkpoint, recipe, linears, calibration)
    if together:
        alphas |= dict.fromkeys((x.name for x in together), _best_alpha(checkpoint, recipe, together, calibration))
    return alphas


def _best_alpha(checkpoint: Checkpoint, recipe: Recipe, linears: Sequence[Linear], calibration: Calibration) -> float:
    weights = [checkpoint.tensor(linear.key()) for linear in linears]
    x = calibration.absmax[linears[0].name].max(axis=0)
    w = np.max([np.abs(weight).max(axis=0) for weight in weights], axis=0)
    if linears[0].kind == "cross_attn.to_out":
        x, w = (over_readers(side, checkpoint.sizes.dit) for side in (x, w))
    bits = WEIGHT_BITS[recipe.bits_of(linears[0])]

    def rounded(weight: Float) -> Float:
        return dequantize_weight(quantize_weight(weight, bits, recipe.group_size if bits == 4 else 0))

    problems = [_problem(linear, weight, recipe, calibration) for linear, weight in zip(linears, weights)]
    return best(alpha_errors(problems, lambda alpha: smoothing_factor(x, w, alpha), rounded))


def _problem(linear: Linear, weight: Float, recipe: Recipe, calibration: Calibration) -> Problem:
    rows, steps = calibration.rows[linear.name]
    absmax = calibration.absmax[linear.name]

    def activation(smoothed: Float, s: Float, of: NDArray[np.int64]) -> Float:
        return rounded_rows(recipe, linear, smoothed, activation_scales(absmax, s), steps[of])

    return problem(rows, weight, activation)


def rounded_rows(
    recipe: Recipe, linear: Linear, smoothed: Float, delta: Float, steps: NDArray[np.int64], factor: float = 1.0
) -> Float:
    """X / s [n, in] after the recipe's activation range; delta [steps of the table], times `factor`; steps [n]."""
    if recipe.activation_range == "token":
        return activations.token(smoothed, 1e-12)
    if recipe.activation_range == "static" or linear.graph == "conditioning":
        return activations.static(smoothed, float(delta.max()) * factor)
    return activations.step(smoothed, float(delta.max()) * factor, delta[steps] * factor)


def clip_factor(
    recipe: Recipe,
    linear: Linear,
    rows: tuple[Float, NDArray[np.int64]],
    delta: Float,
    wanted: Float,
    stored: Float,
) -> float:
    """By what a Linear's activation range is best multiplied: least error of X^ wanted^T against Q(X^) stored^T.

    rows: X^ = X / s [n, in] and, for each, which of `delta` [steps] is its own; wanted, stored: the float weight
    [out, in] and what its integers stand for, both of s W less the low-rank branch.
    """
    smoothed, steps = rows
    if not len(smoothed):
        return 1.0

    def activation(x: Float, factor: float) -> Float:
        return rounded_rows(recipe, linear, x, delta, steps, factor)

    return best(clip_errors([(smoothed, wanted, stored)], activation))
