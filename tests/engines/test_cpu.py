"""What the CPU says of VNNI, and what OpenVINO's int8 products are with it and without it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hardware import CPU_BACKENDS, product, saturates, saturating
from int4_graphs import DELTA, NAME, write_linear
from numpy.typing import NDArray

from dit_trt.engines import base, cpu
from dit_trt.engines.base import BACKENDS, open_engine, precision_of
from dit_trt.exporters.quantized import LARGEST, Weight

X86 = "processor\t: 0\nmodel name\t: avx_vnni 9000\nflags\t\t: fpu avx2 {}\n\nprocessor\t: 1\nflags\t\t: fpu {}\n"


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file in the place of /proc/cpuinfo, not there yet."""
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    cpu._vnni.cache_clear()
    yield tmp_path / "cpuinfo"
    cpu._vnni.cache_clear()


@pytest.mark.parametrize(
    ("text", "has", "lacks"),
    [
        (X86.format("avx512f avx512_vnni", ""), True, False),
        (X86.format("avx_vnni", ""), True, False),
        (X86.format("avx512f", "avx_vnni"), False, True),  # the first processor is asked
        (X86.format("avx_vnni_int8", ""), False, True),
        ("processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n", False, False),  # Arm
        ("", False, False),
        (None, False, False),
    ],
)
def test_what_cpuinfo_tells(cpuinfo: Path, text: str | None, has: bool, lacks: bool) -> None:
    if text is not None:
        cpuinfo.write_text(text)
    assert (cpu.has_vnni(), cpu.lacks_vnni()) == (has, lacks)


def test_the_cpu_is_asked_once(cpuinfo: Path) -> None:
    cpuinfo.write_text(X86.format("avx_vnni", ""))
    assert cpu.has_vnni()
    cpuinfo.write_text(X86.format("", ""))
    assert cpu.has_vnni()
    assert not cpu.lacks_vnni()


@pytest.mark.parametrize(
    ("backend", "device", "lacks", "expected"),
    [
        ("openvino", None, True, True),
        ("openvino", "CPU", True, True),
        ("openvino", "cpu", True, True),
        ("openvino", "GPU.0", True, False),
        ("openvino", None, False, False),
        ("onnxruntime", None, True, False),
    ],
)
def test_which_backend_saturates(
    monkeypatch: pytest.MonkeyPatch, backend: str, device: str | None, lacks: bool, expected: bool
) -> None:
    monkeypatch.setattr(base, "lacks_vnni", lambda: lacks)
    assert BACKENDS[backend].saturates(device) is expected


def test_tests_and_product_agree_on_this_cpu() -> None:
    assert {name: kind.saturates() for name, kind in BACKENDS.items()} == {name: saturates(name) for name in BACKENDS}


def engines_product(
    folder: Path, backend: str, x: NDArray, w: NDArray, precision: str | None = None
) -> NDArray[np.float64]:
    """x w^T by the engine's int8 kernel, its integers as they come out."""
    weight = Weight(w.astype(np.int8), np.ones(len(w), np.float32), 8)
    path = write_linear(folder, weight, "expanded", len(x), BACKENDS[backend].dialect.activation)
    engine = open_engine(backend, path, {"x": x.shape}, threads=1, precision=precision)
    assert NAME in engine.int8_matmuls()
    return engine.run({"x": (x * DELTA).astype(np.float32)})["y"].T.astype(np.float64) / DELTA


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("sign", [1, -1])
def test_large_products_of_one_sign_are_smaller_exactly_where_it_saturates(
    tmp_path: Path, backend: str, sign: int
) -> None:
    x, w = np.full((8, 64), 127), np.full((64, 64), sign * 127)
    found, exact = engines_product(tmp_path, backend, x, w), sign * 64 * 127 * 127
    if BACKENDS[backend].saturates():
        assert (np.abs(found) < 0.02 * abs(exact)).all()
    else:
        np.testing.assert_allclose(found, exact, rtol=1e-6)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("largest", [64, 127])
def test_products_of_random_integers_are_those_of_the_formula(tmp_path: Path, backend: str, largest: int) -> None:
    """Weights of no more than 64 never saturate: 2 x 255 x 64 < 2^15."""
    random = np.random.default_rng(0)
    x, w = random.integers(-128, 128, (8, 96)), random.integers(-largest, largest + 1, (64, 96))
    exact = x @ w.T
    found = engines_product(tmp_path, backend, x, w)
    np.testing.assert_allclose(found, product(backend, x, w), rtol=1e-6, atol=0.5)
    assert np.array_equal(saturating(x, w), exact) == (largest == 64)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_integers_of_7_bits_are_added_exactly_on_every_cpu(tmp_path: Path, backend: str, sign: int) -> None:
    """By the kernels that a bundle of w7a8 gets."""
    precision = precision_of(backend, {"int16_sums": True}, "step")
    assert precision == ("int16" if backend == "onnxruntime" else None)
    x, w = np.full((8, 64), 127), np.full((64, 64), sign * LARGEST[7])
    found = engines_product(tmp_path, backend, x, w, precision)
    np.testing.assert_allclose(found, sign * 64 * 127 * LARGEST[7], rtol=1e-6)
    assert 2 * 255 * LARGEST[7] < 2**15
    assert np.array_equal(saturating(x, w), x @ w.T)


@pytest.mark.parametrize(
    ("backend", "facts", "graph", "expected"),
    [
        ("openvino", {"trunk": "bf16", "int16_sums": True}, "step", "bf16"),
        ("openvino", {"trunk": "bf16", "int16_sums": True}, "step-1", "bf16"),
        ("openvino", {"trunk": "bf16", "int16_sums": True}, "conditioning", None),
        ("openvino", {"trunk": "fp32"}, "step", None),
        ("onnxruntime", {"trunk": "fp32", "int16_sums": True}, "step", "int16"),
        ("onnxruntime", {"trunk": "fp32", "int16_sums": True}, "conditioning", "int16"),
        ("onnxruntime", {"trunk": "fp32", "int16_sums": False}, "step", None),
        ("onnxruntime", {}, "step", None),  # a bundle of before
        ("tensorrt", {"trunk": "fp16", "int16_sums": True}, "step", None),
    ],
)
def test_what_an_engine_is_told_of_its_arithmetic(
    backend: str, facts: dict[str, object], graph: str, expected: str | None
) -> None:
    assert precision_of(backend, facts, graph) == expected
