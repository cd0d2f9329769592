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

from ..engines.manifest import step_graphs
from ..exporters.checkpoint import Checkpoint
from ..exporters.graph_weights import Shape, graph_weights
from ..exporters.linears import DIT_PREFIX, Linear
from ..exporters.qdq import ALIGNMENT, INLINE
from .layers import branch_tensors, weight_tensors
from .recipe import Recipe
from .scale_tables import KNOTS

# Bytes of a graph's nodes and names: fixed, and for every block.
_STRUCTURE = {"text": (930, 0), "conditioning": (6200, 1520), "step": (1600, 8050), "decoder": (2150, 0)}
_AUTOENCODER_STRUCTURE = 430  # of an autoencoder's graphs, for every weight
# More for every MatMul in integers: the pair at its input and the weight's nodes, and what else a recipe adds there.
_MATMUL = {"w8a8": 945, "expanded": 945 + 700, "memory": 600}
_RANGE = {"none": 0, "static": 0, "step": 230, "token": 900}
_REQUANTIZED, _BRANCH, _DIFFERENCE = 1100, 900, 800
# Names in a file of scales: of every table, and of every slot.
_TABLE_HEADER, _SLOT_HEADER = 125, 165
_NORMS = {"self_attn.to_qkv": "pre_norm", "cross_attn.to_q": "cross_attend_norm", "ff.ff.0.proj": "ff_norm"}
_SOURCES = {"self_attn.to_out": "self_attn.to_qkv", "ff.ff.2": "ff.ff.0.proj"}


@dataclass(frozen=True)
class PartSizes:
    """parts: bytes by part of the bundle; data_files: by graph, of its data file, up to padding at its end."""

    parts: dict[str, int]
    data_files: dict[str, int]


def part_sizes(checkpoint: Checkpoint, recipe: Recipe, steps: int) -> PartSizes:
    """steps: of the calibration; the scales of a step range are told for as many noise levels, at most 16."""
    chosen = recipe.chosen(checkpoint.linears)
    parts: dict[str, int] = {}
    data_files: dict[str, int] = {}
    bounds = np.linspace(0, steps, (recipe.groups or 1) + 1).round().astype(int)
    for kind, weights in graph_weights(checkpoint.config).items():
        here = [linear for linear in chosen if linear.graph == kind]
        slots = _Slots(checkpoint, recipe, here) if recipe.activation_range == "step" and kind == "step" else None
        tensors = list(_tensors(weights, here, recipe, slots))
        data = sum(ALIGNMENT * math.ceil(size / ALIGNMENT) for size in tensors if size >= INLINE)
        size = data + sum(size for size in tensors if size < INLINE) + _structure(checkpoint, recipe, kind, weights)
        lengths = [last - first for first, last in pairwise(bounds)] if kind == "step" else [steps]
        for graph, length in zip(step_graphs(lengths[1:]) if kind == "step" else (kind,), lengths):
            data_files[graph] = data
            parts[graph] = size + (slots.file_bytes(min(KNOTS, length)) if slots is not None and here else 0)
    parts["scales"] = _scales_bytes(chosen)
    parts["tokenizer"] = checkpoint.tokenizer_file.stat().st_size
    return PartSizes(parts, data_files)


def _tensors(weights: dict[str, Shape], here: Sequence[Linear], recipe: Recipe, slots: _Slots | None) -> Iterator[int]:
    """Bytes of every weight of a graph."""
    packed = {
        linear.graph_name(part): sizes for linear in here for part, sizes in weight_tensors(linear, recipe).items()
    }
    moved = set() if slots is None else slots.vectors.keys()
    for name, shape in weights.items():
        if name in packed:
            yield from packed[name]
        elif name not in moved:
            yield 4 * math.prod(shape)
    for linear in here:
        yield from branch_tensors(linear, recipe)


def _structure(checkpoint: Checkpoint, recipe: Recipe, graph: str, weights: dict[str, Shape]) -> int:
    """About the bytes of a graph without its weights."""
    if graph in ("encoder", "decoder") and checkpoint.sizes.tiling:
        return _AUTOENCODER_STRUCTURE * len(weights)
    fixed, per_block = _STRUCTURE[graph]
    size = fixed + per_block * checkpoint.sizes.dit.depth
    for linear in checkpoint.linears:
        if linear.graph == graph and (bits := recipe.bits_of(linear)) != "fp32":
            matmul = _MATMUL["w8a8" if bits == "w8a8" else recipe.w4]
            if graph == "step":
                matmul += _RANGE[recipe.activation_range] + (_REQUANTIZED if recipe.requantizes else 0)
                matmul += _DIFFERENCE if recipe.cfg_pair == "difference" else 0
            elif recipe.activation_range == "token":
                matmul += _RANGE["token"]
            matmul += _BRANCH if recipe.lora_rank else 0
            size += matmul * len(linear.parts)
    return size


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
            if linear.kind in _NORMS:
                norm = f"{DIT_PREFIX}{layer}{_NORMS[linear.kind]}"
                self._move(checkpoint, linear, f"{norm}.gamma", f"{norm}.beta")
            elif linear.kind == "ff.ff.2" and f"{layer}ff.ff.0.proj" in names:
                self._move(checkpoint, linear, f"{DIT_PREFIX}{layer}ff.ff.0.proj.value.bias")

    def _move(self, checkpoint: Checkpoint, linear: Linear, *names: str) -> None:
        """Those of them that are not all zeros."""
        self.vectors |= {name: linear.in_features for name in names if checkpoint.tensor(name).any()}

    def file_bytes(self, knots: int) -> int:
        """About the bytes of the file, with its tables at that many noise levels."""
        size, tables, slots = 4 * knots, 0, len(self.vectors)
        for linear in self._linears:
            wide = (linear.in_features + linear.out_features) if self._recipe.requantizes else 0
            difference = self._recipe.cfg_pair == "difference"
            size += knots * (4 + 2 * wide + 4 * difference) + (4 * linear.in_features if wide else 0)
            tables += 1 + 2 * bool(wide) + difference
            slots += (4 if wide else 2) + 2 * difference
        return size + 4 * sum(self.vectors.values()) + _TABLE_HEADER * tables + _SLOT_HEADER * slots


def _scales_bytes(chosen: Sequence[Linear]) -> int:
    tensors = {f"smoothing/{linear.name}": np.zeros(linear.in_features, np.float32) for linear in chosen}
    tensors |= {f"activation_scale/{linear.name}": np.zeros(1, np.float32) for linear in chosen}
    return len(save(tensors))
