"""The bytes of every part of a bundle before it is built: weights exactly, a graph's nodes and names as measured.

Weights are counted as the exporter writes them: in a graph's data file from 64-byte boundaries, those under 1024 bytes
in the graph itself. What a node takes was measured on two sizes of model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from safetensors.numpy import save

from ..engines.base import INT8, Dialect
from ..engines.manifest import step_graphs
from ..exporters.checkpoint import Checkpoint
from ..exporters.conditioners import Conditioning
from ..exporters.data_file import ALIGNMENT, INLINE
from ..exporters.graph_weights import Shape, graph_weights
from ..exporters.half import GRAPHS as half_graphs
from ..exporters.half import cast_node, is_matrix
from ..exporters.linears import DIT_PREFIX, NORMS, SOURCES, Linear
from .layers import branch_tensors, weight_tensors
from .recipe import Recipe
from .scale_tables import KNOTS

# Bytes of a graph's nodes and names: fixed, for every block, and more for every MatMul by 8-bit integers.
_STRUCTURE = {
    "text": (930, 0, 0),
    "conditioning": (3520, 1520, 600),
    "step": (1815, 8265, 945),
    "decoder": (2150, 0, 0),
}
_NUMBER = 1340  # of the conditioning graph, for every number
_T5, _T5_LAYER, _T5_GATED_LAYER, _T5_PROJECTION = 1960, 4260, 4705, 420
_AUTOENCODER_STRUCTURE = 430  # of an autoencoder's graphs, for every weight
# What a recipe adds to that, for every MatMul, and for every tensor that is quantized.
_FOUR_BITS = {"expanded": 880, "memory": -575}
_STEP, _REQUANTIZED, _DIFFERENCE = 230, 1450, 800
_DIFFERENCE_TENSOR = {"static": 1435, "step": 1840, "token": 585}
_TOKEN, _TOKEN_TENSOR = 240, 1860
_BRANCH, _BRANCH_TENSOR, _REQUANTIZED_BRANCH = 1400, 590, 700
# Names in a file of scales: of every table, and of every slot.
_TABLE_HEADER, _SLOT_HEADER = 125, 165
_CASTS = 2400  # of a half-precision trunk, for every block
_READERS = {source: kind for kind, (source, _) in SOURCES.items()}


@dataclass(frozen=True)
class PartSizes:
    """parts: bytes by part of the bundle; data_files: by graph, of its data file, up to padding at its end."""

    parts: dict[str, int]
    data_files: dict[str, int]


def part_sizes(checkpoint: Checkpoint, recipe: Recipe, steps: int, dialect: Dialect = INT8) -> PartSizes:
    """steps: of the calibration; the scales of a step range are told for as many noise levels, at most 16."""
    chosen = recipe.chosen(checkpoint.linears)
    parts: dict[str, int] = {}
    data_files: dict[str, int] = {}
    bounds = np.linspace(0, steps, (recipe.groups or 1) + 1).round().astype(int)
    for kind, weights in graph_weights(checkpoint.config).items():
        here = [linear for linear in chosen if linear.graph == kind]
        slots = _Slots(checkpoint, recipe, here) if recipe.activation_range == "step" and kind == "step" else None
        narrow = kind == "step" and dialect.trunk != "float32"
        halves = narrow or (recipe.halves and kind in half_graphs)
        half = {n for n, shape in weights.items() if halves and is_matrix(n, shape)}
        tensors = list(_tensors(weights, here, recipe, slots, half, dialect.int4_block))
        data = sum(ALIGNMENT * math.ceil(size / ALIGNMENT) for size in tensors if size >= INLINE)
        size = data + sum(size for size in tensors if size < INLINE) + _structure(checkpoint, recipe, kind, weights)
        replaced = {linear.graph_name(part) for linear in here for part in linear.parts}
        if narrow:
            size += _CASTS * checkpoint.sizes.dit.depth
        else:
            size += sum(cast_node(name).ByteSize() + len(".half") + 3 for name in half - replaced)
        lengths = [int(last - first) for first, last in pairwise(bounds)] if kind == "step" else [steps]
        for graph, length in zip(step_graphs(lengths[1:]) if kind == "step" else (kind,), lengths):
            data_files[graph] = data
            of_steps = slots.widths + slots.file_bytes(min(KNOTS, length)) if slots is not None and here else 0
            parts[graph] = size + of_steps
    parts["scales"] = _scales_bytes(recipe, chosen)
    parts["tokenizer"] = checkpoint.tokenizer_file.stat().st_size
    return PartSizes(parts, data_files)


def _tensors(
    weights: dict[str, Shape],
    here: Sequence[Linear],
    recipe: Recipe,
    slots: _Slots | None,
    half: set[str],
    int4_block: int,
) -> Iterator[int]:
    """Bytes of every weight of a graph; half: those stored in 16 bits."""
    packed = {
        linear.graph_name(part): sizes
        for linear in here
        for part, sizes in weight_tensors(linear, recipe, int4_block).items()
    }
    moved = set() if slots is None else slots.vectors.keys()
    for name, shape in weights.items():
        if name in packed:
            yield from packed[name]
        elif name not in moved:
            yield (2 if name in half else 4) * math.prod(shape)
    for linear in here:
        yield from branch_tensors(linear, recipe)


def _structure(checkpoint: Checkpoint, recipe: Recipe, graph: str, weights: dict[str, Shape]) -> int:
    """About the bytes of a graph without its weights."""
    if graph in ("encoder", "decoder") and checkpoint.sizes.tiling:
        return _AUTOENCODER_STRUCTURE * len(weights)
    conditioning = checkpoint.sizes.conditioning
    if graph == "text" and conditioning.prompt_kind == "t5":
        return _t5_structure(conditioning)
    fixed, per_block, per_matmul = _STRUCTURE[graph]
    size = fixed + per_block * checkpoint.sizes.dit.depth
    size += _NUMBER * len(conditioning.numbers) if graph == "conditioning" else 0
    branch, in_step = bool(recipe.lora_rank), graph == "step"
    if in_step:
        per_matmul += _STEP * (recipe.activation_range == "step") + _DIFFERENCE * (recipe.cfg_pair == "difference")
        per_matmul += (_REQUANTIZED + _REQUANTIZED_BRANCH * branch) * recipe.requantizes
    per_matmul += _BRANCH * branch
    pair = _DIFFERENCE_TENSOR[recipe.activation_range] if in_step and recipe.cfg_pair == "difference" else 0
    tokens = 0
    here = [linear for linear in checkpoint.linears if linear.graph == graph and recipe.bits_of(linear) != "fp32"]
    for linear in here:
        four = recipe.bits_of(linear) == "w4a8"
        token = recipe.activation_range == "token" and not (four and recipe.w4 == "memory")
        own = per_matmul + _TOKEN * token + (_FOUR_BITS[recipe.w4] if four else 0)
        size += own * len(linear.parts) + _BRANCH_TENSOR * branch + pair
        tokens += token
    # All Linears of the conditioning graph read one tensor.
    return size + _TOKEN_TENSOR * (tokens if in_step else min(tokens, 1))


def _t5_structure(conditioning: Conditioning) -> int:
    """With the bucket of every pair of positions, an int32 that is in the graph itself."""
    encoder = conditioning.encoder
    layer = _T5_GATED_LAYER if encoder.is_gated else _T5_LAYER
    buckets = 4 * conditioning.prompt_tokens**2
    return _T5 + layer * encoder.num_layers + _T5_PROJECTION * conditioning.projects + buckets


class _Slots:
    """What a step graph with ranges by step takes from its file of scales.

    vectors: norm gains and biases that go there from the graph, by name, and their widths.
    """

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, here: Sequence[Linear]):
        self._recipe, self._linears = recipe, here
        self.vectors: dict[str, int] = {}
        names = {linear.name for linear in here}
        for linear in here:
            layer = linear.name.removesuffix(linear.kind)
            if linear.kind in NORMS:
                norm = f"{DIT_PREFIX}{layer}{NORMS[linear.kind]}"
                self._move(checkpoint, linear, f"{norm}.gamma", f"{norm}.beta")
            elif linear.kind == "ff.ff.2" and f"{layer}ff.ff.0.proj" in names:
                self._move(checkpoint, linear, f"{DIT_PREFIX}{layer}ff.ff.0.proj.value.bias")

    def _move(self, checkpoint: Checkpoint, linear: Linear, *names: str) -> None:
        """Those of them that are not all zeros."""
        self.vectors |= {name: linear.in_features for name in names if checkpoint.tensor(name).any()}

    @property
    def widths(self) -> int:
        """Bytes of the constant that tells how the graph's input `step_scales` is cut: an int64 for every piece."""
        return 8 * (len(self.vectors) + sum(map(self._pieces, self._linears)))

    def _pieces(self, linear: Linear) -> int:
        """How many the factors of a Linear are, but for `vectors`; equal ones are one."""
        names = {other.name for other in self._linears}
        layer = linear.name.removesuffix(linear.kind)
        source, reader = SOURCES.get(linear.kind), _READERS.get(linear.kind)
        merged = source is not None and layer + source[0] in names
        of_input = 0 if linear.kind in NORMS or merged else 1
        if self._recipe.requantizes:  # columns (the branch's, too), rows; no f is merged into a g
            return of_input + merged + 1 + 2 * len(linear.parts) + bool(self._recipe.lora_rank)
        return of_input + 1 + (reader is not None and layer + reader in names)

    def file_bytes(self, knots: int) -> int:
        """About the bytes of the file, with its tables at that many noise levels."""
        size, tables, slots = 4 * knots, 0, len(self.vectors)
        difference = self._recipe.cfg_pair == "difference"
        for linear in self._linears:
            wide = (linear.in_features + linear.out_features) if self._recipe.requantizes else 0
            size += knots * (4 + 2 * wide + 4 * difference) + (4 * linear.in_features if wide else 0)
            tables += 1 + 2 * bool(wide) + difference
            slots += (4 if wide else 2) + 2 * difference
        return size + 4 * sum(self.vectors.values()) + _TABLE_HEADER * tables + _SLOT_HEADER * slots


def _scales_bytes(recipe: Recipe, chosen: Sequence[Linear]) -> int:
    tensors = {f"smoothing/{linear.name}": np.zeros(linear.in_features, np.float32) for linear in chosen}
    fixed = [linear for linear in chosen if _has_scale(recipe, linear)]
    tensors |= {f"activation_scale/{linear.name}": np.zeros(1, np.float32) for linear in fixed}
    return len(save(tensors))


def _has_scale(recipe: Recipe, linear: Linear) -> bool:
    """Whether the input's range is one number, or one and its multiples by step."""
    if recipe.activation_range == "token" or (recipe.requantizes and linear.graph == "step"):
        return False
    return not (recipe.w4 == "memory" and recipe.bits_of(linear) == "w4a8")
