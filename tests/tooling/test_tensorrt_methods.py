"""`--backend tensorrt` without a GPU: each method's bundle, all its Linears int8 and all its attentions fused."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from commands import invoke, one_object
from trt_graphs import builds

from dit_trt.engines.bundle import Bundle
from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.tooling.build import build_bundle
from dit_trt.tooling.recipe import Recipe

pytestmark = builds

RECIPES = {
    "sqs": Recipe("sqs"),
    "sqs-plain": Recipe("sqs", smooth=False),
    "sqs-pair": Recipe("sqs", cfg_pair="difference"),
    "sqd": Recipe("sqd"),
    "sqd-pair": Recipe("sqd", cfg_pair="difference"),
    "sqd-requantize": Recipe("sqd", sqd_weights="requantize"),
    "sqd-grouped": Recipe("sqd", sqd_weights="grouped:2"),
    "sqd-rank": Recipe("sqd", lora_rank=8),
    "sqt": Recipe("sqt"),
    "sqt-pair": Recipe("sqt", cfg_pair="difference"),
    "w7a8": Recipe("sqs", "w7a8"),
    "w4a8": Recipe("sqs", "w4a8"),
    "w4a8-group-32": Recipe("sqd", "w4a8", group_size=32),
    "w4a8-channel": Recipe("sqt", "w4a8", group_size=0),
    "best": Recipe("sqt", "w4a8", lora_rank=8, cfg_pair="difference"),
    "requantize-rank-pair": Recipe("sqd", sqd_weights="requantize", lora_rank=8, cfg_pair="difference"),
    "requantize-bf16": Recipe("sqd", sqd_weights="requantize", trunk="bf16"),
    "best-bf16": Recipe("sqt", "w4a8", lora_rank=8, cfg_pair="difference", trunk="bf16"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_method(tiny: Path, tiny_table_file: Path, name: str, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    built = build_bundle(Checkpoint.open(str(tiny)), recipe, "tensorrt", tmp_path / "bundle", tiny_table_file)
    assert built.linears == built.int8_linears == 14
    manifest = built.bundle.manifest
    assert (manifest["attentions"], manifest["fused_attentions"]) == (4, 4)
    assert manifest["trunk"] == ("bf16" if recipe.trunk == "bf16" else "fp16")


def test_an_fp32_trunk_has_int8_and_no_fused_attention(tiny: Path, tiny_table_file: Path, tmp_path: Path) -> None:
    recipe = Recipe("sqs", trunk="fp32")
    built = build_bundle(Checkpoint.open(str(tiny)), recipe, "tensorrt", tmp_path / "bundle", tiny_table_file)
    assert built.linears == built.int8_linears == 14
    assert "attentions" not in built.bundle.manifest


DEMO = {
    "none": ("--method", "none"),
    "sqs": ("--method", "sqs"),
    "sqt": ("--method", "sqt"),
    "w4a8": ("--method", "sqs", "--bits", "w4a8", "--group-size", "channel", "--trunk", "bf16"),
}


@pytest.mark.parametrize("name", DEMO)
def test_the_demo(newcomer: Path, name: str, tmp_path: Path) -> None:
    built = one_object(
        invoke("build", "--backend", "tensorrt", *DEMO[name], "--output", tmp_path / "bundle", "--json").stdout
    )
    assert built["backend"] == "tensorrt"
    manifest = Bundle(tmp_path / "bundle").manifest
    if name == "none":
        assert (built["linears"], manifest["trunk"]) == (0, "fp32")
        nodes = onnx.load(tmp_path / "bundle" / "step.onnx", load_external_data=False).graph.node
        assert not {node.op_type for node in nodes} & {"QuantizeLinear", "DequantizeLinear"}
    else:
        assert built["linears"] == built["int8_linears"] == 56
        assert (manifest["attentions"], manifest["fused_attentions"]) == (16, 16)
