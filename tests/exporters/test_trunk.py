"""Half-precision trunks: the type of every tensor, where Casts stand, and that the numbers are those of float32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from handmade import KINDS, Handmade, handmade, random_prompt
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from dit_trt.engines.base import Dialect
from dit_trt.engines.errors import UserError
from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.exporters.data_file import DataFile
from dit_trt.exporters.lint import lint
from dit_trt.exporters.rewriting import Rewriting
from dit_trt.exporters.trunk import HALVES, Trunk
from dit_trt.runtime.graph_shapes import graph_shapes
from dit_trt.tooling.build import bundle_sizes
from dit_trt.tooling.tables import Calibration

Half = Literal["float16", "bfloat16"]
HALF_TYPES = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
OTHER: dict[str, Half] = {"float16": "bfloat16", "bfloat16": "float16"}
# Relative errors of the velocity: in float against a float32 trunk; quantized, times what quantizing costs by itself: a
# value on a rounding edge falls to its other side.
NEAR = {"float16": 3e-3, "bfloat16": 2.5e-2}
WORSE = {"float16": 1.2, "bfloat16": 1.5}
every_half = pytest.mark.parametrize("half", ["float16", "bfloat16"])
every_kind = pytest.mark.parametrize("kind", [None, *KINDS])


def model_of(tiny: Path, table: Calibration, kind: str | None, rank: int = 0) -> Handmade:
    """kind: of every Linear; None: all in float."""
    checkpoint = Checkpoint.open(str(tiny))
    model = handmade(checkpoint, table.absmax, kind or "static", rank)
    return model if kind is not None else Handmade(checkpoint, model.smoothing, {})


def written(model: Handmade, folder: Path, trunk: str, branch: str = "float32") -> tuple[Path, int]:
    """The step graph's file, and the width of its scales."""
    dialect = Dialect(trunk=trunk, branch=branch)  # type: ignore[arg-type]
    [made] = model.write(folder, dialect, ("step",)).values()
    lint(folder / "step.onnx", dialect)
    return folder / "step.onnx", sum(slot.width for slot in made.slots)


def inputs_of(model: Handmade, folder: Path) -> dict[str, NDArray]:
    """What the step graph reads at step 6: real conditioning, and noise."""
    sizes, random = bundle_sizes(model.checkpoint), np.random.default_rng(0)
    shapes = graph_shapes(sizes, 1)
    written = model.write(folder / "inputs", Dialect())
    prompt = random_prompt(model.checkpoint, random)
    session = onnxruntime.InferenceSession(folder / "inputs" / "conditioning.onnx", providers=["CPUExecutionProvider"])
    made = dict(zip([output.name for output in session.get_outputs()], session.run(None, prompt)))
    made["time_embed"] = made["time_embed"][0]
    found = {"x": random.standard_normal(shapes["step"]["x"]).astype(np.float32), **made}
    if written["step"].slots:
        found["step_scales"] = model.step_scales(written["step"].slots, 6)
    return found


def miss(found: NDArray, expected: NDArray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def velocity(path: Path, inputs: Mapping[str, NDArray]) -> NDArray:
    """Node by node as the standard says: an engine would choose its own types."""
    model = onnx.load(path)
    names = {value.name for value in model.graph.input}
    [found] = ReferenceEvaluator(model).run(["velocity"], {k: v for k, v in inputs.items() if k in names})
    return found


def types_of(path: Path) -> dict[str, int]:
    """Element type of every tensor."""
    model = shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True, data_prop=True)
    graph = model.graph
    values = [*graph.value_info, *graph.input, *graph.output]
    return {v.name: v.type.tensor_type.elem_type for v in values} | {t.name: t.data_type for t in graph.initializer}


@every_half
@every_kind
def test_the_velocity_is_that_of_a_float32_trunk(
    tiny: Path, tiny_table: Calibration, tmp_path: Path, half: Half, kind: str | None
) -> None:
    model = model_of(tiny, tiny_table, kind)
    inputs = inputs_of(model, tmp_path)
    full, found = (velocity(written(model, tmp_path / trunk, trunk)[0], inputs) for trunk in ("float32", half))
    assert found.dtype == np.float32
    if kind is None:
        assert 0 < miss(found, full) < NEAR[half]
        return
    exact = Handmade(model.checkpoint, model.smoothing, {})
    truth = velocity(written(exact, tmp_path / "exact", "float32")[0], inputs)
    assert miss(found, truth) < WORSE[half] * miss(full, truth)


@every_half
@every_kind
def test_every_operation_has_one_type(
    tiny: Path, tiny_table: Calibration, tmp_path: Path, half: Half, kind: str | None
) -> None:
    """Strongly typed: what ONNX infers is checked, and what the trunk promises is looked up."""
    path, _ = written(model_of(tiny, tiny_table, kind, rank=8 if kind else 0), tmp_path, half, OTHER[half])
    onnx.checker.check_model(str(path), full_check=True)
    types, graph = types_of(path), onnx.load(path, load_external_data=False).graph
    makers = {name: node for node in graph.node for name in node.output}
    narrow, wide = HALF_TYPES[half], TensorProto.FLOAT
    integer = 0
    for node in graph.node:
        read = [types[name] for name in node.input]
        match node.op_type:
            case "LayerNormalization" | "QuantizeLinear" | "ReduceMax" | "ReduceMin":
                assert read[0] == wide
            case "DequantizeLinear":
                assert types[node.output[0]] == wide and types[node.input[1]] == wide
            case "MatMul":
                is_int8 = makers.get(node.input[0], node).op_type == "DequantizeLinear"
                integer += is_int8
                assert read == (
                    [wide] * 2 if is_int8 else [HALF_TYPES[OTHER[half]]] * 2 if "lora" in node.name else [narrow] * 2
                )
            case "Softmax":
                assert read == [narrow]
            case "Conv":
                assert set(read) == {wide}
            case "Add" if node.name.startswith("node_add_") and "add_1" not in node.output:
                residual = any(makers[name].op_type == "Cast" for name in node.input if name in makers)
                assert read == [narrow if residual else read[0]] * 2
    assert integer == (0 if kind is None else 2 * 9)
    assert {types[value.name] for value in [*graph.input, *graph.output]} == {wide}


@every_half
def test_rope_and_residuals(tiny: Path, tiny_table: Calibration, tmp_path: Path, half: Half) -> None:
    """Angles are float32 up to the product they are for; the residual stream is half from the first sum to the last."""
    path, _ = written(model_of(tiny, tiny_table, "static"), tmp_path, half)
    types, graph = types_of(path), onnx.load(path, load_external_data=False).graph
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    assert {tensor.data_type for tensor in graph.initializer if tensor.name.startswith("rope.")} == {TensorProto.FLOAT}
    turned = [name for table in ("rope.cos", "rope.sin") for name in _downstream(table, readers)]
    assert len(turned) > 8
    assert {types[name] for name in turned} == {TensorProto.FLOAT}
    norms = [node for node in graph.node if node.op_type == "LayerNormalization"]
    makers = {name: node for node in graph.node for name in node.output}
    streams = [makers[node.input[0]] for node in norms]
    assert {node.op_type for node in streams} == {"Cast"}
    assert {types[node.input[0]] for node in streams} == {HALF_TYPES[half]}
    assert len(norms) == 6


def _downstream(tensor: str, readers: Mapping[str, list[onnx.NodeProto]]) -> list[str]:
    """Tensors made of `tensor`, up to the Casts that end it."""
    found = []
    for node in readers.get(tensor, []):
        if node.op_type != "Cast":
            found += [*node.output, *(name for output in node.output for name in _downstream(output, readers))]
    return found


@every_half
def test_attention_is_half_from_its_first_product_to_its_second(
    tiny: Path, tiny_table: Calibration, tmp_path: Path, half: Half
) -> None:
    path, _ = written(model_of(tiny, tiny_table, "token"), tmp_path, half)
    graph = onnx.load(path, load_external_data=False).graph
    makers = {name: node for node in graph.node for name in node.output}
    products = {name: node for node in graph.node if node.op_type == "MatMul" for name in node.input}
    softmaxes = [node for node in graph.node if node.op_type == "Softmax"]
    assert len(softmaxes) == 4
    for softmax in softmaxes:
        assert makers[softmax.input[0]].op_type == "MatMul"
        assert softmax.output[0] in products


def test_float_weights_are_stored_once_and_in_half(tiny: Path, tiny_table: Calibration, tmp_path: Path) -> None:
    model = model_of(tiny, tiny_table, None)
    sizes = {}
    for trunk in ("float32", "float16"):
        path, _ = written(model, tmp_path / trunk, trunk)
        sizes[trunk] = path.with_name("step.onnx.data").stat().st_size
    assert sizes["float16"] < 0.52 * sizes["float32"]


@every_half
def test_what_is_rounded_is_scaled_in_float32(tiny: Path, tiny_table: Calibration, tmp_path: Path, half: Half) -> None:
    """The unconditional half's context is zeros: its tokens' factors are beyond FP16, and infinity x 0 is NaN."""
    for kind in ("token", "step"):
        model = model_of(tiny, tiny_table, kind)
        path, _ = written(model, tmp_path / kind, half)
        graph = onnx.load(path)
        scaled = [node.input[0] for node in graph.graph.node if node.op_type == "QuantizeLinear"]
        graph.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in scaled)
        inputs, names = inputs_of(model, tmp_path), {value.name for value in graph.graph.input}
        outputs = ReferenceEvaluator(graph).run(None, {k: v for k, v in inputs.items() if k in names})
        assert len(outputs) > 8
        assert all(np.isfinite(value).all() and value.dtype == np.float32 for value in outputs)


def small_graph(nodes: list[onnx.NodeProto], weights: Mapping[str, NDArray]) -> onnx.GraphProto:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4])
    return helper.make_graph(nodes, "g", [value], [result], [numpy_helper.from_array(w, n) for n, w in weights.items()])


def test_a_weight_beyond_fp16_is_refused_with_the_fix(tmp_path: Path) -> None:
    graph = small_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], {})
    with DataFile(tmp_path / "data") as data:
        rewriting = Rewriting(graph, data)
        trunk = Trunk(rewriting, "float16", ["w"])
        with pytest.raises(
            UserError, match=r"^w holds values beyond FP16's largest, 65504: take --trunk bf16 or fp32$"
        ):
            trunk.store("w", np.full((4, 4), 7e4, np.float32))
        Trunk(Rewriting(small_graph(list(graph.node), {}), data), "bfloat16", ["w"]).store(
            "w", np.ones((4, 4), np.float32)
        )


def test_a_constant_that_both_read_is_there_in_both_types(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Mul", ["h", "c"], ["half"]),
        helper.make_node("Mul", ["x", "c"], ["full"]),
        helper.make_node("Add", ["half", "full"], ["y"]),
    ]
    graph = small_graph(nodes, {"c": np.float32(0.1)})
    with DataFile(tmp_path / "data") as data:
        rewriting = Rewriting(graph, data)
        Trunk(rewriting, "bfloat16", ["w"]).store("w", np.eye(4, dtype=np.float32))
        rewriting.finish()
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    assert constants["c"] == np.float32(0.1)
    assert constants["c.bfloat16"] == ml_dtypes.bfloat16(0.1)
    assert HALVES["bfloat16"][1] == ml_dtypes.bfloat16
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    [y] = ReferenceEvaluator(model).run(None, {"x": x})
    np.testing.assert_allclose(y, 0.2 * x, rtol=1e-2)
