"""Matrices stored in FP16: which, what comes back, and what FP16 cannot hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from dit_trt.engines.bundle import Bundle
from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.exporters.half import fits, is_matrix


@pytest.mark.parametrize(
    ("name", "shape", "halved"),
    [
        ("conditioner.table.weight", (32, 64), True),
        ("pretransform.decoder.layers.0.weight", (128, 64, 7), True),
        ("model.model.to_cond_embed.0.weight", (31, 33), False),  # 1023 elements
        ("model.model.timestep_features.weight", (2048, 1), False),  # frequencies: 2 pi t w must keep its digits
        ("pretransform.decoder.layers.0.bias", (2048,), False),
        ("rope.cos", (1025, 32), False),
    ],
)
def test_which(name: str, shape: tuple[int, ...], halved: bool) -> None:
    assert is_matrix(name, shape) == halved


def test_what_fp16_cannot_hold() -> None:
    weight = np.random.default_rng(0).standard_normal((40, 50)).astype(np.float32)
    assert fits(weight) and fits(weight * 1e4) and fits(weight * 1e-3)
    assert not fits(weight * 1e5), "beyond 65504"
    assert not fits(weight * 1e-7), "below the smallest"
    mixed = weight.copy()
    mixed[7] *= 1e-7
    assert not fits(mixed), "one row is enough"
    mixed[7] = 0
    assert fits(mixed), "zeros are zeros"


def test_a_quantized_bundle_holds_the_checkpoint_to_fp16(tiny: Path, tiny_sqs: Bundle, tiny_float: Bundle) -> None:
    """Outside the step graph; the float bundle and the step graph keep FP32."""
    checkpoint = Checkpoint.open(str(tiny))
    halved = {}
    for graph in ("text", "conditioning", "step", "decoder"):
        for bundle in (tiny_sqs, tiny_float):
            model = onnx.load(bundle.path(f"{graph}.onnx"))
            halves = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT16]
            if bundle is tiny_sqs:
                halved[graph] = {tensor.name.removesuffix(".half"): numpy_helper.to_array(tensor) for tensor in halves}
                casts = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Cast"}
                assert all(casts[name] == f"{name}.half" for name in halved[graph])
            else:
                assert not halves
    assert not halved["step"] and not halved["text"]
    assert set(halved["decoder"]) == {"pretransform.components", "pretransform.mel_inverse"}
    for name, half in halved["decoder"].items():
        np.testing.assert_array_equal(half, checkpoint.tensor(name).astype(np.float16))
    assert "model.model.to_timestep_embed.2.weight" in halved["conditioning"]
    assert not any(".to_kv." in name for name in halved["conditioning"]), "those are int8"
