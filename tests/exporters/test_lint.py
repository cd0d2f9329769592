"""The graph lint: one graph it likes, every rule broken alone, and the graphs of a real bundle."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiny import CONFIG

from dit_trt.engines.base import Dialect
from dit_trt.exporters.float_graphs import graph_names
from dit_trt.exporters.lint import FORBIDDEN, GraphLintError, lint, lint_faults

K, N = 32, 16


def initializer(name, array):
    return numpy_helper.from_array(np.asarray(array), name)


def good():
    """x -> Q -> DQ -> MatMul(DQ(int8 W)) -> + bias -> * factor -> Split."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["x_q"], name="fc.x_q"),
        helper.make_node("DequantizeLinear", ["x_q", "x_scale", "x_zero"], ["x_dq"], name="fc.x_dq"),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["w_dq"], name="fc.w_dq", axis=1),
        helper.make_node("MatMul", ["x_dq", "w_dq"], ["product"], name="fc"),
        helper.make_node("Add", ["product", "bias"], ["sum"], name="plus"),
        helper.make_node("Mul", ["sum", "factor"], ["scaled"], name="times"),
        helper.make_node("Split", ["scaled"], ["y", "z"], name="halves", axis=2, num_outputs=2),
    ]
    initializers = [
        initializer("x_scale", np.float32(0.01)),
        initializer("x_zero", np.int8(0)),
        initializer("w", rng.integers(-127, 128, (K, N), dtype=np.int8)),
        initializer("w_scale", np.full(N, 0.02, np.float32)),
        initializer("w_zero", np.zeros(N, np.int8)),
        initializer("bias", rng.standard_normal(N).astype(np.float32)),
        initializer("factor", np.float32(1.5)),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, K])]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, N // 2]) for name in ("y", "z")]
    graph = helper.make_graph(nodes, "good", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def node(model, name):
    [found] = [node for node in model.graph.node if node.name == name]
    return found


def change(model, name, array):
    [tensor] = [tensor for tensor in model.graph.initializer if tensor.name == name]
    tensor.CopyFrom(initializer(name, array))


def faults(model, folder):
    onnx.save_model(model, folder / "graph.onnx")
    try:
        lint(folder / "graph.onnx")
    except GraphLintError as error:
        message = str(error)
        assert message.startswith("graph.onnx: ")
        return message.removeprefix("graph.onnx: ").split("; ")
    return []


def test_a_good_graph_passes(tmp_path):
    onnx.checker.check_model(good(), full_check=True)
    assert faults(good(), tmp_path) == []


def as_input(model, name):
    """The initializer `name` is given at run time instead."""
    [tensor] = [tensor for tensor in model.graph.initializer if tensor.name == name]
    model.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
    model.graph.initializer.remove(tensor)


def computed(model):
    """The activation scale becomes max(x) / 127, as a dynamic quantizer has it."""
    model.graph.node.insert(0, helper.make_node("ReduceMax", ["x"], ["amax"], name="amax", keepdims=0))
    node(model, "fc.x_q").input[1] = "amax"
    node(model, "fc.x_dq").input[1] = "amax"


def without_dq(model):
    node(model, "fc").input[0] = "x_q"
    model.graph.node.remove(node(model, "fc.x_dq"))


def two_dqs(model):
    copy = onnx.NodeProto()
    copy.CopyFrom(node(model, "fc.x_dq"))
    copy.name, copy.output[0] = "fc.x_dq2", "x_dq2"
    model.graph.node.insert(2, copy)


def q_read_by_another(model):
    model.graph.node.append(helper.make_node("Identity", ["x_q"], ["seen"], name="peek"))


def residual(model):
    model.graph.node.append(helper.make_node("Add", ["x_dq", "x"], ["r"], name="residual"))


def weight_float(model):
    model.graph.node.remove(node(model, "fc.w_dq"))
    model.graph.initializer.append(initializer("w_dq", np.ones((K, N), np.float32)))


def activation_float(model):
    node(model, "fc").input[0] = "x"
    model.graph.node.remove(node(model, "fc.x_dq"))
    model.graph.node.remove(node(model, "fc.x_q"))


def mul_after_weight(model):
    model.graph.node.insert(3, helper.make_node("Mul", ["w_dq", "w_scale"], ["w_scaled"], name="rescale"))
    node(model, "fc").input[1] = "w_scaled"


def swapped(model):
    node(model, "fc").input[:] = ["w_dq", "x_dq"]


def straight_into(kind):
    def damage(model):
        model.graph.node.remove(node(model, "halves"))
        model.graph.node.append(helper.make_node(kind, ["product", "at"], ["part"], name="parted"))

    return damage


def behind(kind, *between):
    """The product goes through these nodes into one of the kind."""

    def damage(model):
        model.graph.node.remove(node(model, "halves"))
        last = "product"
        for i, op in enumerate(between):
            operand = "bias" if op == "Add" else "x" if op == "Sum of two" else "sizes"
            made = helper.make_node(
                {"Sum of two": "Add"}.get(op, op), [last, operand][: 1 if op == "Transpose" else 2], [f"t{i}"]
            )
            model.graph.node.append(made)
            last = f"t{i}"
        model.graph.node.append(helper.make_node(kind, [last, "at"], ["part"], name="parted"))

    return damage


def forbidden(kind):
    return lambda model: model.graph.node.append(helper.make_node(kind, ["x", "x"], ["other"], name="int"))


def other_scale(model):
    model.graph.initializer.append(initializer("other", np.float32(0.5)))
    node(model, "fc.x_dq").input[1] = "other"


def set_axis(model, axis):
    [attribute] = [a for a in node(model, "fc.w_dq").attribute if a.name == "axis"]
    attribute.i = axis


def no_zero_points(model):
    for name in ("fc.x_q", "fc.x_dq"):
        del node(model, name).input[2]


Q, DQ, W = "fc.x_q: ", "fc.x_dq: ", "fc.w_dq: "
SCALE = "its scale is not positive and finite"
ZERO = "its zero point is not int8 0"
COMPUTED = "its scale is computed, not an initializer: the GEMM would be float"
BROKEN = {  # what is done to the good graph -> all the faults this makes
    "activation scale computed": (computed, [Q + COMPUTED, DQ + COMPUTED]),
    "activation scale as input": (lambda m: as_input(m, "x_scale"), [Q + COMPUTED, DQ + COMPUTED]),
    "weight scale as input": (lambda m: as_input(m, "w_scale"), [W + COMPUTED]),
    "activation scale zero": (lambda m: change(m, "x_scale", np.float32(0)), [Q + SCALE, DQ + SCALE]),
    "activation scale negative": (lambda m: change(m, "x_scale", np.float32(-1)), [Q + SCALE, DQ + SCALE]),
    "activation scale NaN": (lambda m: change(m, "x_scale", np.float32("nan")), [Q + SCALE, DQ + SCALE]),
    "activation scale infinite": (lambda m: change(m, "x_scale", np.float32("inf")), [Q + SCALE, DQ + SCALE]),
    "one weight scale of many zero": (
        lambda m: change(m, "w_scale", np.array([1] * (N - 1) + [0], np.float32)),
        [W + SCALE],
    ),
    "scale fp16": (
        lambda m: change(m, "w_scale", np.ones(N, np.float16)),
        [W + "its scale is float16, accumulators need float32"],
    ),
    "zero point uint8": (lambda m: change(m, "x_zero", np.uint8(0)), [Q + ZERO, DQ + ZERO]),
    "zero point not zero": (lambda m: change(m, "x_zero", np.int8(3)), [Q + ZERO, DQ + ZERO]),
    "one zero point of many not zero": (
        lambda m: change(m, "w_zero", np.array([0] * (N - 1) + [-1], np.int8)),
        [W + ZERO],
    ),
    "zero point left out (uint8)": (no_zero_points, [Q + ZERO, DQ + ZERO]),
    "DQ with another scale than its Q": (
        lambda m: other_scale(m),
        [DQ + "its scale is not its QuantizeLinear's"],
    ),
    "weight scales along the input": (
        lambda m: change(m, "w_scale", np.ones(K, np.float32)) or set_axis(m, 0),
        [W + "its axis is 0, weights [in, out] have a scale per output, axis 1"],
    ),
    "activation scale per channel": (
        lambda m: change(m, "x_scale", np.ones(K, np.float32)),
        [Q + f"activations have one scale, this has {K}"],
    ),
    "Q without DQ": (
        without_dq,
        [Q + "is not followed by exactly one DequantizeLinear", "fc: only one of its inputs is quantized"],
    ),
    "Q with two DQs": (two_dqs, [Q + "is not followed by exactly one DequantizeLinear"]),
    "Q read by another": (q_read_by_another, [Q + "is not followed by exactly one DequantizeLinear"]),
    "DQ feeds an Add": (residual, [DQ + "feeds Add residual, not a GEMM's input 0"]),
    "only the activation quantized": (weight_float, ["fc: only one of its inputs is quantized"]),
    "only the weight quantized": (activation_float, ["fc: only one of its inputs is quantized"]),
    "Mul after the weight's DQ": (
        mul_after_weight,
        ["fc: only one of its inputs is quantized", W + "feeds Mul rescale, not a GEMM's input 1"],
    ),
    "inputs swapped": (
        swapped,
        [DQ + "feeds MatMul fc, not a GEMM's input 0", W + "feeds MatMul fc, not a GEMM's input 1"],
    ),
    "K too small": (
        lambda m: change(m, "w", np.ones((8, N), np.int8)),
        [W + f"[8, {N}] is too small to be worth int8"],
    ),
    "N too small": (
        lambda m: change(m, "w", np.ones((K, 15), np.int8)),
        [W + f"[{K}, 15] is too small to be worth int8"],
    ),
    **{
        f"straight into {kind}": (straight_into(kind), [f"fc: goes straight into {kind} and would fall to float"])
        for kind in ("Split", "Slice", "Gather")
    },
    **{
        f"through {', '.join(between)} into {kind}": (
            behind(kind, *between),
            [f"fc: goes straight into {kind} and would fall to float"],
        )
        for kind, *between in (
            ("Split", "Add"),
            ("Slice", "Add"),
            ("Gather", "Add"),
            ("Gather", "Reshape", "Transpose"),
            ("Gather", "Add", "Reshape", "Transpose"),
        )
    },
    **{kind: (forbidden(kind), [f"int: {kind} is not portable"]) for kind in FORBIDDEN},
}


@pytest.mark.parametrize(("damage", "expected"), BROKEN.values(), ids=BROKEN)
def test_a_broken_rule_is_named_with_its_node(tmp_path, damage, expected):
    model = good()
    damage(model)
    assert sorted(faults(model, tmp_path)) == sorted(expected)


@pytest.mark.parametrize("path", [("Slice", "Reshape", "Transpose"), ("Split", "Reshape"), ("Split", "Sum of two")])
def test_what_cuts_a_head_or_a_sum_passes(tmp_path, path):
    """RoPE slices within a head; a sum of two products cannot be cut in a weight."""
    model = good()
    behind(*path)(model)
    assert faults(model, tmp_path) == []


def test_each_dialect_has_its_zero_point(tmp_path):
    model = good()
    change(model, "x_zero", np.uint8(128))
    assert lint_faults(model, tmp_path, Dialect("uint8")) == []
    wrong = "its zero point is not uint8 128"
    assert sorted(lint_faults(good(), tmp_path, Dialect("uint8"))) == sorted([Q + wrong, DQ + wrong])


def test_the_forbidden_are_those_of_the_design():
    assert {"MatMulInteger", "DynamicQuantizeLinear", "QLinearMatMul"} <= set(FORBIDDEN)


def test_all_faults_are_told_at_once(tmp_path):
    model = good()
    change(model, "x_scale", np.float32(0))
    change(model, "w_zero", np.full(N, 5, np.int8))
    residual(model)
    forbidden("MatMulInteger")(model)
    expected = {
        Q + SCALE,
        DQ + SCALE,
        W + ZERO,
        DQ + "feeds Add residual, not a GEMM's input 0",
        "int: MatMulInteger is not portable",
    }
    assert sorted(faults(model, tmp_path)) == sorted(expected)


def test_scales_in_the_data_file_are_read_too(tmp_path):
    for bad, expected in ((0.02, []), (0.0, [W + SCALE])):
        model = good()
        change(model, "w_scale", np.full(N, bad, np.float32))
        onnx.save_model(
            model, tmp_path / "graph.onnx", save_as_external_data=True, location="graph.data", size_threshold=0
        )
        loaded = onnx.load(tmp_path / "graph.onnx", load_external_data=False)
        assert all(tensor.data_location == TensorProto.EXTERNAL for tensor in loaded.graph.initializer)
        assert lint_faults(loaded, tmp_path) == expected
        (tmp_path / "graph.data").unlink()


# -------------------- weights that are made anew at every step


def stepped():
    """The good graph with `DQ(w) -> * columns -> * rows -> Q(1) -> DQ(1) -> MatMul`, both factors given at run time."""
    model = good()
    model.graph.node.insert(3, helper.make_node("Mul", ["w_dq", "columns"], ["w_columns"], name="columns"))
    model.graph.node.insert(4, helper.make_node("Mul", ["w_columns", "rows"], ["w_rows"], name="rows"))
    again = ["one", "w_step_zero"]
    model.graph.node.insert(5, helper.make_node("QuantizeLinear", ["w_rows", *again], ["w_q"], name="fc.w_q"))
    model.graph.node.insert(6, helper.make_node("DequantizeLinear", ["w_q", *again], ["w_again"], name="fc.w_again"))
    node(model, "fc").input[1] = "w_again"
    model.graph.initializer.extend([initializer("one", np.float32(1)), initializer("w_step_zero", np.int8(0))])
    for name, shape in (("columns", [K, 1]), ("rows", [N])):
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    return model


def no_last_pair(model):
    for name in ("fc.w_q", "fc.w_again"):
        model.graph.node.remove(node(model, name))
    node(model, "fc").input[1] = "w_rows"


def mul_after_the_pair(model):
    model.graph.node.insert(7, helper.make_node("Mul", ["w_again", "rows"], ["w_late"], name="late"))
    node(model, "fc").input[1] = "w_late"


def stored_weight_too(model):
    """The stored weight is multiplied as well as rescaled."""
    model.graph.node.append(helper.make_node("MatMul", ["x_dq", "w_dq"], ["other"], name="other"))


def as_activation(model):
    node(model, "fc").input[:] = ["w_again", "x_dq"]


HALF = "only one of its inputs is quantized"
BROKEN_STEPPED = {
    "no Q/DQ before the MatMul": (no_last_pair, ["fc: " + HALF, W + "feeds Mul columns, not a GEMM's input 1"]),
    "Mul after the last DQ": (mul_after_the_pair, ["fc: " + HALF, "fc.w_again: feeds Mul late, not a GEMM's input 1"]),
    "rounded to another scale": (
        lambda m: change(m, "one", np.float32(2)),
        ["fc.w_q: weights rounded at every step have the scale 1"],
    ),
    "rounded by channel": (
        lambda m: change(m, "one", np.ones(N, np.float32)),
        ["fc.w_q: weights rounded at every step have the scale 1"],
    ),
    "with the activations' zero point": (
        lambda m: change(m, "w_step_zero", np.uint8(128)),
        ["fc.w_q: " + ZERO, "fc.w_again: " + ZERO],
    ),
    "scale given at run time": (lambda m: as_input(m, "one"), ["fc.w_q: " + COMPUTED, "fc.w_again: " + COMPUTED]),
    "stored weight in a product": (
        stored_weight_too,
        [W + "feeds Mul columns, not a GEMM's input 1", "fc.w_again: feeds MatMul fc, not a GEMM's input 0"],
    ),
    "inputs swapped": (
        as_activation,
        [DQ + "feeds MatMul fc, not a GEMM's input 0", "fc.w_again: feeds MatMul fc, not a GEMM's input 1"],
    ),
    "too small": (lambda m: change(m, "w", np.ones((8, N), np.int8)), [W + f"[8, {N}] is too small to be worth int8"]),
}


@pytest.mark.parametrize("dialect", ["int8", "uint8"])
def test_a_weight_rounded_at_every_step_passes(tmp_path, dialect):
    model = stepped()
    onnx.checker.check_model(model, full_check=True)
    change(model, "x_zero", {"int8": np.int8(0), "uint8": np.uint8(128)}[dialect])
    assert lint_faults(model, tmp_path, Dialect(dialect)) == []


@pytest.mark.parametrize(("damage", "expected"), BROKEN_STEPPED.values(), ids=BROKEN_STEPPED)
def test_a_broken_step_weight_is_named(tmp_path, damage, expected):
    model = stepped()
    damage(model)
    assert sorted(faults(model, tmp_path)) == sorted(expected)


# -------------------- a real bundle


@pytest.mark.parametrize("graph", graph_names(CONFIG))
def test_a_real_bundle_is_clean(tiny_sqs, tiny_float, graph):
    for bundle in (tiny_sqs, tiny_float):
        lint(bundle.path(f"{graph}.onnx"))
    kinds = {node.op_type for node in onnx.load(tiny_sqs.path(f"{graph}.onnx"), load_external_data=False).graph.node}
    assert ("QuantizeLinear" in kinds) == (graph in ("conditioning", "step"))


QKV = "model.model.transformer.layers.1.self_attn.to_qkv.q"
FF2 = "model.model.transformer.layers.0.ff.ff.2"


def per_channel(model):
    change(model, f"{FF2}.x_scale", np.ones(256, np.float32))


def split_after(model):
    product = node(model, QKV).output[0]
    model.graph.node.append(helper.make_node("Split", [product], ["a", "b"], name="s", axis=2, num_outputs=2))


REAL = {
    "scale as input": (
        lambda m: as_input(m, f"{FF2}.x_scale"),
        [f"{FF2}.x_q: {COMPUTED}", f"{FF2}.x_dq: {COMPUTED}"],
    ),
    "weight scale as input": (lambda m: as_input(m, f"{QKV}.scale"), [f"{QKV}.dq: {COMPUTED}"]),
    "per channel": (per_channel, [f"{FF2}.x_q: activations have one scale, this has 256"]),
    "split after": (split_after, [f"{QKV}: goes straight into Split and would fall to float"]),
}


@pytest.mark.parametrize(("damage", "expected"), REAL.values(), ids=REAL)
def test_damage_to_a_real_graph_is_found(tiny_sqs, damage, expected):
    model = onnx.load(tiny_sqs.path("step.onnx"), load_external_data=False)
    damage(model)
    assert lint_faults(model, tiny_sqs.folder) == expected
