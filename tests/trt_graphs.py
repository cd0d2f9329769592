"""Small quantized graphs for a TensorRT builder, good ones and what can be done to them, and what it makes of them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from dit_trt.engines import tensorrt_api
from dit_trt.engines.tensorrt_account import Product, products_of_plan
from dit_trt.engines.tensorrt_build import build_plan
from dit_trt.exporters.int4 import pack

# Only of TensorRT-RTX can the plan be read, and be built without a GPU. In CI, which has it, they fail without.
builds = pytest.mark.skipif(
    not tensorrt_api.is_rtx() and "CI" not in os.environ, reason="TensorRT-RTX is not installed"
)

ROWS, K, N = 32, 128, 384
HEADS, WIDTH = 4, N // 3
FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def plan_of(model: ModelProto, folder: Path) -> bytes:
    """Raises RuntimeError with the parser's or builder's reason."""
    onnx.save_model(model, folder / "g.onnx")
    dims = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
    return build_plan(folder / "g.onnx", {name: tuple(d.dim_value for d in dim) for name, dim in dims.items()})


def products_of(model: ModelProto, folder: Path) -> dict[str, Product]:
    """The products of its plan, by the name of each MatMul in them."""
    names = {node.name for node in model.graph.node if node.op_type == "MatMul"}
    products = products_of_plan(plan_of(model, folder))
    return {node: product for product in products for node in product.nodes if node in names}


def operands(product: Product) -> str:
    """`int8 x int8 -> float`"""
    return f"{product.operands[0]} x {product.operands[1]} -> {product.result}"


# -------------------- parts


def node(model: ModelProto, name: str) -> NodeProto:
    [found] = [node for node in model.graph.node if node.name == name]
    return found


def array(model: ModelProto, name: str) -> NDArray:
    [found] = [tensor for tensor in model.graph.initializer if tensor.name == name]
    return numpy_helper.to_array(found)


def put(model: ModelProto, **arrays: object) -> None:
    """Add initializers, or change them."""
    for name, value in arrays.items():
        take(model, name)
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))


def take(model: ModelProto, name: str) -> TensorProto | None:
    for tensor in model.graph.initializer:
        if tensor.name == name:
            model.graph.initializer.remove(tensor)
            return tensor
    return None


def as_input(model: ModelProto, name: str) -> None:
    """The initializer is given at run time instead."""
    tensor = take(model, name)
    assert tensor is not None
    model.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))


def add(model: ModelProto, op: str, inputs: list[str], output: str, before: str = "", **attributes: object) -> None:
    """A node called as its output is; before: the node in front of which it stands (default: at the end)."""
    made = helper.make_node(op, inputs, [output], output, None, None, None, **attributes)
    nodes = model.graph.node
    nodes.insert(next(i for i, one in enumerate(nodes) if one.name == before) if before else len(nodes), made)


# -------------------- graphs


def linear(outputs: int = N, batch: tuple[int, ...] = (2,)) -> ModelProto:
    """y = x W in int8, called `fc`, with x float32 [*batch, ROWS, K] and W [K, outputs], as the exporter writes it."""
    random = np.random.default_rng(0)
    shape = [*batch, ROWS]
    graph = helper.make_graph(
        [],
        "linear",
        [helper.make_tensor_value_info("x", FLOAT, [*shape, K])],
        [helper.make_tensor_value_info("y", FLOAT, [*shape, outputs])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    put(model, x_scale=np.float32(0.03), x_zero=np.int8(0), w_zero=np.zeros(outputs, np.int8))
    put(model, w=random.integers(-127, 128, (K, outputs), dtype=np.int8))
    put(model, w_scale=random.uniform(0.01, 0.02, outputs).astype(np.float32))
    add(model, "QuantizeLinear", ["x", "x_scale", "x_zero"], "x_q")
    add(model, "DequantizeLinear", ["x_q", "x_scale", "x_zero"], "x_dq")
    add(model, "DequantizeLinear", ["w", "w_scale", "w_zero"], "w_dq", axis=1)
    add(model, "MatMul", ["x_dq", "w_dq"], "fc")
    add(model, "Identity", ["fc"], "y")
    return model


def int4(model: ModelProto, blocks: int = 1, undone: bool = False) -> None:
    """The weight becomes 4 bits in two levels. blocks: scales an output channel; undone: all are the Q's own."""
    random, outputs = np.random.default_rng(1), len(array(model, "w_zero"))
    own = random.uniform(0.01, 0.02, (outputs, 1)).astype(np.float32)
    scales = np.repeat(own, blocks, axis=1)
    if not undone:
        scales *= random.uniform(0.5, 1, scales.shape).astype(np.float32)
        own = scales.max(axis=1, keepdims=True) * np.float32(7 / 127)
    put_int4(model, "w", random.integers(-7, 8, (outputs, K), dtype=np.int8))
    put(model, w_scale=scales if blocks > 1 else scales[:, 0], w_own=own[:, 0])
    attributes = {"axis": 1, "block_size": K // blocks} if blocks > 1 else {"axis": 0}
    add(model, "DequantizeLinear", ["w", "w_scale"], "w_int4_dq", before="w_dq", **attributes)
    add(model, "Transpose", ["w_int4_dq"], "w_transposed", before="w_dq", perm=[1, 0])
    add(model, "QuantizeLinear", ["w_transposed", "w_own", "w_zero"], "w_int8", before="w_dq", axis=1)
    node(model, "w_dq").input[:] = ["w_int8", "w_own", "w_zero"]


def bare_int4(model: ModelProto, block: int) -> None:
    """The weight [K, outputs] becomes 4 bits with a scale for every `block` inputs, dequantized at once."""
    random, outputs = np.random.default_rng(1), len(array(model, "w_zero"))
    put_int4(model, "w", random.integers(-7, 8, (K, outputs), dtype=np.int8))
    put(model, w_scale=random.uniform(0.01, 0.02, (K // block, outputs)).astype(np.float32))
    model.graph.node.remove(node(model, "w_dq"))
    add(model, "DequantizeLinear", ["w", "w_scale"], "w_dq", before="fc", axis=0, block_size=block)


def put_int4(model: ModelProto, name: str, integers: NDArray[np.int8]) -> None:
    take(model, name)
    shape, data = integers.shape, pack(integers).tobytes()
    model.graph.initializer.append(helper.make_tensor(name, TensorProto.INT4, shape, data, raw=True))


def attend(model: ModelProto, how: str, last: str = "fc") -> None:
    """Self attention over the fused q, k, v in `last`, float32 [2, ROWS, N]. how: what takes them out, an op's name."""
    model.graph.node.remove(node(model, "y"))
    del model.graph.output[:]
    head = WIDTH // HEADS
    put(
        model,
        heads=np.array([2, ROWS, HEADS, head]),
        joined=np.array([2, ROWS, WIDTH]),
        head_scale=np.float32(head**-0.5),
    )
    names = ["q", "k", "v"]
    match how:
        case "Split":
            model.graph.node.append(helper.make_node("Split", [last], names, "qkv", axis=2, num_outputs=3))
        case "Slice":
            put(model, axis=np.array([2]))
            for i, name in enumerate(names):
                put(model, **{f"{name}_from": np.array([i * WIDTH]), f"{name}_to": np.array([(i + 1) * WIDTH])})
                add(model, "Slice", [last, f"{name}_from", f"{name}_to", "axis"], name)
        case "Gather":
            put(model, kinds=np.array([2, ROWS, 3, HEADS, head]), **{f"{name}_at": i for i, name in enumerate(names)})
            add(model, "Reshape", [last, "kinds"], "by_kind")
            add(model, "Transpose", ["by_kind"], "kinds_first", perm=[2, 0, 3, 1, 4])
            for name in names:
                add(model, "Gather", ["kinds_first", f"{name}_at"], f"{name}_heads", axis=0)
    for name in names if how != "Gather" else ():
        add(model, "Reshape", [name, "heads"], f"{name}_split")
        add(model, "Transpose", [f"{name}_split"], f"{name}_heads", perm=[0, 2, 1, 3])
    add(model, "Transpose", ["k_heads"], "k_columns", perm=[0, 1, 3, 2])
    add(model, "MatMul", ["q_heads", "k_columns"], "scores")
    add(model, "Mul", ["scores", "head_scale"], "scaled_scores")
    add(model, "Softmax", ["scaled_scores"], "attention", axis=-1)
    add(model, "MatMul", ["attention", "v_heads"], "seen")
    add(model, "Transpose", ["seen"], "tokens_first", perm=[0, 2, 1, 3])
    add(model, "Reshape", ["tokens_first", "joined"], "y")
    model.graph.output.append(helper.make_tensor_value_info("y", FLOAT, [2, ROWS, WIDTH]))


def with_bias(model: ModelProto) -> str:
    put(model, bias=np.linspace(-1, 1, N).astype(np.float32))
    add(model, "Add", ["fc", "bias"], "biased", before="y")
    node(model, "y").input[0] = "biased"
    return "biased"


def with_factor(model: ModelProto, last: str = "fc") -> str:
    put(model, factor=np.float32(1.25))
    add(model, "Mul", [last, "factor"], "scaled", before="y")
    node(model, "y").input[0] = "scaled"
    return "scaled"


def attention(dtype: int) -> ModelProto:
    """One attention of `dtype`, [2, HEADS, ROWS, 32]; its nodes are `scores`, `scaled`, `softmax` and `seen`."""
    shape, kind = [2, HEADS, ROWS, 32], helper.tensor_dtype_to_np_dtype(dtype)
    inputs = [helper.make_tensor_value_info(name, dtype, shape) for name in ("q", "k", "v")]
    graph = helper.make_graph([], "attention", inputs, [helper.make_tensor_value_info("y", dtype, shape)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    put(model, head_scale=np.array(32**-0.5, kind))
    add(model, "Transpose", ["k"], "k_columns", perm=[0, 1, 3, 2])
    add(model, "MatMul", ["q", "k_columns"], "scores")
    add(model, "Mul", ["scores", "head_scale"], "scaled")
    add(model, "Softmax", ["scaled"], "softmax", axis=-1)
    add(model, "MatMul", ["softmax", "v"], "seen")
    add(model, "Identity", ["seen"], "y")
    return model
