"""What a Linear costs, told by its shape, is what the exporter's own nodes and the branch's own arrays take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto

from dit_trt.exporters.data_file import DataFile
from dit_trt.exporters.int4 import weight_nodes
from dit_trt.exporters.linears import Linear
from dit_trt.tooling.layers import layers
from dit_trt.tooling.low_rank import low_rank
from dit_trt.tooling.recipe import Recipe
from dit_trt.tooling.weights import quantize_weight

LINEARS = [
    Linear("transformer.layers.0.self_attn.to_qkv", "step", 96, {"q": 32, "k": 32, "v": 32}),
    Linear("transformer.layers.0.cross_attn.to_kv", "conditioning", 80, {"k": 31, "v": 31}),
    Linear("transformer.layers.0.ff.ff.2", "step", 192, {"": 33}, bias=True),
]
RECIPES = {
    "w8a8": (Recipe(), 8, [0, 0, 0]),
    "groups": (Recipe(bits="w4a8"), 4, [32, 16, 64]),
    "channels": (Recipe(bits="w4a8", group_size=0), 4, [0, 0, 0]),
    "one group": (Recipe(bits="w4a8", group_size=192), 4, [96, 16, 192]),
    "memory": (Recipe("sqt", bits="w4a8", w4="memory", group_size=16), 4, [16, 16, 16]),
    "by step": (Recipe("sqd", sqd_weights="grouped:3", bits="w4a8"), 4, [32, 16, 64]),
}


def stored(tensor: TensorProto) -> int:
    if tensor.data_location == TensorProto.EXTERNAL:
        return int(next(entry.value for entry in tensor.external_data if entry.key == "length"))
    return len(tensor.raw_data)


@pytest.mark.parametrize("rank", [0, 5, 50])
@pytest.mark.parametrize(("recipe", "bits", "groups"), RECIPES.values(), ids=RECIPES)
def test_bytes_are_those_of_the_tensors(
    tmp_path: Path, recipe: Recipe, bits: int, groups: list[int], rank: int
) -> None:
    recipe = Recipe.from_dict({**recipe.to_dict(), "lora_rank": rank})
    rng = np.random.default_rng(0)
    for linear, group, layer in zip(LINEARS, groups, layers(LINEARS, recipe)):
        copies = 3 if recipe.groups and linear.graph == "step" else 1
        with DataFile(tmp_path / "data") as data:
            total = 0
            for part, rows in linear.parts.items():
                weight = rng.standard_normal((rows, linear.in_features), np.float32)
                made = weight_nodes(part, quantize_weight(weight, bits, group), data, recipe.w4)  # type: ignore[arg-type]
                total += sum(map(stored, made.initializers))
        assert layer.bytes == copies * total
        whole = rng.standard_normal((linear.out_features, linear.in_features), np.float32)
        branch = low_rank(whole, rank) if rank else None
        assert layer.branch_bytes == (0 if branch is None else copies * (branch.a.nbytes + branch.b.nbytes))
        assert layer.float_bytes == whole.nbytes


def test_each_linear_has_its_own_bits() -> None:
    bits_for = (("ff.*", "w4a8"), ("cross_attn.to_kv", "float"))
    mixed = layers(LINEARS, Recipe(bits_for=bits_for, lora_rank=4))
    assert [layer.bits for layer in mixed] == ["w8a8", "fp32", "w4a8"]
    assert (mixed[1].bytes, mixed[1].branch_bytes) == (mixed[1].float_bytes, 0)
    assert mixed[0] == layers(LINEARS, Recipe(lora_rank=4))[0]
    assert mixed[2] == layers(LINEARS, Recipe(bits="w4a8", lora_rank=4))[2]
