"""From a recipe and a model to a ranking or a choice of bits, whatever that takes: a table, trajectories, trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..engines.base import choose_backend
from ..engines.errors import UserError
from ..exporters.checkpoint import Checkpoint
from ..runtime.pipeline import Settings
from .allocate import (
    Mix,
    Simulated,
    at_bits,
    bits_to_try,
    cheapest,
    dit_bytes,
    frontier,
    mixed_recipe,
    options,
    part_bytes,
    reach,
    rest_bytes,
    within,
    without_bits_for,
)
from .quantize import quantize_model
from .recipe import Recipe
from .sensitivity import Error, Probe, Sensitivity, measure_parts, parts_of, rank, without
from .tables import load_calibration
from .workflow import CalibrationOptions, Say, Watch, calibration_table, reference_bundle, silent, unwatched


@dataclass(frozen=True)
class Ranking:
    """rows: the worst first; whole: the error of all together. spared: of the recipe without what was `left_out`."""

    rows: list[Sensitivity]
    whole: Error
    recipe: Recipe
    left_out: list[str]
    spared: Error | None

    @property
    def predicted_error(self) -> float:
        """Of the whole, were the parts' errors independent."""
        return sum(row.error.mean_squared for row in self.rows) ** 0.5

    def bars(self) -> tuple[list[str], dict[str, list[float]]]:
        return [row.part.name for row in self.rows], {"": [row.error.relative_error for row in self.rows]}

    def to_dict(self) -> dict[str, Any]:
        rows = [
            {
                "name": row.part.name,
                "linears": [linear.name for linear in row.part.linears],
                **_numbers(row.error),
                "share": row.share,
                "float_bytes": row.float_bytes,
                "bytes": row.bytes,
            }
            for row in self.rows
        ]
        return {
            "ranking": rows,
            "whole": {**_numbers(self.whole), "predicted_relative_error": self.predicted_error},
            "left_out": self.left_out,
            "without": None if self.spared is None else _numbers(self.spared),
            "recipe": self.recipe.to_dict(),
        }


@dataclass(frozen=True)
class Allocation:
    """A mix of bits, its recipe, and what the simulation of the whole says of it. errors: by bits, of every part.

    bytes: of the DiT's weights, see `allocate.dit_bytes`; rest_bytes of them belong to no Linear.
    """

    mix: Mix
    errors: Mapping[str, Sequence[Error]]
    error: Error
    recipe: Recipe
    bytes: int
    float_bytes: int
    rest_bytes: int

    @property
    def predicted_error(self) -> float:
        return self.mix.squared**0.5

    def bars(self) -> tuple[list[str], dict[str, list[float]]]:
        """The worst first."""
        names = list(self.mix.choices)
        order = sorted(range(len(names)), key=lambda part: -max(e[part].mean_squared for e in self.errors.values()))
        bars = {bits: [errors[part].relative_error for part in order] for bits, errors in self.errors.items()}
        return [names[part] for part in order], bars

    def to_dict(self) -> dict[str, Any]:
        rows = [
            {
                "name": name,
                "bits": choice.bits,
                "bytes": choice.bytes,
                "relative_error": {bits: errors[number].relative_error for bits, errors in self.errors.items()},
            }
            for number, (name, choice) in enumerate(self.mix.choices.items())
        ]
        return {
            "choices": rows,
            "size_bytes": self.bytes,
            "float_size_bytes": self.float_bytes,
            "rest_bytes": self.rest_bytes,
            "predicted_relative_error": self.predicted_error,
            **_numbers(self.error),
            "recipe": self.recipe.to_dict(),
        }


def _numbers(error: Error) -> dict[str, float]:
    return {
        "relative_error": error.relative_error,
        "worst_step_cosine": error.worst_step_cosine,
        "worst_step": error.worst_step,
    }


class Study:
    """One model and recipe, its parts, and the trajectories on which all is measured.

    Raises UserError for whatever the user can mend, before anything is calibrated or measured where that is known.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: str = "demo",
        by: str = "layer",
        prompts: Sequence[str] = (),
        steps_sampled: int = 8,
        calibration: CalibrationOptions | None = None,
        watch: Watch = unwatched,
        say: Say = silent,
        settings: Settings | None = None,
    ):
        self.recipe, self.checkpoint = recipe, Checkpoint.open(model)
        self.parts = parts_of(recipe.chosen(self.checkpoint.linears), by)
        self._prompts, self._steps_sampled = prompts, steps_sampled
        self._settings = settings or Settings.of_objective(self.checkpoint.sizes.objective)
        self._options, self._watch, self._say = calibration or CalibrationOptions(), watch, say
        self._probe: Probe | None = None

    def _prepare(self) -> Probe:
        """Calibration and trajectories, once."""
        if self._probe is None:
            backend = choose_backend("auto")
            table = calibration_table(self.checkpoint, backend, self._options, self._watch, self._say, self.recipe)
            self._calibration = load_calibration(table, self.checkpoint, self.recipe.needs_rows)
            reference = reference_bundle(self.checkpoint, backend, self._say)
            calls = len(self._prompts) * self._settings.steps
            with self._watch("FP32 trajectories", calls) as done:
                self._probe = Probe(
                    self.checkpoint, reference, self._prompts, self._settings, self._steps_sampled, done
                )
        return self._probe

    def _measure_parts(self, recipe: Recipe, what: str) -> list[Error]:
        probe = self._prepare()
        with self._watch(what, len(self.parts) * probe.points) as done:
            return measure_parts(self.checkpoint, recipe, self._calibration, probe, self.parts, done)

    def simulate(self, recipe: Recipe) -> Error:
        """The error of the whole model under a recipe."""
        return self._prepare().measure(quantize_model(self.checkpoint, recipe, self._calibration))

    def rank(self, top: int | None = None, above: float | None = None) -> Ranking:
        """All parts; the `top` worst of them, or those with a relative error `above`, are left out of the recipe."""
        if top is not None and top >= len(self.parts):
            raise UserError(f"--top {top} would leave nothing to quantize: there are {len(self.parts)}")
        errors = self._measure_parts(self.recipe, f"quantizing {len(self.parts)} parts alone, calls")
        rows = rank(self.recipe, self.parts, errors)
        left_out = rows[:top] if top is not None else []
        if above is not None:
            left_out = [row for row in rows if row.error.relative_error > above]
        self._say("simulating all together")
        recipe, spared = self.recipe, None
        if left_out:
            recipe = without(self.recipe, self.checkpoint.linears, left_out)
            spared = self.simulate(recipe)
        return Ranking(rows, self.simulate(self.recipe), recipe, [row.part.name for row in left_out], spared)

    def allocate(self, budget: int | None, cosine: float | None) -> Allocation:
        """Bits for every part: the least error in `budget` bytes, or the fewest bytes with a worst-step `cosine`.

        Raises UserError when there are no such bits.
        """
        self.recipe = without_bits_for(self.recipe, self.checkpoint.linears)
        least, most = self._least_and_most()
        if budget is not None:
            self._check_budget(budget, least, most)
        tried = bits_to_try(self.recipe)
        errors = {
            bits: self._measure_parts(at_bits(self.recipe, bits), f"{len(self.parts)} parts alone in {bits}, calls")
            for bits in tried
        }
        choices = options(self.recipe, self.parts, errors)
        if budget is not None:
            fixed = least - cheapest(choices).bytes
            mix = within(choices, budget - fixed)
            found = Simulated(mix, self._simulate_mix(mix))
        else:
            assert cosine is not None
            found = self._reach([mix for mix in frontier(choices) if not mix.is_float], cosine)
        recipe = self._recipe(found.mix)
        rest = rest_bytes(self.checkpoint, self.recipe)
        return Allocation(found.mix, errors, found.error, recipe, dit_bytes(self.checkpoint, recipe), most, rest)

    def _least_and_most(self) -> tuple[int, int]:
        """Bytes of the DiT with all parts at the fewest bits, and in float."""
        most = dit_bytes(self.checkpoint, at_bits(self.recipe, "float"))
        saved = (
            part_bytes(self.recipe, part, "float")
            - min(part_bytes(self.recipe, part, bits) for bits in bits_to_try(self.recipe))
            for part in self.parts
        )
        return most - sum(saved), most

    def _check_budget(self, budget: int, least: int, most: int) -> None:
        if budget < least:
            rest = rest_bytes(self.checkpoint, self.recipe)
            raise UserError(
                f"--budget-mb {budget / 1e6:g} is too small: with the fewest bits everywhere the DiT's weights take "
                f"{least / 1e6:.3f} MB, {rest / 1e6:.3f} MB of them in what stays float"
            )
        if budget >= most:
            raise UserError(
                f"--budget-mb {budget / 1e6:g} holds the whole DiT in float ({most / 1e6:.3f} MB): there is nothing to "
                "choose; for FP32 use build --method none"
            )

    def _reach(self, mixes: Sequence[Mix], cosine: float) -> Simulated:
        best: list[Error] = []

        def simulate(mix: Mix) -> Error:
            best.append(self._simulate_mix(mix))
            return best[-1]

        with self._watch("mixes simulated, at most", len(mixes).bit_length() + 1) as done:
            found = reach(mixes, cosine, simulate, done)
        if found is None:
            raise UserError(
                f"no mix reaches --target-cosine {cosine:g}: the best that quantizes anything reaches "
                f"{best[0].worst_step_cosine:.6f}; ask for less, or use build --method none"
            )
        return found

    def _recipe(self, mix: Mix) -> Recipe:
        return mixed_recipe(self.recipe, self.checkpoint.linears, self.parts, mix)

    def _simulate_mix(self, mix: Mix) -> Error:
        return self.simulate(self._recipe(mix))
