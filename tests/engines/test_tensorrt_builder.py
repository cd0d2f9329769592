"""Every graph that TensorRT's builder turns down or silently multiplies otherwise: the lint says so first, by name.

What the builder does is shown, too, so that a rule which a newer TensorRT needs no more is seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper
from trt_graphs import (
    FLOAT,
    HALF,
    K,
    N,
    add,
    array,
    as_input,
    attend,
    bare_int4,
    builds,
    int4,
    linear,
    node,
    operands,
    plan_of,
    products_of,
    put,
    take,
    with_bias,
    with_factor,
)

from dit_trt.engines.base import BACKENDS, INT8
from dit_trt.exporters.lint import lint_faults

pytestmark = builds

Damage = Callable[[ModelProto], object]
DIALECT = BACKENDS["tensorrt"].dialects["fp32"]
INTEGERS, LOST = "int8 x int8 -> float", "float x float -> float"
COMPUTED = "its scale is computed, not an initializer: the GEMM would be float"
SCALE = "its scale is not positive and finite"
ZERO = "its zero point is not int8 0"
ONE_SIDE = "fc: only one of its inputs is quantized"


def faults(model: ModelProto, folder: Path) -> list[str]:
    return lint_faults(model, folder, DIALECT)


# -------------------- int8 is lost, and nothing said


def scale_by_step(model: ModelProto) -> None:
    """The activation scale is a row of a table, as SQD would have it at first sight."""
    take(model, "x_scale")
    put(model, table=np.float32([0.02, 0.03, 0.04]))
    add(model, "Gather", ["table", "step"], "x_scale", before="x_q")
    model.graph.input.append(helper.make_tensor_value_info("step", TensorProto.INT64, []))


def scale_by_channel(model: ModelProto) -> None:
    put(model, x_scale=np.linspace(0.01, 0.03, K).astype(np.float32), x_zero=np.zeros(K, np.int8))
    for name in ("x_q", "x_dq"):
        node(model, name).attribute.append(helper.make_attribute("axis", 2))


def mul_between(model: ModelProto, dq: str, side: int, shape: list[int]) -> None:
    """A factor that is given at run time, between a DQ and the MatMul."""
    model.graph.input.append(helper.make_tensor_value_info("factor", FLOAT, shape))
    add(model, "Mul", [dq, "factor"], "between", before="fc")
    node(model, "fc").input[side] = "between"


def fused(how: str, bias: bool = False, factor: bool = False) -> Damage:
    """One MatMul for q, k and v, which attention takes apart."""

    def damage(model: ModelProto) -> None:
        last = with_bias(model) if bias else "fc"
        attend(model, how, with_factor(model, last) if factor else last)

    return damage


STRAIGHT = "fc: goes straight into {} and would fall to float"
FLOATS: dict[str, tuple[Damage, list[str]]] = {
    "activation scale is an input": (lambda m: as_input(m, "x_scale"), [f"x_q: {COMPUTED}", f"x_dq: {COMPUTED}"]),
    "activation scale from a table": (scale_by_step, [f"x_q: {COMPUTED}", f"x_dq: {COMPUTED}"]),
    "weight scale is an input": (lambda m: as_input(m, "w_scale"), [f"w_dq: {COMPUTED}"]),
    "activation scale a channel": (scale_by_channel, [f"x_q: activations have one scale, this has {K}"]),
    "Mul behind the activation's DQ": (
        lambda m: mul_between(m, "x_dq", 0, [1]),
        ["x_dq: feeds Mul between, not a GEMM's input 0", ONE_SIDE],
    ),
    "Mul behind the weight's DQ": (
        lambda m: mul_between(m, "w_dq", 1, [K, 1]),
        ["w_dq: feeds Mul between, not a GEMM's input 1", ONE_SIDE],
    ),
    **{
        f"fused q, k, v{', bias' if bias else ''}, {how}": (fused(how, bias), [STRAIGHT.format(how)])
        for how in ("Split", "Slice", "Gather")
        for bias in (False, True)
    },
}


@pytest.mark.parametrize(("damage", "expected"), FLOATS.values(), ids=FLOATS)
def test_silently_float(tmp_path: Path, damage: Damage, expected: list[str]) -> None:
    model = linear()
    damage(model)
    assert sorted(faults(model, tmp_path)) == sorted(expected)
    assert operands(products_of(model, tmp_path)["fc"]) == LOST


# -------------------- no plan


def zero_point(value: np.generic) -> Damage:
    return lambda model: put(model, x_zero=value)


def dynamic(model: ModelProto) -> None:
    """x is quantized as ONNX Runtime's dynamic quantizer does it."""
    del model.graph.node[:]
    put(model, w_zero=np.int8(0))
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["x_q", "x_scale", "x_zero"], "dynamic"),
        helper.make_node("MatMulInteger", ["x_q", "w", "x_zero", "w_zero"], ["sums"], "fc"),
    ]
    for name in ("x_scale", "x_zero"):
        take(model, name)
    model.graph.node.extend(nodes)
    add(model, "Cast", ["sums"], "cast", to=FLOAT)
    add(model, "Mul", ["cast", "x_scale"], "y")


def integer_output(model: ModelProto) -> None:
    """The product in the operators of the QOperator format."""
    del model.graph.node[:]
    put(model, w_zero=np.int8(0), w_scale=np.float32(0.02), y_scale=np.float32(0.1))
    add(model, "QuantizeLinear", ["x", "x_scale", "x_zero"], "x_q")
    operands = ["x_q", "x_scale", "x_zero", "w", "w_scale", "w_zero", "y_scale", "x_zero"]
    model.graph.node.append(helper.make_node("QLinearMatMul", operands, ["fc"], "fc"))
    add(model, "DequantizeLinear", ["fc", "y_scale", "x_zero"], "y")


POSITIVE = "Scale coefficients must all be positive"
SHIFT = "Non-zero zero point is not supported"
UNDONE = "w_int8: undoes w_int4_dq, whose scales it has: TensorRT builds nothing of that"
BARE = "fc: an int8 activation by a 4-bit weight would be a float product, or a wrong one"
FAILS: dict[str, tuple[Damage, list[str], str]] = {  # damage, the lint's faults, of the builder's reason
    "activation scale zero": (lambda m: put(m, x_scale=np.float32(0)), [f"x_q: {SCALE}", f"x_dq: {SCALE}"], POSITIVE),
    "one weight scale zero": (
        lambda m: put(m, w_scale=np.float32([0] + [1] * (N - 1))),
        [f"w_dq: {SCALE}"],
        POSITIVE,
    ),
    "uint8": (zero_point(np.uint8(128)), [f"x_q: {ZERO}", f"x_dq: {ZERO}"], SHIFT),
    "int8 zero point 3": (zero_point(np.int8(3)), [f"x_q: {ZERO}", f"x_dq: {ZERO}"], SHIFT),
    "dynamic quantizer": (
        dynamic,
        ["dynamic: DynamicQuantizeLinear is not portable", "fc: MatMulInteger is not portable"],
        "dynamic: .*; fc: ",
    ),
    "QLinearMatMul": (
        integer_output,
        [
            "fc: QLinearMatMul is not portable",
            "x_q: is not followed by exactly one DequantizeLinear",
            "y: dequantizes what no QuantizeLinear made",
        ],
        "fc: ",
    ),
    "4 bits, the Q undoes the DQ": (
        lambda m: int4(m, 1, undone=True),
        [UNDONE],
        "Mismatched type .* i8 vs. expected type:int4",
    ),
    "4 bits in blocks without a Q": (lambda m: bare_int4(m, 64), [BARE], r"CHECK\(is_constant\(\)\) failed"),
}


@pytest.mark.parametrize(("damage", "expected", "reason"), FAILS.values(), ids=FAILS)
def test_no_plan(tmp_path: Path, damage: Damage, expected: list[str], reason: str) -> None:
    model = linear()
    damage(model)
    assert sorted(faults(model, tmp_path)) == sorted(expected)
    with pytest.raises(RuntimeError, match=reason):
        plan_of(model, tmp_path)


# -------------------- int8, but not what the graph says


def test_bare_int4_blocks_become_one_product(tmp_path: Path) -> None:
    """A scale for every 64 inputs cannot be taken out of a sum over 128: yet that is what the plan does, silently."""
    model = linear(batch=())
    bare_int4(model, 64)
    assert faults(model, tmp_path) == [BARE]
    assert operands(products_of(model, tmp_path)["fc"]) == INTEGERS
    assert array(model, "w_scale").size == 2 * N
    # Flattened, for the output [ROWS, N].
    assert re.search(rb"tensor=\{[^\n]* dims=\{ 1 %d \} [^\n]*folded_matmul" % (2 * N), plan_of(model, tmp_path))


def in_half(model: ModelProto, scales: bool) -> None:
    """The graph's own tensors in FP16. scales: the scales, too, so that no Cast is needed; else float32 in between."""
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = HALF
    if scales:
        put(
            model,
            x_scale=array(model, "x_scale").astype(np.float16),
            w_scale=array(model, "w_scale").astype(np.float16),
        )
    else:
        add(model, "Cast", ["x"], "x_float", before="x_q", to=FLOAT)
        node(model, "x_q").input[0] = "x_float"
        add(model, "Cast", ["fc"], "fc_half", before="y", to=HALF)
        node(model, "y").input[0] = "fc_half"


def test_half_scales_make_half_sums(tmp_path: Path) -> None:
    """Sums of products of 127 by 127 leave FP16's range at five; those of float32 scales leave the product in float."""
    model = linear()
    in_half(model, scales=True)
    told = "its scale is float16, accumulators need float32"
    assert sorted(faults(model, tmp_path)) == [f"w_dq: {told}", f"x_dq: {told}", f"x_q: {told}"]
    assert operands(products_of(model, tmp_path)["fc"]) == "int8 x int8 -> half"
    assert float(np.finfo(np.float16).max) < 5 * 127 * 127
    good = linear()
    in_half(good, scales=False)
    assert faults(good, tmp_path) == []
    assert operands(products_of(good, tmp_path)["fc"]) == INTEGERS


# -------------------- the good twins


def by_step(model: ModelProto) -> None:
    """What changes with the step, in front of a constant Q and behind the product."""
    for name in ("r", "y_factor"):
        model.graph.input.append(helper.make_tensor_value_info(name, FLOAT, [1]))
    add(model, "Mul", ["x", "r"], "x_r", before="x_q")
    node(model, "x_q").input[0] = "x_r"
    add(model, "Mul", ["fc", "y_factor"], "fc_y", before="y")
    node(model, "y").input[0] = "fc_y"


def by_channel(model: ModelProto) -> None:
    put(model, inverse=np.linspace(30, 90, K).astype(np.float32), x_scale=np.float32(1))
    add(model, "Mul", ["x", "inverse"], "x_inverse", before="x_q")
    node(model, "x_q").input[0] = "x_inverse"


GOOD: dict[str, Damage] = {
    "as it is": lambda m: None,
    "bias": with_bias,
    "step factors outside": by_step,
    "channel factors in front": by_channel,
    **{
        f"fused q, k, v{', bias' if bias else ''}, factor, {how}": fused(how, bias, factor=True)
        for how in ("Split", "Slice", "Gather")
        for bias in (False, True)
    },
    "4 bits, two blocks": lambda m: int4(m, 2),
    "4 bits, two blocks of the Q's scale": lambda m: int4(m, 2, undone=True),
    "4 bits, one block of another scale": lambda m: int4(m, 1),
}


@pytest.mark.parametrize("change", GOOD.values(), ids=GOOD)
def test_good_graphs_pass_and_are_int8(tmp_path: Path, change: Damage) -> None:
    model = linear()
    change(model)
    assert faults(model, tmp_path) == []
    assert operands(products_of(model, tmp_path)["fc"]) == INTEGERS


def test_a_rule_of_tensorrt_is_of_its_dialect(tmp_path: Path) -> None:
    """Others take a 4-bit weight whose Q undoes its DQ, and are given it."""
    model = linear()
    int4(model, 1, undone=True)
    assert lint_faults(model, tmp_path, INT8) == []
    for dialect in BACKENDS["tensorrt"].dialects.values():
        assert lint_faults(model, tmp_path, dialect) == [UNDONE]
