"""What a build would make, told without making it: the bytes of every Linear, of every part of the bundle, its name.

Weights are counted as the exporter writes them: in a graph's data file from 64-byte boundaries, those under 1024 bytes
in the graph itself. That is exact. The size of a graph without its weights is estimated, from the two sizes of model it
was measured on; the whole bundle comes out within 1 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from ..engines.base import choose_backend
from ..engines.bundle import bundles_folder, check_target
from ..exporters.checkpoint import Checkpoint
from ..exporters.data_file import ALIGNMENT, INLINE
from ..exporters.graph_weights import graph_weights
from ..exporters.linears import Linear
from .build import bundle_name
from .layers import Layer, layers, packed
from .recipe import Recipe
from .tables import load_calibration, table_facts
from .workflow import CalibrationOptions, table_at_hand

# Bytes of a graph's nodes and names: fixed, for every block, and more for every MatMul in int8 (measured).
_STRUCTURE = {
    "text": (930, 0, 0),
    "conditioning": (6200, 1520, 600),
    "step": (1600, 8050, 945),
    "decoder": (2150, 0, 0),
}
_AUTOENCODER_STRUCTURE = 430  # of an autoencoder's graphs, for every weight (measured)


@dataclass(frozen=True)
class BuildPlan:
    """What `plan_build` found out. `bundle` is None while its name depends on a calibration that has not run.

    parts: expected bytes by part of the bundle; data_files: those of the graphs' data files, up to the padding after
    the last weight (< 64 bytes). table: `shipped`, `cache`, `to run`, or None when the recipe needs no calibration.
    """

    recipe: Recipe
    backend: str
    layers: list[Layer]
    parts: dict[str, int]
    data_files: dict[str, int]
    float_size_bytes: int
    table: str | None
    bundle: Path | None

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
) -> BuildPlan:
    """Check all that `workflow.build` checks before it begins, and foretell what it would write. Writes nothing.

    Raises UserError as the build would: for the model, the backend, the patterns, the output, the prompts.
    """
    backend = choose_backend(backend, device)
    checkpoint = Checkpoint.open(model)
    if output is not None:
        check_target(output)
    chosen = recipe.chosen(checkpoint.linears)
    table, facts = None, None
    if chosen:
        calibration.plan(checkpoint)  # its prompts and steps are checked even where a table is at hand
        table = "to run"
        if (found := table_at_hand(checkpoint, calibration)) is not None:
            path, table = found
            load_calibration(path, checkpoint)
            facts = table_facts(path)
    if output is None and table != "to run":
        output = bundles_folder() / bundle_name(checkpoint, recipe, backend, facts, device)
    parts, data_files = _sizes(checkpoint, chosen)
    return BuildPlan(
        recipe,
        backend,
        layers(checkpoint.linears, chosen, recipe.bits),
        parts,
        data_files,
        sum(_sizes(checkpoint, [])[0].values()),
        table,
        output,
    )


def _sizes(checkpoint: Checkpoint, chosen: Sequence[Linear]) -> tuple[dict[str, int], dict[str, int]]:
    """-> bytes by part of the bundle, bytes by graph of its data file."""
    quantized = {linear.graph_name(part): linear for linear in chosen for part in linear.parts}
    parts, data_files = {}, {}
    for graph, weights in graph_weights(checkpoint.config).items():
        tensors: list[int] = []
        for name, shape in weights.items():
            tensors += packed(shape[1], shape[0]) if name in quantized else [4 * math.prod(shape)]
        integer = sum(name in quantized for name in weights)
        if graph in ("encoder", "decoder") and checkpoint.sizes.tiling:
            structure = _AUTOENCODER_STRUCTURE * len(weights)
        else:
            fixed, per_block, per_matmul = _STRUCTURE[graph]
            structure = fixed + per_block * checkpoint.sizes.dit.depth + per_matmul * integer
        data_files[graph] = sum(ALIGNMENT * math.ceil(size / ALIGNMENT) for size in tensors if size >= INLINE)
        parts[graph] = data_files[graph] + sum(size for size in tensors if size < INLINE) + structure
    parts["scales"] = _scales_bytes(chosen)
    parts["tokenizer"] = checkpoint.tokenizer_file.stat().st_size
    return parts, data_files


def _scales_bytes(chosen: Sequence[Linear]) -> int:
    tensors = {f"smoothing/{linear.name}": np.zeros(linear.in_features, np.float32) for linear in chosen}
    tensors |= {f"activation_scale/{linear.name}": np.zeros(1, np.float32) for linear in chosen}
    return len(save(tensors))
