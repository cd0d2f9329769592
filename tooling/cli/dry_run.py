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
    head = ("Linear", "in", "out", "count", "bits", "FP32 bytes", "bytes", "branch")
    width = len(head) if any(layer.branch_bytes for layer in plan.layers) else len(head) - 1
    show_table([row[:width] for row in (head, *_by_kind(plan.layers))])
    before = sum(layer.float_bytes for layer in plan.layers)
    after = sum(layer.bytes + layer.branch_bytes for layer in plan.layers)
    bits = " and ".join(dict.fromkeys(layer.bits for layer in plan.layers if layer.bits != "fp32")) or "integers"
    show(f"\n{plan.linears} of {len(plan.layers)} Linears in {bits}: {before:,} -> {after:,} bytes\n")
    show_table([("part", "bytes, about"), *plan.parts.items()])
    show(f"\nbundle  {megabytes(plan.size_bytes)} (FP32: {megabytes(plan.float_size_bytes)}), within 2 %")
    show(f"        {plan.bundle or 'its name is known once the calibration has run'}")
    if plan.table is not None:
        run = f"will run, {len(options.chosen())} prompts x {plan.steps} steps"
        origins = {"shipped": "the table shipped with the checkpoint", "cache": "a table from the cache", "to run": run}
        lacks = f"; the table at hand lacks {plan.table.lacks}" if plan.table.lacks else ""
        show(f"calibration  {origins[plan.table.origin]}{lacks}")
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
        else {"table": plan.table.origin, "prompts": len(options.chosen()), "steps": plan.steps},
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
        sums = [sum(getattr(layer, field) for layer in same) for field in ("float_bytes", "bytes", "branch_bytes")]
        rows.append((same[0].kind, width, height, len(same), bits, *sums))
    return rows
