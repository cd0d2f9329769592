"""ONNX Runtime: which MatMuls run in int8, the same numbers as OpenVINO, its devices."""

import numpy as np
import onnx
import onnxruntime
import pytest
from graphs import (
    CONDITIONING_MATMULS,
    GRAPHS,
    STEP_MATMULS,
    damaged_copy,
    insert_mul,
    matmul_names,
    named,
    random_inputs,
    shapes_of,
)
from hardware import CPU_BACKENDS, exact_int8

from dit_trt.engines import onnxruntime as backend
from dit_trt.engines.bundle import Bundle
from dit_trt.engines.errors import UserError
from dit_trt.engines.onnxruntime import ONNXRuntimeEngine
from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.runtime.graph_shapes import graph_shapes
from dit_trt.runtime.pipeline import Pipeline, Settings
from dit_trt.tooling.build import build_bundle, prove
from dit_trt.tooling.recipe import Recipe

PLANTED = "ignore:Specified provider"  # the test pretends that a provider is there


@pytest.fixture(scope="module")
def sqs(tiny, tiny_table_file, tmp_path_factory) -> Bundle:
    target = tmp_path_factory.mktemp("ort") / "sqs"
    return build_bundle(Checkpoint.open(str(tiny)), Recipe("sqs"), "onnxruntime", target, tiny_table_file).bundle


@pytest.fixture(scope="module")
def floats(tiny, tmp_path_factory) -> Bundle:
    return build_bundle(
        Checkpoint.open(str(tiny)), Recipe("none"), "onnxruntime", tmp_path_factory.mktemp("ort") / "float"
    ).bundle


def opened(bundle, graph, path=None, **options):
    return ONNXRuntimeEngine(path or bundle.path(f"{graph}.onnx"), shapes_of(bundle, graph), threads=1, **options)


def unoptimized(path, inputs):
    """The graph as the standard says, node by node."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs)))


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


# -------------------- int8


@pytest.mark.parametrize(("graph", "parts"), [("step", STEP_MATMULS), ("conditioning", CONDITIONING_MATMULS)])
def test_exactly_the_quantized_matmuls_run_in_int8(sqs, graph, parts):
    assert opened(sqs, graph).int8_matmuls() & matmul_names(sqs.path(f"{graph}.onnx")) == named(parts)


@pytest.mark.parametrize("graph", GRAPHS)
def test_nothing_of_a_float_bundle_runs_in_int8(floats, graph):
    assert opened(floats, graph).int8_matmuls() == set()


def test_openvinos_dialect_would_be_lost_here(tiny, tiny_sqs):
    """Why the dialect exists: of int8 pairs that several Linears share, ONNX Runtime makes float products."""
    shapes = graph_shapes(tiny_sqs.manifest["sizes"])
    lost = prove(tiny_sqs.folder, "onnxruntime", shapes, Checkpoint.open(str(tiny)).linears).lost
    assert {name.split(".", 3)[3] for name in lost} >= {"self_attn.to_qkv", "ff.ff.0.proj"}


def test_a_matmul_that_lost_its_int8_is_not_counted(sqs, tmp_path):
    matmul = "model.model.transformer.layers.1.self_attn.to_out"
    folder = damaged_copy(sqs, tmp_path / "damaged", lambda graph: insert_mul(graph, f"{matmul}.dq", [128, 1]))
    shapes = {**shapes_of(sqs, "step"), "factor": (128, 1)}
    engine = ONNXRuntimeEngine(folder / "step.onnx", shapes, threads=1)
    assert engine.int8_matmuls() & named(STEP_MATMULS) == named(STEP_MATMULS) - {matmul}


def test_quantized_activations_are_uint8_around_128(sqs):
    graph = onnx.load(sqs.path("step.onnx"), load_external_data=False).graph
    points = [onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name.endswith(".x_zero_point")]
    assert len(points) == 12  # per block: qkv and value/gate share theirs
    assert all(point.dtype == np.uint8 and point == 128 for point in points)


@pytest.mark.parametrize("graph", ["conditioning", "step"])
def test_integers_equal_the_standards(sqs, tiny_sqs, graph):
    """The same weights in OpenVINO's dialect, run node by node as the standard says, give the same numbers."""
    inputs = random_inputs(sqs, graph)
    found = opened(sqs, graph).run(inputs)
    for path in (sqs.path(f"{graph}.onnx"), tiny_sqs.path(f"{graph}.onnx")):
        for name, expected in unoptimized(path, inputs).items():
            # Float sums in another order may tip a value over a rounding edge; few do.
            assert relative(found[name], expected) < 0.01, name
            assert np.median(np.abs(found[name] - expected)) < 1e-4 * np.abs(expected).max(), name


# -------------------- running


@pytest.mark.parametrize("graph", GRAPHS)
def test_float_graphs_equal_the_standards(floats, graph):
    inputs = random_inputs(floats, graph)
    found = opened(floats, graph).run(inputs)
    for name, expected in unoptimized(floats.path(f"{graph}.onnx"), inputs).items():
        assert np.abs(expected).max() > 0
        assert relative(found[name], expected) < 1e-4, name


def test_same_seed_same_latents_as_openvino(floats, tiny_float):
    settings = Settings(steps=8, sampler="dpmpp-2m", cfg_scale=2)
    latents = []
    for bundle in (floats, tiny_float):
        pipeline = Pipeline(bundle)
        latents.append(pipeline.sample(pipeline.condition("dog barking", settings, 0.5), settings))
    assert relative(*latents) < 1e-4


@pytest.mark.parametrize("what", ["floats", "sqs"])
def test_clips_computed_at_once_are_the_same_bytes(what, request):
    pipeline, settings = Pipeline(request.getfixturevalue(what)), Settings(steps=4)
    at_once = pipeline.generate(["dog", "rain"], settings, num_variations=2, batch=3)
    for clip, alone in zip(at_once, pipeline.generate(["dog", "rain"], settings, num_variations=2), strict=True):
        np.testing.assert_array_equal(clip.audio, alone.audio)


def test_int8_velocities_equal_openvinos(sqs, tiny_sqs, tiny_float):
    exact_int8("openvino")
    inputs = random_inputs(sqs, "step")
    found, other, exact = (Pipeline(b).engine("step").run(inputs)["velocity"] for b in (sqs, tiny_sqs, tiny_float))
    assert relative(found, other) < 0.1 * relative(other, exact)


def test_velocities_of_7_bits_equal_openvinos_on_any_cpu(tiny, tiny_table_file, tiny_float, tmp_path):
    checkpoint, recipe = Checkpoint.open(str(tiny)), Recipe("sqs", "w7a8")
    bundles = [build_bundle(checkpoint, recipe, b, tmp_path / b, tiny_table_file).bundle for b in CPU_BACKENDS]
    inputs = random_inputs(bundles[0], "step")
    found, other, exact = (Pipeline(b).engine("step").run(inputs)["velocity"] for b in (*bundles, tiny_float))
    assert relative(found, other) < 0.1 * relative(other, exact)


def test_inputs_stay_bound_and_belong_to_the_engine(floats):
    first, second = (random_inputs(floats, "step", seed) for seed in (1, 2))
    fresh = opened(floats, "step").run({**first, "x": second["x"]})["velocity"]
    engine = opened(floats, "step")
    before = engine.run(first)["velocity"]
    kept = before.copy()
    for array in first.values():
        array[...] = np.nan
    np.testing.assert_array_equal(engine.run({"x": second["x"]})["velocity"], fresh)
    np.testing.assert_array_equal(before, kept)


def test_a_wrong_or_missing_input_is_refused(floats):
    inputs = random_inputs(floats, "step")
    engine = opened(floats, "step")
    with pytest.raises(ValueError, match=r"x has shape \(1, 16, 24\), the engine takes \(2, 16, 24\)"):
        engine.run({**inputs, "x": inputs["x"][:1]})
    del inputs["time_embed"]
    with pytest.raises(ValueError, match="inputs never given: time_embed"):
        opened(floats, "step").run(inputs)


def test_shapes_for_another_graph_are_refused(floats):
    with pytest.raises(RuntimeError, match="its inputs are"):
        ONNXRuntimeEngine(floats.path("step.onnx"), shapes_of(floats, "decoder"))


@pytest.mark.parametrize(
    ("vnni", "precision", "exact"),
    [(True, "int32", "0"), (False, "int32", "1"), (True, "int16", "0"), (False, "int16", "0")],
)
def test_without_vnni_kernels_that_cannot_overflow_are_taken(floats, monkeypatch, vnni, precision, exact):
    seen = {}

    class Options(onnxruntime.SessionOptions):
        def add_session_config_entry(self, name, value):
            seen[name] = value
            super().add_session_config_entry(name, value)

    monkeypatch.setattr(backend, "has_vnni", lambda: vnni)
    monkeypatch.setattr(backend.ort, "SessionOptions", Options)
    ONNXRuntimeEngine(floats.path("text.onnx"), shapes_of(floats, "text"), precision=precision)
    assert seen.get("session.x64quantprecision", "0") == exact


def test_the_exact_kernels_give_the_same_numbers(sqs, monkeypatch):
    inputs = random_inputs(sqs, "step")
    expected = opened(sqs, "step").run(inputs)["velocity"]
    monkeypatch.setattr(backend, "has_vnni", lambda: False)
    engine = opened(sqs, "step")
    assert engine.int8_matmuls() & named(STEP_MATMULS) == named(STEP_MATMULS)
    assert relative(engine.run(inputs)["velocity"], expected) < 0.01


# -------------------- devices


def test_cuda_without_the_cuda_package_says_which_one(floats):
    with pytest.raises(UserError, match="cuda needs onnxruntime-gpu in the place of onnxruntime"):
        opened(floats, "step", device="cuda")


@pytest.mark.parametrize("device", ["tpu", ""])
def test_an_unknown_device_names_those_there_are(floats, device):
    with pytest.raises(UserError, match="available: cpu"):
        opened(floats, "step", device=device)


@pytest.mark.filterwarnings(PLANTED)
def test_a_cuda_that_does_not_start_is_not_silently_the_cpu(floats, monkeypatch):
    """onnxruntime-gpu without a driver falls back to the CPU and only logs it."""
    monkeypatch.setattr(backend.ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(UserError, match="no working cuda here"):
        opened(floats, "step", device="cuda")


def test_float_products_can_be_accepted(tiny, tiny_table_file, tmp_path, monkeypatch):
    """What a CUDA build meets: no int8 product at all; refused, unless it was asked for."""
    monkeypatch.setattr(ONNXRuntimeEngine, "int8_matmuls", lambda self: set())
    checkpoint = Checkpoint.open(str(tiny))
    with pytest.raises(
        UserError, match=r"^14 of 14 Linears do not run in int8 with onnxruntime: .*--allow-float-gemm$"
    ):
        build_bundle(checkpoint, Recipe("sqs"), "onnxruntime", tmp_path / "b", tiny_table_file)
    built = build_bundle(checkpoint, Recipe("sqs"), "onnxruntime", tmp_path / "b", tiny_table_file, allow_float=True)
    assert (built.linears, built.int8_linears) == (14, 0)
    assert (built.bundle.manifest["linears"], built.bundle.manifest["int8_linears"]) == (14, 0)
