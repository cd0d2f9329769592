"""A checkpoint, a recipe and a calibration become integers: what the exporter writes and the simulation computes with.

Everything here is in the smoothed domain, X / s and s W, each Linear by itself. `QuantizedRange.exported` gives the
same in the domain of the folded graph, where 1/s has gone into whatever made X.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines.errors import UserError
from ..exporters.checkpoint import Checkpoint
from ..exporters.linears import Linear
from ..exporters.quantized import Activation, LowRank, QuantizedLinear, Weight
from .recipe import Recipe
from .smoothing import Smoothing, activation_scales, fold, smoothing_factor, smoothing_factors
from .tables import Calibration
from .weights import quantize_weight

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


def quantize_model(checkpoint: Checkpoint, recipe: Recipe, calibration: Calibration) -> list[QuantizedRange]:
    """Smooth and quantize the Linears of a recipe; weights are read (and read again) one Linear at a time.

    Returns one range of steps, or G for SQD `grouped:G`, highest sigma first; the conditioning graph is the same in
    all. Raises UserError when the calibration lacks what the recipe needs.
    """
    chosen = recipe.chosen(checkpoint.linears)
    missing = [linear.name for linear in chosen if linear.name not in calibration.absmax]
    if missing:
        raise UserError(f"the calibration table lacks {missing[0]}; calibrate again with --recalibrate")
    bounds = np.linspace(0, len(calibration.sigmas), (recipe.groups or 1) + 1).round().astype(int)
    return [
        _quantize_range(checkpoint, recipe, chosen, calibration, slice(first, last)) for first, last in pairwise(bounds)
    ]


def _quantize_range(
    checkpoint: Checkpoint, recipe: Recipe, chosen: list[Linear], calibration: Calibration, steps: slice
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
        alphas = {linear.name: float(recipe.alpha) for linear in chosen}
        factors = smoothing_factors(chosen, config, seen, absmax_w, alphas)
    by_step = {linear.name for linear in chosen if recipe.requantizes and linear.graph == "step"}
    smoothing = fold({name: s for name, s in factors.items() if name not in by_step}, checkpoint.linears, config)
    linears: dict[str, Quantized] = {}
    tables: dict[str, Float] = {}
    for linear in chosen:
        name, x = linear.name, calibration.absmax[linear.name][_steps_of(linear, steps)]
        s = factors.get(name, np.ones(linear.in_features, np.float32))
        kind: Any = (
            recipe.activation_range if linear.graph == "step" or recipe.activation_range == "token" else "static"
        )
        if name in by_step:
            tables |= _step_tables(linear, x, checkpoint.tensor(linear.key()), absmax_w(linear), float(recipe.alpha))
            delta, s_of_range = tables[f"delta/{name}"][:, 0], tables[f"smoothing/{name}"]
        else:
            delta, s_of_range = activation_scales(x, s), s
        scale = {"token": TOKEN_FLOOR * float(delta.max())}.get(kind, 1.0 if name in by_step else float(delta.max()))
        ratio = None
        if recipe.cfg_pair == "difference" and linear.graph == "step":
            ratio = 1.0
            if kind != "token":
                of_difference = activation_scales(_difference(calibration, name)[steps], s_of_range)
                ratio = float(delta.max() / of_difference.max())
            if kind == "step":
                tables[f"difference/{name}"] = (delta / of_difference)[:, None]
                ratio = 1.0
        if kind == "step" and name not in by_step:
            tables[f"range/{name}"] = (delta.max() / delta)[:, None]
        activation = Activation(kind, scale, ratio)
        whole = partial(_whole, checkpoint, linear, s, recipe)
        linears[name] = Quantized(linear, s, activation, whole, recipe.lora_rank, name in by_step)
    return QuantizedRange(linears, smoothing, calibration.sigmas[steps], tables)


def _difference(calibration: Calibration, name: str) -> Float:
    if name not in calibration.difference:
        raise UserError("the calibration table knows nothing of the guidance pair; calibrate again with --recalibrate")
    return calibration.difference[name]


def _steps_of(linear: Linear, steps: slice, all_steps: bool = False) -> slice:
    return steps if linear.graph == "step" and not all_steps else slice(None)


def _step_tables(linear: Linear, absmax_x: Float, weight: Float, absmax_w: Float, alpha: float) -> dict[str, Float]:
    """SQD with a smoothing of its own at every step: s[t], the weight's scales under it, delta[t]."""
    s = smoothing_factor(absmax_x, absmax_w, alpha)
    magnitude = np.abs(weight)
    sigma = np.stack([(magnitude * row).max(axis=1) for row in s]) / np.float32(127)
    return {
        f"smoothing/{linear.name}": s,
        f"weight_scale/{linear.name}": np.maximum(sigma, np.float32(1e-12)),
        f"delta/{linear.name}": activation_scales(absmax_x, s)[:, None],
    }


def _whole(checkpoint: Checkpoint, linear: Linear, s: Float, recipe: Recipe) -> tuple[Weight, LowRank | None]:
    smoothed = checkpoint.tensor(linear.key()) * s
    if not np.isfinite(smoothed).all():
        raise UserError(f"the checkpoint's {linear.key()} holds NaN or infinity")
    integers, scale = quantize_weight(smoothed)
    return Weight(integers, scale), None


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
        return LowRank(a.astype(np.float16), b.astype(np.float16))

    branch = low_rank if item.rank else None
    return QuantizedLinear(linear, item.activation, weight, branch, item.s if item.by_step else None)
