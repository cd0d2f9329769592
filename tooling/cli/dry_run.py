"""What `dit-trt build --dry-run` prints: a BuildPlan as a table, and as the JSON object."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING

from .common import megabytes, show, show_table

if TYPE_CHECKING:
    from ..plan import BuildPlan, Layer
    from ..workflow import CalibrationOptions


def show_plan(plan: BuildPlan, options: CalibrationOptions) -> dict:
    """Show the plan by kind of Linear and by part; returns the object for --json."""
    show_table([("Linear", "in", "out", "count", "bits", "FP32 bytes", "bytes"), *_by_kind(plan.layers)])
    before, after = sum(layer.float_bytes for layer in plan.layers), sum(layer.bytes for layer in plan.layers)
    show(f"\n{plan.linears} of {len(plan.layers)} Linears in {plan.recipe.bits}: {before:,} -> {after:,} bytes\n")
    show_table([("part", "bytes, about"), *plan.parts.items()])
    show(f"\nbundle  {megabytes(plan.size_bytes)} (FP32: {megabytes(plan.float_size_bytes)}), within 1 %")
    show(f"        {plan.bundle or 'its name is known once the calibration has run'}")
    if plan.table is not None:
        run = f"will run, {len(options.chosen())} prompts x {options.steps} steps"
        origins = {"shipped": "the table shipped with the checkpoint", "cache": "a table from the cache", "to run": run}
        show(f"calibration  {origins[plan.table]}")
    show("nothing was written (--dry-run)")
    return {
        "dry_run": True,
        "bundle": None if plan.bundle is None else str(plan.bundle),
        "backend": plan.backend,
        "recipe": plan.recipe.to_dict(),
        "linears": plan.linears,
        "size_bytes": plan.size_bytes,
        "size_bytes_by_part": plan.parts,
        "float_size_bytes": plan.float_size_bytes,
        "calibration": None
        if plan.table is None
        else {"table": plan.table, "prompts": len(options.chosen()), "steps": options.steps},
        "layers": [asdict(layer) for layer in plan.layers],
    }


def _by_kind(layers: Iterable[Layer]) -> list[tuple]:
    """A row for each kind of Linear (two where only some of them are quantized), in the order of a block."""
    layers = list(layers)
    order = {kind: i for i, kind in enumerate(dict.fromkeys(layer.kind for layer in layers))}

    def key(layer: Layer) -> tuple:
        return order[layer.kind], layer.bits, layer.in_features, layer.out_features

    rows = []
    for (_, bits, width, height), group in groupby(sorted(layers, key=key), key=key):
        same = list(group)
        sums = sum(layer.float_bytes for layer in same), sum(layer.bytes for layer in same)
        rows.append((same[0].kind, width, height, len(same), bits, *sums))
    return rows
