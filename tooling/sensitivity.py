"""Which Linears, kinds or blocks a recipe hurts: each is quantized alone, the others left in FP32, and then ranked.

What is measured is the CFG-combined velocity of the plain simulation (see simulate.py), teacher forced: every choice
gets the inputs that FP32 met on its own trajectories, on prompts that no calibration saw and at a few steps between
the first and the last. Bytes are those of the weights as the exporter stores them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..engines.bundle import Bundle
from ..engines.errors import UserError
from ..exporters.checkpoint import Checkpoint
from ..exporters.linears import Linear
from ..runtime.pipeline import Pipeline, Settings
from ..runtime.step_engine import Conditioning
from .fidelity import Forced, compare_velocities, trajectory
from .layers import layers
from .quantize import QuantizedRange, quantize_model
from .recipe import Recipe
from .simulate import SimulatedModel, SimulatedPipeline
from .smoothing import Smoothing
from .tables import Calibration

Float = NDArray[np.float32]
Done = Callable[[int], object]
BY = ("layer", "kind", "block")


@dataclass(frozen=True)
class Part:
    """Linears that are quantized together. name: a pattern for recipes, which matches these of what is quantized."""

    name: str
    linears: tuple[Linear, ...]


def parts_of(linears: Iterable[Linear], by: str) -> list[Part]:
    """Every Linear by itself, all of a kind, or all of a block, in the order of the model."""
    names: Mapping[str, Callable[[Linear], str]] = {
        "layer": lambda linear: linear.name,
        "kind": lambda linear: linear.kind,
        "block": lambda linear: f"transformer.layers.{linear.block}.*",
    }
    found: dict[str, list[Linear]] = {}
    for linear in linears:
        found.setdefault(names[by](linear), []).append(linear)
    return [Part(name, tuple(members)) for name, members in found.items()]


@dataclass(frozen=True)
class Error:
    """cosine and squared, both [prompts, sampled steps]: of the velocity v' against FP32's v.

    squared: ||v' - v||^2 / ||v||^2. steps: which of the trajectory's steps were sampled.
    """

    steps: tuple[int, ...]
    cosine: NDArray[np.float64]
    squared: NDArray[np.float64]

    @property
    def mean_squared(self) -> float:
        """What adds up over Linears if their errors are independent; infinite where a velocity is no number."""
        mean = float(self.squared.mean())
        return mean if np.isfinite(mean) else float("inf")

    @property
    def relative_error(self) -> float:
        """The root of the mean square."""
        return self.mean_squared**0.5

    @property
    def worst_step_cosine(self) -> float:
        """The lowest mean over prompts of any sampled step; NaN when a velocity is no number."""
        return float(self.cosine.mean(axis=0).min())

    @property
    def worst_step(self) -> int:
        return self.steps[int(self.cosine.mean(axis=0).argmin())]


def sampled_steps(steps: int, count: int) -> tuple[int, ...]:
    """`count` of `steps`, at equal distances from the first to the last (in log sigma: the schedule's own measure)."""
    return tuple(dict.fromkeys(np.linspace(0, steps - 1, count).round().astype(int).tolist()))


class Probe:
    """Inputs of the DiT on FP32's own trajectories, and the velocities that FP32 makes of them.

    FP32 samples with the engines of `reference`, which is fast; what is compared with is the simulation's own FP32, so
    that a model in which nothing is quantized has no error at all. done(calls) counts up to prompts x settings.steps.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        reference: Bundle,
        prompts: Sequence[str],
        settings: Settings,
        steps_sampled: int,
        done: Done = lambda calls: None,
    ):
        self._checkpoint, self._reference, self._settings = checkpoint, reference, settings
        self._prompts, self.steps = list(prompts), sampled_steps(settings.steps, steps_sampled)
        self._x = self._recorded(done)
        unquantized = self.pipeline([QuantizedRange({}, Smoothing(), settings.sigmas[:-1])])
        self._conditionings = self._conditioned(unquantized)
        forced = [self._velocities(unquantized, conditioning) for conditioning in self._conditionings]
        self._velocity = [[one(x[step], step) for step in self.steps] for one, x in zip(forced, self._x)]

    @property
    def points(self) -> int:
        """Calls of the DiT that one measurement takes."""
        return len(self._prompts) * len(self.steps)

    def pipeline(self, ranges: Sequence[QuantizedRange]) -> Pipeline:
        return SimulatedPipeline(self._reference, SimulatedModel(self._checkpoint, ranges))

    def measure(self, ranges: Sequence[QuantizedRange], done: Done = lambda calls: None) -> Error:
        """The error of a quantized model (see quantize_model); done(calls) counts up to `points`."""
        pipeline = self.pipeline(ranges)
        conditionings = self._conditionings
        if any(item.linear.graph == "conditioning" for item in ranges[0].linears.values()):
            conditionings = self._conditioned(pipeline)
        shape = (len(self._prompts), len(self.steps))
        cosine, error = np.zeros(shape), np.zeros(shape)
        for prompt, conditioning in enumerate(conditionings):
            velocity = self._velocities(pipeline, conditioning)
            for index, step in enumerate(self.steps):
                found = velocity(self._x[prompt][step], step)
                cosine[prompt, index], error[prompt, index] = compare_velocities(self._velocity[prompt][index], found)
                done(prompt * len(self.steps) + index + 1)
        return Error(self.steps, cosine, np.square(error))

    def _recorded(self, done: Done) -> list[dict[int, Float]]:
        """Of every prompt: x [channels, latents] as the model sees it, by sampled step."""
        pipeline, steps = Pipeline(self._reference), self._settings.steps
        found: list[dict[int, Float]] = []
        for number, conditioning in enumerate(self._conditioned(pipeline)):

            def stepped(step: int, number: int = number) -> None:
                done(number * steps + step + 1)

            one = replace(self._settings, seed=self._settings.seed + number)
            x, _ = trajectory(pipeline, conditioning, one, stepped)
            found.append({step: x[step] for step in self.steps})
        return found

    def _conditioned(self, pipeline: Pipeline) -> list[Conditioning]:
        seconds = pipeline.check_seconds(None)
        return [pipeline.condition(prompt, self._settings, seconds) for prompt in self._prompts]

    def _velocities(self, pipeline: Pipeline, conditioning: Conditioning) -> Forced:
        return Forced(pipeline, conditioning, self._settings.cfg_scale)


# -------------------- ranking


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing one part alone does. share: of the sum of all parts' mean squared errors.

    float_bytes, bytes: of its weights, before and after.
    """

    part: Part
    error: Error
    share: float
    float_bytes: int
    bytes: int


def measure_parts(
    checkpoint: Checkpoint,
    recipe: Recipe,
    calibration: Calibration,
    probe: Probe,
    parts: Sequence[Part],
    done: Done = lambda calls: None,
) -> list[Error]:
    """The error of each part, quantized alone as `recipe` says; done(calls) counts up to len(parts) * probe.points."""

    def measured(number: int, part: Part) -> Error:
        ranges = quantize_model(checkpoint, only(recipe, part), calibration)
        return probe.measure(ranges, lambda calls: done(number * probe.points + calls))

    return [measured(number, part) for number, part in enumerate(parts)]


def rank(recipe: Recipe, parts: Sequence[Part], errors: Sequence[Error]) -> list[Sensitivity]:
    """The worst first; velocities that are no numbers are worst of all."""
    total = sum(error.mean_squared for error in errors)
    rows = [
        Sensitivity(
            part,
            error,
            _share(error.mean_squared, total),
            sum(4 * linear.in_features * linear.out_features for linear in part.linears),
            sum(weight_bytes(recipe, linear) for linear in part.linears),
        )
        for part, error in zip(parts, errors)
    ]
    return sorted(rows, key=lambda row: -row.error.mean_squared)


def _share(squared: float, total: float) -> float:
    if not np.isfinite(total):
        return float(not np.isfinite(squared))
    return squared / total if total else 0.0


def only(recipe: Recipe, part: Part) -> Recipe:
    """The recipe for these Linears alone."""
    return replace(recipe, include=tuple(linear.name for linear in part.linears))


def without(recipe: Recipe, linears: Sequence[Linear], rows: Sequence[Sensitivity]) -> Recipe:
    """The recipe that leaves these parts in float too. Raises UserError when that is all of it."""
    spared = replace(recipe, exclude=tuple(dict.fromkeys([*recipe.exclude, *(row.part.name for row in rows)])))
    if not any(spared.bits_of(linear) != "fp32" for linear in linears):
        raise UserError("what is to be left out is all there is to quantize; raise --exclude-above or lower --top")
    return spared


def weight_bytes(recipe: Recipe, linear: Linear) -> int:
    """Bytes of a Linear's weight in a recipe, and of its low-rank branch, in all graphs that hold it."""
    [layer] = layers([linear], recipe)
    return layer.bytes + layer.branch_bytes
