"""The graph writer: what lands in the file, in which order, and what the rewritten nodes look like."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from dit_trt.engines.bundle import Bundle
from dit_trt.engines.home import home
from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.exporters.data_file import ALIGNMENT, DataFile
from dit_trt.exporters.float_graphs import export_topologies
from dit_trt.exporters.qdq import is_weight, write_graph
from dit_trt.exporters.quantized import Activation, QuantizedLinear, Weight


@pytest.fixture(scope="module")
def checkpoint(tiny: Path) -> Checkpoint:
    return Checkpoint.open(str(tiny))


@pytest.fixture(scope="module")
def topology(checkpoint: Checkpoint) -> onnx.ModelProto:
    return export_topologies(checkpoint.config, home() / "graphs")["step"]


def test_topology_holds_no_weights(topology: onnx.ModelProto, checkpoint: Checkpoint) -> None:
    assert topology.ByteSize() < 200_000
    names = {value.name for value in topology.graph.input if is_weight(value)}
    linears = [linear for linear in checkpoint.linears if linear.graph == "step"]
    assert {linear.graph_name(part) for linear in linears for part in linear.parts} <= names
    assert not any(tensor.name in names for tensor in topology.graph.initializer)


def test_every_weight_is_asked_for_once_and_written_in_turn(
    checkpoint: Checkpoint, topology: onnx.ModelProto, tmp_path: Path
) -> None:
    """Streaming: one weight in memory at a time, so each is on disk before the next is asked for."""
    asked: list[str] = []
    data = tmp_path / "g.onnx.data"

    def weight(name: str) -> NDArray:
        asked.append(name)
        return checkpoint.tensor(name)

    def quantized(part: str) -> Weight:
        asked.append(f"quantized {part}")
        return Weight(np.ones((128, 256), np.int8), np.ones(128, np.float32))

    linear = next(x for x in checkpoint.linears if x.name == "transformer.layers.0.ff.ff.2")
    item = QuantizedLinear(linear, Activation("static", 0.1), quantized)
    size = write_graph(topology, tmp_path / "g.onnx", weight, {linear.name: item}).bytes
    names = [value.name for value in topology.graph.input if is_weight(value)]
    assert asked == ["quantized ", *(name for name in names if name != linear.graph_name(""))]
    assert size == data.stat().st_size + (tmp_path / "g.onnx").stat().st_size


def test_external_data_is_aligned_and_whole(tiny_float: Bundle) -> None:
    model = onnx.load(tiny_float.path("step.onnx"), load_external_data=False)
    spans = []
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entry = {item.key: item.value for item in tensor.external_data}
            assert entry["location"] == "step.onnx.data"
            assert int(entry["offset"]) % ALIGNMENT == 0
            spans.append((int(entry["offset"]), int(entry["offset"]) + int(entry["length"])))
    assert len(spans) > 20
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert spans[-1][1] == tiny_float.path("step.onnx.data").stat().st_size


def test_quantized_file_is_a_quarter_of_the_linears(tiny_float: Bundle, tiny_sqs: Bundle, tiny: Path) -> None:
    linears = [x for x in Checkpoint.open(str(tiny)).linears if x.graph == "step"]
    values = sum(x.in_features * x.out_features for x in linears)
    saved = tiny_float.path("step.onnx.data").stat().st_size - tiny_sqs.path("step.onnx.data").stat().st_size
    assert saved == pytest.approx(3 * values, rel=0.03)


@pytest.mark.parametrize("shape", [(0,), (3,), (1, 1), (17, 5), (64, 64)])
@pytest.mark.parametrize("dtype", [np.float32, np.int8, np.int64, np.float16])
def test_data_file_round_trip(tmp_path: Path, shape: tuple[int, ...], dtype: type) -> None:
    array = np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)
    with DataFile(tmp_path / "data") as data:
        data.add("first", np.ones((40, 40), np.float32))
        tensor = data.add("x", np.asfortranarray(array))
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        onnx.external_data_helper.load_external_data_for_tensor(tensor, str(tmp_path))
    found = onnx.numpy_helper.to_array(tensor)
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)
