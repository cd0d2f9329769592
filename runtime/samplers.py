"""Samplers: a noisy latent and a falling list of sigmas in, the clean latent out.

Each is one pure function of `denoise`, which may be a formula, a torch module or an engine. The DPM-Solver++ ones
work in the variable lambda = -log(sigma) of Lu et al. 2022 (DPM-Solver++, arXiv 2211.01095), h being a step's length in
it, and solve the exponential integral with the last one, two or three denoised estimates. Whatever the order, a step
is a weighted sum of the latent, these estimates and noise, and is computed as one: beside a small model's step every
pass over an array counts. Weights are Python floats, so the latent keeps its own precision (float32 in the product).

`denoise(x, sigma, step)` returns the denoised latent, a new array each time (the last ones are kept, not
copied); the step index is there because scale tables are keyed by it.
`noise(step)` returns standard normal noise like `x`, asked for in step order and only where a step uses it;
increments of a Brownian path over the steps are independent, so nothing more is needed.
`callback(step, sigma, denoised)` is called after each model call, before the latent moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from math import exp, expm1, log, sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray

Latent = NDArray[np.floating]
Denoise = Callable[[Latent, float, int], Latent]
Noise = Callable[[int], Latent]
Callback = Callable[[int, float, Latent], object]


def _steps(sigmas: ArrayLike) -> Iterator[tuple[int, float, float]]:
    """`(step, sigma, next sigma)` in Python numbers: numpy's float64 would make float32 latents float64."""
    levels = np.asarray(sigmas, dtype=np.float64).tolist()
    return ((step, sigma, after) for step, (sigma, after) in enumerate(pairwise(levels)))


def _sum(*terms: tuple[float, Latent]) -> Latent:
    """The sum of weight * array, a new array."""
    (weight, array), *others = terms
    total = array * weight
    for weight, array in others:
        total += array * weight
    return total


def _multistep(
    weights: Callable[[float, float, list[float]], list[float]],
    denoise: Denoise,
    x: Latent,
    sigmas: ArrayLike,
    noise: Noise | None,
    callback: Callback | None,
) -> Latent:
    """x' = exp(-e) x + sum of weights * estimates + sigma' sqrt(1 - exp(-e)) z; e = 2h, or h and no z without noise.

    weights(e, h, lengths of the last two steps, newest first) -> those of D0, D1, ..., as many as there are.
    """
    history: list[tuple[Latent, float]] = []  # (denoised, h) of the last two steps, newest first
    for step, sigma, sigma_next in _steps(sigmas):
        denoised = denoise(x, sigma, step)
        if callback is not None:
            callback(step, sigma, denoised)
        if sigma_next == 0:
            return denoised
        h = log(sigma / sigma_next)
        e = h if noise is None else 2 * h
        estimates = [denoised, *(estimate for estimate, _ in history)]
        terms = [(exp(-e), x), *zip(weights(e, h, [earlier for _, earlier in history]), estimates)]
        if noise is not None:
            terms.append((sigma_next * sqrt(-expm1(-e)), noise(step)))
        x = _sum(*terms)
        history = [(denoised, h), *history[:1]]
    return x


def _weights_2m(e: float, h: float, earlier: list[float]) -> list[float]:
    """Of the estimates in (1 - exp(-e)) (D0 + (D0 - D1) / 2r), r = h1 / h."""
    moved = -expm1(-e)
    if not earlier:
        return [moved]
    half = h / earlier[0] / 2
    return [moved * (1 + half), -moved * half]


def _weights_3m(e: float, h: float, earlier: list[float]) -> list[float]:
    """Of the estimates in the formula of `sample_dpmpp_3m_sde`."""
    moved = -expm1(-e)
    if not earlier:
        return [moved]
    phi2 = 1 - moved / e
    a = h / earlier[0]  # times (D0 - D1)
    if len(earlier) == 1:
        return [moved + phi2 * a, -phi2 * a]
    b = h / earlier[1]  # times (D1 - D2)
    bend = (phi2 / a - phi2 / e + 0.5) * h / (earlier[0] + earlier[1])  # times a (D0 - D1) - b (D1 - D2)
    return [moved + (phi2 + bend) * a, -(phi2 + bend) * a - bend * b, bend * b]


def sample_dpmpp_2m(
    denoise: Denoise,
    x: Latent,
    sigmas: ArrayLike,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Latent:
    """DPM-Solver++(2M): second order, deterministic.

    x, any shape, at noise level `sigmas[0]`; sigmas [steps + 1], falling, ending in 0 -> the clean latent,
    of the shape and dtype of x. `noise` is there for a common signature and never called.

        x' = exp(-h) x + (1 - exp(-h)) D,  D = D0 + (D0 - D1) / 2r,  r = h1 / h    (Lu et al., algorithm 2)
    """
    return _multistep(_weights_2m, denoise, x, sigmas, None, callback)


def sample_dpmpp_2m_sde(
    denoise: Denoise,
    x: Latent,
    sigmas: ArrayLike,
    noise: Noise,
    callback: Callback | None = None,
) -> Latent:
    """SDE-DPM-Solver++(2M), midpoint rule, eta = 1: second order, fresh noise in every step but the last.

    Arguments and result as in `sample_dpmpp_2m`.

        x' = exp(-2h) x + (1 - exp(-2h)) (D0 + (D0 - D1) / 2r) + sigma' sqrt(1 - exp(-2h)) z,  r = h1 / h
    """
    return _multistep(_weights_2m, denoise, x, sigmas, noise, callback)


def sample_dpmpp_3m_sde(
    denoise: Denoise,
    x: Latent,
    sigmas: ArrayLike,
    noise: Noise,
    callback: Callback | None = None,
) -> Latent:
    """SDE-DPM-Solver++(3M), eta = 1: third order, the sampler of Stable Audio Open's model card.

    The first two steps are of first and second order. Arguments and result as in `sample_dpmpp_2m`.

        x' = exp(-e) x + (1 - exp(-e)) D0 + phi2 d1 - phi3 d2 + sigma' sqrt(1 - exp(-e)) z
        e = 2h,  phi2 = (exp(-e) - 1) / e + 1,  phi3 = phi2 / e - 1/2
        a = (D0 - D1) / r0,  b = (D1 - D2) / r1,  r0 = h1 / h,  r1 = h2 / h
        d2 = (a - b) / (r0 + r1),  d1 = a + r0 d2;  in the second step d1 = a, d2 = 0
    """
    return _multistep(_weights_3m, denoise, x, sigmas, noise, callback)


def sample_pingpong(
    denoise: Denoise, x: Latent, sigmas: ArrayLike, noise: Noise, callback: Callback | None = None
) -> Latent:
    """Ping-pong sampling of a distilled rectified flow (Stable Audio Open Small): denoise, then noise again, to less.

    x at level sigmas[0], where the flow's x = (1 - sigma) * clean + sigma * noise; sigmas within 0..1.
    """
    for step, sigma, sigma_next in _steps(sigmas):
        denoised = denoise(x, sigma, step)
        if callback is not None:
            callback(step, sigma, denoised)
        if sigma_next == 0:
            return denoised
        x = _sum((1 - sigma_next, denoised), (sigma_next, noise(step)))
    return x


def sample_flow_euler(
    denoise: Denoise, x: Latent, sigmas: ArrayLike, noise: Noise | None = None, callback: Callback | None = None
) -> Latent:
    """Euler's method on a rectified flow's ODE, dx / d sigma = (x - D) / sigma: first order, deterministic.

    x and sigmas as for ping-pong. `noise` is there for a common signature and never called.
    """
    for step, sigma, sigma_next in _steps(sigmas):
        denoised = denoise(x, sigma, step)
        if callback is not None:
            callback(step, sigma, denoised)
        x = _sum((sigma_next / sigma, x), (1 - sigma_next / sigma, denoised))
    return x


# By the objective that a model was trained for: they do not share noise levels, nor what a velocity is.
SAMPLERS_OF: dict[str, dict[str, Callable[..., Latent]]] = {
    "v": {
        "dpmpp-3m-sde": sample_dpmpp_3m_sde,
        "dpmpp-2m-sde": sample_dpmpp_2m_sde,
        "dpmpp-2m": sample_dpmpp_2m,
    },
    "rf_denoiser": {"pingpong": sample_pingpong, "euler": sample_flow_euler},
}
SAMPLERS = {name: sampler for samplers in SAMPLERS_OF.values() for name, sampler in samplers.items()}
OBJECTIVE_OF = {name: objective for objective, samplers in SAMPLERS_OF.items() for name in samplers}
# The last of each is deterministic, for comparisons in which nothing but the velocity may differ.
DETERMINISTIC = {objective: list(samplers)[-1] for objective, samplers in SAMPLERS_OF.items()}
