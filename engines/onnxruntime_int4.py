"""4-bit weights that stay in 4 bits in ONNX Runtime: MatMulNBits, and proof that it multiplies them in int8."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

if TYPE_CHECKING:
    from onnx import NodeProto

LEVEL, BLOCK = "session.qdq_matmulnbits_accuracy_level", "session.qdq_matmulnbits_block_size"
# At accuracy level 4 MatMulNBits quantizes its activation to int8, a range for every token and block of input channels.
# Its blocks are the weight's groups, powers of two; one with a scale an output channel is given blocks of this many.
OPTIONS = {LEVEL: "4", BLOCK: "128"}


def int4_matmuls(nodes: Iterable[NodeProto], provider: str) -> set[str]:
    """Names of the MatMulNBits nodes of an optimized graph that multiply int8 by 4-bit weights on `provider`."""
    found = set()
    for node in nodes:
        if node.op_type == "MatMulNBits":
            values = {attribute.name: attribute.i for attribute in node.attribute}
            if values["accuracy_level"] == 4 and quantizes_activations(values["block_size"], provider):
                found.add(node.name)
    return found


@cache
def quantizes_activations(block: int, provider: str) -> bool:
    """Whether level 4 gives other numbers than level 0, float: where its kernels lack an instruction it does not."""
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    scale = random.uniform(0.5, 1, (2, 64)).astype(np.float32)
    weight = TensorProto(name="w", data_type=TensorProto.INT4, dims=[2 * block, 64], raw_data=random.bytes(64 * block))
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["f"], axis=0, block_size=block),
        helper.make_node("MatMul", ["x", "f"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [32, s]) for n, s in (("x", 2 * block), ("y", 64)))
    graph = helper.make_graph(nodes, "", [x], [y], [weight, numpy_helper.from_array(scale, "s")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
    value = random.standard_normal((32, 2 * block)).astype(np.float32)
    found = []
    for level in ("4", "0"):
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry(LEVEL, level)
        session = ort.InferenceSession(model, options, providers=[provider])
        found.append(session.run(None, {"x": value})[0])
    return not np.array_equal(*found)
