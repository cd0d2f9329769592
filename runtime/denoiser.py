"""The v-prediction denoiser with classifier-free guidance: what stands between a sampler and the step engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..engines.base import Engine
from .schedule import v_scalings

Float = NDArray[np.float32]
# Sees every call of the step engine: step, its inputs (only those that change) and all its outputs.
Observer = Callable[[int, Mapping[str, Float], Mapping[str, Float]], None]


@dataclass(frozen=True)
class Conditioning:
    """What the conditioning graph made of one prompt, both CFG halves (row 0 the prompt's, row 1 the other's).

    constants: `global_embed` [2, embed_dim] and `context_k.i`, `context_v.i` [2, heads, tokens, dim_heads];
    time_embed [steps, embed_dim].
    """

    constants: Mapping[str, Float]
    time_embed: Float


def guide(velocity: Float, cfg_scale: float) -> Float:
    """Classifier-free guidance: velocity [2, channels, latents] -> u + (c - u) * cfg_scale, [channels, latents]."""
    conditional, unconditional = velocity
    return unconditional + (conditional - unconditional) * np.float32(cfg_scale)


class GuidedDenoiser:
    """denoise(x [channels, latents], sigma, step) -> denoised: one engine call with both CFG halves as its batch."""

    def __init__(
        self,
        engine: Engine,
        conditioning: Conditioning,
        sigmas: ArrayLike,
        cfg_scale: float,
        observe: Observer | None = None,
    ):
        self._engine = engine
        self._time_embed = conditioning.time_embed
        self._scalings = np.stack(v_scalings(np.asarray(sigmas)[:-1]), axis=1).tolist()
        self._cfg_scale = cfg_scale
        self._observe = observe
        self._pending: Mapping[str, Float] = conditioning.constants

    def __call__(self, x: Float, sigma: float, step: int) -> Float:
        c_skip, c_out, c_in = self._scalings[step]
        inputs = {"x": np.stack((x * c_in,) * 2), "time_embed": self._time_embed[step]}
        outputs = self._engine.run({**self._pending, **inputs})
        self._pending = {}  # an engine keeps what it was given; only x and time_embed change from step to step
        if self._observe is not None:
            self._observe(step, inputs, outputs)
        return x * c_skip + guide(outputs["velocity"], self._cfg_scale) * c_out
