"""Two blocks of Stable Audio Open at their own width and length: all int8 and fused, in FP16 and BF16 trunks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from random_blocks import Form, prove_blocks
from trt_graphs import builds

from dit_trt.engines.base import BACKENDS, Backend
from dit_trt.exporters import float_graphs
from dit_trt.tooling import build, synthetic_checkpoint

pytestmark = builds

CONFIG = synthetic_checkpoint._stable_audio_open(depth=2)
FORMS = {
    "sqs": Form(),
    "sqd": Form("step"),
    "sqd-grouped-2": Form("step", graphs=2),
    "sqd-requantize": Form("requantize"),
    "sqt": Form("token"),
    "rank-32": Form(rank=32),
    "w4a8-group-64": Form(bits=4, group=64),
    "w4a8-group-128": Form(bits=4, group=128),
    "w4a8-channel": Form(bits=4),
}


@pytest.fixture(scope="module")
def topologies() -> dict[str, onnx.ModelProto]:
    return {name: float_graphs._EXPORTS[name](CONFIG) for name in ("conditioning", "step")}


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """For 0.1 GB, and gone at the end; no plan of it is kept, either."""
    monkeypatch.setattr(build, "graph_digest", lambda path: None)
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.mark.parametrize("trunk", ["fp16", "bf16"])
@pytest.mark.parametrize("name", FORMS)
def test_all_linears_are_int8_and_all_attentions_fused(
    folder: Path, topologies: dict[str, onnx.ModelProto], name: str, trunk: str
) -> None:
    linears, proven = prove_blocks(folder, CONFIG, topologies, FORMS[name], trunk)
    assert len(linears) == 14
    assert proven == build.Proven([], attentions=4)


def test_the_plan_of_a_negative_prompt_is_no_worse(folder: Path, topologies: dict[str, onnx.ModelProto]) -> None:
    _, proven = prove_blocks(folder, CONFIG, topologies, FORMS["sqt"], "fp16", context=2)
    assert proven == build.Proven([], attentions=4)


def test_a_plan_for_a_range_of_lengths_is_no_worse(folder: Path, topologies: dict[str, onnx.ModelProto]) -> None:
    _, proven = prove_blocks(folder, CONFIG, topologies, FORMS["sqt"], "fp16", {"profile": [64, 216, 1024]})
    assert proven == build.Proven([], attentions=4)


@pytest.mark.parametrize(
    ("trunk", "branch"), [("fp16", "float16"), ("fp16", "float32"), ("bf16", "bfloat16"), ("bf16", "float32")]
)
def test_a_branch_in_the_wrong_type_costs_the_fused_attention(
    folder: Path,
    topologies: dict[str, onnx.ModelProto],
    monkeypatch: pytest.MonkeyPatch,
    trunk: str,
    branch: str,
) -> None:
    """Why a trunk's dialect has the other half type for the low-rank branch."""
    dialects = dict(BACKENDS["tensorrt"].dialects)
    assert dialects[trunk].branch == {"fp16": "bfloat16", "bf16": "float16"}[trunk]
    monkeypatch.setitem(BACKENDS, "tensorrt", _with_branch(trunk, branch))
    _, proven = prove_blocks(folder, CONFIG, topologies, FORMS["rank-32"], trunk)
    assert proven.lost == []
    assert sorted(proven.unfused) == sorted(
        f"transformer.layers.{i}.{kind}_attn" for i in (0, 1) for kind in ("self", "cross")
    )


def _with_branch(trunk: str, branch: str) -> Backend:
    kind = BACKENDS["tensorrt"]
    dialects = {**kind.dialects, trunk: replace(kind.dialects[trunk], branch=branch)}  # type: ignore[arg-type]
    return replace(kind, dialects=dialects)
