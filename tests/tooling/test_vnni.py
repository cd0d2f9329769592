"""What a build says on a CPU without VNNI, where OpenVINO's int8 sums saturate. Whatever the CPU here is."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import QUICK_CALIBRATION, error_of, invoke

from dit_trt.engines.bundle import Bundle
from dit_trt.engines.onnxruntime import ONNXRuntimeEngine
from dit_trt.runtime.pipeline import Pipeline
from dit_trt.tooling.timed_steps import open_step_engine

NOTE = "note: this CPU has no VNNI, so openvino adds int8 products in 16 bits that saturate: "


@pytest.fixture
def build(tiny: Path, tiny_table_file: Path, tmp_path: Path) -> tuple[object, ...]:
    return ("build", "--model", tiny, "--output", tmp_path / "out", *QUICK_CALIBRATION)


def pretend(monkeypatch: pytest.MonkeyPatch, lacks: bool) -> None:
    monkeypatch.setattr("dit_trt.engines.base.lacks_vnni", lambda: lacks)
    monkeypatch.setattr("dit_trt.engines.onnxruntime.has_vnni", lambda: not lacks)


@pytest.mark.parametrize(
    ("words", "lacks", "fix"),
    [
        ("openvino", True, ", nor does w7a8"),
        ("openvino --device CPU --method sqt --exclude ff.ff.2", True, ", nor does w7a8"),
        ("openvino --bits w7a8 --bits-for ff.ff.2=w8a8", True, ", nor does w7a8"),
        ("openvino --method sqd --sqd-weights requantize", True, ""),
        ("openvino --bits w4a8", True, ", nor does --group-size channel"),
        (
            "openvino --bits w4a8 --bits-for ff.ff.2=w8a8",
            True,
            ", nor does w7a8 with --group-size channel",
        ),
        ("openvino --bits w7a8", True, None),
        ("openvino --bits w4a8 --group-size channel", True, None),
        ("openvino", False, None),
        ("openvino --method none", True, None),
        ("onnxruntime", True, None),
    ],
)
def test_the_note_is_said_once_where_int8_saturates(
    build: tuple[object, ...], monkeypatch: pytest.MonkeyPatch, words: str, lacks: bool, fix: str | None
) -> None:
    pretend(monkeypatch, lacks)
    result = invoke(*build, "--backend", *words.split())
    said = [line for line in result.stderr.splitlines() if "VNNI" in line]
    assert said == (
        [] if fix is None else [f"{NOTE}--backend onnxruntime does not{fix} (dit-trt diff tells what it costs)"]
    )
    assert "VNNI" not in result.stdout


@pytest.mark.parametrize(
    ("words", "lacks", "note"),
    [
        ("onnxruntime --bits w7a8", True, None),
        (
            "onnxruntime --bits w7a8 --bits-for ff.ff.2=w8a8",
            True,
            "note: 2 of 14 Linears need more than w7a8, so onnxruntime takes its slower kernels",
        ),
        (
            "openvino --bits w7a8",
            False,
            "note: w7a8 gains nothing here, where int8 products are added in 32 bits: w8a8 is more exact",
        ),
    ],
)
def test_what_is_said_of_w7a8_that_does_not_pay(
    build: tuple[object, ...], monkeypatch: pytest.MonkeyPatch, words: str, lacks: bool, note: str | None
) -> None:
    pretend(monkeypatch, lacks)
    result = invoke(*build, "--backend", *words.split())
    assert [line for line in result.stderr.splitlines() if line.startswith("note")] == ([note] if note else [])


@pytest.mark.parametrize(("bits", "fits"), [("w8a8", False), ("w7a8", True)])
def test_a_bundle_tells_its_engine_that_16_bits_suffice(
    build: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: str, fits: bool
) -> None:
    pretend(monkeypatch, True)
    invoke(*build, "--backend", "onnxruntime", "--bits", bits)
    pipeline = Pipeline(Bundle(tmp_path / "out"))
    assert pipeline.bundle.manifest["int16_sums"] is fits
    conditioning = pipeline.condition("dog barking", pipeline.settings(), 0.7)
    [timed] = open_step_engine(pipeline, conditioning, threads=1).engines
    for engine in (pipeline.engine("step"), pipeline.engine("conditioning", 8), timed):
        assert isinstance(engine, ONNXRuntimeEngine) and engine.exact is not fits


MEMORY = ("--backend", "openvino", "--method", "sqt", "--bits", "w4a8", "--w4", "memory")
PLAIN_FIX = "exclude them with --exclude, choose another backend, or accept them with --allow-float-gemm"
VNNI_FIX = (
    "this CPU has no VNNI, which --w4 memory needs there: take --w4 expanded, another backend, "
    "or accept them with --allow-float-gemm"
)
MEMORY_FIX = (
    "activations are not quantized beside weights that stay in 4 bits there: take --w4 expanded, another backend, "
    "or accept them with --allow-float-gemm"
)


@pytest.mark.parametrize(
    ("words", "lacks", "fix"),
    [
        (MEMORY, True, VNNI_FIX),
        (MEMORY, False, MEMORY_FIX),
        ((*MEMORY, "--bits-for", "ff.ff.2=w8a8"), True, PLAIN_FIX),  # an 8-bit Linear is lost too: not VNNI's doing
        (("--backend", "openvino"), True, PLAIN_FIX),
    ],
)
def test_lost_linears_are_refused_with_the_fix(
    build: tuple[object, ...], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], lacks: bool, fix: str
) -> None:
    pretend(monkeypatch, lacks)
    monkeypatch.setattr("dit_trt.engines.openvino.OpenVINOEngine.int8_matmuls", lambda self: set())
    message = error_of(*build, *words)
    assert message.startswith("Error: 14 of 14 Linears do not run in int8 with openvino: ")
    assert message.endswith(f"; {fix}")


def test_float_products_do_not_saturate(build: tuple[object, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """All Linears lost and accepted: there is no int8 sum to speak of."""
    pretend(monkeypatch, True)
    monkeypatch.setattr("dit_trt.engines.openvino.OpenVINOEngine.int8_matmuls", lambda self: set())
    result = invoke(*build, *MEMORY, "--allow-float-gemm")
    assert "14 Linears asked for, 0 in int8" in result.stdout
    assert "VNNI" not in result.stderr
