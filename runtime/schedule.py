"""The noise levels of one run: how many steps in, sigmas, model times and the denoiser's scalings out.

Stable Audio Open runs on a polyexponential schedule, 500 down to 0.3, through a v-prediction denoiser.
Symbols are those of Karras et al. 2022 (arXiv 2206.00364) with sigma_data = 1; the model's own time is t =
atan(sigma) * 2 / pi. Stable Audio Open Small is a rectified flow: its levels lie in 0..1 and are its time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


def polyexponential_sigmas(
    steps: int, sigma_min: float = 0.3, sigma_max: float = 500.0, rho: float = 1.0
) -> NDArray[np.float64]:
    """float64 [steps + 1]: `steps` falling noise levels from `sigma_max` to `sigma_min`, then 0.

    log sigma = ramp^rho * (log sigma_max - log sigma_min) + log sigma_min, ramp even from 1 to 0. With rho =
    1 each level is the one before times a constant. One step is `[sigma_max, 0]`. Ranges are the caller's to
    check.
    """
    ramp = np.linspace(1.0, 0.0, steps) ** rho
    low, high = np.log(sigma_min), np.log(sigma_max)
    return np.append(np.exp(ramp * (high - low) + low), 0.0)


def sigma_to_t(sigma: ArrayLike) -> NDArray[np.float64]:
    """Noise level to model time, atan(sigma) * 2 / pi in 0..1, float64 of the same shape.

    Half of the 100 steps lie above t = 0.946: never let these pass through 16 bits (64 distinct values of 100
    remain).
    """
    return np.arctan(np.asarray(sigma, dtype=np.float64)) * (2.0 / np.pi)


def v_scalings(
    sigma: ArrayLike,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """`(c_skip, c_out, c_in)` of v prediction, float64 of the shape of `sigma`.

    denoised = c_skip * x + c_out * v(c_in * x, t), Karras et al. eq. 7 with sigma_data = 1.
    """
    sigma = np.asarray(sigma, dtype=np.float64)
    norm = np.hypot(sigma, 1.0)
    return 1.0 / norm**2, -sigma / norm, 1.0 / norm


MAX_SIGMA = 1e6  # what lies above would only leave float32
FLOW_LOGSNR = (-6.0, 2.0)  # stable-audio-tools' sample_rf: where a flow's levels begin and end
LEAST_FLOW_SIGMA = 0.12  # just above the last level before 0: to begin below it would be to add noise


def flow_sigmas(steps: int, sigma_max: float = 1.0) -> NDArray[np.float64]:
    """float64 [steps + 1]: levels of a rectified flow, even in log((1 - sigma) / sigma), from `sigma_max` <= 1 to 0.

    Those of stable-audio-tools' sample_rf: sigmoid(-logsnr) from -6, or from the log SNR of `sigma_max`, to 2, then the
    first is set to sigma_max and the last to 0.
    """
    start, end = FLOW_LOGSNR
    if sigma_max < 1:
        start = np.log((1 - sigma_max) / sigma_max + 1e-6)
    sigmas = 1 / (1 + np.exp(np.linspace(start, end, steps + 1)))
    sigmas[0], sigmas[-1] = sigma_max, 0.0
    return sigmas


def flow_scalings(sigma: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """`(c_skip, c_out, c_in)` of a rectified flow: denoised = x - sigma * v(x, sigma)."""
    sigma = np.asarray(sigma, dtype=np.float64)
    return np.ones_like(sigma), -sigma, np.ones_like(sigma)


Levels = tuple[float, float]
Scalings = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True)
class Objective:
    """What a model was trained to predict, and so how it is sampled.

    sigmas(steps, sigma_min, sigma_max) -> [steps + 1]; time(sigma): the model's own t; scalings(sigma): (c_skip, c_out,
    c_in). levels(sigma_min, sigma_max): the lowest and the highest level that a run between them may begin at, and
    fault: what is wrong with those two, None for nothing. init_level: where a run begins that has a recording to begin
    from. interpolates: noise takes the place of sound, x = (1 - sigma) * clean + sigma * noise.
    """

    sigmas: Callable[[int, float, float], NDArray[np.float64]]
    time: Callable[[ArrayLike], NDArray[np.float64]]
    scalings: Callable[[ArrayLike], Scalings]
    levels: Callable[[float, float], Levels]
    fault: Callable[[float, float], str | None]
    init_level: float
    interpolates: bool = False


def _v_fault(sigma_min: float, sigma_max: float) -> str | None:
    if 0 < sigma_min < sigma_max <= MAX_SIGMA:
        return None
    return f"sigma_min {sigma_min} and sigma_max {sigma_max} must be 0 < min < max <= 1e6"


def _flow_fault(sigma_min: float, sigma_max: float) -> str | None:
    if LEAST_FLOW_SIGMA <= sigma_max <= MAX_SIGMA:
        return None
    return f"sigma_max {sigma_max} is below {LEAST_FLOW_SIGMA}, where a flow's levels end"


OBJECTIVES = {
    "v": Objective(
        polyexponential_sigmas, sigma_to_t, v_scalings, lambda low, high: (low, high), _v_fault, init_level=1.0
    ),
    "rf_denoiser": Objective(
        lambda steps, low, high: flow_sigmas(steps, min(high, 1.0)),
        lambda sigma: np.asarray(sigma, dtype=np.float64),
        flow_scalings,
        lambda low, high: (LEAST_FLOW_SIGMA, min(high, 1.0)),
        _flow_fault,
        init_level=0.5,
        interpolates=True,
    ),
}
