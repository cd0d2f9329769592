"""The report of a GPU on a stand-in (tests/fake_gpu.py): complete, resumed, a failing row in its place."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from fake_gpu import FakeGPU, install
from graphs import random_inputs, shapes_of

from dit_trt.engines import tensorrt
from dit_trt.engines.onnxruntime import ONNXRuntimeEngine
from dit_trt.tooling import gpu_gemm, gpu_report, gpu_torch
from dit_trt.tooling.gpu_report import Report, command, reference_engine
from dit_trt.tooling.gpu_table import markdown
from dit_trt.tooling.workflow import CalibrationOptions

CALIBRATION = CalibrationOptions(num_prompts=2, steps=6)
NAMES = ["FP32", "FP16", "SQD W8A8"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeGPU]:
    monkeypatch.setenv("DIT_TRT_HOME", str(tmp_path / "home"))
    yield install(monkeypatch)
    gc.collect()


def invoke(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_a_report(gpu: FakeGPU, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [word for name in NAMES for word in ("--row", name)]
    arguments = ("--model", tiny, *rows, "--steps", 4, "--rounds", 3, "--num-prompts", 2, "--calib-steps", 6)

    def fails(*args: object, **options: object) -> None:
        raise RuntimeError("the builder said\nout of memory on this device")

    with monkeypatch.context() as patched:
        patched.setattr(tensorrt, "build_plan", fails)
        shown = invoke(*arguments, "--output", tmp_path / "failed.md")
    assert shown.count("| failed |") == 3 and "FP16 failed: " in shown and "out of memory on this device" in shown

    found = json.loads(invoke(*arguments, "--output", tmp_path / "all.md", "--json").splitlines()[-1])
    [report] = found["reports"]
    assert report["gpu"] == "Stand-in" and report["compute_capability"] == "8.9" and report["driver_cuda"] == "13.1"
    for name, row in report["rows"].items():
        assert row["cosine"] > 0.999 and row["largest_error"] < 0.2, (name, row)  # ONNX Runtime against itself
        assert len(row["step_ms"]) == len(row["launch_ms"]) == 3
        assert row["device_bytes"] > 0 and row["plan_bytes"] > 1000 and row["sampling_seconds"] > 0
    sqd = report["rows"]["SQD W8A8"]
    assert sqd["int8_linears"] == sqd["linears"] > 0 and sqd["fused_attentions"] == sqd["attentions"] > 0
    text = (tmp_path / "all.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(table) == 4 and all(line.count("|") == table[0].count("|") for line in table)
    assert "Stand-in, compute capability 8.9" in text and "TensorRT-RTX" in text

    built = len(gpu.builds)
    again = json.loads(invoke(*arguments, "--output", tmp_path / "again.md", "--json").splitlines()[-1])
    assert again["reports"][0]["rows"] == report["rows"] and len(gpu.builds) == built, "nothing is measured twice"


def test_what_was_measured_is_not_lost(gpu: FakeGPU, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the second row, and again while all are timed."""
    report = Report(str(tiny), 4, CALIBRATION)
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patched:
        patched.setattr(Report, "_measure", _interrupt_at("FP16", Report._measure))
        report.run(NAMES[:2], 2, lambda what: None)
    assert "cosine" in report.kept["FP32"] and "FP16" not in report.kept
    kept = report.kept["FP32"]
    resumed = Report(str(tiny), 4, CALIBRATION)
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patched:
        patched.setattr(gpu_report._Opened, "timed", _interrupt_at(None, gpu_report._Opened.timed))
        resumed.run(NAMES[:2], 2, lambda what: None)
    assert resumed.kept["FP32"] == kept and "cosine" in resumed.kept["FP16"]
    last = Report(str(tiny), 4, CALIBRATION)
    last.run(NAMES[:2], 2, lambda what: None)
    assert {**last.kept["FP32"], "step_ms": 0, "launch_ms": 0} == {**kept, "step_ms": 0, "launch_ms": 0}
    assert all(len(row["step_ms"]) == 2 for row in last.kept.values())


def _interrupt_at(name, real):  # type: ignore[no-untyped-def]
    def measure(self, *arguments):  # type: ignore[no-untyped-def]
        if name is None or arguments[0] == name:
            raise KeyboardInterrupt
        return real(self, *arguments)

    return measure


def test_ratios_are_within_rounds() -> None:
    row = {
        **dict.fromkeys(("linears", "int8_linears", "attentions", "fused_attentions"), 0),
        **dict.fromkeys(("plan_bytes", "device_bytes", "host_peak_bytes"), 10**6),
        **dict.fromkeys(("build_seconds", "open_seconds", "cosine", "largest_error", "sampling_seconds"), 1.0),
        "launch_ms": [1.0, 1.0, 1.0],
    }
    rows = {"FP32": {**row, "step_ms": [10.0, 20.0, 40.0]}, "SQS W8A8": {**row, "step_ms": [2.0, 5.0, 8.0]}}
    facts = {"gpu": "G", "compute_capability": "9.0", "memory_bytes": 8e9, "driver_cuda": "13.0", "tensorrt": "T 1"}
    report = {**facts, "model": "demo", "steps": 100, "rounds": 3, "rows": rows}
    line = next(line for line in markdown([report], "c").splitlines() if line.startswith("| SQS"))
    assert "| **5.00** (2.00-8.00) | 1.00 | 5.00 |  |" in line  # 5, 4 and 5 times


def test_without_a_gpu_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "unusable", lambda: "no NVIDIA GPU is there")
    said = invoke("--output", tmp_path / "r.md", code=1)
    assert said == "Error: TensorRT does not run here: no NVIDIA GPU is there\n"
    assert "give --output a file in a folder that exists" in invoke("--output", tmp_path / "no" / "r.md", code=1)


# -------------------- products by PyTorch


def test_the_products_are_those_of_a_block() -> None:
    from dit_trt.tooling.synthetic_models import MODELS

    dit = MODELS["sao"]["model"]["diffusion"]["config"]
    assert dit["embed_dim"] == gpu_gemm.WIDTH
    assert sum(k * n for k, n in gpu_gemm.PRODUCTS.values()) == 1536 * (3 * 1536 + 3 * 1536 + 2 * 6144 + 6144)


def test_all_three_compute_the_same_product() -> None:
    works = gpu_gemm.products(32, 64, 48, "cpu")
    fp16, bf16, int8 = (works[kind]().float() for kind in ("fp16", "bf16", "int8"))
    scale = fp16.square().mean().sqrt()
    assert int8.dtype == torch.float32 and (bf16 - fp16).abs().max() < 0.05 * scale
    assert 0 < (int8 - fp16).square().mean().sqrt() < 0.05 * scale
    times = gpu_gemm.milliseconds(works, 3, lambda: None)
    assert times.keys() == works.keys() and all(np.isfinite(time) and time > 0 for time in times.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_products_without_a_gpu_are_one_line() -> None:
    for each in (gpu_gemm.command, gpu_torch.command):
        result = CliRunner().invoke(each, [])
        assert result.exit_code == 1 and result.output.startswith("Error: PyTorch sees no NVIDIA GPU here")


def test_a_branch_in_bfloat16_is_what_onnx_runtime_computes_in_float32(
    tiny: Path, tiny_table_file: Path, tmp_path: Path
) -> None:
    """ONNX Runtime refuses the graph as it is; the copy has the branch, and leaves nothing behind."""
    from dit_trt.exporters.checkpoint import Checkpoint
    from dit_trt.tooling.build import build_bundle
    from dit_trt.tooling.recipe import Recipe

    found = {}
    for rank in (0, 8):
        recipe, folder = Recipe("sqt", lora_rank=rank), tmp_path / "bundles" / str(rank)
        bundle = build_bundle(Checkpoint.open(str(tiny)), recipe, "tensorrt", folder, tiny_table_file).bundle
        path, shapes = bundle.path("step.onnx"), shapes_of(bundle, "step")
        if rank:
            with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
                ONNXRuntimeEngine(path, shapes)
        found[rank] = reference_engine(path, shapes).run(random_inputs(bundle, "step"))["velocity"]
    assert sorted(file.name for file in (tmp_path / "bundles").iterdir()) == ["0", "8"]
    apart = np.linalg.norm(found[8] - found[0]) / np.linalg.norm(found[0])
    assert 0.001 < apart < 0.3, "the branch is at work"
