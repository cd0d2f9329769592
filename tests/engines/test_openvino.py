"""OpenVINO: which MatMuls run in int8, what a lost one does to a build, and the float graphs against ONNX Runtime."""

import shutil

import numpy as np
import onnxruntime
import pytest
from graphs import (
    CONDITIONING_MATMULS,
    GRAPHS,
    LAYER,
    STEP_MATMULS,
    damaged_copy,
    insert_mul,
    make_input,
    matmul_names,
    named,
    random_inputs,
    replace_location,
    shapes_of,
)

from dit_trt.engines.errors import UserError
from dit_trt.engines.openvino import OpenVINOEngine
from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.runtime.graph_shapes import graph_shapes
from dit_trt.tooling import build as building
from dit_trt.tooling.recipe import Recipe


def compiled(bundle, graph, path=None, **options):
    return OpenVINOEngine(path or bundle.path(f"{graph}.onnx"), shapes_of(bundle, graph), **options)


# -------------------- int8


@pytest.mark.parametrize(("graph", "parts"), [("step", STEP_MATMULS), ("conditioning", CONDITIONING_MATMULS)])
def test_exactly_the_quantized_matmuls_run_in_int8(tiny_sqs, graph, parts):
    engine = compiled(tiny_sqs, graph)
    matmuls = matmul_names(tiny_sqs.path(f"{graph}.onnx"))
    assert engine.int8_matmuls() & matmuls == named(parts)
    assert engine.float_matmuls() & named(parts) == set()


@pytest.mark.parametrize("graph", GRAPHS)
def test_nothing_of_a_float_bundle_runs_in_int8(tiny_float, graph):
    engine = compiled(tiny_float, graph)
    assert engine.int8_matmuls() == set()
    assert bool(engine.float_matmuls()) == (graph != "text")  # the tiny text encoder is a table


TO_OUT = LAYER.format(1) + "self_attn.to_out"
VALUE = LAYER.format(0) + "ff.ff.0.proj.value"
DAMAGES = {
    "activation scale as input": (lambda graph: make_input(graph, f"{TO_OUT}.x_scale"), TO_OUT),
    "weight scale as input": (lambda graph: make_input(graph, f"{TO_OUT}.scale"), TO_OUT),
    "Mul after the weight's DQ": (lambda graph: insert_mul(graph, f"{TO_OUT}.dq", [128, 1]), TO_OUT),
    "one part of a fused Linear": (lambda graph: make_input(graph, f"{VALUE}.scale"), VALUE),
}


def lost(folder, sizes, linears, step_sigmas=()):
    return building.prove(folder, "openvino", graph_shapes(sizes, step_sigmas=step_sigmas), linears).lost


@pytest.mark.parametrize(("damage", "matmul"), DAMAGES.values(), ids=DAMAGES)
def test_a_matmul_that_lost_its_int8_is_not_counted(tiny, tiny_sqs, tmp_path, damage, matmul):
    folder = damaged_copy(tiny_sqs, tmp_path / "damaged", damage)
    engine = compiled(tiny_sqs, "step", folder / "step.onnx")
    assert engine.int8_matmuls() & matmul_names(folder / "step.onnx") == named(STEP_MATMULS) - {matmul}
    linears = Checkpoint.open(str(tiny)).linears
    sizes, expected = tiny_sqs.manifest["sizes"], [matmul.removeprefix("model.model.").removesuffix(".value")]
    assert lost(folder, sizes, linears) == expected
    for name in ("step.onnx", "step.onnx.data"):
        (folder / name).rename(folder / name.replace("step", "step-1"))
        shutil.copy(tiny_sqs.path(name), folder)
    replace_location(folder / "step-1.onnx", "step-1.onnx.data")
    assert lost(folder, sizes, linears) == []
    assert lost(folder, sizes, linears, [9.0]) == expected, "in every graph"


def test_no_linear_of_the_whole_bundle_is_lost(tiny, tiny_sqs, tiny_float):
    linears = Checkpoint.open(str(tiny)).linears
    assert lost(tiny_sqs.folder, tiny_sqs.manifest["sizes"], linears) == []
    names = [linear.name for linear in linears]
    assert lost(tiny_float.folder, tiny_float.manifest["sizes"], linears) == names


@pytest.mark.parametrize(
    "matmul", [TO_OUT, LAYER.format(0) + "cross_attn.to_kv.v"], ids=["in the step", "in the conditioning"]
)
def test_a_build_that_lost_a_linear_fails_and_leaves_nothing(tiny, tiny_table_file, tmp_path, monkeypatch, matmul):
    real = OpenVINOEngine.int8_matmuls
    monkeypatch.setattr(OpenVINOEngine, "int8_matmuls", lambda self: real(self) - {matmul})
    with pytest.raises(UserError) as error:
        building.build_bundle(
            Checkpoint.open(str(tiny)), Recipe("sqs"), "openvino", tmp_path / "out" / "bundle", tiny_table_file
        )
    linear = matmul.removeprefix("model.model.").removesuffix(".v")
    assert str(error.value).startswith(f"1 of 14 Linears do not run in int8 with openvino: {linear};")
    assert "--exclude" in str(error.value)
    assert list((tmp_path / "out").iterdir()) == []


# -------------------- running


@pytest.mark.parametrize("graph", GRAPHS)
def test_float_graphs_equal_onnx_runtimes(tiny_float, graph):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(tiny_float.path(f"{graph}.onnx"), options)
    inputs = random_inputs(tiny_float, graph)
    engine = compiled(tiny_float, graph)
    found = engine.run(inputs)
    names = [output.name for output in session.get_outputs()]
    assert sorted(found) == sorted(engine.outputs) == sorted(names)
    for name, expected in zip(names, session.run(names, inputs)):
        assert found[name].shape == expected.shape
        assert np.abs(expected).max() > 0
        error = np.linalg.norm(found[name] - expected) / np.linalg.norm(expected)
        assert error < 1e-4, name


def test_inputs_and_outputs_are_the_graphs(tiny_sqs):
    engine = compiled(tiny_sqs, "step")
    assert engine.inputs == shapes_of(tiny_sqs, "step")
    assert engine.outputs == ["velocity"]


def test_inputs_stay_bound_and_belong_to_the_engine(tiny_float):
    first, second = (random_inputs(tiny_float, "step", seed) for seed in (1, 2))
    fresh = compiled(tiny_float, "step").run({**first, "x": second["x"]})["velocity"]
    engine = compiled(tiny_float, "step")
    before = engine.run(first)["velocity"]
    kept = before.copy()
    for array in first.values():
        array[...] = np.nan  # the caller's arrays are the caller's again
    after = engine.run({"x": second["x"]})["velocity"]
    np.testing.assert_array_equal(after, fresh)
    np.testing.assert_array_equal(before, kept)  # and outputs are not overwritten by the next run
    assert np.abs(after - before).max() > 0.01


def test_a_cached_engine_is_the_same_engine(tiny_sqs, tmp_path):
    inputs = random_inputs(tiny_sqs, "step")
    first = compiled(tiny_sqs, "step", cache=tmp_path / "cache")
    blobs = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert blobs
    second = compiled(tiny_sqs, "step", cache=tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == blobs
    np.testing.assert_array_equal(second.run(inputs)["velocity"], first.run(inputs)["velocity"])


@pytest.mark.parametrize("damage", [b"", b"\0" * 100, b"an older format " * 999], ids=["empty", "zeros", "foreign"])
def test_a_damaged_cache_is_made_anew(tiny_sqs, tmp_path, damage):
    inputs = random_inputs(tiny_sqs, "step")
    expected = compiled(tiny_sqs, "step", cache=tmp_path).run(inputs)["velocity"]
    blobs = list(tmp_path.rglob("*.blob"))
    assert blobs
    for path in blobs:
        path.write_bytes(damage)
    np.testing.assert_array_equal(compiled(tiny_sqs, "step", cache=tmp_path).run(inputs)["velocity"], expected)


@pytest.mark.parametrize("device", ["TPU", "cpu?", ""])
def test_an_unknown_device_names_those_there_are(tiny_sqs, device):
    with pytest.raises(UserError) as error:
        compiled(tiny_sqs, "step", device=device)
    assert repr(device) in str(error.value)
    assert "CPU" in str(error.value)
