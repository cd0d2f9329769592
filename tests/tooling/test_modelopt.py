"""nvidia-modelopt's INT8 of the tiny model: the same function in our engines, in int8, and a bundle like any other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from commands import error_of, invoke, one_object
from hardware import CPU_BACKENDS, exact_int8
from onnx import TensorProto, helper, numpy_helper
from tiny import random_model, write_checkpoint

from dit_trt.engines.base import BACKENDS
from dit_trt.engines.bundle import Bundle
from dit_trt.engines.errors import UserError
from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.exporters.fake_quant import import_step
from dit_trt.runtime.pipeline import Pipeline, Settings
from dit_trt.tooling import modelopt
from dit_trt.tooling.modelopt import Source, build_modelopt
from dit_trt.tooling.modelopt_step import arguments, export_step, input_names, quantize_step, step_linears
from dit_trt.tooling.peers import Call, calibration_calls, plain_graph
from dit_trt.tooling.peers import step_linears as named_parts
from peers import require

ALGORITHMS = ["smoothquant", "svdquant"]
SETTINGS = Settings(steps=6, seed=7)


@dataclass(frozen=True)
class Quantized:
    """modelopt's model of the tiny one, its ONNX, and what it was calibrated on."""

    step: torch.nn.Module
    source: Source

    def velocity(self, call: Call) -> np.ndarray:
        with torch.inference_mode():
            return self.step(*arguments(call)).numpy()


@pytest.fixture(scope="module")
def checkpoint(tiny: Path) -> Checkpoint:
    return Checkpoint.open(str(tiny))


@pytest.fixture(scope="module")
def quantized(
    checkpoint: Checkpoint, tiny_float: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Quantized]:
    require("modelopt.torch.quantization")
    calls = calibration_calls(Pipeline(tiny_float), ["dog barking", "rain"], SETTINGS, 2)
    folder = tmp_path_factory.mktemp("modelopt")
    made: dict[str, Quantized] = {}

    def quantize(algorithm: str) -> Quantized:
        if algorithm not in made:
            step = quantize_step(checkpoint, algorithm, calls)
            for name, factor in step.named_buffers():  # stored in FP16: so they are the same numbers
                if "svdquant_lora" in name:
                    factor.copy_(factor.half().float())
            export_step(step, calls[0], folder / f"{algorithm}.onnx")
            facts = {"prompts": ["dog barking", "rain"], "settings": asdict(SETTINGS), "calls": 2}
            source = Source(folder / f"{algorithm}.onnx", f"modelopt-{algorithm}", {}, facts, calls)
            made[algorithm] = Quantized(step, source)
        return made[algorithm]

    return quantize


@pytest.fixture(scope="module")
def bundle(
    checkpoint: Checkpoint, quantized: Callable[[str], Quantized], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Bundle]:
    folder = tmp_path_factory.mktemp("bundles")

    def build(algorithm: str, backend: str) -> Bundle:
        target = folder / f"{algorithm}-{backend}"
        if not target.exists():
            build_modelopt(checkpoint, quantized(algorithm).source, backend, target)
        return Bundle(target)

    return build


def plainly(graph: Path, call: Call) -> np.ndarray:
    """The velocity by ONNX Runtime, node by node as they stand."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(graph), options)
    return session.run(None, {name: call[name] for name in input_names(call)})[0]


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# -------------------- the same function


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_import_computes_what_modelopts_onnx_does(
    algorithm: str, backend: str, checkpoint: Checkpoint, quantized: Callable[[str], Quantized], tmp_path: Path
) -> None:
    """To the bit, where nothing is optimized; and in a third of the bytes."""
    source = quantized(algorithm).source
    target = tmp_path / "step.onnx"
    names = input_names(source.calls[0])
    found = import_step(source.onnx, target, step_linears(checkpoint), names, BACKENDS[backend].dialect)
    assert found.keys() == {linear.name for linear in step_linears(checkpoint)}
    for call in source.calls:
        np.testing.assert_array_equal(plainly(target, call), plainly(source.onnx, call))
    tensors = {tensor.name: tensor for tensor in onnx.load(target).graph.initializer}
    stored = {"int8": TensorProto.INT8, "scale": TensorProto.FLOAT}
    for linear in step_linears(checkpoint):
        for part, size in linear.parts.items():
            base = linear.graph_name(part).removesuffix(".weight")
            assert {kind: tensors[f"{base}.{kind}"].data_type for kind in stored} == stored
            assert list(tensors[f"{base}.int8"].dims) == [linear.in_features, size]
    halves = [tensor for tensor in tensors.values() if tensor.data_type == TensorProto.FLOAT16]
    assert len(halves) == (36 if algorithm == "svdquant" else 0)
    assert sum(item.branch_bytes for item in found.values()) == sum(len(half.raw_data) for half in halves)
    assert target.with_name("step.onnx.data").stat().st_size < source.onnx.stat().st_size * 0.4


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_engine_is_modelopts_model_in_int8(
    algorithm: str,
    backend: str,
    quantized: Callable[[str], Quantized],
    bundle: Callable[[str, str], Bundle],
    tiny_float: Bundle,
) -> None:
    """Every Linear of the step by the runtime's account, and the velocity of modelopt's own torch model.

    Not more apart than a few integers on rounding edges make: the method itself is 5 to 10 % from FP32.
    """
    manifest = bundle(algorithm, backend).verify().manifest
    assert (manifest["linears"], manifest["int8_linears"]) == (12, 12)
    assert [layer["name"] for layer in manifest["layers"] if not layer["int8"]] == [
        f"transformer.layers.{i}.cross_attn.to_kv" for i in range(2)
    ]
    model, engine = quantized(algorithm), Pipeline(bundle(algorithm, backend)).engine("step")
    exact_int8(backend)
    exact = Pipeline(tiny_float).engine("step")
    for call in model.source.calls:
        expected = model.velocity(call)
        assert distance(engine.run(call)["velocity"], expected) < 0.01
        assert distance(exact.run(call)["velocity"], expected) > 0.03


def test_weights_that_are_stored_as_integers(tiny_float: Bundle, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """[in, out] without a Transpose, int8 with a DQ: what ONNX-level quantizers write, modelopt.onnx's among them."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    calls = iter(calibration_calls(Pipeline(tiny_float), ["rain"], SETTINGS, 2))
    call = next(calls)

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict | None:
            return next(({**call} for call in calls), None)

    linears = step_linears(checkpoint)
    plain, source, target = (tmp_path / f"{name}.onnx" for name in ("plain", "source", "step"))
    quantize_static(
        plain_graph(tiny_float.path("step.onnx"), plain),
        source,
        Reader(),
        op_types_to_quantize=["MatMul"],
        nodes_to_quantize=[part for parts in named_parts(linears).values() for part in parts],
        per_channel=True,
        activation_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True, "OpTypesToExcludeOutputQuantization": ["MatMul"]},
    )
    found = import_step(source, target, linears, input_names(call), BACKENDS["onnxruntime"].dialect)
    assert found.keys() == {linear.name for linear in linears}
    np.testing.assert_array_equal(plainly(target, call), plainly(source, call))


# -------------------- a bundle like any other


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_tensorrt_builds_it_and_every_linear_is_int8(algorithm: str, bundle: Callable[[str, str], Bundle]) -> None:
    manifest = bundle(algorithm, "tensorrt").manifest
    assert manifest["backend"] == "tensorrt"
    assert (manifest["linears"], manifest["int8_linears"]) == (12, 12)


def test_the_bundle_runs_and_is_compared(bundle: Callable[[str, str], Bundle], tmp_path: Path) -> None:
    folder = bundle("svdquant", "openvino").folder
    sound = tmp_path / "sound.wav"
    for more in ((), ("--short-window", "--seconds", 0.3), ("--cfg", 1)):  # both, fewer and one of the axes
        invoke("run", "--bundle", folder, "--steps", 2, "--output", sound, *more, "rain")
        assert sound.stat().st_size > 1000
        sound.unlink()
    found = one_object(invoke("diff", folder, "--num-prompts", 1, "--steps", 3, "--min-cosine", 0.1, "--json").stdout)
    assert found["passed"]
    assert found["worst_step_cosine"] < 0.9999
    shown = invoke("inspect", folder).stdout
    assert "modelopt-svdquant (smoothing static, activation range static), w8a8" in shown
    assert "exclude cross_attn.to_kv" in shown
    assert "12 asked for, 12 in int8" in shown
    assert "2 prompts x 6 steps" in shown
    layers = one_object(invoke("inspect", folder, "--json").stdout)["layers"]
    assert {layer["branch_bytes"] > 0 for layer in layers if layer["int8"]} == {True}


def test_both_halves_get_their_own_context(bundle: Callable[[str, str], Bundle], tiny_float: Bundle) -> None:
    """Its graph would give the prompt's context to the unconditional half, too, where ours takes a shorter one."""
    settings = Settings(steps=4, seed=3)
    pipeline, reference = Pipeline(bundle("max", "openvino")), Pipeline(tiny_float)
    conditioning = pipeline.condition("a dog barks", settings, 0.5)
    assert conditioning.contexts == 1 and pipeline.context_rows(conditioning) == 2
    assert reference.context_rows(conditioning) == 1
    given = pipeline.step_engine_for(conditioning).engines[0].inputs
    assert {shape[0] for name, shape in given.items() if name.startswith("context_")} == {2}


@pytest.mark.parametrize("command", [("inspect", "--recipe"), ("diff", "--simulate")])
def test_it_has_no_recipe(command: tuple[str, str], bundle: Callable[[str, str], Bundle]) -> None:
    message = error_of(command[0], bundle("smoothquant", "openvino").folder, command[1])
    assert message.endswith("was made by modelopt-smoothquant, not by a recipe of dit-trt build")


def run(*arguments: object, code: int = 0) -> str:
    """The module's own command; its one JSON object, or its one line of error."""
    result = CliRunner().invoke(modelopt.command, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    if code:
        assert result.stdout == ""
        return result.stderr.splitlines()[-1]
    return result.stdout


def test_the_command(tiny: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require("modelopt.torch.quantization")
    monkeypatch.setenv("DIT_TRT_HOME", str(tmp_path))
    for cache in ("graphs", "reference"):
        (tmp_path / cache).symlink_to(home / cache)
    few = ("--num-prompts", 2, "--calib-steps", 2, "--calls", 2)
    built = one_object(run("--model", tiny, "--algorithm", "max", "--backend", "openvino", *few, "--json"))
    assert (built["linears"], built["int8_linears"], built["backend"]) == (12, 12, "openvino")
    [listed] = one_object(invoke("list", "--json").stdout)["bundles"]
    assert (listed["bundle"], listed["method"]) == (built["bundle"], "modelopt-max")
    manifest = Bundle(Path(built["bundle"])).verify().manifest
    assert manifest["recipe"]["smoothing"] == "none"
    assert manifest["calibration"]["calls"] == 2
    assert manifest["versions"]["nvidia-modelopt"]


def test_a_users_own_step(
    tiny: Path, quantized: Callable[[str], Quantized], bundle: Callable[[str, str], Bundle], tmp_path: Path
) -> None:
    graph = quantized("smoothquant").source.onnx
    out = tmp_path / "mine"
    run("--model", tiny, "--onnx", graph, "--backend", "openvino", "--output", out)
    mine, made = Bundle(out), bundle("smoothquant", "openvino")
    assert mine.manifest["recipe"]["method"] == "modelopt-onnx"
    assert mine.manifest["calibration"] is None
    files = ("step.onnx", "step.onnx.data", "scales.safetensors")
    assert {name: mine.manifest["files"][name] for name in files} == {
        name: made.manifest["files"][name] for name in files
    }


# -------------------- what is refused


def removed(kinds: Sequence[str]) -> Callable[[onnx.GraphProto], None]:
    """The Q and DQ of weights or inputs taken out."""

    def change(graph: onnx.GraphProto) -> None:
        renamed: dict[str, str] = {}
        for node in list(graph.node):
            if node.op_type in ("QuantizeLinear", "DequantizeLinear") and any(kind in node.name for kind in kinds):
                renamed[node.output[0]] = renamed.get(node.input[0], node.input[0])
                graph.node.remove(node)
        for node in graph.node:
            for i, name in enumerate(node.input):
                node.input[i] = renamed.get(name, name)

    return change


def renamed_weight(old: str, new: str) -> Callable[[onnx.GraphProto], None]:
    def change(graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            if tensor.name == f"dit.transformer.layers.0.{old}.weight":
                for node in graph.node:
                    for i, name in enumerate(node.input):
                        node.input[i] = f"dit.{new}.weight" if name == tensor.name else name
                tensor.name = f"dit.{new}.weight"

    return change


def resized(*shape: int) -> Callable[[onnx.GraphProto], None]:
    def change(graph: onnx.GraphProto) -> None:
        name = "dit.transformer.layers.0.cross_attn.to_q.weight"
        tensor = next(tensor for tensor in graph.initializer if tensor.name == name)
        tensor.CopyFrom(numpy_helper.from_array(np.ones(shape, np.float32), name))

    return change


def fixed_shape(graph: onnx.GraphProto) -> None:
    graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


def half_inputs(graph: onnx.GraphProto) -> None:
    graph.input[1].type.tensor_type.elem_type = TensorProto.FLOAT16


def zero_points(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and "input_quantizer" in node.name:
            graph.initializer.append(numpy_helper.from_array(np.array(3, np.int8), "three"))
            node.input[2] = "three"
            for other in graph.node:
                if other.op_type == "DequantizeLinear" and other.input[0] == node.output[0]:
                    other.input[2] = "three"
            return


def another_scale(graph: onnx.GraphProto) -> None:
    node = next(node for node in graph.node if node.op_type == "DequantizeLinear" and "input_quantizer" in node.name)
    graph.initializer.append(numpy_helper.from_array(np.array(0.5, np.float32), "half"))
    node.input[1] = "half"


def attention_too(graph: onnx.GraphProto) -> None:
    """Softmax's output quantized, as modelopt's attention quantizers do."""
    softmax = next(node for node in graph.node if node.op_type == "Softmax")
    name = softmax.output[0]
    graph.initializer.append(numpy_helper.from_array(np.array(1 / 127, np.float32), "s"))
    graph.initializer.append(numpy_helper.from_array(np.array(0, np.int8), "z"))
    for node in graph.node:
        for i, read in enumerate(node.input):
            node.input[i] = f"{name}.dq" if read == name else read
    place = list(graph.node).index(softmax) + 1
    graph.node.insert(place, helper.make_node("DequantizeLinear", [f"{name}.q", "s", "z"], [f"{name}.dq"], "a_dq"))
    graph.node.insert(place, helper.make_node("QuantizeLinear", [name, "s", "z"], [f"{name}.q"], "a_q"))


def foreign_node(graph: onnx.GraphProto) -> None:
    graph.node[-1].domain = "trt"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (removed(["_quantizer"]), "quantizes no Linear of this model's blocks; export the step with its Q/DQ nodes"),
        (removed(["input_quantizer"]), "is quantized, its input is not: W8A8 needs both"),
        (removed(["to_qkv/k/"]), "quantizes only q, v of transformer.layers.0.self_attn.to_qkv"),
        (
            renamed_weight("cross_attn.to_q", "transformer.project_in"),
            r"leave it float \({\"quantizer_name\": \"\*tran",
        ),
        (renamed_weight("cross_attn.to_q", "transformer.layers.0.self_attn.to_qkv"), "split its parts first"),
        (renamed_weight("cross_attn.to_q", "transformer.layers.0.self_attn.to_out"), "two products read dit.transf"),
        (resized(128, 64), "is .64, 128., not of this model"),
        (resized(64, 128), "the scales of dit.transformer.layers.0.cross_attn.to_q.weight .64, 128. are not one an"),
        (another_scale, "is dequantized by another scale than it is quantized by"),
        (zero_points, "is not quantized symmetrically to 8 bits"),
        (attention_too, "a_dq quantizes what no Linear of a block reads"),
        (fixed_shape, "x has a fixed shape; export it with dynamic_axes"),
        (half_inputs, "global_embed are not float32; export the model in float32"),
        (foreign_node, "has nodes of trt: of modelopt's formats only INT8 is taken"),
        (lambda graph: graph.input.pop(), "context_v.1 missing or unknown"),
        (lambda graph: setattr(graph.output[0], "name", "y"), "its output is not velocity alone"),
    ],
)
def test_another_graph_is_refused(
    change: Callable[[onnx.GraphProto], object],
    line: str,
    checkpoint: Checkpoint,
    quantized: Callable[[str], Quantized],
    tmp_path: Path,
) -> None:
    source = quantized("smoothquant").source
    model = onnx.load(source.onnx)
    change(model.graph)
    onnx.save(model, tmp_path / "changed.onnx")
    names = input_names(source.calls[0])
    with pytest.raises(UserError, match=line) as error:
        import_step(
            tmp_path / "changed.onnx",
            tmp_path / "o.onnx",
            step_linears(checkpoint),
            names,
            BACKENDS["openvino"].dialect,
        )
    assert "\n" not in str(error.value)


def test_files_that_are_no_step_of_the_model(tiny: Path, quantized: Callable[[str], Quantized], tmp_path: Path) -> None:
    noise = tmp_path / "noise.onnx"
    noise.write_bytes(b"\xff" * 100)
    options = ("--backend", "openvino", "--output", tmp_path / "out")
    assert "cannot be read as ONNX" in run("--model", tiny, "--onnx", noise, *options, code=1)
    assert "is not a file" in run("--model", tiny, "--onnx", tmp_path / "none", *options, code=1)
    other = write_checkpoint(tmp_path / "other", random_model(seed=1))
    line = run("--model", other, "--onnx", quantized("smoothquant").source.onnx, *options, code=1)
    assert "is not a step of other: its velocity has a cosine of" in line
    assert not (tmp_path / "out").exists()


def test_options_that_do_not_go_together(tiny: Path) -> None:
    line = run("--model", tiny, "--onnx", "a.onnx", "--algorithm", "max", "--calls", 3, code=2)
    assert line.startswith("Error: --algorithm, --calls: --onnx names a step that is quantized already")
    assert "Invalid value for '--algorithm'" in run("--algorithm", "awq", code=2)
    assert "unknown backend" in run("--backend", "tpu", code=1)


def test_a_missing_package_is_named(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization", None)
    few = ("--num-prompts", 1, "--calib-steps", 1, "--calls", 1, "--output", tmp_path / "out")
    line = run("--model", tiny, "--backend", "openvino", *few, code=1)
    assert line.startswith("Error: nvidia-modelopt cannot be imported")
    assert line.endswith('pip install -e ".[modelopt]"')
