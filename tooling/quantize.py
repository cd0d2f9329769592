"""A checkpoint, a recipe and a calibration become integers: what the exporter writes and the simulation computes with.

Everything here is in the smoothed domain, X / s and s W, each Linear by itself. `QuantizedRange.exported` gives the
same in the domain of the folded graph, where 1/s has gone into whatever made X.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..engines.errors import UserError
from ..exporters.checkpoint import Checkpoint
from ..exporters.linears import Linear
from ..exporters.quantized import Activation, LowRank, QuantizedLinear, Weight
from .gptq import gptq, hessian
from .low_rank import product, residual, svdquant
from .ranges import choose_alphas, clip_factor
from .recipe import WEIGHT_BITS, Recipe
from .smoothing import Smoothing, activation_scales, fold, smoothing_factor, smoothing_factors
from .tables import Calibration
from .weights import QMAX, dequantize_weight, quantize_weight

Float = NDArray[np.float32]
TOKEN_FLOOR = 1e-8  # of the calibrated range: the least range of a token


@dataclass(frozen=True)
class Quantized:
    """One Linear, smoothed and in integers. s [in]: its smoothing factor, ones where there is none.

    whole() -> the Weight of all parts, of s W, and the low-rank branch, which reads X / s. by_step: W is rescaled at
    every step (SQD `requantize`); s is then what the stored integers were smoothed with.
    """

    linear: Linear
    s: Float
    activation: Activation
    whole: Callable[[], tuple[Weight, LowRank | None]]
    rank: int = 0
    by_step: bool = False


@dataclass(frozen=True)
class QuantizedRange:
    """The model as it is over a range of steps (all of them, but for SQD `grouped`).

    smoothing: the folds; sigmas: [steps]; tables: [steps, width] by name, see exporters.quantized.
    """

    linears: dict[str, Quantized]
    smoothing: Smoothing
    sigmas: NDArray[np.float64]
    tables: dict[str, Float] = field(default_factory=dict)

    def exported(self) -> dict[str, QuantizedLinear]:
        """By Linear name, in the domain of the folded graph."""
        kept = _Kept()
        return {name: _exported(item, self.smoothing.rows.get(name), kept) for name, item in self.linears.items()}


def range_bounds(ranges: Sequence[QuantizedRange]) -> list[float]:
    """The falling sigmas between ranges: between two steps, so that no machine's last digit of a sigma decides."""
    return [float((high.sigmas[-1] * low.sigmas[0]) ** 0.5) for high, low in pairwise(ranges)]


def quantize_model(checkpoint: Checkpoint, recipe: Recipe, calibration: Calibration) -> list[QuantizedRange]:
    """Smooth and quantize the Linears of a recipe; weights are read (and read again) one Linear at a time.

    Returns one range of steps, or G for SQD `grouped:G`, highest sigma first; the conditioning graph is the same in
    all. Raises UserError when the calibration lacks what the recipe needs.
    """
    chosen = recipe.chosen(checkpoint.linears)
    check_groups(recipe, len(calibration.sigmas))
    missing = [linear.name for linear in chosen if linear.name not in calibration.absmax]
    if missing:
        raise UserError(f"the calibration table lacks {missing[0]}; calibrate again with --recalibrate")
    alphas = choose_alphas(checkpoint, recipe, chosen, calibration) if recipe.smooth else {}
    bounds = np.linspace(0, len(calibration.sigmas), (recipe.groups or 1) + 1).round().astype(int)
    return [
        _quantize_range(checkpoint, recipe, chosen, calibration, alphas, slice(first, last))
        for first, last in pairwise(bounds)
    ]


def check_groups(recipe: Recipe, steps: int) -> None:
    """Raises UserError when SQD `grouped` has more ranges than there are calibrated steps."""
    if (recipe.groups or 0) > steps:
        raise UserError(f"sqd_weights {recipe.sqd_weights} needs {recipe.groups} calibrated steps, not {steps}")


def _quantize_range(
    checkpoint: Checkpoint,
    recipe: Recipe,
    chosen: list[Linear],
    calibration: Calibration,
    alphas: Mapping[str, float],
    steps: slice,
) -> QuantizedRange:
    config = checkpoint.sizes.dit

    def absmax_w(linear: Linear) -> Float:
        return np.abs(checkpoint.tensor(linear.key())).max(axis=0)

    # What all ranges share: to_kv runs once a prompt, and cross to_out's 1/s is folded into it.
    seen = {
        linear.name: calibration.absmax[linear.name][_steps_of(linear, steps, linear.kind == "cross_attn.to_out")]
        for linear in chosen
    }
    factors: dict[str, Float] = {}
    if recipe.smooth:
        factors = smoothing_factors(chosen, config, seen, absmax_w, alphas)
    by_step = {linear.name for linear in chosen if recipe.requantizes and linear.graph == "step"}
    smoothing = fold({name: s for name, s in factors.items() if name not in by_step}, checkpoint.linears, config)
    linears: dict[str, Quantized] = {}
    tables: dict[str, Float] = {}
    for linear in chosen:
        name, x = linear.name, calibration.absmax[linear.name][_steps_of(linear, steps)]
        s = factors.get(name, np.ones(linear.in_features, np.float32))
        integers = Integers(checkpoint, recipe, calibration, linear, s)
        s_of_range = s
        if name in by_step:
            s_of_range = smoothing_factor(x, absmax_w(linear), alphas[name])
            tables |= _weight_tables(linear, checkpoint.tensor(linear.key()), s_of_range)
        delta = activation_scales(x, s_of_range)
        of_difference = None
        if recipe.cfg_pair == "difference" and linear.graph == "step" and recipe.activation_range != "token":
            of_difference = activation_scales(_difference(calibration, name)[steps], s_of_range)
        if recipe.clip and recipe.activation_range != "token":
            # Of a pair, u alone: the error of its difference, which guidance multiplies, is not that of the rows here.
            delta = delta * integers.clip_factor(delta, _steps_of(linear, steps))
        activation, more = _range(recipe, linear, delta, of_difference, name in by_step)
        tables |= more
        linears[name] = Quantized(linear, s, activation, integers, recipe.lora_rank, name in by_step)
    return QuantizedRange(linears, smoothing, calibration.sigmas[steps], tables)


def _range(
    recipe: Recipe, linear: Linear, delta: Float, of_difference: Float | None, by_step: bool
) -> tuple[Activation, dict[str, Float]]:
    """How the input is rounded, and its tables, from its range delta at every step [steps].

    of_difference: the same of the guidance pair's difference, where that is what is rounded.
    """
    name, largest = linear.name, float(delta.max())
    ratio = None if of_difference is None else float(largest / of_difference.max())
    pair = 1.0 if recipe.cfg_pair == "difference" and linear.graph == "step" else None  # every token has its own range
    if recipe.w4 == "memory" and recipe.bits_of(linear) == "w4a8":
        return Activation("engine", 1.0, pair), {}
    if recipe.activation_range == "token":
        return Activation("token", TOKEN_FLOOR * largest, pair), {}
    if recipe.activation_range == "static" or linear.graph == "conditioning":
        return Activation("static", largest, ratio), {}
    tables = {f"delta/{name}": delta[:, None]} if by_step else {f"range/{name}": (largest / delta)[:, None]}
    if of_difference is not None:
        tables[f"difference/{name}"] = (delta / of_difference)[:, None]
    return Activation("step", 1.0 if by_step else largest, None if ratio is None else 1.0), tables


def _difference(calibration: Calibration, name: str) -> Float:
    if name not in calibration.difference:
        raise UserError("the calibration table knows nothing of the guidance pair; calibrate again with --recalibrate")
    return calibration.difference[name]


def _steps_of(linear: Linear, steps: slice, all_steps: bool = False) -> slice:
    return steps if linear.graph == "step" and not all_steps else slice(None)


def _weight_tables(linear: Linear, weight: Float, s: Float) -> dict[str, Float]:
    """SQD with a smoothing of its own at every step, s [steps, in]: it and the weight's scales under it."""
    magnitude = np.abs(weight)
    sigma = np.stack([(magnitude * row).max(axis=1) for row in s]) / np.float32(QMAX)
    return {f"smoothing/{linear.name}": s, f"weight_scale/{linear.name}": np.maximum(sigma, np.float32(1e-12))}


class Integers:
    """The Weight and low-rank branch of one Linear, made when they are asked for."""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, calibration: Calibration, linear: Linear, s: Float):
        self._checkpoint, self._recipe, self._linear, self._s = checkpoint, recipe, linear, s
        self._calibration = calibration
        self._bits = WEIGHT_BITS[recipe.bits_of(linear)]

    def smoothed(self) -> Float:
        """s W [out, in]"""
        smoothed = self._checkpoint.tensor(self._linear.key()) * self._s
        if not np.isfinite(smoothed).all():
            raise UserError(f"the checkpoint's {self._linear.key()} holds NaN or infinity")
        return smoothed

    def __call__(self) -> tuple[Weight, LowRank | None]:
        recipe, smoothed = self._recipe, self.smoothed()
        compensated = recipe.rounding == "gptq" and self._bits == 4
        moment = (
            hessian([self._calibration.rows[self._linear.name][0] / self._s]) if compensated or self._clips else None
        )
        quantize = partial(self._compensated, moment) if compensated else partial(self._nearest, moment)
        if not recipe.lora_rank:
            return quantize(smoothed), None
        root = None
        if compensated and moment is not None and np.trace(moment) > 0:
            root = np.linalg.cholesky(moment).astype(np.float32)
        if recipe.lora_form == "residual":
            weight = quantize(smoothed)
            return weight, residual(smoothed, weight, recipe.lora_rank, root)
        draft, rounds = partial(self._nearest, moment), 4 if compensated else 0
        branch, weight = svdquant(smoothed, recipe.lora_rank, quantize, root, rounds, draft)
        return weight, branch

    def clip_factor(self, delta: Float, steps: slice) -> float:
        """By what the ranges delta [steps of the slice] are best multiplied, judged by the rows of these steps."""
        weight, branch = self()
        wanted = self.smoothed() if branch is None else self.smoothed() - product(branch)
        rows, of_step = self._calibration.rows[self._linear.name]
        first = steps.start or 0
        here = (of_step >= first) & (of_step < first + len(delta))
        own = rows[here] / self._s, of_step[here] - first
        return clip_factor(self._recipe, self._linear, own, delta, wanted, dequantize_weight(weight))

    @property
    def _group(self) -> int:
        return self._recipe.group_size if self._bits == 4 else 0

    def _nearest(self, moment: NDArray[np.float64] | None, weight: Float) -> Weight:
        clip = np.diag(moment).astype(np.float32) if moment is not None and self._clips else None
        return quantize_weight(weight, self._bits, self._group, clip)

    def _compensated(self, moment: NDArray[np.float64] | None, weight: Float) -> Weight:
        assert moment is not None
        return gptq(weight, moment, self._bits, self._group, self._clips)

    @property
    def _clips(self) -> bool:
        return self._recipe.clip and self._bits == 4


class _Kept:
    """The Weight and branch of the Linear asked for last: its parts are asked for one after another."""

    def __init__(self) -> None:
        self._of: Quantized | None = None

    def __call__(self, item: Quantized) -> tuple[Weight, LowRank | None]:
        if self._of is not item:
            self._of, self._whole = item, item.whole()
        return self._whole


def _exported(item: Quantized, rows: Float | None, kept: _Kept) -> QuantizedLinear:
    """A fold into output rows leaves the integers as they are: it scales the scales, and the branch."""
    linear = item.linear

    def weight(part: str) -> Weight:
        whole, _ = kept(item)
        of_part = linear.rows(part)
        scale = whole.scale[of_part]
        if rows is not None:
            scale = scale * rows[of_part].reshape(-1, *[1] * (scale.ndim - 1))
        return Weight(whole.integers[of_part], scale, whole.bits)

    def low_rank() -> LowRank:
        _, branch = kept(item)
        assert branch is not None
        a = branch.a / item.s[:, None] if item.by_step else branch.a
        b = branch.b if rows is None else branch.b * rows
        most = float(np.finfo(np.float16).max)
        return LowRank(*(np.clip(side, -most, most).astype(np.float16) for side in (a, b)))

    branch = low_rank if item.rank else None
    return QuantizedLinear(linear, item.activation, weight, branch, item.s if item.by_step else None)
