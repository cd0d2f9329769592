"""What a build would make, told without making it: the bytes of every Linear, of every part of the bundle, its name.

The bytes of weights are exact, those of a graph's nodes and of its scales by step about right (see part_sizes); the
whole bundle comes out within 2 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..engines.base import BACKENDS, choose_backend
from ..engines.bundle import bundles_folder, check_target
from ..engines.tensorrt_build import PlanOptions
from ..exporters.checkpoint import Checkpoint
from .build import bundle_name, trunk_of
from .layers import Layer, layers
from .part_sizes import part_sizes
from .recipe import Recipe
from .tables import load_calibration, table_facts
from .workflow import CalibrationOptions, TableAtHand, table_at_hand


@dataclass(frozen=True)
class BuildPlan:
    """What `plan_build` found out. `bundle` is None while its name depends on a calibration that has not run.

    parts: expected bytes by part of the bundle; data_files: those of the graphs' data files, up to the padding after
    the last weight (< 64 bytes). table: where it comes from and what kept another from being used, see workflow; None
    when the recipe needs no calibration. steps: of a calibration's every run.
    """

    recipe: Recipe
    backend: str
    layers: list[Layer]
    parts: dict[str, int]
    data_files: dict[str, int]
    float_size_bytes: int
    table: TableAtHand | None
    bundle: Path | None
    steps: int

    @property
    def size_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def linears(self) -> int:
        return sum(layer.bits != "fp32" for layer in self.layers)


def plan_build(
    recipe: Recipe,
    model: str,
    backend: str,
    output: Path | None,
    calibration: CalibrationOptions,
    device: str | None = None,
    text_encoder: str | None = None,
    options: PlanOptions | None = None,
) -> BuildPlan:
    """Check all that `workflow.build` checks before it begins, and foretell what it would write. Writes nothing.

    Raises UserError as the build would: for the model, the backend, the patterns, the output, the prompts.
    """
    backend = choose_backend(backend, device, to_build=True)
    dialect = BACKENDS[backend].dialects[trunk_of(recipe, backend)]
    checkpoint = Checkpoint.open(model, text_encoder)
    if output is not None:
        check_target(output)
    table, facts = None, None
    if recipe.chosen(checkpoint.linears):
        calibration.plan(checkpoint)  # its prompts and steps are checked even where a table is at hand
        table = table_at_hand(checkpoint, calibration, recipe)
        if table.path is not None:
            load_calibration(table.path, checkpoint, recipe.needs_rows)
            facts = table_facts(table.path)
    if output is None and (table is None or table.path is not None):
        output = bundles_folder() / bundle_name(
            checkpoint, recipe, backend, facts, device, None if options is None else options.to_dict()
        )
    steps = calibration.settings(checkpoint).steps
    sizes = part_sizes(checkpoint, recipe, steps, dialect)
    return BuildPlan(
        recipe,
        backend,
        layers(checkpoint.linears, recipe, dialect.int4_block),
        sizes.parts,
        sizes.data_files,
        sum(part_sizes(checkpoint, Recipe("none"), steps).parts.values()),
        table,
        output,
        steps,
    )
