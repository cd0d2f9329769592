"""What a build says on a CPU without VNNI, where OpenVINO's int8 sums saturate. Whatever the CPU here is."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import QUICK_CALIBRATION, error_of, invoke

NOTE = "note: this CPU has no VNNI, so openvino adds int8 products in 16 bits that saturate: "


@pytest.fixture
def build(tiny: Path, tiny_table_file: Path, tmp_path: Path) -> tuple[object, ...]:
    return ("build", "--model", tiny, "--output", tmp_path / "out", *QUICK_CALIBRATION)


def pretend(monkeypatch: pytest.MonkeyPatch, lacks: bool) -> None:
    monkeypatch.setattr("dit_trt.engines.base.lacks_vnni", lambda: lacks)


@pytest.mark.parametrize(
    ("words", "lacks", "notes"),
    [
        (["--backend", "openvino"], True, 1),
        (["--backend", "openvino", "--device", "CPU", "--method", "sqt", "--exclude", "ff.ff.2"], True, 1),
        (["--backend", "openvino", "--bits", "w7a8", "--bits-for", "ff.ff.2=w8a8"], True, 1),
        (["--backend", "openvino", "--bits", "w7a8"], True, 0),
        (["--backend", "openvino", "--bits", "w4a8", "--group-size", "channel"], True, 0),
        (["--backend", "openvino"], False, 0),
        (["--backend", "openvino", "--method", "none"], True, 0),
        (["--backend", "onnxruntime"], True, 0),
    ],
)
def test_the_note_is_said_once_where_int8_saturates(
    build: tuple[object, ...], monkeypatch: pytest.MonkeyPatch, words: list[str], lacks: bool, notes: int
) -> None:
    pretend(monkeypatch, lacks)
    result = invoke(*build, *words)
    said = [line for line in result.stderr.splitlines() if "VNNI" in line]
    assert [line.startswith(NOTE) for line in said] == [True] * notes
    assert "VNNI" not in result.stdout


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
