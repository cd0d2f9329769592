"""The input of the step graph: how factors become slots, what is shared, and the Split that cuts them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from handmade import handmade
from onnx import TensorProto, helper

from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.exporters.data_file import DataFile
from dit_trt.exporters.quantized import Slot
from dit_trt.exporters.rewriting import Rewriting
from dit_trt.exporters.step_slots import INPUT, StepSlots, scaled, times
from dit_trt.tooling.tables import Calibration


def test_the_product_of_two_slots() -> None:
    a = Slot(1, {"range/a": -1, "range/b": 1}, np.float32([2]))
    b = Slot(3, {"range/a": 1, "smoothing/c": -1}, np.float32([1, 2, 3]))
    product = times(a, b)
    assert (product.width, product.powers) == (3, {"range/b": 1, "smoothing/c": -1})
    np.testing.assert_array_equal(product.constant, [2, 4, 6])


def test_a_vector_in_front_of_a_slot_gives_it_its_width() -> None:
    slot = scaled(Slot(1, {"range/a": 1}), np.float32([[3, 4]]))
    assert (slot.width, slot.powers, slot.constant.tolist()) == (2, {"range/a": 1}, [3, 4])


@pytest.mark.parametrize("widths", [[4], [1, 2], [2, 1, 1, 3]])
def test_the_pieces_are_the_input_cut_in_order(tmp_path: Path, widths: list[int]) -> None:
    slots = StepSlots()
    names = slots.pieces(Slot(sum(widths), {"range/a": 1}), widths)
    names += [slots.piece(Slot(2, {"range/b": 1}), "norm.gamma"), slots.piece(Slot(1, {"range/c": 1}))]
    assert slots.piece(Slot(1, {"range/c": 1})) == names[-1], "equal slots are one"
    assert [slot.width for slot in slots.slots] == [sum(widths), 2, 1]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
    graph = helper.make_graph([], "pieces", [], outputs)
    with DataFile(tmp_path / "data") as data:
        rewriting = Rewriting(graph, data)
        slots.finish(rewriting)
        rewriting.finish()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    values = np.arange(sum(widths) + 3, dtype=np.float32)
    found = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {INPUT: values})
    cuts = np.cumsum([*widths, 2])
    for piece, expected in zip(found, np.split(values, cuts), strict=True):
        np.testing.assert_array_equal(piece, expected)


def test_nothing_that_depends_on_the_step_is_no_input(tiny: Path, tiny_table: Calibration, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(tiny))
    for kind in ("static", "token"):
        written = handmade(checkpoint, tiny_table.absmax, kind).write(tmp_path)
        assert written["step"].slots == ()
        assert INPUT not in {value.name for value in onnx.load(tmp_path / "step.onnx").graph.input}


def test_one_range_a_step_costs_these_slots(tiny: Path, tiny_table: Calibration, tmp_path: Path) -> None:
    """Gains and the value bias in the place of weights, one scalar for whoever shares a factor, f of V and of ff.2."""
    written = handmade(Checkpoint.open(str(tiny)), tiny_table.absmax, "step").write(tmp_path)
    block = "transformer.layers.1."
    names = {"qkv": "self_attn.to_qkv", "out": "self_attn.to_out", "q": "cross_attn.to_q", "cross": "cross_attn.to_out"}
    names |= {"ff0": "ff.ff.0.proj", "ff2": "ff.ff.2"}
    r = {short: f"range/{block}{name}" for short, name in names.items()}
    mine = [(s.width, dict(s.powers)) for s in written["step"].slots if any(block in name for name in s.powers)]
    assert sorted(mine, key=str) == sorted(
        [
            (128, {r["qkv"]: 1}),  # pre_norm.gamma
            (1, {r["qkv"]: -1}),  # behind q and k
            (1, {r["qkv"]: -1, r["out"]: 1}),  # behind v
            (1, {r["out"]: -1}),
            (128, {r["q"]: 1}),  # cross_attend_norm.gamma
            (1, {r["q"]: -1}),
            (1, {r["cross"]: 1}),  # a Mul on the input
            (1, {r["cross"]: -1}),
            (128, {r["ff0"]: 1}),  # ff_norm.gamma
            (1, {r["ff0"]: -1, r["ff2"]: 1}),  # behind the value half
            (256, {r["ff2"]: 1}),  # its bias
            (1, {r["ff0"]: -1}),  # behind the gate
            (1, {r["ff2"]: -1}),
        ],
        key=str,
    )
    graph = onnx.load(tmp_path / "step.onnx").graph
    [width] = [v.type.tensor_type.shape.dim[0].dim_value for v in graph.input if v.name == INPUT]
    assert width == sum(slot.width for slot in written["step"].slots)
    assert sum(node.op_type == "Split" and node.input[0] == INPUT for node in graph.node) == 1


def test_what_the_split_is_cut_by_is_in_the_graph_itself(tmp_path: Path) -> None:
    """ONNX Runtime infers shapes from it, and reads no external data for that: 200 pieces are 1600 bytes."""
    graph = onnx.GraphProto()
    slots = StepSlots()
    with DataFile(tmp_path / "data") as data:
        rewriting = Rewriting(graph, data)
        for i in range(200):
            slots.piece(Slot(1, {f"range/{i}": 1}))
        slots.finish(rewriting)
        rewriting.finish()
    [widths] = [tensor for tensor in graph.initializer if tensor.name.endswith(".widths")]
    assert widths.data_location != onnx.TensorProto.EXTERNAL
    assert onnx.numpy_helper.to_array(widths).tolist() == [1] * 200
