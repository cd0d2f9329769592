"""The noise levels of one run: how many steps in, sigmas, model times and v-prediction scalings out.

Stable Audio Open runs on a polyexponential schedule, 500 down to 0.3, through a v-prediction denoiser.
Symbols are those of Karras et al. 2022 (arXiv 2206.00364) with sigma_data = 1; the model's own time is t =
atan(sigma) * 2 / pi.
"""

from __future__ import annotations

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
