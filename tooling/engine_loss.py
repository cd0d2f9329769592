"""Whose loss is it: a bundle's engine, the plain simulation of its recipe, and FP32, step by step on one input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..engines.bundle import Bundle
from ..engines.errors import UserError
from ..engines.home import home, sha256
from ..exporters.checkpoint import Checkpoint
from ..runtime.pipeline import Pipeline, Settings
from .contents import bundle_recipe
from .fidelity import Forced, compare_velocities, trajectory
from .quantize import quantize_model
from .simulate import SimulatedModel, SimulatedPipeline
from .tables import load_calibration, shipped_table

Table = NDArray[np.float64]


@dataclass(frozen=True)
class EngineLoss:
    """Of the CFG-combined velocity, [prompts, steps]: the simulation against FP32, the engine against the simulation.

    What `method_*` lose is the method's; `engine_error` is the engine's: its own rounding, its tables' knots.
    """

    method_cosine: Table
    method_error: Table
    engine_error: Table


def engine_loss(
    bundle: Bundle,
    reference: Bundle,
    checkpoint: Checkpoint,
    prompts: Sequence[str],
    settings: Settings,
    done: Callable[[int], object] = lambda calls: None,
    negative_prompt: str | None = None,
) -> EngineLoss:
    """Quantize the bundle's recipe again, simulate it, and compare; done(calls) counts 3 calls a prompt and step.

    negative_prompt: of every prompt.
    Raises UserError when the calibration table that the bundle was built with is no longer here.
    """
    recipe = bundle_recipe(bundle)
    table = calibration_of(bundle, checkpoint)
    ranges = quantize_model(checkpoint, recipe, load_calibration(table, checkpoint, recipe.needs_rows))
    exact, engine = Pipeline(reference), Pipeline(bundle)
    simulation = SimulatedPipeline(reference, SimulatedModel(checkpoint, ranges))
    shape = (len(prompts), settings.steps)
    cosine, error, engine_error = (np.zeros(shape) for _ in range(3))
    seconds = exact.check_seconds(None)
    for index, prompt in enumerate(prompts):
        one = replace(settings, seed=settings.seed + index)
        of_exact, *of_forced = (
            pipeline.condition(prompt, one, seconds, negative_prompt) for pipeline in (exact, simulation, engine)
        )
        xs, velocities = trajectory(exact, of_exact, one)
        forced = [Forced(p, c, settings.cfg_scale) for p, c in zip((simulation, engine), of_forced)]
        for step, (x, expected) in enumerate(zip(xs, velocities)):
            simulated, found = (velocity(x, step) for velocity in forced)
            cosine[index, step], error[index, step] = compare_velocities(expected, simulated)
            engine_error[index, step] = compare_velocities(simulated, found)[1]
            done(3 * (index * settings.steps + step + 1))
    return EngineLoss(cosine, error, engine_error)


def calibration_of(bundle: Bundle, checkpoint: Checkpoint) -> Path:
    """The very table that a bundle was built with: shipped with the checkpoint, or in the cache.

    Raises UserError when it is gone, and for a bundle that was not built with one of our recipes.
    """
    bundle_recipe(bundle)
    wanted = (bundle.manifest["calibration"] or {}).get("sha256")
    shipped = shipped_table(checkpoint)
    kept = [*([shipped] if shipped else []), *sorted((home() / "calibration").glob("*/table.safetensors"))]
    for path in kept:
        if sha256(path) == wanted:
            return path
    raise UserError(
        f"the calibration table that {bundle.folder.name} was built with is not here any more; build it again"
    )
