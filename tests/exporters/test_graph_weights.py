"""The weights foretold for every graph are those the exported files hold."""

from __future__ import annotations

import onnx
import pytest
from graphs import GRAPHS

from dit_trt.engines.bundle import Bundle
from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.exporters.graph_weights import graph_weights
from dit_trt.exporters.qdq import is_weight


@pytest.mark.parametrize("graph", GRAPHS)
def test_names_and_shapes_are_those_of_the_float_bundle(tiny_float: Bundle, graph: str) -> None:
    model = onnx.load(tiny_float.path(f"{graph}.onnx"), load_external_data=False)
    real = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer if is_weight(tensor)}
    assert graph_weights(Checkpoint.open(tiny_float.manifest["model"]["source"]).config)[graph] == real
    assert real
