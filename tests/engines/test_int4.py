"""4-bit weights in engines: `expanded` multiplies by just the int8 weight it says, `memory` in int8 of its own."""

import int4_graphs
import numpy as np
import onnx
import pytest
from hardware import dynamic_int4, has_amx_bf16, product, saturates
from int4_graphs import DELTA, NAME, random_weight, write_linear
from onnx import helper, numpy_helper
from openvino import Type

from dit_trt.engines import onnxruntime as ort_backend
from dit_trt.engines import onnxruntime_int4, openvino_int4
from dit_trt.engines.base import BACKENDS
from dit_trt.engines.onnxruntime import ONNXRuntimeEngine
from dit_trt.engines.openvino import OpenVINOEngine
from dit_trt.exporters.quantized import Weight

SHAPES = [(64, 192, 0), (64, 192, 64), (48, 96, 96), (128, 128, 32)]  # out, in, group
ROWS = 5
ENGINES = {"openvino": OpenVINOEngine, "onnxruntime": ONNXRuntimeEngine}
over_backends = pytest.mark.parametrize("backend", ENGINES)
over_shapes = pytest.mark.parametrize(("out_features", "in_features", "group"), SHAPES)


def opened(backend, folder, weight, form, bias=None, rows=ROWS, **options):
    path = write_linear(folder, weight, form, rows, BACKENDS[backend].dialect.activation, bias)
    return ENGINES[backend](path, {"x": (rows, weight.integers.shape[1])}, threads=1, **options)


def answer(engine, x):
    return engine.run({"x": x})["y"].T


def activations(in_features, rows=ROWS):
    x = np.random.default_rng(1).standard_normal((rows, in_features)).astype(np.float32)
    x[:, 3] *= 10  # an outlier channel, else ranges of any extent would be nearly the same
    return x


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


# -------------------- expanded


def integers_inside(backend, folder, weight):
    """The integers [out, in] by which an `expanded` engine multiplies: its answer to one input channel at a time."""
    in_features = weight.integers.shape[1]
    engine = opened(backend, folder, weight, "expanded", rows=in_features)
    assert NAME in engine.int8_matmuls()
    # By ones: sums so small are exact in 16 bits too, where a CPU without VNNI adds them.
    found = answer(engine, np.eye(in_features, dtype=np.float32) * DELTA)
    scaled = found.T / np.float64(DELTA) / int4_graphs.int8(weight)[1][:, None]
    np.testing.assert_allclose(scaled, np.rint(scaled), atol=1e-3)
    return np.rint(scaled)


@over_backends
@over_shapes
def test_expanded_multiplies_by_the_integers_it_says(tmp_path, backend, out_features, in_features, group):
    weight = random_weight(out_features, in_features, group)
    np.testing.assert_array_equal(integers_inside(backend, tmp_path, weight), int4_graphs.int8(weight)[0])


@over_backends
def test_expanded_rounds_ties_and_near_ties_as_the_standard(tmp_path, backend):
    """OpenVINO's own folding would miss 4 % of these."""
    scale = np.random.default_rng(0).integers(1, 40, (512, 4)).astype(np.float32) / 2
    scale[:, 0] = np.float32(127 / 7) * np.float32(1.2)
    weight = Weight(random_weight(512, 128).integers, scale, 4)
    np.testing.assert_array_equal(integers_inside(backend, tmp_path, weight), int4_graphs.int8(weight)[0])


@over_backends
@over_shapes
@pytest.mark.parametrize("with_bias", [False, True])
def test_expanded_equals_its_simulation(tmp_path, backend, out_features, in_features, group, with_bias):
    weight, x = random_weight(out_features, in_features, group), activations(in_features)
    bias = np.linspace(-1, 1, out_features, dtype=np.float32) if with_bias else None
    engine = opened(backend, tmp_path, weight, "expanded", bias)
    assert NAME in engine.int8_matmuls()
    integers, c = int4_graphs.int8(weight)
    x_q = np.clip(np.rint(x / DELTA), -128, 127)
    expected = product(backend, x_q, integers) * (np.float64(DELTA) * c) + (bias if with_bias else 0)
    assert relative(answer(engine, x), expected) < 1e-6


def test_large_expanded_weights_are_in_a_file_and_the_same(tmp_path, monkeypatch, home):
    weight, x = random_weight(128, 192, 64), activations(192)
    in_memory = answer(opened("openvino", tmp_path, weight, "expanded"), x)
    asked, memmap = [], np.memmap
    monkeypatch.setattr(openvino_int4, "LARGE", 1)
    monkeypatch.setattr(openvino_int4.np, "memmap", lambda *a, **k: asked.append(k["shape"]) or memmap(*a, **k))
    np.testing.assert_array_equal(answer(opened("openvino", tmp_path, weight, "expanded"), x), in_memory)
    assert asked == [(128 * 192,)]
    assert list((home / "expanded").iterdir()) == [], "it has no name"


def test_openvino_holds_an_int8_weight(tmp_path):
    engine = opened("openvino", tmp_path, random_weight(64, 192, 64), "expanded")
    ops = engine.compiled.get_runtime_model().get_ordered_ops()
    assert not [op for op in ops if op.get_output_size() and op.get_output_element_type(0) == Type.i4]
    [product] = [op for op in ops if op.get_rt_info()["layerType"].astype(str) == "FullyConnected"]
    assert [product.get_input_element_type(i) for i in (0, 1)] == [Type.i8, Type.i8]


@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize("vnni", [True, False])
def test_onnx_runtime_folds_the_weight_when_it_opens(tmp_path, monkeypatch, group, vnni):
    """No run computes it again, with the kernels for any CPU neither."""
    monkeypatch.setattr(ort_backend, "has_vnni", lambda: vnni)
    engine = opened("onnxruntime", tmp_path, random_weight(64, 192, group), "expanded")
    engine._open(tmp_path / "optimized.onnx")
    graph = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph
    assert sorted(node.op_type for node in graph.node) == ["MatMulIntegerToFloat", "QuantizeLinear", "Transpose"]
    assert onnx.TensorProto.INT4 not in {tensor.data_type for tensor in graph.initializer}


# -------------------- memory


def dynamic(x, weight, group):
    """x W^T with x rounded to 127ths of the absmax of every token and `group` of its channels."""
    blocks = [x[:, start : start + group] for start in range(0, x.shape[1], group)]
    absmax = [np.abs(block).max(axis=1, keepdims=True) for block in blocks]
    rounded = [np.rint(block * (127 / top)) * (top / 127.0) for block, top in zip(blocks, absmax)]
    return np.concatenate(rounded, axis=1).astype(np.float64) @ int4_graphs.real(weight).T.astype(np.float64)


def group_of(backend, in_features, group):
    """How many channels of the activation share a range: of OpenVINO and of ONNX Runtime."""
    if backend == "openvino":
        return openvino_int4.dynamic_group({(in_features, in_features // (group or in_features))})
    return group or int(onnxruntime_int4.OPTIONS[onnxruntime_int4.BLOCK])


MEMORY = [
    *(("openvino", *shape) for shape in [*SHAPES, (64, 200, 0), (64, 256, 128)]),
    *(("onnxruntime", *shape) for shape in [(64, 192, 0), (64, 192, 64), (128, 128, 32), (64, 200, 0), (64, 256, 128)]),
]


@pytest.mark.parametrize(("backend", "out_features", "in_features", "group"), MEMORY)
@pytest.mark.parametrize("with_bias", [False, True])
def test_memory_runs_in_int8(tmp_path, backend, out_features, in_features, group, with_bias):
    """Counted, and its numbers are those of int8 activations, which are far from those of float ones."""
    weight, x = random_weight(out_features, in_features, group), activations(in_features)
    bias = np.linspace(-1, 1, out_features, dtype=np.float32) if with_bias else None
    engine = opened(backend, tmp_path, weight, "memory", bias)
    assert (NAME in engine.int8_matmuls()) == (not saturates(backend))
    dynamic_int4(backend)
    found = answer(engine, x) - (bias if with_bias else 0)
    expected = dynamic(x, weight, group_of(backend, in_features, group))
    assert relative(found, expected) < 1e-5
    assert relative(found, x @ int4_graphs.real(weight).T) > 1e-3


TAILS = {  # what may follow a product: (op, its other input), None: a low-rank branch; in the order of the graph
    "bias": [("Add", "bias")],
    "bias and residual": [("Add", "bias"), ("Add", "residual")],
    "low-rank and bias": [("Add", None), ("Add", "bias")],
    "step": [("Mul", "factor")],
    "step, low-rank and bias": [("Add", None), ("Mul", "factor"), ("Add", "bias"), ("Add", "residual")],
}


@over_backends
@pytest.mark.parametrize("form", ["expanded", "memory"])
@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
def test_a_product_keeps_its_name_whatever_follows(tmp_path, backend, form, tail):
    path = write_linear(tmp_path, random_weight(64, 192, 64), form, ROWS, BACKENDS[backend].dialect.activation)
    model = onnx.load(path)
    graph, shapes = model.graph, {"x": (ROWS, 192), "factor": (1,), "residual": (ROWS, 64)}
    constants = {"a": np.ones((192, 16)), "b": np.ones((16, 64)), "bias": np.ones(64)}
    graph.initializer.extend(numpy_helper.from_array(v.astype(np.float32), name) for name, v in constants.items())
    graph.input.extend(helper.make_tensor_value_info(name, 1, shapes[name]) for name in ("factor", "residual"))
    last = graph.node.pop()
    for i, (op, other) in enumerate(tail):
        if other is None:
            graph.node.append(helper.make_node("MatMul", ["x", "a"], ["x_a"], name="low.a"))
            graph.node.append(helper.make_node("MatMul", ["x_a", "b"], ["low_rank"], name="low.b"))
        inputs = [last.input[0], other or "low_rank"]
        graph.node.append(helper.make_node(op, inputs, [f"after.{i}"], name=f"node_{i}"))
        last.input[0] = f"after.{i}"
    graph.node.append(last)
    used = {name for node in graph.node for name in node.input}
    for value in [value for value in graph.input if value.name not in used]:
        graph.input.remove(value)
    onnx.save_model(model, path)
    engine = ENGINES[backend](path, {name: shape for name, shape in shapes.items() if name in used}, threads=1)
    assert not engine.int8_matmuls() & {"low.a", "low.b"}
    if form == "memory":
        dynamic_int4(backend)
    assert NAME in engine.int8_matmuls()


def test_openvino_without_dynamic_quantization_is_not_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("dit_trt.engines.openvino.dynamic_group", lambda weights: 0)
    weight, x = random_weight(64, 192, 64), activations(192)
    engine = opened("openvino", tmp_path, weight, "memory")
    assert engine.int8_matmuls() == set()
    assert NAME in engine.float_matmuls()
    assert relative(answer(engine, x), x @ int4_graphs.real(weight).T) < 1e-6


def test_onnx_runtime_at_another_level_is_not_counted(tmp_path, monkeypatch):
    monkeypatch.setitem(onnxruntime_int4.OPTIONS, onnxruntime_int4.LEVEL, "0")
    weight, x = random_weight(64, 192, 64), activations(192)
    engine = opened("onnxruntime", tmp_path, weight, "memory")
    assert engine.int8_matmuls() == set()
    assert relative(answer(engine, x), x @ int4_graphs.real(weight).T) < 1e-6


@pytest.mark.parametrize(("backend", "group"), [("openvino", 24), ("onnxruntime", 24)])
def test_groups_no_kernel_takes_are_not_counted(tmp_path, backend, group):
    weight, x = random_weight(64, 96, group), activations(96)
    engine = opened(backend, tmp_path, weight, "memory")
    assert engine.int8_matmuls() == set()
    assert relative(answer(engine, x), x @ int4_graphs.real(weight).T) < 1e-6


def test_a_cpu_whose_kernels_are_float_is_not_counted(tmp_path, monkeypatch):
    for module, backend in ((openvino_int4, "openvino"), (onnxruntime_int4, "onnxruntime")):
        engine = opened(backend, tmp_path, random_weight(64, 192, 64), "memory")
        monkeypatch.setattr(module, "quantizes_activations", lambda *_: False)
        assert engine.int8_matmuls() == set()


@pytest.mark.parametrize(
    ("in_features", "groups", "group", "expected"),
    [(256, 1, 128, True), (256, 4, 64, True), (256, 4, 128, False), (256, 1, 0, False), (192, 2, 64, False)],
)
@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_the_trial_tells_what_openvino_quantizes(in_features, groups, group, expected, precision):
    """With AMX its BF16 kernels are preferred to those that quantize."""
    found = openvino_int4.quantizes_activations(8, in_features, groups, group, precision)
    in_bf16 = precision == "bf16" and has_amx_bf16()
    assert found == (expected and not saturates("openvino") and not in_bf16)


@pytest.mark.parametrize(
    ("weights", "group"),
    [
        ({(1536, 1), (6144, 1)}, 128),
        ({(1536, 12)}, 128),
        ({(1536, 24)}, 64),
        ({(1536, 12), (96, 3)}, 32),
        ({(200, 1), (64, 1)}, 64),
        ({(96, 4)}, 0),
    ],
)
def test_the_largest_group_that_suits_all(weights, group):
    assert openvino_int4.dynamic_group(weights) == group


def test_a_cached_engine_is_the_same_engine(tmp_path):
    weight, x = random_weight(64, 192, 64), activations(192)
    for form in ("expanded", "memory"):
        (tmp_path / form).mkdir()
        engines = [opened("openvino", tmp_path, weight, form, cache=tmp_path / form) for _ in range(2)]
        assert list((tmp_path / form).rglob("*.blob"))
        in_int8 = form == "expanded" or not saturates("openvino")
        assert [NAME in engine.int8_matmuls() for engine in engines] == [in_int8] * 2
        np.testing.assert_array_equal(*(answer(engine, x) for engine in engines))
