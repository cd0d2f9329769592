"""What the tests of every backend ask for: shapes and inputs of a bundle's graphs, names of MatMuls, damaged copies."""

import shutil

import numpy as np
import onnx
from onnx import TensorProto, helper

from dit_trt.runtime.graph_shapes import graph_shapes

STEPS = 5
GRAPHS = ("text", "conditioning", "step", "decoder")
LAYER = "model.model.transformer.layers.{}."
# 7 Linears a block, 11 MatMuls: the fused ones have one a part
STEP_MATMULS = (
    "self_attn.to_qkv.q",
    "self_attn.to_qkv.k",
    "self_attn.to_qkv.v",
    "self_attn.to_out",
    "cross_attn.to_q",
    "cross_attn.to_out",
    "ff.ff.0.proj.value",
    "ff.ff.0.proj.gate",
    "ff.ff.2",
)
CONDITIONING_MATMULS = ("cross_attn.to_kv.k", "cross_attn.to_kv.v")


def named(parts, depth=2):
    return {LAYER.format(i) + part for i in range(depth) for part in parts}


def shapes_of(bundle, graph):
    return graph_shapes(bundle.manifest["sizes"], STEPS)[graph]


def matmul_names(path):
    nodes = onnx.load(path, load_external_data=False).graph.node
    return {node.name for node in nodes if node.op_type == "MatMul"}


def random_inputs(bundle, graph, seed=0):
    rng = np.random.default_rng(seed)
    inputs = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes_of(bundle, graph).items()}
    if graph == "conditioning":
        return {
            **inputs,
            "seconds_start": np.zeros(2, np.float32),
            "seconds_total": np.array([0.7, 0.3], np.float32),
            "keep": np.array([1, 0], np.float32),
            "t": np.linspace(0.99, 0.1, STEPS, dtype=np.float32),
        }
    if graph == "text":
        ids = rng.integers(0, 10, inputs["input_ids"].shape)
        return {"input_ids": ids, "attention_mask": (np.arange(ids.shape[1]) < 4).astype(np.int64)[None]}
    return inputs


def damaged_copy(bundle, folder, damage):
    """The bundle's graphs in `folder`, the step graph after `damage(graph)`."""
    shutil.copytree(bundle.folder, folder)
    model = onnx.load(folder / "step.onnx", load_external_data=False)
    damage(model.graph)
    onnx.save_model(model, folder / "step.onnx")
    return folder


def replace_location(path, data):
    """The graph at `path` reads its weights from the file `data`."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = data
    onnx.save_model(model, path)


def make_input(graph, name):
    """The initializer `name` becomes a graph input of the same type and shape."""
    [tensor] = [tensor for tensor in graph.initializer if tensor.name == name]
    graph.initializer.remove(tensor)
    graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))


def insert_mul(graph, output, factor_shape):
    """A Mul by a new graph input between the node that makes `output` and all who read it."""
    index = next(i for i, node in enumerate(graph.node) if output in node.output)
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == output:
                node.input[i] = "scaled"
    graph.node.insert(index + 1, helper.make_node("Mul", [output, "factor"], ["scaled"], name="scaled"))
    graph.input.append(helper.make_tensor_value_info("factor", TensorProto.FLOAT, factor_shape))
