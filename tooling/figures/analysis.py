"""All that the figures and the report show of a bundle, gathered: FP32's replay, ranges, smoothing, errors, sound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...engines.bundle import Bundle
from ...engines.errors import UserError
from ...exporters.checkpoint import Checkpoint
from ...exporters.linears import Linear
from ...runtime.pipeline import Pipeline, Settings
from ...runtime.wav import finish
from ..contents import bundle_recipe
from ..engine_loss import calibration_of
from ..fidelity import Forced, compare_velocities
from ..quantize import quantize_model
from ..recipe import Recipe
from ..sensitivity import sampled_steps
from ..tables import load_calibration
from ..workflow import Say, Watch, checkpoint_of, reference_backend, reference_bundle, silent, unwatched
from .channels import Outliers, Smoothed, Spread, outliers, smoothed, spread
from .layer_errors import layer_errors
from .replay import replay

Float = NDArray[np.float32]
Table = NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """What to look at closely: a Linear by its kind in a block, and a sampling step. None: the last."""

    linear: str = "ff.ff.2"
    block: int | None = None
    step: int | None = None

    def found(self, checkpoint: Checkpoint, steps: int) -> tuple[Linear, int]:
        """The Linear and the step. Raises UserError naming those there are."""
        kinds = list(dict.fromkeys(linear.kind for linear in checkpoint.linears))
        if self.linear not in kinds:
            raise UserError(f"no Linear {self.linear!r} in a block (one of: {', '.join(kinds)})")
        depth = checkpoint.sizes.dit.depth
        block, step = (depth - 1 if self.block is None else self.block), (steps - 1 if self.step is None else self.step)
        if not 0 <= block < depth:
            raise UserError(f"--block {block} is outside 0..{depth - 1}, the blocks of {checkpoint.name}")
        if not 0 <= step < steps:
            raise UserError(f"--step {step} is outside 0..{steps - 1}, the steps of this run")
        [linear] = [one for one in checkpoint.linears if (one.block, one.kind) == (block, self.linear)]
        return linear, step


@dataclass(frozen=True)
class Clip:
    """audio float32 [2, n] in -1..1"""

    label: str
    audio: Float
    sample_rate: int


@dataclass(frozen=True)
class Analysis:
    """See the modules for each part. input [2, tokens, in]: of `linear` at `step`.

    spreads: by Linear name, over the steps of the calibration; errors: by name of every quantized Linear, at the
    sampled `steps`; cosine, relative_error [settings.steps]: of the bundle's velocity on FP32's trajectory.
    """

    bundle: Bundle
    reference: Bundle
    recipe: Recipe
    linears: list[Linear]
    prompt: str
    settings: Settings
    linear: Linear
    step: int
    input: Float
    outliers: Outliers
    spreads: dict[str, Spread]
    smoothing: Smoothed
    is_smoothed: bool
    steps: tuple[int, ...]
    errors: dict[str, Table]
    cosine: Table
    relative_error: Table
    clips: list[Clip]

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(linear.kind for linear in self.linears))

    def worst(self) -> list[tuple[str, float, int]]:
        """Every quantized Linear: name, mean error over the sampled steps, its worst step; the worst first."""
        rows = [(name, float(of.mean()), self.steps[int(of.argmax())]) for name, of in self.errors.items()]
        return sorted(rows, key=lambda row: -row[1])

    def range_rows(self) -> list[dict[str, Any]]:
        """A row for every kind: the medians over its blocks. growth: none where the input never changes."""
        rows = []
        for kind in self.kinds:
            spreads = [self.spreads[linear.name] for linear in self.linears if linear.kind == kind]
            changes = len(spreads[0].high) > 1
            rows.append(
                {
                    "kind": kind,
                    "first": _median([one.high[0] for one in spreads]),
                    "last": _median([one.high[-1] for one in spreads]),
                    "growth": _median([one.growth for one in spreads]) if changes else None,
                    "largest": float(max(one.high.max() for one in spreads)),
                    "standing_out": _median([one.standing_out for one in spreads]),
                }
            )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """The numbers behind the figures."""
        worst_step = int(self.cosine.argmin())
        own = self.spreads[self.linear.name]
        return {
            "bundle": str(self.bundle.folder),
            "reference": str(self.reference.folder),
            "prompt": self.prompt,
            "seed": self.settings.seed,
            "steps": self.settings.steps,
            "linear": self.linear.name,
            "step": self.step,
            "activation": {
                "tokens": self.input.shape[1],
                "channels": self.input.shape[2],
                "absmax": self.outliers.absmax,
                "top_channel": self.outliers.top,
                "top_channel_over_median": self.outliers.standing_out,
                "top_channel_share": self.outliers.top_share,
                "channels_for_half": self.outliers.for_half,
                "top_channel_lasting": self.outliers.lasting,
            },
            "range": {"first": float(own.high[0]), "last": float(own.high[-1]), "growth": own.growth},
            "ranges": self.range_rows(),
            "smoothing": {"smoothed": self.is_smoothed, **self.smoothing.ratios()},
            "layers": [{"name": name, "relative_error": mean, "worst_step": at} for name, mean, at in self.worst()],
            "velocity": {
                "worst_step_cosine": float(self.cosine.min()),
                "worst_step": worst_step,
                "mean_step_cosine": float(self.cosine.mean()),
                "mean_relative_error": float(self.relative_error.mean()),
            },
        }


def _median(values: list) -> float:
    return float(np.median(np.array(values, np.float64)))


def analyze(
    bundle: Bundle,
    prompt: str,
    settings: Settings,
    choice: Choice | None = None,
    steps_sampled: int = 25,
    audio: bool = True,
    watch: Watch = unwatched,
    say: Say = silent,
) -> Analysis:
    """Replay, compare, simulate. audio: also sample the bundle by itself, so that both can be heard.

    Raises UserError for a choice that the model has not, and for a bundle whose model or calibration table is gone.
    """
    recipe = bundle_recipe(bundle)
    if recipe.method == "none":
        raise UserError(f"{bundle.folder.name} is FP32: there is nothing to compare; name a quantized bundle")
    checkpoint = checkpoint_of(bundle)
    linear, step = (choice or Choice()).found(checkpoint, settings.steps)
    calibration = load_calibration(calibration_of(bundle, checkpoint), checkpoint, recipe.needs_rows)
    reference = reference_bundle(checkpoint, reference_backend(bundle.backend), say)
    pipeline = Pipeline(bundle)
    with watch("replaying in FP32", settings.steps) as done:
        exact = replay(checkpoint, reference, prompt, settings, linear, step, done)
    with watch("comparing velocities", settings.steps) as done:
        cosine, error = _velocities(pipeline, prompt, settings, exact.x, exact.velocity, done)
    ranges = quantize_model(checkpoint, recipe, calibration)
    steps = sampled_steps(settings.steps, steps_sampled)
    with watch("simulating every Linear", len(steps)) as done:
        errors = layer_errors(checkpoint, ranges, reference, prompt, settings, exact.x, steps, done)
    clips = []
    if audio:
        with watch("sampling with the bundle", settings.steps) as done:
            clips = _clips(pipeline, reference, prompt, settings, exact.latents, done)
    item = ranges[0].linears.get(linear.name)
    s = np.ones(linear.in_features, np.float32) if item is None else item.s
    return Analysis(
        bundle,
        reference,
        recipe,
        checkpoint.linears,
        prompt,
        settings,
        linear,
        step,
        exact.input,
        outliers(exact.input[0]),
        {one.name: spread(calibration.absmax[one.name]) for one in checkpoint.linears},
        smoothed(calibration.absmax[linear.name], checkpoint.tensor(linear.key()), s),
        bool(recipe.smooth and item is not None),
        steps,
        errors,
        cosine,
        error,
        clips,
    )


def _velocities(
    pipeline: Pipeline, prompt: str, settings: Settings, x: Float, expected: Float, done: Callable[[int], object]
) -> tuple[Table, Table]:
    """Cosine and relative error [steps] of the bundle's velocity, teacher forced."""
    conditioning = pipeline.condition(prompt, settings, pipeline.check_seconds(None))
    velocity = Forced(pipeline, conditioning, settings.cfg_scale)
    rows = []
    for step in range(settings.steps):
        rows.append(compare_velocities(expected[step], velocity(x[step], step)))
        done(step + 1)
    cosine, error = np.array(rows).T
    return cosine, error


def _clips(
    pipeline: Pipeline,
    reference: Bundle,
    prompt: str,
    settings: Settings,
    latents: Float,
    done: Callable[[int], object],
) -> list[Clip]:
    """FP32's sound, of the latents that are there, and the bundle's own."""
    exact = Pipeline(reference)
    samples = round(exact.check_seconds(None) * exact.sample_rate)
    [own] = pipeline.generate([prompt], settings, on_step=lambda clip, step: done(step + 1))
    return [
        Clip("FP32", finish(exact.decode(latents), samples), exact.sample_rate),
        Clip(pipeline.bundle.folder.name, own.audio, own.sample_rate),
    ]
