"""The denoiser with classifier-free guidance: what stands between a sampler and the step engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from .schedule import Objective
from .step_engine import Conditioning, StepEngine

Float = NDArray[np.float32]
# Sees every call of the step engine: step, its inputs (only those that change) and all its outputs.
Observer = Callable[[int, Mapping[str, Float], Mapping[str, Float]], None]


def guide(velocity: Float, cfg_scale: float) -> Float:
    """Classifier-free guidance: velocity [2, ...], both halves -> u + (c - u) * cfg_scale, [...].

    [1, ...], the prompt's alone, is what a scale of 1 leaves of it.
    """
    if len(velocity) == 1:
        return velocity[0]
    conditional, unconditional = velocity
    guided = conditional - unconditional
    guided *= np.float32(cfg_scale)
    guided += unconditional
    return guided


class GuidedDenoiser:
    """denoise(x [clips, channels, latents], sigma, step) -> denoised: one engine call, all clips' CFG halves its batch.

    A conditioning of the prompts' halves alone makes half of that.
    """

    def __init__(
        self,
        engine: StepEngine,
        conditioning: Conditioning,
        cfg_scale: float,
        objective: Objective,
        observe: Observer | None = None,
    ):
        self._engine, self._conditioning = engine, conditioning
        self._scalings = np.stack(objective.scalings(conditioning.sigmas), axis=1).tolist()
        self._cfg_scale = cfg_scale
        self._observe = observe

    def __call__(self, x: Float, sigma: float, step: int) -> Float:
        c_skip, c_out, c_in = self._scalings[step]
        scaled = np.empty((self._conditioning.batch, *x.shape[1:]), x.dtype)
        np.multiply(x, c_in, out=scaled.reshape(-1, *x.shape))
        outputs = self._engine.run(self._conditioning, step, scaled)
        if self._observe is not None:
            self._observe(step, {"x": scaled, **self._conditioning.at(step)}, outputs)
        halves = outputs["velocity"].reshape(-1, *x.shape)
        denoised = guide(halves, self._cfg_scale) * c_out
        denoised += x * c_skip
        return denoised
