"""What a plan says of itself: its products by name and type, and that a build names what was lost."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import LAYER, damaged_copy, make_input
from onnx import GraphProto, TensorProto, helper
from trt_graphs import HALF, K, N, add, as_input, attention, builds, linear, plan_of, put

from dit_trt.engines import tensorrt_account, tensorrt_api
from dit_trt.engines.base import BACKENDS
from dit_trt.engines.bundle import Bundle
from dit_trt.engines.errors import UserError
from dit_trt.engines.tensorrt import TensorRTPlan
from dit_trt.engines.tensorrt_account import (
    Product,
    attention_nodes,
    int8_nodes,
    products_of_inspector,
    products_of_plan,
)
from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.exporters.float_graphs import attention_names
from dit_trt.runtime.graph_shapes import graph_shapes
from dit_trt.tooling.build import Proven, build_bundle, prove
from dit_trt.tooling.recipe import Recipe

# -------------------- the text of a plan


@builds
def test_a_product_has_its_types_and_all_its_nodes(tmp_path: Path) -> None:
    [product] = products_of_plan(plan_of(linear(), tmp_path))
    assert (product.kind, product.operands[:2], product.result) == ("gemm", ("int8", "int8"), "float")
    assert {"fc", "x_dq", "w_dq"} <= {*product.nodes}
    assert int8_nodes([product]) == {*product.nodes}
    assert attention_nodes([product]) == set()


@builds
def test_a_float_product_is_not_int8(tmp_path: Path) -> None:
    model = linear()
    as_input(model, "x_scale")
    [product] = products_of_plan(plan_of(model, tmp_path))
    assert (product.operands[:2], product.nodes) == (("float", "float"), ("fc",))
    assert int8_nodes([product]) == set()


@builds
@pytest.mark.parametrize("parts", [3, 8])
def test_products_that_were_merged_name_all_their_nodes(tmp_path: Path, parts: int) -> None:
    """q, k and v, or every block's to_kv: one GEMM where they read the same."""
    model = linear()
    for i in range(1, parts):
        put(model, **{f"w{i}": np.random.default_rng(i).integers(-127, 128, (K, N), dtype=np.int8)})
        add(model, "DequantizeLinear", [f"w{i}", "w_scale", "w_zero"], f"w{i}_dq", axis=1)
        add(model, "MatMul", ["x_dq", f"w{i}_dq"], f"fc{i}")
        model.graph.output.append(helper.make_tensor_value_info(f"fc{i}", TensorProto.FLOAT, [2, 32, N]))
    products = products_of_plan(plan_of(model, tmp_path))
    assert len(products) == 1
    assert {"fc", *(f"fc{i}" for i in range(1, parts))} <= int8_nodes(products)


@builds
def test_attention_is_fused_in_half(tmp_path: Path) -> None:
    [product] = products_of_plan(plan_of(attention(HALF), tmp_path))
    assert (product.kind, product.operands[:3]) == ("attention", ("half",) * 3)
    assert {"scores", "softmax", "seen"} <= attention_nodes([product])
    assert int8_nodes([product]) == set()


@builds
def test_attention_is_not_fused_in_float(tmp_path: Path) -> None:
    products = products_of_plan(plan_of(attention(TensorProto.FLOAT), tmp_path))
    assert [product.kind for product in products] == ["gemm", "gemm"]
    assert attention_nodes(products) == set()


@builds
def test_attention_whose_weights_are_seen_is_not_fused(tmp_path: Path) -> None:
    model = attention(HALF)
    model.graph.output.append(helper.make_tensor_value_info("softmax", HALF, [2, 4, 32, 32]))
    assert "softmax" not in attention_nodes(products_of_plan(plan_of(model, tmp_path)))


TENSORS = 'tensor={ dims={ 1 } name="a" type=int8 }\n  tensor={ dims={ 1 } name="b" type=int8 }\n'
GEMM = '  fully_connected={ name="fc" output={"c" } input={"a" "b" } layers="[ONNX Layer: fc]" }\n'


def test_a_plan_in_another_form_tells_nothing() -> None:
    """Rather than that no product of it is int8."""
    assert products_of_plan((TENSORS + GEMM).encode()) == [Product("gemm", ("int8", "int8"), ("fc",))]
    for other in (
        "",
        TENSORS,
        GEMM,
        TENSORS + GEMM.replace("input=", "in="),
        TENSORS + GEMM.replace("ONNX Layer: ", ""),
        TENSORS + GEMM.replace("fully_connected", "matmul"),
        TENSORS.replace("type=", "kind=") + GEMM,
    ):
        assert products_of_plan(other.encode()) == []


def test_a_longer_word_is_no_product() -> None:
    plan = (TENSORS + GEMM + GEMM.replace(" fully", " shape_fully").replace("[ONNX Layer: fc]", "")).encode()
    assert len(products_of_plan(plan)) == 1


# -------------------- the inspector's JSON


def layer(kind: str, name: str, types: list[str], nodes: list[str], key: str = "Datatype") -> dict:
    return {
        "Name": name,
        "LayerType": kind,
        "Inputs": [{"Name": f"in{i}", "Dimensions": [32, 32], key: kind} for i, kind in enumerate(types)],
        "Outputs": [{"Name": "out", "Dimensions": [32, 32], key: "Float"}],
        "Metadata": "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes),
    }


def test_the_inspector_tells_products() -> None:
    layers = [
        layer("gemm", "q+k", ["Int8", "Int8"], ["q", "k", "q"]),
        layer("MatrixMultiply", "fc2", ["Half", "Half"], ["fc2"]),
        layer("kgen", "_gemm_mha_v2_0x1", ["Half", "Half", "Half"], ["qk", "softmax", "pv"]),
        layer("PointWise", "add", ["Float", "Float"], ["add"]),
        layer("CaskGemmMatrixMultiply", "fc3", ["Row major INT8 format", "Int8"], ["fc3"], key="Format/Datatype"),
    ]
    products = products_of_inspector(json.dumps({"Layers": layers}))
    assert products == [
        Product("gemm", ("int8", "int8"), ("q", "k"), "float"),
        Product("gemm", ("half", "half"), ("fc2",), "float"),
        Product("attention", ("half", "half", "half"), ("qk", "softmax", "pv"), "float"),
        Product("gemm", ("int8", "int8"), ("fc3",), "float"),
    ]
    assert int8_nodes(products) == {"q", "k", "fc3"}
    assert attention_nodes(products) == {"qk", "softmax", "pv"}


def test_an_inspector_without_details_tells_nothing() -> None:
    assert products_of_inspector(json.dumps({"Layers": ["fc", "softmax"]})) == []
    unnamed = layer("gemm", "fc", ["Int8", "Int8"], [])
    assert products_of_inspector(json.dumps({"Layers": [unnamed]})) == []


# -------------------- what a build makes of it


LOST = "transformer.layers.1.ff.ff.2"


@pytest.fixture(scope="module")
def checkpoint(tiny: Path) -> Checkpoint:
    return Checkpoint.open(str(tiny))


@pytest.fixture(scope="module")
def bundle(checkpoint: Checkpoint, tiny_table_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    target = tmp_path_factory.mktemp("tensorrt") / "sqs"
    built = build_bundle(checkpoint, Recipe("sqs"), "tensorrt", target, tiny_table_file)
    assert built.linears == built.int8_linears == 14
    assert (built.bundle.manifest["attentions"], built.bundle.manifest["fused_attentions"]) == (4, 4)
    return built.bundle


def proven(
    bundle: Bundle, checkpoint: Checkpoint, folder: Path, damage: Callable[[GraphProto], object], **inputs: tuple
) -> Proven:
    """Of a copy after `damage` to its step graph, which takes these `inputs` more."""
    copy = damaged_copy(bundle, folder, damage)
    shapes = {graph: graph_shapes(bundle.manifest["sizes"])[graph] for graph in ("conditioning", "step")}
    shapes["step"] = {**shapes["step"], **inputs}
    return prove(copy, "tensorrt", shapes, checkpoint.linears, {"trunk": "fp16"})


@builds
def test_a_lost_linear_is_named(bundle: Bundle, checkpoint: Checkpoint, tmp_path: Path) -> None:
    scale = f"{LAYER.format(1)}ff.ff.2.x_scale"
    found = proven(bundle, checkpoint, tmp_path / "copy", lambda graph: make_input(graph, scale), **{scale: ()})
    assert found == Proven([LOST], attentions=4)


@builds
def test_a_linear_is_lost_with_any_of_its_parts(bundle: Bundle, checkpoint: Checkpoint, tmp_path: Path) -> None:
    scale = f"{LAYER.format(0)}self_attn.to_qkv.k.scale"
    found = proven(bundle, checkpoint, tmp_path / "copy", lambda graph: make_input(graph, scale), **{scale: (128,)})
    assert found.lost == ["transformer.layers.0.self_attn.to_qkv"]


@builds
def test_an_attention_that_is_not_fused_is_named(bundle: Bundle, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The second block's cross attention, whose softmax somebody wants to see."""

    def show(graph: GraphProto) -> None:
        softmax = [node for node in graph.node if node.op_type == "Softmax"][3]
        graph.output.append(helper.make_tensor_value_info(softmax.output[0], HALF, None))

    found = proven(bundle, checkpoint, tmp_path / "copy", show)
    assert found == Proven([], attentions=4, unfused=("transformer.layers.1.cross_attn",))


@builds
def test_a_build_without_fused_attention_fails_and_says_which(
    checkpoint: Checkpoint, tiny_table_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = BACKENDS["tensorrt"]
    wrong = replace(kind.dialects["bf16"], branch="bfloat16")
    monkeypatch.setitem(BACKENDS, "tensorrt", replace(kind, dialects={**kind.dialects, "bf16": wrong}))
    recipe, target = Recipe("sqs", lora_rank=8, trunk="bf16"), tmp_path / "bundle"
    with pytest.raises(
        UserError,
        match=r"^4 of 4 attentions are not fused with tensorrt: transformer.layers.0.self_attn, .*; "
        r"try another --trunk, or accept them with --allow-float-gemm$",
    ):
        build_bundle(checkpoint, recipe, "tensorrt", target, tiny_table_file)
    assert not target.exists()
    built = build_bundle(checkpoint, recipe, "tensorrt", target, tiny_table_file, allow_float=True)
    assert built.int8_linears == 14
    assert (built.bundle.manifest["attentions"], built.bundle.manifest["fused_attentions"]) == (4, 0)


@builds
def test_a_plan_that_does_not_tell_is_an_error_and_no_count(
    bundle: Bundle, checkpoint: Checkpoint, tiny_table_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_account, "_TENSOR", re.compile(rb'operand=\{[^\n]*?name="([^"]+)"[^\n]*?type=(\w+)'))
    shapes = graph_shapes(bundle.manifest["sizes"])["step"]
    line = f"the plans of {tensorrt_api.version()} are in a form that is not known"
    with pytest.raises(RuntimeError, match=f"^{line}$"):
        TensorRTPlan(bundle.path("step.onnx"), shapes).int8_matmuls()
    with pytest.raises(UserError, match=f"^tensorrt does not tell its kernels of conditioning.onnx: {line}$"):
        build_bundle(checkpoint, Recipe("sqs"), "tensorrt", tmp_path / "bundle", tiny_table_file)
    assert not (tmp_path / "bundle").exists()


@builds
def test_every_attention_of_a_step_graph_has_a_name(bundle: Bundle) -> None:
    nodes = {n.name: n.op_type for n in onnx.load(bundle.path("step.onnx"), load_external_data=False).graph.node}
    names = attention_names(bundle.path("step.onnx"))
    assert all(nodes[name] == "Softmax" for name in names)
    assert [*names.values()] == [f"transformer.layers.{i}.{kind}_attn" for i in (0, 1) for kind in ("self", "cross")]
