"""Every way of rounding a Linear as a graph: integer for integer by its formula, and whole in the real engines.

The oracle is tests/handmade.py: torch's model with every Linear replaced by its formula, nothing folded, in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
import pytest
from graphs import CONDITIONING_MATMULS, STEP_MATMULS, matmul_names, named
from handmade import KINDS, Handmade, Row, handmade, random_prompt
from hardware import CPU_BACKENDS, exact_int8
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from dit_trt.engines.base import BACKENDS, Engine, open_engine
from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.exporters.linears import Linear
from dit_trt.exporters.lint import lint
from dit_trt.exporters.qdq import Written
from dit_trt.exporters.step_slots import INPUT
from dit_trt.runtime.graph_shapes import graph_shapes
from dit_trt.tooling.build import bundle_sizes
from dit_trt.tooling.tables import Calibration

RANK, COARSE = 16, 7  # a branch beside weights of 4 bits: large enough to be seen in the wrong place
# Engines add in float32, and now and then a value on a rounding edge goes the other way: that changes a few tokens by
# much more than the others, which are compared by their median.
EXACT, EDGE = 4e-3, 2e-2


@dataclass
class Run:
    """The graphs of a model in a folder, and what goes through them."""

    checkpoint: Checkpoint
    prompt: dict[str, NDArray]
    x: NDArray[np.float32]

    def engines(self, folder: Path, written: Mapping[str, Written], backend: str) -> dict[str, Engine]:
        shapes = graph_shapes(bundle_sizes(self.checkpoint), 1)
        if slots := written["step"].slots:
            shapes["step"] = {**shapes["step"], INPUT: (sum(slot.width for slot in slots),)}
        return {name: open_engine(backend, folder / f"{name}.onnx", shapes[name], threads=1) for name in written}

    def feeds(self, made: Mapping[str, NDArray], scales: NDArray) -> dict[str, NDArray]:
        """The step graph's, from the conditioning graph's outputs."""
        step = {"x": self.x, **made, "time_embed": made["time_embed"][0]}
        return {**step, INPUT: scales} if scales.size else step


@pytest.fixture(scope="module")
def run(tiny: Path) -> Run:
    checkpoint = Checkpoint.open(str(tiny))
    shapes, random = graph_shapes(bundle_sizes(checkpoint), 1), np.random.default_rng(0)
    prompt = random_prompt(checkpoint, random)
    return Run(checkpoint, prompt, random.standard_normal(shapes["step"]["x"]).astype(np.float32))


def velocity(
    run: Run, model: Handmade, folder: Path, backend: str, step: int, branch: Literal["float32", "bfloat16"] = "float32"
) -> tuple[NDArray, dict[str, Engine]]:
    """In a backend's own dialect but for the type of branches, and the engines that made it."""
    dialect = replace(BACKENDS[backend].dialect, branch=branch)
    written = model.write(folder, dialect)
    for name in written:
        lint(folder / f"{name}.onnx", dialect)
    engines = run.engines(folder, written, backend)
    made = engines["conditioning"].run(run.prompt)
    scales = model.step_scales(written["step"].slots, step)
    return engines["step"].run(run.feeds(made, scales))["velocity"], engines


def miss(found: NDArray, expected: NDArray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def token_miss(found: NDArray, expected: NDArray) -> float:
    """The median over tokens of the relative error; both [batch, channels, tokens]."""
    return float(np.median(np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)))


def exact_sums(backend: str, kinds: Iterable[str | None], levels: int) -> None:
    """Skip what follows where products may saturate: integers of up to 64 never do, and only `requantize` makes larger
    ones of them."""
    if levels > 64 or "requantize" in kinds:
        exact_int8(backend)


def agree(found: NDArray, expected: NDArray) -> bool:
    return token_miss(found, expected) < EXACT and miss(found, expected) < EDGE


# -------------------- whole, in the engines


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("rank", [0, RANK])
@pytest.mark.parametrize("kind", KINDS)
def test_the_engines_velocity_is_the_formulas_and_all_of_it_is_int8(
    run: Run, tiny_table: Calibration, tmp_path: Path, kind: str, rank: int, backend: str
) -> None:
    levels = COARSE if rank else 127
    model = handmade(run.checkpoint, tiny_table.absmax, kind, rank, levels)
    steps = (1, 6) if (kind, rank) == ("requantize", 0) else (6,)
    made = {step: velocity(run, model, tmp_path, backend, step) for step in steps}
    for graph, parts in (("step", STEP_MATMULS), ("conditioning", CONDITIONING_MATMULS)):
        for _, engines in made.values():
            assert engines[graph].int8_matmuls() & matmul_names(tmp_path / f"{graph}.onnx") == named(parts)
    exact_sums(backend, [kind], levels)
    for step, (found, _) in made.items():
        assert agree(found, model.velocity(run.prompt, run.x, step))
        rounding = token_miss(found, Handmade(run.checkpoint, model.smoothing, {}).velocity(run.prompt, run.x, step))
        assert 5 * EXACT < rounding < 0.7, "the same as float, or nothing like it, proves nothing"


MIXTURES = {
    # what one kind does where its neighbour's factor is not there to be merged into
    "self to_out alone": {"self_attn.to_out": "step"},
    "ff.2 alone": {"ff.ff.2": "step", "self_attn.to_out": "token"},
    "ff.2 behind static": {"ff.ff.2": "step", "ff.ff.0.proj": "static", "self_attn.to_qkv": "token"},
    "to_out behind token": {"self_attn.to_out": "step", "self_attn.to_qkv": "token", "cross_attn.to_out": "step"},
    "per channel behind one range": {
        **{"self_attn.to_qkv": "step", "self_attn.to_out": "requantize"},
        **{"ff.ff.0.proj": "step", "ff.ff.2": "requantize", "cross_attn.to_out": "requantize"},
    },
    "one range behind per channel": {
        **{"self_attn.to_qkv": "requantize", "self_attn.to_out": "step"},
        **{"ff.ff.0.proj": "requantize", "ff.ff.2": "step", "cross_attn.to_q": "requantize"},
    },
    "no reader": {"self_attn.to_qkv": "step", "ff.ff.0.proj": "step", "cross_attn.to_q": "step"},
    "per channel, alone": {"self_attn.to_out": "requantize", "ff.ff.2": "requantize", "cross_attn.to_kv": "token"},
}


@pytest.mark.parametrize(("name", "backend"), list(zip(MIXTURES, itertools.cycle(CPU_BACKENDS))))
def test_any_kind_beside_any_other(run: Run, tiny_table: Calibration, tmp_path: Path, name: str, backend: str) -> None:
    kinds = MIXTURES[name]
    model = handmade(run.checkpoint, tiny_table.absmax, lambda linear: kinds.get(linear.kind), RANK, COARSE)
    found, engines = velocity(run, model, tmp_path, backend, 6)
    matmuls = matmul_names(tmp_path / "step.onnx") | matmul_names(tmp_path / "conditioning.onnx")
    found_int8 = (engines["step"].int8_matmuls() | engines["conditioning"].int8_matmuls()) & matmuls
    assert found_int8 == {base(row.linear, part) for row in model.rows.values() for part in row.linear.parts}
    exact_sums(backend, kinds.values(), COARSE)
    assert agree(found, model.velocity(run.prompt, run.x, 6))


def test_a_branch_makes_up_for_coarse_weights(run: Run, tiny_table: Calibration, tmp_path: Path) -> None:
    exact = Handmade(run.checkpoint, handmade(run.checkpoint, tiny_table.absmax, "token").smoothing, {})
    expected = exact.velocity(run.prompt, run.x, 6)
    errors = []
    for rank in (0, RANK):
        model = handmade(run.checkpoint, tiny_table.absmax, "token", rank, levels=COARSE)
        errors.append(miss(velocity(run, model, tmp_path / str(rank), "openvino", 6)[0], expected))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_branch_in_bfloat16_adds_little_and_costs_no_int8(
    run: Run, tiny_table: Calibration, tmp_path: Path, kind: str
) -> None:
    assert BACKENDS["openvino"].dialect.branch == "bfloat16"
    model = handmade(run.checkpoint, tiny_table.absmax, kind, RANK, COARSE)
    found, engines = velocity(run, model, tmp_path, "openvino", 6, "bfloat16")
    assert engines["step"].int8_matmuls() & matmul_names(tmp_path / "step.onnx") == named(STEP_MATMULS)
    exact_sums("openvino", [kind], COARSE)
    expected = model.velocity(run.prompt, run.x, 6)
    rounding = token_miss(found, Handmade(run.checkpoint, model.smoothing, {}).velocity(run.prompt, run.x, 6))
    assert 0 < token_miss(found, expected) < 0.15 * rounding


@pytest.mark.parametrize("kind", ["step", "token", "requantize"])
def test_a_branch_on_the_other_side_of_the_factor_would_be_seen(
    run: Run, tiny_table: Calibration, tmp_path: Path, kind: str
) -> None:
    """The proof above fails if the branch moves: for one Linear of one block, moved here."""
    exact_sums("openvino", [kind], COARSE)
    model = handmade(run.checkpoint, tiny_table.absmax, kind, RANK, levels=COARSE)
    written = model.write(tmp_path)
    matmul = "model.model.transformer.layers.0.ff.ff.2"
    graph = onnx.load(tmp_path / "step.onnx", load_external_data=False)
    first, second = following(graph.graph, matmul)
    assert {first.op_type, second.op_type} == {"Add", "Mul"}
    (first.input[1], second.input[1]) = (second.input[1], first.input[1])
    (first.op_type, second.op_type) = (second.op_type, first.op_type)
    onnx.save(graph, tmp_path / "step.onnx")
    engines = run.engines(tmp_path, written, "openvino")
    made = engines["conditioning"].run(run.prompt)
    found = engines["step"].run(run.feeds(made, model.step_scales(written["step"].slots, 6)))["velocity"]
    assert not agree(found, model.velocity(run.prompt, run.x, 6))


def following(graph: onnx.GraphProto, matmul: str) -> list[onnx.NodeProto]:
    """The two nodes behind a product."""
    found = []
    [current] = [node.output[0] for node in graph.node if node.name == matmul]
    for _ in range(2):
        [node] = [node for node in graph.node if node.input and node.input[0] == current]
        found.append(node)
        current = node.output[0]
    return found


# -------------------- one by one, without an engine's optimizations


@pytest.mark.parametrize("rank", [0, RANK])
@pytest.mark.parametrize("kind", KINDS)
def test_every_linears_integers_are_its_formulas(
    run: Run, tiny_table: Calibration, tmp_path: Path, kind: str, rank: int
) -> None:
    """Bit for bit from the float tensor that is rounded; sums and factors as float32 allows."""
    model, step = handmade(run.checkpoint, tiny_table.absmax, kind, rank), 6
    written = model.write(tmp_path)
    graph = onnx.load(tmp_path / "step.onnx")
    conditioning = onnxruntime.InferenceSession(tmp_path / "conditioning.onnx", providers=["CPUExecutionProvider"])
    made = dict(zip([output.name for output in conditioning.get_outputs()], conditioning.run(None, run.prompt)))
    values = every_tensor(graph, run.feeds(made, model.step_scales(written["step"].slots, step)), tmp_path)
    nodes = {node.output[0]: node for node in graph.graph.node}
    products = {node.name: node for node in graph.graph.node if node.op_type == "MatMul"}
    for row in model.rows.values():
        for part in row.linear.parts if row.linear.graph == "step" else ():
            name = base(row.linear, part)
            product = products[name]
            quantize = nodes[nodes[product.input[0]].input[0]]
            x, x_q = values[quantize.input[0]], values[quantize.output[0]]
            w_q = values[nodes[product.input[1]].input[0]]
            np.testing.assert_array_equal(x_q, np.clip(np.rint(x / x_scale(row)), -128, 127))
            if kind == "token":
                source = values[nodes[quantize.input[0]].input[0]]
                amax = np.maximum(np.abs(source).max(axis=-1, keepdims=True), np.float32(127 * row.delta))
                np.testing.assert_array_equal(x, source * (np.float32(127) / amax))
                assert np.isin(np.abs(x_q).max(axis=-1), (0, 127)).all()  # 0: cross attention without a prompt
            np.testing.assert_array_equal(w_q.T, integers(model, row, part, step))
            scale = np.ones(1) if kind == "requantize" else row.scale * model.folded_rows(row.linear)
            scale = scale if scale.size == 1 else scale[row.linear.rows(part)]
            exact = x_q.astype(np.float64) @ w_q.astype(np.float64) * (scale * x_scale(row))
            close(values[product.output[0]], exact)
            assert len(np.unique(x_q)) > 20, "a product of zeros proves nothing"


def close(found: NDArray, expected: NDArray) -> None:
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def base(linear: Linear, part: str) -> str:
    return linear.graph_name(part).removesuffix(".weight")


def x_scale(row: Row) -> np.float32:
    return np.float32(row.delta if row.kind in ("static", "step") else 1)


def integers(model: Handmade, row: Row, part: str, step: int) -> NDArray:
    """[rows of the part, in], in the graph's order of float32 operations."""
    rows, name = row.linear.rows(part), row.linear.name
    if row.kind != "requantize":
        return row.integers[rows]
    columns = ((1 / row.s).astype(np.float64) * model.tables[f"smoothing/{name}"][step]).astype(np.float32)
    inverse = (1 / model.tables[f"weight_scale/{name}"][step].astype(np.float64)).astype(np.float32)[rows, None]
    scale = (row.scale * model.folded_rows(row.linear))[rows, None]
    return np.clip(np.rint(row.integers[rows] * scale * columns * inverse), -128, 127)


def every_tensor(model: onnx.ModelProto, feeds: Mapping[str, NDArray], folder: Path) -> dict[str, NDArray]:
    """What is rounded, what becomes of it and every product, by ONNX Runtime without optimizations."""
    makers = {name: node for node in model.graph.node for name in node.output}
    wanted = {node.output[0]: TensorProto.FLOAT for node in model.graph.node if node.op_type == "MatMul"}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            wanted |= {node.input[0]: TensorProto.FLOAT, node.output[0]: TensorProto.INT8}
            if (before := makers[node.input[0]]).op_type == "Mul":
                wanted[before.input[0]] = TensorProto.FLOAT
    present = {output.name for output in model.graph.output}
    new = [name for name in wanted if name not in present]
    model.graph.output.extend([helper.make_tensor_value_info(name, wanted[name], None) for name in new])
    path = folder / "exposed.onnx"
    onnx.save(model, path)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    outputs = [output.name for output in session.get_outputs()]
    return {**tensors, **dict(zip(outputs, session.run(None, dict(feeds)), strict=True))}
