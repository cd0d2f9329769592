"""4-bit weights in a graph: their bytes, what the standard makes of the nodes, their sizes, and the lint's rules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import hypothesis
import int4_graphs
import numpy as np
import onnx
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from int4_graphs import NAME, random_weight, run_standard, write_linear
from onnx import TensorProto, helper, numpy_helper

from dit_trt.engines.base import Dialect
from dit_trt.engines.int4 import unpack
from dit_trt.exporters.data_file import ALIGNMENT, DataFile
from dit_trt.exporters.int4 import WeightNodes, allow_int4, expand, pack, packed_bytes, weight_nodes
from dit_trt.exporters.lint import GraphLintError, lint
from dit_trt.exporters.quantized import Weight

SHAPES = [(64, 96, 0), (64, 96, 32), (64, 96, 96), (32, 192, 64), (17, 33, 0), (17, 33, 11)]  # out, in, group


@hypothesis.given(hnp.arrays(np.int8, hnp.array_shapes(max_dims=3, max_side=9), elements=st.integers(-8, 7)))
def test_packing_round_trip(integers: np.ndarray) -> None:
    packed = pack(integers)
    assert packed.dtype == np.uint8
    assert packed.size == (integers.size + 1) // 2
    np.testing.assert_array_equal(unpack(packed, integers.shape), integers)
    tensor = TensorProto(data_type=TensorProto.INT4, dims=integers.shape, raw_data=packed.tobytes())
    np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(np.int8), integers)  # onnx's own reading
    assert integers.size % 2 == 0 or packed[-1] >> 4 == 0


def test_the_first_of_a_byte_is_its_low_half() -> None:
    assert pack(np.array([1, -2, 7], np.int8)).tolist() == [0xE1, 0x07]


def made(folder: Path, weight: Weight, form: str) -> WeightNodes:
    with DataFile(folder / "g.onnx.data") as data:
        return weight_nodes("w", weight, data, form)  # type: ignore[arg-type]


@pytest.mark.parametrize(("out_features", "in_features", "group"), SHAPES)
def test_expanded_is_what_the_standard_computes(
    tmp_path: Path, out_features: int, in_features: int, group: int
) -> None:
    weight = random_weight(out_features, in_features, group)
    path = write_linear(tmp_path, weight, "expanded", rows=3)
    onnx.checker.check_model(path, full_check=True)
    x = np.zeros((3, in_features), np.float32)
    first, integers, last = run_standard(path, x, f"{NAME}.int4_dq", f"{NAME}.int8", f"{NAME}.dq")
    want, c = int4_graphs.int8(weight)
    np.testing.assert_array_equal(first, int4_graphs.real(weight))
    assert integers.dtype == np.int8
    np.testing.assert_array_equal(integers.T, want)
    np.testing.assert_array_equal(last.T, want * c[:, None])
    found, scale = expand(weight)
    np.testing.assert_array_equal(found, want)
    np.testing.assert_array_equal(scale, c)
    assert np.abs(want).max() == (127 if group else 7), "the range of int8 is used"


@pytest.mark.parametrize(("out_features", "in_features", "group"), SHAPES)
def test_memory_is_what_the_standard_computes(tmp_path: Path, out_features: int, in_features: int, group: int) -> None:
    weight = random_weight(out_features, in_features, group)
    path = write_linear(tmp_path, weight, "memory", rows=3)
    onnx.checker.check_model(path, full_check=True)
    [found] = run_standard(path, np.zeros((3, in_features), np.float32), f"{NAME}.dq")
    np.testing.assert_array_equal(found.T, int4_graphs.real(weight))


def test_eight_bits_are_as_ever(tmp_path: Path) -> None:
    integers = np.random.default_rng(0).integers(-127, 128, (64, 96)).astype(np.int8)
    weight = Weight(integers, np.linspace(0.01, 0.1, 64, dtype=np.float32))
    for form in ("expanded", "memory"):  # one form, whatever the 4-bit ones have
        found = made(tmp_path, weight, form)
        assert [node.op_type for node in found.nodes] == ["DequantizeLinear"]
        assert [tensor.name for tensor in found.initializers] == ["w.int8", "w.scale", "w.zero_point"]
        onnx.external_data_helper.load_external_data_for_tensor(found.initializers[0], str(tmp_path))
        np.testing.assert_array_equal(numpy_helper.to_array(found.initializers[0]), integers.T)
    np.testing.assert_array_equal(expand(weight)[0], integers)


def test_ties_go_to_even() -> None:
    scale = np.array([[127 / 7, 0.5]], np.float32)
    assert scale[0, 0] * np.float32(7) / np.float32(127) == 1
    integers, c = expand(Weight(np.array([[7, -7, 1, 2, 3, 5, -1, -5]], np.int8), scale, 4))
    assert c.tolist() == [1]
    assert integers.tolist() == [[127, -127, 18, 36, 2, 2, 0, -2]]


@pytest.mark.parametrize("form", ["expanded", "memory"])
@pytest.mark.parametrize("bits", [8, 7, 4])
@pytest.mark.parametrize(("out_features", "in_features", "group"), SHAPES)
def test_bytes_are_what_is_written(
    tmp_path: Path, out_features: int, in_features: int, group: int, bits: int, form: str
) -> None:
    group = group if bits == 4 else 0
    weight = random_weight(out_features, in_features, group)
    found = made(tmp_path, Weight(weight.integers, weight.scale, bits), form)  # type: ignore[arg-type]
    sizes = []
    for tensor in found.initializers:
        entry = {item.key: item.value for item in tensor.external_data}
        assert int(entry.get("offset", 0)) % ALIGNMENT == 0
        sizes.append(int(entry.get("length", len(tensor.raw_data))))
    assert tuple(sizes) == packed_bytes(in_features, out_features, bits, group, form)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [8, 7, 4])
def test_integers_that_do_not_fit_are_refused(tmp_path: Path, bits: int) -> None:
    integers = np.zeros((16, 16), np.int8)
    integers[3, 5] = {8: -128, 7: 64, 4: -8}[bits]
    with pytest.raises(ValueError, match=f"{bits} bits"):
        made(tmp_path, Weight(integers, np.ones(16, np.float32), bits), "expanded")  # type: ignore[arg-type]


def test_eight_bits_have_no_groups(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one scale an output channel"):
        made(tmp_path, Weight(np.zeros((16, 16), np.int8), np.ones((16, 2), np.float32)), "expanded")


@pytest.mark.parametrize(("before", "after"), [((20, 9), (21, 10)), ((23, 12), (23, 12))])
def test_versions_are_raised_never_lowered(before: tuple[int, int], after: tuple[int, int]) -> None:
    ops = [helper.make_opsetid("", before[0]), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([], "", [], []), opset_imports=ops, ir_version=before[1])
    allow_int4(model)
    assert [opset.version for opset in model.opset_import] == [after[0], 1]
    assert model.ir_version == after[1]


# -------------------- lint


@pytest.mark.parametrize("form", ["expanded", "memory"])
@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_both_forms_pass_the_lint(tmp_path: Path, form: str, group: int, kind: str) -> None:
    path = write_linear(tmp_path, random_weight(64, 96, group), form, 3, kind)  # type: ignore[arg-type]
    lint(path, Dialect(kind))  # type: ignore[arg-type]


def node_of(graph: onnx.GraphProto, suffix: str) -> onnx.NodeProto:
    return next(node for node in graph.node if node.name == f"{NAME}{suffix}")


def set_attribute(node: onnx.NodeProto, name: str, value: int) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def old_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 20


def zero_point(model: onnx.ModelProto) -> None:
    points = TensorProto(name="zp", data_type=TensorProto.INT4, dims=[64, 3], raw_data=bytes(96))
    model.graph.initializer.append(points)
    node = next(node for node in model.graph.node if node.input[0] == f"{NAME}.int4")
    node.input.append("zp")


def bare(model: onnx.ModelProto) -> None:
    """DQ -> Q without the Transpose: ONNX Runtime would compute it at every run."""
    node_of(model.graph, ".int8").input[0] = f"{NAME}.int4_dq"
    model.graph.node.remove(node_of(model.graph, ".transposed"))


def quantized_activation(model: onnx.ModelProto) -> None:
    zero = numpy_helper.from_array(np.array(0, np.int8), "z")
    model.graph.initializer.extend([numpy_helper.from_array(np.array(0.1, np.float32), "d"), zero])
    model.graph.node.insert(0, helper.make_node("QuantizeLinear", ["x", "d", "z"], ["q"], name="x_q"))
    model.graph.node.insert(1, helper.make_node("DequantizeLinear", ["q", "d", "z"], ["dq"], name="x_dq"))
    node_of(model.graph, "").input[0] = "dq"


def negative_scale(model: onnx.ModelProto) -> None:
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == f"{NAME}.scale")
    scale.CopyFrom(numpy_helper.from_array(-np.ones(tuple(scale.dims), np.float32), scale.name))


def second_reader(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Relu", [f"{NAME}.int8"], ["r"], name="r"))


DAMAGES: dict[str, tuple[str, Callable[[onnx.ModelProto], object], str]] = {
    "opset": ("expanded", old_opset, "opset 20 knows no 4-bit weights"),
    "zero point": ("expanded", zero_point, "int4_dq: has a zero point"),
    "zero point in memory": ("memory", zero_point, "dq: has a zero point"),
    "no Transpose": ("expanded", bare, "int4_dq: goes into QuantizeLinear, no engine makes int8"),
    "int8 by int4": ("memory", quantized_activation, "an int8 activation by a 4-bit weight"),
    "block": ("expanded", lambda m: set_attribute(node_of(m.graph, ".int4_dq"), "block_size", 48), "block size 48"),
    "axis": ("memory", lambda m: set_attribute(node_of(m.graph, ".dq"), "axis", 1), "axis 1 ask for"),
    "axis of int8": ("expanded", lambda m: set_attribute(node_of(m.graph, ".int8"), "axis", 0), "scale per output"),
    "scale": ("expanded", negative_scale, "int4_dq: its scale is not positive and finite"),
    "scale in memory": ("memory", negative_scale, "dq: its scale is not positive and finite"),
    "two readers": ("expanded", second_reader, "not followed by exactly one DequantizeLinear"),
}


@pytest.mark.parametrize(("form", "damage", "fault"), DAMAGES.values(), ids=DAMAGES)
def test_the_lint_names_the_fault(
    tmp_path: Path, form: str, damage: Callable[[onnx.ModelProto], object], fault: str
) -> None:
    path = write_linear(tmp_path, random_weight(64, 96, 32), form, 3)  # type: ignore[arg-type]
    model = onnx.load(path, load_external_data=False)
    damage(model)
    onnx.save_model(model, path)
    with pytest.raises(GraphLintError, match=fault):
        lint(path)
