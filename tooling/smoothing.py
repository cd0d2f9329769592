"""SmoothQuant for a DiT (paper eq. 1-5) and its folds: absmax tables in, what happens to every weight out.

X^ = X / s costs nothing at run time when 1/s is folded into whatever produced X. Every s is computed from the original
weights and activations; the folds come after. `Smoothing` holds, for each Linear, the factor on its input columns (s),
the factor on its output rows (1/s of whoever reads them), and the factors on norms and biases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..exporters.linears import DIT_PREFIX, NORMS, Linear

if TYPE_CHECKING:
    from ..exporters.dit import DiTConfig

Float = NDArray[np.float32]

# A channel that calibration saw as (almost) dead is floored here, relative to the layer's largest.
FLOOR = 1e-5
NOTHING = 1e-20  # the largest absmax of what counts as zeros: below, products and inverses leave float32


def smoothing_factor(absmax_x: Float, absmax_w: Float, alpha: float) -> Float:
    """s[j] = absmax_x[j]^alpha / absmax_w[j]^(1 - alpha) (eq. 3). absmax_x may be [in] or [steps, in].

    Both are floored at 1e-5 of their largest, so that s is finite and positive with dead channels; a layer that saw
    nothing but zeros, or whose weights are zeros, is not smoothed (s = 1).
    """
    if min(absmax_x.max(), absmax_w.max()) < NOTHING:
        return np.ones_like(absmax_x, dtype=np.float32)
    x, w = (np.maximum(a.astype(np.float64), FLOOR * float(a.max())) for a in (absmax_x, absmax_w))
    return (x**alpha / w ** (1 - alpha)).astype(np.float32)


def activation_scales(absmax_x: Float, s: Float) -> Float:
    """delta[t] = max over channels of (absmax_x / s) / 127, [steps]: the range of the smoothed activation by step.

    absmax_x [steps, in]; s [in] or [steps, in]. Its largest is the static range. A step that saw nothing has that one,
    too; where none saw anything, 1.
    """
    delta = ((absmax_x.astype(np.float64) / s).max(axis=1) / 127).astype(np.float32)
    seen = delta >= np.finfo(np.float32).tiny  # less has no inverse
    return np.where(seen, delta, delta.max() if seen.any() else np.float32(1))


@dataclass
class Smoothing:
    """Factors by Linear name (`columns`, `rows`) and by graph weight name (`vectors`: norms), all float32.

    `factor[name]` is a Linear's own s, also when nothing is quantized with it; a Linear that is not smoothed has none.
    """

    factor: dict[str, Float] = field(default_factory=dict)
    rows: dict[str, Float] = field(default_factory=dict)
    vectors: dict[str, Float] = field(default_factory=dict)

    def weight(self, linear: Linear, part: str, weight: Float) -> Float:
        """The original W [rows of part, in] as the folded graph has it: W * s * rows."""
        if linear.name in self.factor:
            weight = weight * self.factor[linear.name]
        if linear.name in self.rows:
            weight = weight * self.rows[linear.name][linear.rows(part), None]
        return weight

    def vector(self, name: str, value: NDArray) -> NDArray:
        """A norm's gain, a bias or `to_cond_embed.2.weight` with its fold."""
        factor = self.vectors.get(name)
        if factor is None:
            return value
        return value * (factor if value.ndim == 1 else factor[:, None])


def smoothing_factors(
    chosen: Sequence[Linear],
    config: DiTConfig,
    absmax_x: Mapping[str, Float],
    absmax_w: Callable[[Linear], Float],
    alphas: Mapping[str, float],
) -> dict[str, Float]:
    """s [in] of every chosen Linear by name (eq. 3), with what the folds ask of them: all `to_kv` share one.

    absmax_x: by Linear name, [steps, in]; its max over the steps is used. absmax_w(linear): [in], of the original W.
    """
    found = {}
    kv = [linear for linear in chosen if linear.kind == "cross_attn.to_kv"]
    for linear in chosen:
        x = absmax_x[linear.name].max(axis=0)
        if linear.kind == "cross_attn.to_kv":
            continue
        w = absmax_w(linear)
        if linear.kind == "cross_attn.to_out":
            x, w = over_readers(x, config), over_readers(w, config)
        found[linear.name] = smoothing_factor(x, w, alphas[linear.name])
    if kv:
        # All blocks read one context: one s.
        x = absmax_x[kv[0].name].max(axis=0)
        w = np.max([absmax_w(linear) for linear in kv], axis=0)
        found |= dict.fromkeys((linear.name for linear in kv), smoothing_factor(x, w, alphas[kv[0].name]))
    return found


def fold(factors: Mapping[str, Float], linears: Sequence[Linear], config: DiTConfig) -> Smoothing:
    """Where 1/s of each Linear goes, for static factors by Linear name; `linears` are all of the model."""
    smoothing = Smoothing(factor=dict(factors))
    for linear in linears:
        if linear.name in factors and linear.kind != "cross_attn.to_kv":
            _fold_one(smoothing, linear, factors[linear.name], config)
    kv = [linear.name for linear in linears if linear.kind == "cross_attn.to_kv"]
    if smoothed := [name for name in kv if name in factors]:
        # Folded into the bias-less Linear that makes the context. So it concerns the to_kv that stay in float, too.
        s = factors[smoothed[0]]
        smoothing.vectors[DIT_PREFIX + "to_cond_embed.2.weight"] = _inverse(s)
        smoothing.factor |= dict.fromkeys(kv, s)
    return smoothing


def _fold_one(smoothing: Smoothing, linear: Linear, s: Float, config: DiTConfig) -> None:
    layer = f"transformer.layers.{linear.block}."
    match linear.kind:
        case "self_attn.to_qkv" | "cross_attn.to_q" | "ff.ff.0.proj":
            norm = NORMS[linear.kind]
            for parameter in ("gamma", "beta"):
                smoothing.vectors[f"{DIT_PREFIX}{layer}{norm}.{parameter}"] = _inverse(s)
        case "self_attn.to_out":
            _rows(smoothing, layer + "self_attn.to_qkv", 3 * config.embed_dim, 2 * config.embed_dim, s)
        case "cross_attn.to_out":
            kv = s.reshape(config.kv_heads, -1, config.dim_heads)[:, 0].reshape(-1)
            _rows(smoothing, layer + "cross_attn.to_kv", 2 * kv.size, kv.size, kv)
        case "ff.ff.2":
            _rows(smoothing, layer + "ff.ff.0.proj", 2 * config.ff_inner, 0, s)
            smoothing.vectors[f"{DIT_PREFIX}{layer}ff.ff.0.proj.value.bias"] = _inverse(s)
        case kind:
            raise ValueError(f"no fold is known for {kind}")


def _inverse(s: Float) -> Float:
    return (1 / s).astype(np.float32)


def _rows(smoothing: Smoothing, name: str, size: int, start: int, s: Float) -> None:
    """Fold 1/s into the output rows start..start+len(s) of the Linear `name`."""
    factor = np.ones(size, np.float32)
    factor[start : start + s.size] = _inverse(s)
    smoothing.rows[name] = factor


def over_readers(absmax: Float, config: DiTConfig) -> Float:
    """[query heads * dim] -> the same, each the max over the query heads that read one kv head (repeat_interleave)."""
    grouped = absmax.reshape(config.kv_heads, -1, config.dim_heads)
    return np.broadcast_to(grouped.max(axis=1, keepdims=True), grouped.shape).reshape(-1)
