"""TensorRT's engine on a stand-in GPU (tests/fake_gpu.py): buffers, copies, CUDA graphs, plans kept and refused."""

from __future__ import annotations

import gc
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import fake_polygraphy
import numpy as np
import pytest
import tensorrt_rtx
from commands import QUICK_CALIBRATION, error_of, invoke
from fake_gpu import FakeGPU, RuntimeCache, RuntimeConfig, install
from graphs import random_inputs, shapes_of
from numpy.typing import NDArray
from readme import ROOT

from dit_trt.engines import cuda, tensorrt, tensorrt_api
from dit_trt.engines.base import BACKENDS, choose_backend, open_engine
from dit_trt.engines.bundle import Bundle
from dit_trt.engines.errors import UserError
from dit_trt.engines.manifest import write_manifest
from dit_trt.engines.onnxruntime import ONNXRuntimeEngine
from dit_trt.engines.tensorrt import StalePlanError, TensorRTEngine
from dit_trt.runtime.pipeline import Pipeline


@pytest.fixture(scope="module")
def bundles(tiny: Path, tiny_table_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """By trunk, and one whose plan runs 8 to 24 latents; built without any GPU."""
    found = {}
    for name, words in {
        "fp16": ("--trunk", "fp16"),
        "fp32": ("--trunk", "fp32", "--method", "sqd"),
        "profile": ("--profile", "8,16,24"),
    }.items():
        folder = tmp_path_factory.mktemp("bundles") / name
        invoke("build", "--model", tiny, *QUICK_CALIBRATION, "--backend", "tensorrt", *words, "--output", folder)
        found[name] = Bundle(folder)
    return found


@pytest.fixture(params=["rtx", "full"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeGPU]:
    """Of both kinds, and a home without plans."""
    monkeypatch.setenv("DIT_TRT_HOME", str(tmp_path / "home"))
    yield install(monkeypatch, full=request.param == "full")
    gc.collect()  # what is left on this GPU is freed on this one


@pytest.fixture
def rtx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeGPU]:
    monkeypatch.setenv("DIT_TRT_HOME", str(tmp_path / "home"))
    yield install(monkeypatch)
    gc.collect()


def both(bundle: Bundle, graph: str) -> tuple[TensorRTEngine, ONNXRuntimeEngine]:
    shapes = shapes_of(bundle, graph)
    return TensorRTEngine(bundle.path(f"{graph}.onnx"), shapes), ONNXRuntimeEngine(bundle.path(f"{graph}.onnx"), shapes)


# -------------------- one engine


def test_the_calls_are_those_of_nvidias_bindings() -> None:
    """Names, and what they return where there is no driver: the stand-in is like the real ones."""
    source = (ROOT / "engines" / "cuda.py").read_text("utf-8")
    names = set(re.findall(r"runtime\(\)\.(cuda\w+)", source)) | set(re.findall(r'_free(?:, |\()"(cuda\w+)"', source))
    real = cuda.runtime()
    assert len(names) >= 16
    for name in names:
        assert hasattr(real, name), name
    for kind, member in re.findall(r"(cuda\w+)\.(cudaMemcpy\w+|cudaStreamCaptureMode\w+)", source):
        assert hasattr(getattr(real, kind), member)
    assert {"name", "totalGlobalMem"} <= set(dir(real.cudaDeviceProp))
    for name in ("create_runtime_cache", "set_runtime_cache"):
        assert hasattr(tensorrt_rtx.IRuntimeConfig, name) and hasattr(RuntimeConfig, name)
    for name in ("serialize", "deserialize"):
        assert hasattr(tensorrt_rtx.IRuntimeCache, name) and hasattr(RuntimeCache, name)
    assert {"cudaDevAttrComputeCapabilityMajor", "cudaDevAttrComputeCapabilityMinor"} <= set(dir(real.cudaDeviceAttr))
    assert [len(real.cudaGetDeviceCount()), len(real.cudaFree(0))] == [2, 1]


@pytest.mark.parametrize("graph", ["text", "conditioning", "step", "decoder"])
def test_every_graph_computes_what_onnx_runtime_does(bundles: dict[str, Bundle], gpu: FakeGPU, graph: str) -> None:
    engine, reference = both(bundles["fp16"], graph)
    inputs = random_inputs(bundles["fp16"], graph)
    expected, found = reference.run(inputs), engine.run(inputs)
    assert engine.outputs == reference.outputs
    assert engine.inputs == reference.inputs
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-4 * np.abs(value).max())


def test_only_what_is_given_is_copied_and_the_rest_stays(bundles: dict[str, Bundle], gpu: FakeGPU) -> None:
    engine, reference = both(bundles["fp32"], "step")
    inputs = random_inputs(bundles["fp32"], "step")
    engine.run(inputs)
    copied = gpu.cuda.counts["cudaMemcpyAsync"]
    assert copied == len(inputs) + 1
    x = np.random.default_rng(9).standard_normal(inputs["x"].shape).astype(np.float32)
    for run in range(1, 4):
        found = engine.run({"x": x * run})["velocity"]
        expected = reference.run({**inputs, "x": x * run})["velocity"]
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    assert gpu.cuda.counts["cudaMemcpyAsync"] == copied + 3 * 2
    assert found is not engine.run({})["velocity"], "an answer is the caller's own"


def test_the_second_run_is_captured_and_the_others_launch_that(bundles: dict[str, Bundle], gpu: FakeGPU) -> None:
    """TensorRT's; TensorRT-RTX captures by itself."""
    engine, _ = both(bundles["fp16"], "decoder")
    inputs = random_inputs(bundles["fp16"], "decoder")
    launched = []
    for run in range(4):
        engine.run({"latents": inputs["latents"] * run})
        launched.append((gpu.cuda.counts["cudaStreamBeginCapture"], gpu.cuda.counts["cudaGraphLaunch"]))
    assert launched == ([(0, 0), (1, 1), (1, 2), (1, 3)] if gpu.full else [(0, 0)] * 4)


def test_wrong_and_missing_inputs(bundles: dict[str, Bundle], gpu: FakeGPU) -> None:
    engine, _ = both(bundles["fp16"], "decoder")
    with pytest.raises(ValueError, match=r"latents has shape"):
        engine.run({"latents": np.zeros((1, 1, 1), np.float32)})
    with pytest.raises(ValueError, match=r"inputs never given: latents"):
        engine.run({})


def test_a_failure_is_one_runtime_error(bundles: dict[str, Bundle], gpu: FakeGPU) -> None:
    engine, _ = both(bundles["fp16"], "decoder")
    gpu.fails = True
    tensorrt_api.log().errors[:] = ["out of\nmemory", "and more"]
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        engine.run(random_inputs(bundles["fp16"], "decoder"))
    with pytest.raises(RuntimeError, match=r"^CUDA: error 101$"):
        cuda.use_device(7)


def test_all_memory_is_given_back(bundles: dict[str, Bundle], gpu: FakeGPU) -> None:
    engines = [both(bundles["fp16"], "decoder")[0] for _ in range(2)]
    for engine in engines:
        for _ in range(3):
            engine.run(random_inputs(bundles["fp16"], "decoder"))
    assert len(gpu.cuda.memory) == 2 * 2 * len([*engines[0].inputs, *engines[0].outputs])
    del engines, engine
    gc.collect()
    assert (gpu.cuda.memory, gpu.cuda.streams, gpu.cuda.graphs) == ({}, {}, {})


# -------------------- plans


def opened(bundle: Bundle, rebuild: bool = False) -> TensorRTEngine:
    path = bundle.path("decoder.onnx")
    return open_engine("tensorrt", path, shapes_of(bundle, "decoder"), digest="d", rebuild=rebuild)  # type: ignore[return-value]


def test_a_plan_is_built_once(bundles: dict[str, Bundle], gpu: FakeGPU) -> None:
    for _ in range(3):
        opened(bundles["fp16"])
    assert gpu.builds == ["decoder.onnx"]


def test_what_tensorrt_rtx_compiled_is_kept_for_the_next_process(
    bundles: dict[str, Bundle], rtx: FakeGPU, tmp_path: Path
) -> None:
    """Kernels are compiled where a plan first runs; those of another driver are not taken, and replaced."""
    first = opened(bundles["fp16"])
    kept = list((tmp_path / "home" / "compiled").rglob("*.kernels"))
    assert [file.read_bytes() for file in kept] == [rtx.kernels] and rtx.compiled == 1
    latents = {"latents": np.ones(first.inputs["latents"], np.float32)}
    expected = first.run(latents)
    for name, array in opened(bundles["fp16"]).run(latents).items():
        np.testing.assert_array_equal(array, expected[name])
    assert rtx.compiled == 1 and len(rtx.builds) == 1
    rtx.kernels = b"kernels for the next driver"
    opened(bundles["fp16"])
    assert rtx.compiled == 2
    kept = list((tmp_path / "home" / "compiled").rglob("*.kernels"))
    assert [file.read_bytes() for file in kept] == [rtx.kernels]
    opened(bundles["fp16"])
    assert rtx.compiled == 2 and len(rtx.builds) == 1
    kept[0].write_bytes(b"forged")  # the folder is no longer what was left there: plan and kernels are made anew
    opened(bundles["fp16"])
    assert rtx.compiled == 3 and len(rtx.builds) == 2


def test_what_tensorrt_timed_is_kept_for_the_next_build(
    bundles: dict[str, Bundle], gpu: FakeGPU, tmp_path: Path
) -> None:
    opened(bundles["fp16"])
    kept = list((tmp_path / "home" / "compiled").glob("*.timing"))
    assert [file.name for file in kept] == (["TensorRT 1.7.1.116 for sm89.timing"] if gpu.full else [])
    if gpu.full:
        assert kept[0].stat().st_size > 0
        kept[0].write_bytes(b"damaged")
        shutil.rmtree(next((tmp_path / "home" / "compiled").glob("*/")))
        opened(bundles["fp16"])
        assert kept[0].read_bytes() != b"damaged"
    assert not list((tmp_path / "home" / "compiled").glob("*.part"))


def test_a_plan_of_another_version_needs_a_word(
    bundles: dict[str, Bundle], gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(bundles["fp16"])
    product = "TensorRT" if gpu.full else "TensorRT-RTX"
    monkeypatch.setattr(tensorrt_api, "version", lambda: f"{product} 99.1")
    with pytest.raises(StalePlanError) as error:
        opened(bundles["fp16"])
    target = "sm89" if gpu.full else "portable"
    assert str(error.value) == (
        f"the plan of decoder.onnx is one of {product}-1.7.1.116 for {target}; here is {product}-99.1 for {target}: "
        "build it anew with --rebuild"
    )
    opened(bundles["fp16"], rebuild=True)
    opened(bundles["fp16"])
    assert len(gpu.builds) == 2


def test_a_plan_that_changed_is_never_opened(bundles: dict[str, Bundle], gpu: FakeGPU, tmp_path: Path) -> None:
    opened(bundles["fp16"])
    [plan] = (tmp_path / "home").rglob("*.plan")
    plan.write_bytes(plan.read_bytes()[:-1] + b"x")
    opened(bundles["fp16"])
    plan.parent.chmod(0o777)
    opened(bundles["fp16"])
    assert len(gpu.builds) == 3


def test_one_plan_for_all_windows_of_a_profile(bundles: dict[str, Bundle], gpu: FakeGPU) -> None:
    pipeline = Pipeline(bundles["profile"])
    for latents in (8, 13, 24):
        assert pipeline.step_engine_of(2, latents).latent_shape[-1] == latents
    assert gpu.builds == ["step.onnx"]
    with pytest.raises(UserError, match=r"^7 latents are not among the 8 to 24 of this bundle's --profile: "):
        pipeline.step_engine_of(2, 7)


def test_an_open_engine_does_not_hold_its_plan(bundles: dict[str, Bundle], gpu: FakeGPU, tmp_path: Path) -> None:
    path, shapes = bundles["fp16"].path("step.onnx"), shapes_of(bundles["fp16"], "step")
    kept = TensorRTEngine(path, shapes, cache=tmp_path)
    [file] = tmp_path.glob("*.plan")
    assert not [v for v in vars(kept).values() if isinstance(v, bytes)]
    assert kept.plan == file.read_bytes() and kept.int8_matmuls()
    alone = TensorRTEngine(path, shapes)
    assert len(alone.plan) > 1000 and alone.int8_matmuls() == kept.int8_matmuls()


def test_weights_that_stay_on_the_device(bundles: dict[str, Bundle], gpu: FakeGPU) -> None:
    path, shapes = bundles["fp16"].path("decoder.onnx"), shapes_of(bundles["fp16"], "decoder")
    engine = TensorRTEngine(path, shapes, options={"weight_streaming": 1000, "workspace": 10**8})
    assert engine.cuda_engine.weight_streaming_budget_v2 == 1000


# -------------------- whole


@pytest.mark.parametrize("name", ["fp16", "fp32", "profile"])
def test_a_prompt_becomes_the_sound_that_onnx_runtime_makes(
    bundles: dict[str, Bundle], gpu: FakeGPU, tmp_path: Path, name: str
) -> None:
    twin = Path(shutil.copytree(bundles[name].folder, tmp_path / "twin"))
    manifest = json.loads((twin / "manifest.json").read_text())
    write_manifest(twin, {**manifest, "backend": "onnxruntime", "plan": {}})
    options = {"seconds": 0.4, "steps": 6, "seed": 3}
    found, _ = Pipeline(bundles[name])("dog barking", **options)  # type: ignore[arg-type]
    expected, _ = Pipeline(Bundle(twin))("dog barking", **options)  # type: ignore[arg-type]
    difference = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert found.shape == expected.shape and difference < 0.1
    short = {"short_window": True, "cfg_scale": 1.0}
    assert Pipeline(bundles[name])("rain", **options, **short)[0].shape == found.shape  # type: ignore[arg-type]


def test_dit_trt_run(bundles: dict[str, Bundle], rtx: FakeGPU, tmp_path: Path) -> None:
    arguments = ("run", "dog barking", "rain", "--bundle", bundles["fp16"].folder, "--steps", 2, "--output", tmp_path)
    invoke(*arguments)
    assert (tmp_path / "dog-barking-1000.wav").stat().st_size > 1000
    built = len(rtx.builds)
    invoke(*arguments, "--device", "cuda:1")
    assert len(rtx.builds) == 2 * built  # a plan for each device
    line = error_of(*arguments, "--device", "cuda:3")
    assert line == "Error: TensorRT has no device 'cuda:3' here; available: cuda:0, cuda:1"


def test_dit_trt_diff_and_polygraphys_own_plan(bundles: dict[str, Bundle], rtx: FakeGPU) -> None:
    """The printed line is right as far as there is no GPU: Polygraphy parses and builds, and cannot deserialize."""
    shown = invoke("diff", bundles["fp16"].folder, "--num-prompts", 1, "--steps", 3, "--min-cosine", 0.5).stdout
    assert "PASS: worst_step_cosine" in shown
    *_, line = (line.strip() for line in shown.splitlines() if "polygraphy run" in line)
    assert line.startswith("POLYGRAPHY_USE_TENSORRT_RTX=1 polygraphy run ")
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert "Finished engine building" in said, said
    assert done.returncode != 0 and "CUDA" in said


def test_dit_trt_diff_in_polygraphys_runner(
    bundles: dict[str, Bundle], rtx: FakeGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same plan without our runtime: level with it, and a fault in either fails."""
    fake_polygraphy.install(monkeypatch, rtx)
    arguments = ("diff", bundles["fp16"].folder, "--num-prompts", 2, "--steps", 3, "--min-cosine", 0.5)
    found = json.loads(invoke(*arguments, "--json").stdout)
    assert found["passed"] and found["trt_runner_worst_step_cosine"] == found["worst_step_cosine"]
    assert "the same plan in Polygraphy's TrtRunner, without our runtime: worst step 0." in invoke(*arguments).stdout
    alive = len(rtx.cuda.memory)
    invoke(*arguments)
    assert len(rtx.cuda.memory) == alive  # all of the runner's buffers are freed

    from polygraphy.backend.trt import TrtRunner

    infer = TrtRunner.infer_impl
    monkeypatch.setattr(TrtRunner, "infer_impl", lambda self, feed_dict: _negated(infer(self, feed_dict)))
    shown = invoke(*arguments, code=1).stdout
    assert "FAIL: worst_step_cosine 0." in shown and "without our runtime: worst step -0." in shown


def test_dit_trt_diff_where_polygraphy_finds_no_cuda(bundles: dict[str, Bundle], rtx: FakeGPU) -> None:
    shown = invoke("diff", bundles["fp16"].folder, "--num-prompts", 1, "--steps", 2, "--min-cosine", 0.5).stdout
    assert "Polygraphy's TrtRunner does not run here, so our runtime alone was compared: " in shown


def _negated(outputs: dict[str, NDArray]) -> dict[str, NDArray]:
    return {name: -value for name, value in outputs.items()}


# -------------------- without


def test_without_a_gpu_it_builds_and_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "device_count", lambda: 0)
    assert choose_backend("tensorrt", to_build=True) == "tensorrt"
    with pytest.raises(UserError, match=r"^the backend tensorrt cannot run here: no NVIDIA GPU is there, "):
        choose_backend("tensorrt")
    monkeypatch.setattr(tensorrt_api, "is_rtx", lambda: False)
    with pytest.raises(UserError, match=r"^the backend tensorrt cannot build here: no NVIDIA GPU is there, "):
        choose_backend("tensorrt", to_build=True)


@pytest.mark.parametrize(
    ("rtx", "capabilities", "runs"),
    [
        (True, ["9.0"], False),
        (True, ["10.0", "9.0"], False),
        (True, ["9.0", "8.9"], True),
        (True, ["12.1"], True),
        (True, ["13.0"], True),
        (False, ["9.0"], True),
    ],
)
def test_tensorrt_rtx_on_a_gpu_that_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch, rtx: bool, capabilities: list[str], runs: bool
) -> None:
    """As an H200 answered: no plan opens there. Another backend is chosen, and the reason names what runs."""
    monkeypatch.setattr(cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(cuda, "compute_capability", lambda device: capabilities[device])
    monkeypatch.setattr(tensorrt_api, "is_rtx", lambda: rtx)
    for i, each in enumerate(capabilities):
        if rtx and each in ("9.0", "10.0"):
            with pytest.raises(UserError, match=rf"cuda:{i} has {each}: install tensorrt"):
                tensorrt.check_device(f"cuda:{i}")
        else:
            tensorrt.check_device(f"cuda:{i}")
    if runs:
        assert tensorrt.unusable() is None
        return
    assert choose_backend("auto") != "tensorrt"
    reason = rf"runs on compute capability 7.5, .* and 12.0 and later, cuda:0 has {capabilities[0]}: install tensorrt"
    with pytest.raises(UserError, match=reason):
        choose_backend("tensorrt")


def test_without_either_package_the_fix_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_api, "import_module", _no_module)
    tensorrt_api.found.cache_clear()
    try:
        reason = tensorrt.unbuildable()
        assert reason is not None and "pip install tensorrt (or tensorrt-rtx-cu13" in reason
        assert "libnvinfer.so.11" in reason
        assert BACKENDS["tensorrt"].unusable() == reason
    finally:
        tensorrt_api.found.cache_clear()


def _no_module(name: str) -> object:
    raise ImportError(f"{name}: libnvinfer.so.11: cannot open shared object file\nand more")


def test_a_tensorrt_that_does_not_load_leaves_rtx(monkeypatch: pytest.MonkeyPatch) -> None:
    real = tensorrt_api.import_module
    monkeypatch.setattr(
        tensorrt_api, "import_module", lambda name: _no_module(name) if name == "tensorrt" else real(name)
    )
    tensorrt_api.found.cache_clear()
    assert tensorrt_api.is_rtx()
    tensorrt_api.found.cache_clear()
